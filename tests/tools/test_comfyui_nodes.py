"""The ComfyUI nodes make latents, pictures and models as they say, and refuse what cannot be."""

from __future__ import annotations

import ast
import math
import sys
import types
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.support.comfyui import FOLDER, comfy, our_nodes, ours, stored, trained
from transpixeler.data.media.scale import enlarge, shrink


@pytest.fixture(scope="module")
def node() -> types.SimpleNamespace:
    return our_nodes()


class Vae:
    """Sixteen channels of a picture's mean in squares of eight, and back; frames by fours, but for the first."""

    latent_channels = 16

    def spacial_compression_encode(self) -> int:
        return 8

    def encode(self, pictures: Tensor) -> Tensor:
        small = F.avg_pool2d(pictures.movedim(-1, 1), 8).mean(1)[::4]
        return small[None, None].expand(1, 16, -1, -1, -1)

    def decode(self, latent: Tensor) -> Tensor:
        large = latent.mean(1, keepdim=True).repeat_interleave(8, -1).repeat_interleave(8, -2)
        return large.movedim(1, -1).expand(-1, -1, -1, -1, 3)


def test_a_latent_holds_the_streams_and_comes_apart(node) -> None:
    (latent,) = node.JointLatent().make(64, 48, 9, 2, 3)
    assert latent["samples"].shape == (3, 16, 2 * 3, 6, 8) and "noise_mask" not in latent
    samples = {"samples": torch.arange(12.0).view(1, 1, 12, 1, 1), "batch_index": [0]}
    rgb, depth = node.JointSplit().split(samples, 3, 2)
    assert rgb["samples"].flatten().tolist() == [0, 1, 2, 3] and depth["samples"].flatten().tolist() == [8, 9, 10, 11]
    with pytest.raises(ValueError, match="does not hold 2 streams"):
        node.JointSplit().split({"samples": torch.zeros(1, 16, 5, 2, 2)}, 2, 1)


def test_a_given_video_is_held_and_its_companion_is_not(node) -> None:
    half = node.Streams(("rgb", "seg"), (1, 2))
    video = torch.rand(11, 96, 128, 3)
    (latent,) = node.JointLatent().make(64, 64, 9, 2, 2, adapter_streams=half, vae=Vae(), rgb=video)
    rgb, seg = half.parts(latent["samples"])
    masks = half.parts(latent["noise_mask"])
    assert rgb.shape == (2, 16, 3, 8, 8) and seg.shape == (2, 16, 3, 4, 4)
    assert rgb.min() > 0 and not seg.any() and not masks[0].any() and (masks[1] == 1).all()
    wanted = node.fitted(video, frames=9, height=64, width=64, name="rgb")
    assert torch.allclose(rgb[0, 0, 0], F.avg_pool2d(wanted[:1].mean(-1), 8)[0], atol=1e-6)
    frame = {"image": video[:1], "image_alpha": video[:1]}
    (latent,) = node.JointLatent().make(64, 64, 9, 2, 1, adapter_streams=half, vae=Vae(), **frame)
    assert [mask[0, 0, :, 0, 0].tolist() for mask in half.parts(latent["noise_mask"])] == [[0, 1, 1], [0, 1, 1]]
    assert half.parts(latent["samples"])[1].shape[-1] == 4 and half.parts(latent["samples"])[1][:, :, 0].all()


@pytest.mark.parametrize(
    "given, told",
    [
        ({"rgb": 5}, "rgb: has 5 frames, not 9; make length 5"),
        ({"rgb": 9, "image": 1}, "rgb, image: the video gives the first frame too"),
        ({"rgb": 9, "alpha": 9}, "every stream is given"),
    ],
)
def test_what_cannot_be_given_is_said(node, given: dict[str, int], told: str) -> None:
    pictures = {name: torch.rand(count, 64, 64, 3) for name, count in given.items()}
    with pytest.raises(ValueError, match=told):
        node.JointLatent().make(64, 64, 9, 2, 1, vae=Vae(), **pictures)
    with pytest.raises(ValueError, match="needs the vae"):
        node.JointLatent().make(64, 64, 9, 2, 1, **pictures)


def test_sides_that_a_scale_does_not_divide_are_refused(node) -> None:
    with pytest.raises(ValueError, match=r"the video: 48 by 64 does not fit 2 streams .* multiples of 32"):
        node.JointLatent().make(48, 64, 9, 2, 1, adapter_streams=node.Streams(("rgb", "seg"), (1, 2)))


def test_decoding_gives_pictures_a_mask_and_rgba(node) -> None:
    latent = torch.cat([torch.full((1, 16, 2, 4, 4), 0.25), torch.full((1, 16, 2, 4, 4), 0.75)], dim=2)
    rgb, mask, companion, straight = node.JointDecode().decode({"samples": latent}, Vae(), 2, False)
    assert rgb.shape == companion.shape == (2, 32, 32, 3) and mask.shape == (2, 32, 32)
    assert math.isclose(rgb.mean(), 0.25) and math.isclose(mask.mean(), 0.75)
    assert straight[0, 0, 0].tolist() == [0.25, 0.25, 0.25, 0.75]
    _, turned, _, premultiplied = node.JointDecode().decode({"samples": latent}, Vae(), 2, True, "premultiplied")
    assert math.isclose(turned.mean(), 0.25)
    assert premultiplied[0, 0, 0].tolist() == [0.1875, 0.1875, 0.1875, 0.75]


def test_a_small_companion_is_enlarged_and_shrunk_as_ours(node) -> None:
    rgb = torch.rand(2, 16, 24, 3).mul(255).round()
    small = torch.rand(2, 8, 12, 3).mul(255).round()
    wanted = enlarge(*(x.to(torch.uint8).numpy() for x in (small, rgb)))
    found = node.enlarged(small / 255, rgb / 255) * 255
    assert (found - torch.from_numpy(wanted)).abs().max() < 0.501
    halved = node.shrunk(rgb / 255, 2) * 255
    assert (halved - torch.from_numpy(shrink(rgb.to(torch.uint8).numpy(), 2))).abs().max() < 0.501


def test_an_image_is_shown_to_the_streams_that_have_one(node) -> None:
    streams, latent = node.Streams(("rgb", "seg"), (1, 1)), torch.zeros(1, 16, 6, 4, 4)
    values = node.JointImage()._values(streams, Vae(), latent.shape, [torch.ones(1, 32, 32, 3), None])
    assert [part[0, 0, :, 0, 0].tolist() for part in streams.parts(values["concat_mask"])] == [[0, 1, 1], [1, 1, 1]]
    shown = [part[0, 0, :, 0, 0].tolist() for part in streams.parts(values["concat_latent_image"])]
    assert shown == [[1, 0.5, 0.5], [0.5, 0.5, 0.5]]


def test_the_folder_stands_alone_and_its_nodes_are_whole(node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [ast.parse(file.read_text()) for file in FOLDER.glob("*.py")]
    parts = [part for tree in trees for part in ast.walk(tree)]
    imported = {alias.name.split(".")[0] for part in parts if isinstance(part, ast.Import) for alias in part.names}
    imported |= {part.module.split(".")[0] for part in parts if isinstance(part, ast.ImportFrom) and not part.level}
    assert imported <= {"__future__", "json", "math", "collections", "dataclasses", "pathlib", "typing", "torch",
                        "safetensors", "folder_paths", "comfy", "node_helpers"}  # fmt: skip
    model = trained(2)
    file = stored(model, tmp_path / "a.safetensors")
    folders, samplers = types.ModuleType("folder_paths"), types.ModuleType("comfy.samplers")
    folders.get_filename_list = lambda kind: ["a.safetensors"] if kind == "loras" else []
    folders.get_full_path_or_raise = lambda kind, name: str(file)
    samplers.KSampler = types.SimpleNamespace(SCHEDULERS=["simple"])
    samplers.calculate_sigmas = lambda sampling, scheduler, steps: torch.linspace(1, 0, steps + 1)
    names = {"folder_paths": folders, "comfy": types.ModuleType("comfy"), "comfy.samplers": samplers}
    names["comfy"].samplers = samplers
    for name, module in names.items():
        monkeypatch.setitem(sys.modules, name, module)
    assert set(node.NODE_CLASS_MAPPINGS) == set(node.NODE_DISPLAY_NAME_MAPPINGS)
    for cls in node.NODE_CLASS_MAPPINGS.values():
        inputs = cls.INPUT_TYPES()
        taken = [*inputs["required"], *inputs.get("optional", {})]
        function = getattr(cls, cls.FUNCTION)
        assert taken == list(function.__code__.co_varnames[1 : function.__code__.co_argcount])
        assert isinstance(cls.RETURN_TYPES, tuple) and cls.CATEGORY
    wanted, given = ours(model)
    patched, streams = node.JointAdapter().load(comfy(model), "a.safetensors", 1.0)
    assert (patched.run(*given) - wanted).abs().max() < 2e-5 and streams.names == model.streams
    sampling = types.SimpleNamespace(get_model_object=lambda name: None)
    assert node.ExpertStep().find(sampling, "simple", 8, 0.875) == (2,)  # of 1, 0.875, 0.75, …


def test_each_expert_takes_its_own_adapter(node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained(2)
    folders = types.ModuleType("folder_paths")
    folders.get_full_path_or_raise = lambda kind, name: str(tmp_path / name)
    monkeypatch.setitem(sys.modules, "folder_paths", folders)
    names = [stored(model, tmp_path / f"{name}.safetensors", expert=name).name for name in ("high", "low")]
    models = comfy(model), comfy(model)
    high, low, _ = node.JointExperts().load(*models, *names, 1.0, 0.5)
    wanted, given = ours(model)
    assert (high.run(*given) - wanted).abs().max() < 2e-5 < (low.run(*given) - wanted).abs().max()
    with pytest.raises(ValueError, match=r"adapter_high: low\.safetensors was trained for the expert low"):
        node.JointExperts().load(*models, *reversed(names), 1.0, 1.0)
