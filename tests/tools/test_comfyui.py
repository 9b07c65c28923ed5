"""The ComfyUI nodes give our own forward, on a model that has ComfyUI's names and a patcher that has its methods."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.comfyui import INNER, WIDTH, Base, ComfyWan, Patcher, comfy, our_nodes, ours, stored, trained
from transpixeler.adapters.command import export_command


@pytest.fixture(scope="module")
def node() -> types.SimpleNamespace:
    return our_nodes()


CASES = {
    "two streams": {"streams": 2},
    "three streams": {"streams": 3},
    "one of three": {"streams": 3, "scope": ("seg",)},
    "all tokens": {"streams": 2, "scope": "all", "targets": ("self_attn.*", "cross_attn.*", "ffn.*")},
    "rgb by itself": {"streams": 2, "attends": False},
    "rgb by itself, adapted": {"streams": 2, "attends": False, "scope": "all"},
    "plain": {"streams": 1, "scope": "all"},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("format", ["comfyui", "transpixeler"])
def test_the_node_gives_our_forward(tmp_path: Path, node, case: str, format: str) -> None:
    model = trained(**CASES[case])
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors", format))
    assert adapter.streams.names == model.streams
    base = comfy(model)
    wanted, given = ours(model)
    assert (node.patched(base, adapter, 1.0).run(*given) - wanted).abs().max() < 2e-5
    assert (base.run(*given) - wanted).abs().max() > 1e-2  # unpatched it is another model, and stays it


GIVEN = {
    "matting": {"whole": (0,)},
    "painting": {"whole": (1,)},
    "a first frame": {"first": (0,)},
    "a first frame and its alpha": {"first": (0, 1)},
    "matting at half size": {"whole": (0,), "scales": (1, 2)},
    "half size": {"scales": (1, 2)},
    "half size and a first frame": {"scales": (1, 2), "first": (0, 1)},
}


@pytest.mark.parametrize("case", GIVEN)
@pytest.mark.parametrize("attends", [True, False])
def test_smaller_and_given_streams_are_ours(tmp_path: Path, node, case: str, attends: bool) -> None:
    asked = GIVEN[case]
    model = trained(2, attends=attends)
    said = {"scales": ",".join(map(str, asked["scales"]))} if "scales" in asked else {}
    patched = node.patched(comfy(model), node.read_adapter(stored(model, tmp_path / "a.safetensors", **said)), 1.0)
    wanted, given = ours(model, **asked)
    assert (patched.run(*given) - wanted).abs().max() < 2e-5
    if "whole" in asked or "first" in asked:
        del patched.patches["process_timestep"]  # the twin that gives all frames the same time
        assert (patched.run(*given) - wanted).abs().max() > 1e-3


def test_positions_of_thirds_are_those_of_their_middles(node) -> None:
    """A scale of three, whose token stands on one of RGB's."""
    rope = node.SharedPositions(ComfyWan().rope_encode, node.Joint(node.Streams(("rgb", "seg"), (1, 3)), True))
    turned = rope(4, 12, 12)[0, :, 0]
    small = turned[2 * 36 :].unflatten(0, (2, 2, 2))
    assert torch.allclose(small, turned[: 2 * 36].unflatten(0, (2, 6, 6))[:, 1::3, 1::3], atol=1e-6)


def test_what_is_given_stays_free_of_noise(node) -> None:
    streams = node.Streams(("rgb", "seg"), (1, 1))
    joint, mask = node.Joint(streams, True), torch.ones(1, 4, 4, 2, 2)
    mask[:, :, :2] = 0
    mask[:, :, 2, 0] = 0  # a part of a frame is ComfyUI's own inpainting
    joint.held = node.held_frames(mask, streams)
    clean, noise = torch.zeros(1, 4, 4, 2, 2), torch.ones(1, 4, 4, 2, 2)
    base = Base(nn.Identity()).scale_latent_inpaint
    found = node.HeldClean(base, joint)(latent_image=clean, noise=noise, sigma=0.5)
    assert found[0, 0, :, 0, 0].tolist() == [0, 0, 0.5, 0.5]


@pytest.mark.parametrize("lost", ["rope_encode", "blocks.1.ffn.0.forward"])
def test_a_node_that_left_something_out_is_found(tmp_path: Path, node, lost: str) -> None:
    model = trained(2)
    patched = node.patched(comfy(model), node.read_adapter(stored(model, tmp_path / "a.safetensors")), 1.0)
    del patched.patches[f"diffusion_model.{lost}"]
    wanted, given = ours(model)
    assert (patched.run(*given) - wanted).abs().max() > 1e-3


def test_strengths_of_streams_are_those_of_their_tokens(tmp_path: Path, node) -> None:
    """Half a strength on one companion is half its weights there: what two scopes, trained apart, would hold."""
    model = trained(3, scope="all")
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors"))
    wanted, given = ours(model)
    strengths = node.stream_strengths("seg = 0.5", adapter.streams)
    assert strengths == (1.0, 0.5, 1.0)
    found = node.patched(comfy(model), adapter, 1.0, strengths).run(*given)
    halved = {n: replace(t, up=t.up / 2, span=(1, 2)) for n, t in adapter.targets.items()}
    others = [{n: replace(t, span=span) for n, t in adapter.targets.items()} for span in ((0, 1), (2, 3))]
    apart = comfy(model)
    for targets in (halved, *others):
        apart = node.patched(apart, replace(adapter, targets=targets), 1.0)
    assert (found - apart.run(*given)).abs().max() < 2e-5 and (found - wanted).abs().max() > 1e-3
    assert (node.patched(comfy(model), adapter, 1.0, (1.0, 1.0, 1.0)).run(*given) - wanted).abs().max() < 2e-5


@pytest.mark.parametrize(
    "text, told", [("depth=1", "no stream 'depth'"), ("seg", "is not NAME=NUMBER, such as seg=0.5")]
)
def test_strengths_that_cannot_be_read_are_named(node, text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        node.stream_strengths(text, node.Streams(("rgb", "seg"), (1, 1)))


@pytest.mark.parametrize("attends", [True, False])
def test_two_halves_of_an_adapter_are_the_adapter(tmp_path: Path, node, attends: bool) -> None:
    model = trained(2, attends=attends)
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors"))
    wanted, given = ours(model)
    half = node.patched(comfy(model), adapter, 0.5)
    rest = node.AdapterFile(adapter.streams, attends, {}, adapter.targets)
    assert (half.run(*given) - wanted).abs().max() > 1e-3
    assert (node.patched(half, rest, 0.5).run(*given) - wanted).abs().max() < 2e-5
    both = node.patched(half, adapter, 0.5)  # two marks of a stream are one, their mean
    assert (both.run(*given) - wanted).abs().max() < 2e-5
    with pytest.raises(ValueError, match="need the same streams"):
        node.patched(half, node.AdapterFile(node.Streams(("rgb", "depth"), (1, 1)), attends), 1.0)


def test_what_does_not_fit_is_said(tmp_path: Path, node) -> None:
    model = trained(2)
    adapter = node.read_adapter(stored(model, tmp_path / "a.safetensors"))
    patched = node.patched(comfy(model), adapter, 1.0)
    _, (x, *rest, _) = ours(model)
    with pytest.raises(ValueError, match="5 latent frames are not 2 streams"):
        patched.run(x[:, :, :5], *rest)
    other = comfy(model)
    other.model.diffusion_model.blocks[0].ffn[0] = nn.Linear(WIDTH, 2 * INNER)
    with pytest.raises(ValueError, match=r"another size of Wan: blocks\.0\.ffn\.0"):
        node.patched(other, adapter, 1.0)
    other.model.diffusion_model.ref_conv = nn.Identity()
    with pytest.raises(ValueError, match="it has ref_conv"):
        node.patched(other, adapter, 1.0)
    with pytest.raises(ValueError, match="it has no patch_embedding"):
        node.patched(Patcher(nn.Linear(2, 2)), adapter, 1.0)
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ValueError, match="not an adapter of transpixeler"):
        node.read_adapter(tmp_path / "foreign.safetensors")


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_an_adapter_under_other_names_is_refused(tmp_path: Path, node, format: str) -> None:
    file = stored(trained(2), tmp_path / "a.safetensors", format)
    with pytest.raises(ValueError, match="is no name of ours; `transpixeler export --format comfyui`"):
        node.read_adapter(file)


def test_damaged_scales_and_norms_are_refused(tmp_path: Path, node) -> None:
    with pytest.raises(ValueError, match="damaged: the scales"):
        node.read_adapter(stored(trained(2), tmp_path / "a.safetensors", scales="2,1"))
    from safetensors.torch import save_file

    save_file(
        {"diffusion_model.blocks.0.ffn.0.dora_scale": torch.ones(1)},
        file := tmp_path / "b.safetensors",
        {"transpixeler.scope": "aux"},
    )
    with pytest.raises(ValueError, match="is a DoRA"):
        node.read_adapter(file)


def test_matrices_of_each_companion_are_refused_and_those_of_one_are_read(tmp_path: Path, node) -> None:
    file = stored(trained(3, per_stream=True), tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"seg,depth have matrices of their own.*`transpixeler export --only depth`"):
        node.read_adapter(file)
    (alone,) = export_command(file, format="comfyui", out=tmp_path / "depth.safetensors", companion="depth")
    assert {target.span for target in node.read_adapter(alone).targets.values()} == {(1, 2)}
