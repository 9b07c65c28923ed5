"""HunyuanVideo's VAE and text encoders give what the pieces of diffusers' own pipeline give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families.hunyuan.pipeline import write_pipeline
from transpixeler.config.sections import UserError
from transpixeler.families.hunyuan import encoders
from transpixeler.families.hunyuan.encoders import TEMPLATE, TEMPLATE_LEN, HunyuanTextEncoder, HunyuanVae

CPU = torch.device("cpu")
CAPTIONS = ["a red ball moves", "", " blank  {spaces} ", "many words " * 100, "Ünïcödé"]
SCALE = 0.476986


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hunyuan") / "pipeline"
    write_pipeline(folder)
    return folder


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import HunyuanVideoPipeline

    return HunyuanVideoPipeline.from_pretrained(folder)


@pytest.fixture
def text(folder: Path) -> HunyuanTextEncoder:
    return encoders.load_text_encoder(folder, device=CPU, dtype=torch.float32)


@pytest.fixture
def vae(folder: Path) -> HunyuanVae:
    return encoders.load_vae(folder, device=CPU, dtype=torch.float32)


def video_of(frames: int = 9, height: int = 64, width: int = 96) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (2, frames, height, width, 3), dtype=torch.uint8, generator=generator)


# -- text


@torch.no_grad()
def test_captions_are_encoded_as_the_pipeline_does_at_their_true_length(
    text: HunyuanTextEncoder, pipeline: Any
) -> None:
    theirs, pooled, mask = pipeline.encode_prompt(CAPTIONS)
    ours = text.encode(CAPTIONS)
    assert [len(one["text"]) for one in ours] == mask.sum(1).tolist()
    assert len(ours[1]["text"]) == 1 and len(ours[3]["text"]) == 256  # the mark that ends a turn; cut
    for one, row, vector in zip(ours, theirs, pooled, strict=True):
        torch.testing.assert_close(one["text"], row[: len(one["text"])], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one["pooled"], vector)
    assert (ours[0]["text"][:5] - ours[3]["text"][:5]).abs().max() > 1e-2  # other captions give other numbers


@pytest.mark.parametrize(("name", "broken"), [("LAYER", -1), ("TEMPLATE_LEN", 94), ("TEMPLATE", "{}")])
@torch.no_grad()
def test_a_broken_twin_of_the_text_encoder_is_caught(
    text: HunyuanTextEncoder, pipeline: Any, monkeypatch: pytest.MonkeyPatch, name: str, broken: Any
) -> None:
    theirs, _, mask = pipeline.encode_prompt(CAPTIONS[:1])
    monkeypatch.setattr(encoders, name, broken)
    (ours,) = text.encode(CAPTIONS[:1])
    rows = len(ours["text"])
    assert rows != int(mask.sum()) or (ours["text"] - theirs[0, :rows]).abs().max() > 1e-2


def test_the_template_is_that_of_the_pipeline() -> None:
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

    assert DEFAULT_PROMPT_TEMPLATE == {"template": TEMPLATE, "crop_start": TEMPLATE_LEN}


# -- videos


@pytest.mark.parametrize("frames", [9, 33], ids=["at once", "in pieces"])
@torch.no_grad()
def test_latents_are_the_posteriors_mean_scaled(vae: HunyuanVae, pipeline: Any, frames: int) -> None:
    """The network takes more than 16 frames in pieces, as it does in the pipeline."""
    video = video_of(frames)
    pixels = video.permute(0, 4, 1, 2, 3) / 127.5 - 1
    expected = pipeline.vae.encode(pixels).latent_dist.mean * SCALE
    latents = vae.encode(video)
    assert latents.shape == (2, 4, (frames + 3) // 4, 8, 12) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert (latents / SCALE - latents).abs().max() > 0.1
    assert torch.equal(latents, vae.encode(pixels))
    assert torch.equal(latents, torch.cat([vae.encode(one) for one in video.split(1)]))  # the same in any company


@pytest.mark.parametrize("frames", [3, 9], ids=["at once", "in pieces"])
@torch.no_grad()
def test_videos_are_what_the_pipelines_vae_decodes(vae: HunyuanVae, pipeline: Any, frames: int) -> None:
    latents = torch.randn(1, 4, frames, 8, 12, generator=torch.Generator().manual_seed(1))
    expected = pipeline.vae.decode(latents / SCALE, return_dict=False)[0].clamp(-1, 1)
    found = vae.decode(latents)
    assert found.shape == (1, 3, 4 * frames - 3, 64, 96) and found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (vae.decode(latents / SCALE) - expected).abs().max() > 1e-2


@torch.no_grad()
def test_large_frames_are_encoded_and_decoded_tile_by_tile(vae: HunyuanVae, monkeypatch: pytest.MonkeyPatch) -> None:
    video, latents = video_of(1, 64, 288)[:1], torch.randn(1, 4, 1, 8, 36)
    encoded, decoded = vae.encode(video), vae.decode(latents)
    assert not vae.network.use_tiling
    monkeypatch.setattr(HunyuanVae, "tiled_pixels", 256 * 64)
    monkeypatch.setattr(HunyuanVae, "tiled_latents", 32 * 8)
    for tiled, whole in ((vae.encode(video), encoded), (vae.encode(_floats(video)), encoded)):
        assert vae.network.use_tiling and tiled.shape == whole.shape and not torch.equal(tiled, whole)
    tiled = vae.decode(latents)
    assert tiled.shape == decoded.shape and not torch.equal(tiled, decoded)
    vae.encode(video_of(1))
    assert not vae.network.use_tiling


def _floats(video: Tensor) -> Tensor:
    return video.permute(0, 4, 1, 2, 3) / 127.5 - 1


# -- files


def test_a_fingerprint_follows_the_content_and_needs_no_weights(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = encoders.vae_fingerprint(copy), encoders.text_fingerprint(copy)
    assert before == (encoders.vae_fingerprint(folder), encoders.text_fingerprint(folder))
    (copy / "tokenizer_2/tokenizer_config.json").write_text("{}")
    assert encoders.vae_fingerprint(copy) == before[0] and encoders.text_fingerprint(copy) != before[1]
    (copy / "vae/config.json").write_text("{}")
    assert encoders.vae_fingerprint(copy) != before[0]


def test_the_geometry_is_read_off_the_config(folder: Path) -> None:
    assert encoders.vae_geometry(folder) == ((4, 8, 8), 4)


def test_a_place_without_encoders_is_named(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"model\.path: .* holds no VAE: vae/config\.json is not there; set model\.encoders to hunyuanv"
    ):
        encoders.vae_geometry(tmp_path)
    (tmp_path / "hunyuan.safetensors").touch()
    with pytest.raises(UserError, match=r"holds no pair of text encoders: .*; set model\.encoders to hunyuanv"):
        encoders.text_fingerprint(tmp_path / "hunyuan.safetensors")
