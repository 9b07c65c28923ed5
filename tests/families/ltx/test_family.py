"""A folder or a file of LTX-Video is told, opened and built by what it holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from tests.families.ltx.pipeline import VAES, write_pipeline
from tests.families.ltx.test_encoders import original_vae_name
from tests.families.ltx.tiny import TINY, inputs, ltx, published, with_weights_of
from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.families.ltx.config import TEXT_LEN, LtxConfig, diffusers_config
from transpixeler.families.ltx.family import FAMILY, LtxFolder
from transpixeler.families.ltx.names import NAMES
from transpixeler.models.family import Field, find_family, open_model
from transpixeler.models.weights import WeightSource, load_weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("ltx") / "model"
    write_pipeline(path)
    return path


def opened(path: Path) -> LtxFolder:
    found = open_model(ModelConfig(path=str(path)))
    assert isinstance(found, LtxFolder) and found.family is FAMILY is find_family("ltx")
    return found


def test_a_pipelines_folder_is_told_and_gives_diffusers_model(folder: Path) -> None:
    model = opened(folder)
    assert model.fields == (Field("text", width=24, length=TEXT_LEN, masked=True),)
    assert model.fields[0].tensors == 2
    backbone = model.build(streams=("rgb", "seg"), attention="math", fps=16.0)
    assert backbone.streams == ("rgb", "seg") and backbone.fps == 16.0 and backbone.fields == model.fields
    single = model.build(streams=("rgb",))
    load_weights(single, WeightSource(folder, FAMILY.internal_names))
    expected = with_weights_of(published())
    layout = single.layout((4, 3, 4, 5))
    given = inputs(layout)
    assert torch.equal(single(*given, layout=layout), expected(*given, layout=layout))


def test_the_config_is_written_as_diffusers_does(folder: Path) -> None:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    written = json.loads((folder / "transformer/config.json").read_text())
    del written["_diffusers_version"]
    ours = opened(folder).diffusers_config()
    assert ours == written
    made: Any = LTXVideoTransformer3DModel.from_config(ours)
    assert set(made.state_dict()) == set(published().state_dict())


@pytest.mark.parametrize(("version", "causal"), [("0.9.0", False), ("0.9.1", False), ("0.9.5", True)])
def test_the_vae_tells_where_the_second_latent_frame_begins(version: str, causal: bool, tmp_path: Path) -> None:
    (tmp_path / "transformer").mkdir()
    (tmp_path / "vae").mkdir()
    config = {"_class_name": "LTXVideoTransformer3DModel", **TINY}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    (tmp_path / "vae/config.json").write_text(json.dumps({"latent_channels": 4, **VAES[version]}))
    model = opened(tmp_path)
    assert model.config["causal_temporal_positioning"] is causal
    assert model.build(streams=("rgb",)).config.causal_temporal_positioning is causal
    assert "causal_temporal_positioning" not in model.diffusers_config()


@pytest.mark.parametrize("layers", [28, 48])
def test_a_transformer_alone_is_told_by_its_depth(layers: int, tmp_path: Path) -> None:
    config = {"_class_name": "LTXVideoTransformer3DModel", **TINY, "num_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert opened(tmp_path).config["causal_temporal_positioning"] is (layers == 48)


@pytest.mark.parametrize("frames", [1, 9, 17, 121])
def test_lengths_are_8k_plus_1(frames: int, folder: Path) -> None:
    geometry = opened(folder).geometry
    assert not geometry.fault(704, 480, frames)
    assert geometry.latent(frames, 480, 704) == (4, (frames - 1) // 8 + 1, 15, 22)
    assert geometry.pixels(geometry.latent(frames, 480, 704)) == (frames, 480, 704)
    assert "8k+1" in geometry.fault(704, 480, frames + 4)
    assert "704×480 would be" in geometry.fault(710, 480, frames)


# -- Lightricks' own file


ORIGINAL = {  # what the header of a published file says of its transformer, as far as we read it
    "_class_name": "Transformer3DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "causal_temporal_positioning": True,
    "double_self_attention": False,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-06,
    "only_cross_attention": False,
    "positional_embedding_max_pos": [20, 2048, 2048],
    "positional_embedding_theta": 10000.0,
    "positional_embedding_type": "rope",
    "qk_norm": "rms_norm",
    "standardization_norm": "rms_norm",
    "timestep_scale_multiplier": 1000,
}


def write_file(path: Path, **header: Any) -> None:
    """Write a single file as Lightricks does: a transformer under a prefix, and beside it a VAE."""
    state = published().state_dict()
    internal = {ours: state[stored] for ours, stored in NAMES.internal_names(state).items()}
    tensors = {
        f"model.diffusion_model.{NAMES.parameter(name, source='internal', to='original')}": value.contiguous()
        for name, value in internal.items()
    }
    vae = {original_vae_name("encoder.conv_out.conv.weight", "0.9.5"): torch.zeros(1, 2048, 1)}
    save_file(tensors | vae, path, metadata={"config": json.dumps(header)} if header else None)


def test_a_single_file_says_in_its_header_what_it_is(tmp_path: Path) -> None:
    file = tmp_path / "ltx-video-2b.safetensors"
    write_file(file, transformer={**ORIGINAL, **TINY})
    model = opened(file)
    expected = LtxConfig.read({**TINY, "causal_temporal_positioning": True})
    assert model.build(streams=("rgb",)).config == expected
    assert model.diffusers_config() == diffusers_config(TINY)


def test_a_single_file_without_a_header_is_measured(tmp_path: Path) -> None:
    file = tmp_path / "ltx-video-2b.safetensors"
    write_file(file)
    model = opened(file)
    assert model.config["causal_temporal_positioning"]  # by its VAE
    assert {key: model.config[key] for key in ("num_layers", "in_channels", "caption_channels")} == {
        "num_layers": 2,
        "in_channels": 4,
        "caption_channels": 24,
    }


def test_a_single_files_weights_are_read(tmp_path: Path) -> None:
    file = tmp_path / "ltx-video-2b.safetensors"
    write_file(file, transformer={**ORIGINAL, **TINY})
    single, expected = ltx(seed=9), with_weights_of(published())
    load_weights(single, WeightSource(file, FAMILY.internal_names))
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in single.state_dict().items())


# -- what is refused


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm 'layer_norm' is not supported"),
        ({"patch_size": 2}, "patch_size 2 is not supported, only 1"),
        ({"adaptive_norm": "single_scale"}, "adaptive_norm"),
        ({"out_channels": 8}, "in_channels 4 and out_channels 8 differ"),
        ({"cross_attention_dim": 64}, "cross_attention_dim 64 is not the model's width 32"),
        ({"positional_embedding_max_pos": [10, 2048, 2048]}, "positional_embedding_max_pos"),
    ],
)
def test_what_is_not_supported_is_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        LtxConfig.read({**ORIGINAL, **TINY, **change})
    assert LtxConfig.read({**ORIGINAL, **TINY}).width == 32


def test_another_model_is_not_taken_for_this_one(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "LTX2VideoTransformer3DModel"}')
    assert not FAMILY.recognises(tmp_path)
    file = tmp_path / "ltx-2.safetensors"
    names = ("patchify_proj.weight", "audio_patchify_proj.weight")
    save_file({f"model.diffusion_model.{name}": torch.zeros(4, 4) for name in names}, file)
    assert not FAMILY.recognises(file)
    save_file({f"model.diffusion_model.{names[0]}": torch.zeros(4, 4)}, file)
    assert FAMILY.recognises(file)
    with pytest.raises(UserError, match=r"holds no LTX-Video: .* is not in it"):
        _ = LtxFolder(str(file)).config


def test_a_folder_without_a_config_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds neither transformer/config\.json nor config\.json"):
        _ = LtxFolder(str(tmp_path)).config
