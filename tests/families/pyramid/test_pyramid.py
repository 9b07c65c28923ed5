"""The model on one stage and behind earlier frames is the paper's, written out slowly; so are its files and its VAE."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.families.pyramid.folder import TINY, VAE, make, stored, write_folder
from tests.families.pyramid.reference import Formulas
from tests.support.families.cases import alike, zero
from tests.support.models import move
from transpixeler.config.sections import LoraConfig, ModelConfig, ObjectiveConfig, UserError
from transpixeler.families.pyramid.config import PyramidConfig
from transpixeler.families.pyramid.encoders import FIRST, REST
from transpixeler.families.pyramid.lessons import PyramidLadder, past_of
from transpixeler.families.pyramid.model import PyramidModel
from transpixeler.families.pyramid.names import NAMES
from transpixeler.families.pyramid.vae import CausalVae, VaeConfig
from transpixeler.models.family import open_model
from transpixeler.models.lora import inject
from transpixeler.models.streams import Segment, StreamLayout
from transpixeler.models.tokens import Tokens
from transpixeler.models.weights import WeightSource, load_weights

LENGTHS = torch.tensor([9, 5])
LAYOUTS = {
    "one stage": StreamLayout(("rgb",), ((4, 3, 4, 4),), (1, 2, 2)),
    "first frame": StreamLayout(("rgb",), ((4, 1, 8, 8),), (1, 2, 2)),
    "behind one": StreamLayout(("rgb",), ((4, 1, 8, 8),), (1, 2, 2), past=past_of(2, 1)),
    "behind five": StreamLayout(("rgb",), ((4, 1, 8, 8),), (1, 2, 2), past=past_of(2, 5)),
    "behind three, smaller": StreamLayout(("rgb",), ((4, 1, 4, 4),), (1, 2, 2), past=past_of(1, 3)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_folder(tmp_path_factory.mktemp("pyramid") / "model")


def inputs(layout: StreamLayout) -> tuple[Tensor, ...]:
    draws = torch.Generator().manual_seed(4)
    x, text = torch.randn(2, layout.elements, generator=draws), torch.randn(2, 128, 24, generator=draws)
    times = torch.rand(2, 1, generator=draws).expand(2, len(layout.groups))
    return x, times, text, LENGTHS, torch.randn(2, 20, generator=draws)


def slowly(model: PyramidModel, layout: StreamLayout, *, causal: bool = True) -> Tensor:
    """Return what is predicted of the last part, [B, C, F, H, W]."""
    x, times, text, lengths, pooled = inputs(layout)
    formulas = Formulas(dict(model.named_parameters()), TINY | {"use_temporal_causal": causal})
    parts = [list(row) for row in zip(*layout.unpack(x), strict=True)]
    rows = zip(parts, times[:, 0], text, lengths, pooled, strict=True)
    return torch.stack([formulas.sequence(p, t, words[:n], vector)[-1] for p, t, words, n, vector in rows])


def ours(model: PyramidModel, layout: StreamLayout) -> Tensor:
    return layout.unpack(model(*inputs(layout), layout=layout))[-1]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@torch.no_grad()
def test_the_forward_pass_is_the_papers(layout: StreamLayout) -> None:
    model = make()
    torch.testing.assert_close(ours(model, layout), slowly(model, layout), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_broken_twins_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    model, behind, whole = make(), LAYOUTS["behind five"], LAYOUTS["one stage"]
    expected, several = slowly(model, behind), slowly(model, whole)
    assert (ours(make(use_temporal_causal=False), whole) - several).abs().max() > 1e-3
    assert (ours(make(use_temporal_causal=False), whole) - slowly(model, whole, causal=False)).abs().max() < 1e-5
    with monkeypatch.context() as patched:
        patched.setattr(Tokens, "text_weight", 2.0)
        assert (ours(model, behind) - expected).abs().max() > 1e-3
    places = Segment.positions
    monkeypatch.setattr(Segment, "positions", lambda self: places(self._replace(scale=1)))
    assert (ours(make(), behind) - expected).abs().max() > 1e-3


@torch.no_grad()
def test_an_earlier_frame_sees_no_later_one() -> None:
    """A companion's first frame sees RGB's first one, and nothing that comes after it."""
    model = make(streams=("rgb", "seg"))
    layout = model.layout((4, 3, 4, 4))
    x, times, *fields = inputs(StreamLayout(("rgb",), ((4, 6, 4, 4),), (1, 2, 2)))
    times = times.expand(2, 2)
    before = layout.unpack(model(x, times, *fields, layout=layout))
    for frame in (0, 2):
        moved = x.clone()
        layout.unpack(moved)[0][:, :, frame] += 1
        after = layout.unpack(model(moved, times, *fields, layout=layout))
        for one, other in zip(before, after, strict=True):
            changed = [float((one - other)[:, :, f].abs().max()) > 1e-4 for f in range(3)]
            assert changed == [f >= frame for f in range(3)]


# -- files


def test_weights_are_read_as_published_and_together(tmp_path: Path) -> None:
    model = make(seed=3)
    for spelling in ("diffusers", "original"):
        save_file(stored(model, spelling), tmp_path / f"{spelling}.safetensors")
        other = PyramidModel(PyramidConfig.read(TINY), streams=("rgb",))
        load_weights(other, WeightSource(tmp_path / f"{spelling}.safetensors", NAMES.internal_names))
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert "transformer_blocks.0.attn.to_q.weight" in stored(model)
    opened = open_model(ModelConfig(path=str(tmp_path / "original.safetensors")))
    assert opened.family.name == "pyramid" and opened.config["num_single_layers"] == 2


def test_published_sizes_have_two_billion_weights() -> None:
    with torch.device("meta"):
        model = PyramidModel(PyramidConfig(), streams=("rgb",))
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1.97e9, rel=0.01)
    assert model.width == 1920 and len(model.blocks) == 24


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"_class_name": "PyramidDiffusionMMDiT"}, "the older model"),
        ({"interp_condition_pos": False}, "interp_condition_pos"),
        ({"axes_dims_rope": [16, 16, 16]}, "do not add up"),
    ],
)
def test_what_cannot_run_is_refused_by_name(config: dict[str, object], told: str) -> None:
    with pytest.raises(UserError, match=told) as said:
        PyramidConfig.read(config)
    assert "\n" not in str(said.value)


# -- the autoencoder


@torch.no_grad()
def test_windows_change_nothing_and_no_frame_sees_a_later_one() -> None:
    torch.manual_seed(0)
    vae = CausalVae(VaeConfig.read(VAE)).eval()
    video = torch.randn(1, 3, 25, 16, 16)
    latents = vae.encode(video)
    assert latents.shape == (1, 4, 4, 2, 2) and VaeConfig.read(VAE).stride == (8, 8, 8)
    torch.testing.assert_close(vae.encode(video, window=3), latents)
    torch.testing.assert_close(vae.encode(video[:, :, :17]), latents[:, :, :3])
    frames = vae.decode(latents)
    assert frames.shape == video.shape
    torch.testing.assert_close(vae.decode(latents, window=4), frames)
    torch.testing.assert_close(vae.decode(latents[:, :, :2]), frames[:, :, :9])
    later = video.clone()
    later[:, :, 9:] += 1
    assert torch.equal(vae.encode(later)[:, :, :2], latents[:, :, :2])


@torch.no_grad()
def test_a_first_frame_is_scaled_otherwise_than_those_after_it(folder: Path) -> None:
    opened = open_model(ModelConfig(path=str(folder)))
    vae = opened.load_vae(device=torch.device("cpu"), dtype=torch.float32)
    video = torch.rand(1, 3, 17, 64, 64) * 2 - 1
    raw, found = vae.network.encode(video), vae.encode(video)  # type: ignore[attr-defined]
    for frame in range(3):
        mean, deviation = (-0.04, 1.8726) if frame == 0 else (-0.2343, 3.0986)
        torch.testing.assert_close(found[:, :, frame], (raw[:, :, frame] - mean) / deviation)
    assert (FIRST, REST) == ((-0.04, 1.8726), (-0.2343, 3.0986))
    torch.testing.assert_close(vae.decode(found), vae.network.decode(raw).clamp(-1, 1), atol=1e-5, rtol=1e-4)  # type: ignore[attr-defined]
    texts = opened.load_text_encoder(device=torch.device("cpu"), dtype=torch.float32).encode(["a red circle", ""])
    assert texts[0]["text"].shape[0] < 128 and texts[1]["text"].shape[0] == 1


# -- several streams behind earlier frames


def joint(attends: bool) -> tuple[PyramidModel, StreamLayout, tuple[Tensor, ...]]:
    """Return a model with an adapter that has learned nothing, and equal streams for it."""
    model = PyramidModel(PyramidConfig.read(TINY), streams=("rgb", "seg", "depth"), rgb_attends_aux=attends)
    move(model, seed=0)
    zero(model, "stream_embedding")
    inject(model, LoraConfig(rank=3))
    one = LAYOUTS["behind five"]
    layout = StreamLayout(model.streams, one.shapes * 3, one.patch, past=one.past)
    return model, layout, alike(layout, inputs(one))


@pytest.mark.parametrize("attends", [True, False], ids=["seeing", "blind"])
def test_equal_streams_each_give_what_the_base_gives(attends: bool) -> None:
    model, layout, given = joint(attends)
    base, state = make(), model.state_dict()
    base.load_state_dict({name: state[name] for name in base.state_dict()})
    with torch.no_grad():
        found, expected = layout.videos(model(*given, layout=layout)), ours(base, LAYOUTS["behind five"])
    for velocity in found:
        torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)
    move(model, seed=1, names=".lora_B")
    with torch.no_grad():
        moved = layout.videos(model(*given, layout=layout))
    assert [float((one - expected).abs().max()) > 1e-4 for one in moved] == [attends, True, True]


def test_a_blind_rgb_behind_earlier_frames_runs_forward_only() -> None:
    model, layout, given = joint(False)
    move(model, seed=1, names=".lora_")
    slow, found = copy.deepcopy(model), []
    slow.rgb_forward_only = False
    for one in (model, slow):
        out = one(*given, layout=layout)
        out.square().mean().backward()
        found.append([out.detach(), *(p.grad for p in one.parameters() if p.grad is not None)])
    assert model.rgb_forward_only and len(found[0]) == len(found[1]) > 10
    for mine, other in zip(*found, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-4)


def test_a_model_whose_frames_see_later_ones_has_no_history(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    place = tmp_path / "model/transformer/config.json"
    place.write_text(place.read_text().replace('"use_temporal_causal": true', '"use_temporal_causal": false'))
    opened = open_model(ModelConfig(path=str(tmp_path / "model")))
    with pytest.raises(UserError, match=r"objective.history: this model's frames see later ones; set it to off"):
        opened.ladder(ObjectiveConfig())
    assert opened.ladder(ObjectiveConfig(history="off")) == PyramidLadder(by_frame=False)


def test_a_folder_of_several_is_told_to_name_one(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    for name in ("diffusion_transformer_384p", "diffusion_transformer_768p"):
        shutil.copytree(tmp_path / "transformer", tmp_path / name)
    shutil.rmtree(tmp_path / "transformer")
    shutil.move(tmp_path / "vae", tmp_path / "causal_video_vae")
    with pytest.raises(UserError, match=r"model.path: .* name one, such as .*/diffusion_transformer_384p") as told:
        _ = open_model(ModelConfig(path=str(tmp_path), family="pyramid")).config
    assert "\n" not in str(told.value) and "model.encoders" in str(told.value)
    place = tmp_path / "diffusion_transformer_384p"
    opened = open_model(ModelConfig(path=str(place), encoders=str(tmp_path)))
    assert opened.family.name == "pyramid" and opened.geometry.stride == (8, 8, 8)
