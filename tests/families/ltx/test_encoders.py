"""LTX-Video's VAE and text encoder give what the pieces of diffusers' own pipeline give."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.families.ltx.pipeline import VAES, random_vae, write_pipeline
from transpixeler.config.sections import UserError
from transpixeler.families.ltx import encoders, original
from transpixeler.families.ltx.encoders import DECODE_NOISE, DECODE_TIMESTEP, LtxTextEncoder, LtxVae

CPU = torch.device("cpu")
CAPTIONS = ["a red ball moves", "", " blank  spaces ", " ".join("letters" * 40), "Ünïcödé"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A pipeline's folder for each version."""
    folders = {version: tmp_path_factory.mktemp("ltx") / version for version in VAES}
    for version, folder in folders.items():
        write_pipeline(folder, version=version)
    return folders


@pytest.fixture(scope="module")
def pipeline(models: dict[str, Path]) -> Any:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    return LTXPipeline.from_pretrained(models["0.9.0"])


@pytest.fixture(scope="module")
def text(models: dict[str, Path]) -> LtxTextEncoder:
    return encoders.load_text_encoder(models["0.9.0"], device=CPU, dtype=torch.float32)


@pytest.fixture(params=VAES)
def vae(request: pytest.FixtureRequest, models: dict[str, Path]) -> LtxVae:
    return encoders.load_vae(models[request.param], device=CPU, dtype=torch.float32)


def video_of(batch: int = 2) -> torch.Tensor:
    return torch.randint(0, 256, (batch, 9, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_captions_are_encoded_at_their_true_length_as_the_pipelines_encoder_does_with_a_mask(
    text: LtxTextEncoder, pipeline: Any
) -> None:
    padded = pipeline.tokenizer(CAPTIONS, padding="max_length", max_length=128, truncation=True, return_tensors="pt")
    theirs = pipeline.text_encoder(padded.input_ids, attention_mask=padded.attention_mask)[0]
    ours = [found["text"] for found in text.encode(CAPTIONS)]
    assert [len(one) for one in ours] == padded.attention_mask.sum(1).tolist()
    assert len(ours[1]) == 1 and len(ours[3]) == 128
    for one, row in zip(ours, theirs):
        torch.testing.assert_close(one, row[: len(one)], atol=1e-5, rtol=1e-5)
    assert (ours[0][:8] - ours[3][:8]).abs().max() > 1e-2  # other captions give other numbers


@torch.no_grad()
def test_the_pipeline_agrees_where_nothing_is_padded(text: LtxTextEncoder, pipeline: Any) -> None:
    """The twin is a short caption, whose padding diffusers' pipeline lets the encoder attend."""
    theirs, mask, *_ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    full, short = text.encode([CAPTIONS[3], CAPTIONS[0]])
    torch.testing.assert_close(full["text"], theirs[3], atol=1e-5, rtol=1e-5)
    assert mask[3].all() and int(mask[0].sum()) == len(short["text"])
    assert (short["text"] - theirs[0][mask[0]]).abs().max() > 1e-3


@torch.no_grad()
def test_latents_are_the_posteriors_mean_scaled_by_channel(vae: LtxVae) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx_image2video import LTXImageToVideoPipeline

    network, video = vae.network, video_of()
    pixels = video.permute(0, 4, 1, 2, 3) / 127.5 - 1
    mean = network.encode(pixels).latent_dist.mean
    expected = LTXImageToVideoPipeline._normalize_latents(mean, network.latents_mean, network.latents_std)
    latents = vae.encode(video)
    assert latents.shape == (2, 4, 2, 2, 3) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, expected, atol=1e-4, rtol=1e-4)
    assert (latents - mean).abs().max() > 0.1
    assert torch.equal(latents, vae.encode(pixels))
    assert torch.equal(latents, torch.cat([vae.encode(one) for one in video.split(1)]))  # the same in any company


@torch.no_grad()
def test_videos_are_what_the_pipelines_vae_decodes(vae: LtxVae) -> None:
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline

    network, latents = vae.network, torch.randn(1, 4, 2, 2, 3, generator=torch.Generator().manual_seed(1))
    timestep, noisy = None, latents
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        if network.config.timestep_conditioning:
            timestep = torch.tensor([DECODE_TIMESTEP])
            noisy = (1 - DECODE_NOISE) * latents + DECODE_NOISE * torch.randn(latents.shape)
        scaled = LTXPipeline._denormalize_latents(noisy, network.latents_mean, network.latents_std)
        expected = network.decode(scaled, timestep, return_dict=False)[0].clamp(-1, 1)
    found = vae.decode(latents)
    assert found.shape == (1, 3, 9, 64, 96) and found.std() > 0.01
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_video_is_decoded_to_the_same_bits_every_time(models: dict[str, Path]) -> None:
    """The twin is the network itself, which draws other noise each time."""
    vae = encoders.load_vae(models["0.9.1"], device=CPU, dtype=torch.float32)
    latents = torch.randn(1, 4, 2, 2, 2).repeat(2, 1, 1, 1, 1)
    state = torch.get_rng_state()
    first, second = vae.decode(latents)
    assert torch.equal(first, second) and torch.equal(vae.decode(latents)[0], first)
    assert torch.equal(state, torch.get_rng_state())  # nobody else's draws are disturbed
    timestep = torch.tensor([DECODE_TIMESTEP])
    one, other = (vae.network.decode(latents[:1], timestep, return_dict=False)[0] for _ in range(2))
    assert not torch.equal(one, other)


@torch.no_grad()
def test_large_frames_are_decoded_tile_by_tile_and_encoded_whole(
    models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae = encoders.load_vae(models["0.9.0"], device=CPU, dtype=torch.float32)
    latents = torch.randn(1, 4, 1, 17, 17)
    whole = vae.decode(latents)
    monkeypatch.setattr(LtxVae, "tiled_latents", 16 * 16)
    assert not torch.equal(vae.decode(latents), whole) and vae.network.use_tiling
    vae.encode(video_of(1))
    assert not vae.network.use_tiling


def test_a_fingerprint_follows_the_content_and_needs_no_weights(models: dict[str, Path], tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(models["0.9.0"], copy)
    assert encoders.vae_fingerprint(copy) == encoders.vae_fingerprint(models["0.9.0"])
    before = encoders.vae_fingerprint(copy), encoders.text_fingerprint(copy)
    (copy / "tokenizer/tokenizer_config.json").write_text("{}")
    assert encoders.vae_fingerprint(copy) == before[0] and encoders.text_fingerprint(copy) != before[1]
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    assert encoders.vae_fingerprint(copy) != before[0]


@pytest.mark.parametrize("version", VAES)
def test_the_geometry_is_read_off_the_config(version: str, models: dict[str, Path]) -> None:
    assert encoders.vae_geometry(models[version]) == ((8, 32, 32), 4)


def test_a_folder_without_encoders_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* holds no VAE: vae/config\.json is not there"):
        encoders.vae_geometry(tmp_path)
    with pytest.raises(UserError, match="holds no text encoder"):
        encoders.load_text_encoder(tmp_path, device=CPU, dtype=torch.float32)


# -- Lightricks' own file


def original_vae_name(name: str, version: str) -> str:
    """Return the name that a weight of diffusers' VAE has in Lightricks' file."""
    side, _, rest = name.partition(".")
    if name.startswith("latents_"):
        return f"vae.per_channel_statistics.{'mean' if name.endswith('mean') else 'std'}-of-means"
    rest = rest.replace("conv_shortcut.conv", "conv_shortcut").replace("resnets", "res_blocks")
    rest = rest.replace("norm3.", "norm3.norm.")
    if rest.startswith(("time_embedder", "scale_shift_table")):
        return f"vae.{side}.last_{rest}"
    kind, _, place = rest.partition(".")
    if kind == "mid_block":
        last = {"encoder": 8 if version == "0.9.5" else 9, "decoder": 0}[side]
        return f"vae.{side}.{'down' if side == 'encoder' else 'up'}_blocks.{last}.{place}"
    if not kind.endswith("_blocks"):
        return f"vae.{name}"
    index, _, place = place.partition(".")
    part, sub = next(((p, place.removeprefix(p + ".")) for p in PARTS if place.startswith(p)), ("", place))
    return f"vae.{side}.{kind}.{PLACES[side, version][int(index), part]}.{sub}"


PARTS = ("conv_in", "conv_out", "downsamplers.0", "upsamplers.0")
_OLD_ENCODER = {(0, ""): 0, (0, "downsamplers.0"): 1, (0, "conv_out"): 2, (1, ""): 3, (1, "downsamplers.0"): 4}
_OLD_ENCODER |= {(1, "conv_out"): 5, (2, ""): 6, (2, "downsamplers.0"): 7, (3, ""): 8}
_OLD_DECODER = {(0, ""): 1, (1, "upsamplers.0"): 2, (1, ""): 3, (2, "conv_in"): 4, (2, "upsamplers.0"): 5, (2, ""): 6}
_OLD_DECODER |= {(3, "conv_in"): 7, (3, "upsamplers.0"): 8, (3, ""): 9}
_NEW_DECODER = {(i, part): 2 * i + 1 + (not part) for i in range(3) for part in ("upsamplers.0", "")}
_NEW_ENCODER = {(i, part): 2 * i + bool(part) for i in range(4) for part in ("", "downsamplers.0")}
PLACES = {
    ("encoder", "0.9.0"): _OLD_ENCODER,
    ("encoder", "0.9.1"): _OLD_ENCODER,
    ("encoder", "0.9.5"): _NEW_ENCODER,
    ("decoder", "0.9.0"): _OLD_DECODER,
    ("decoder", "0.9.1"): _NEW_DECODER,
    ("decoder", "0.9.5"): _NEW_DECODER,
}


@pytest.mark.parametrize("version", VAES)
def test_each_published_vae_is_told_by_its_weights_and_fits_its_config(version: str) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    with torch.device("meta"):
        network = AutoencoderKLLTXVideo(**original.VAE_CONFIGS[version])
    state = network.state_dict()
    file = {original_vae_name(name, version): tensor for name, tensor in state.items()}
    assert len(file) == len(state)
    assert original.vae_version({name: tuple(tensor.shape) for name, tensor in file.items()}) == version
    found = original.renamed(file)
    assert {name: tensor.shape for name, tensor in found.items()} == {name: t.shape for name, t in state.items()}
    assert original.VAE_CONFIGS[version].keys() >= {"latent_channels", "block_out_channels", "timestep_conditioning"}


@pytest.mark.parametrize("version", ["0.9.0", "0.9.1"])
def test_a_single_file_gives_the_same_vae(version: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its sizes are those of a small one here, so that the file is."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    network = random_vae(version)
    file = tmp_path / "ltx-video.safetensors"
    state = {original_vae_name(name, version): value.contiguous() for name, value in network.state_dict().items()}
    save_file(state | {"model.diffusion_model.proj_out.bias": torch.zeros(3)}, file)
    monkeypatch.setitem(original.VAE_CONFIGS, version, {"latent_channels": 4, **VAES[version]})
    ours, scale = encoders.load_vae(file, device=CPU, dtype=torch.float32), (network.latents_mean, network.latents_std)
    theirs = LtxVae(network, scale, str, device=CPU)
    latents = ours.encode(video_of(1))
    assert torch.equal(latents, theirs.encode(video_of(1)))
    assert torch.equal(ours.decode(latents), theirs.decode(latents))
    assert encoders.vae_geometry(file) == ((8, 32, 32), 4) and len(ours.fingerprint) == 64
    with pytest.raises(UserError, match="put text_encoder/ and tokenizer/ of Lightricks/LTX-Video beside the file"):
        encoders.text_fingerprint(file)


def test_a_file_without_a_vae_is_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    file = tmp_path / "ltx-video.safetensors"
    save_file({"model.diffusion_model.proj_out.bias": torch.zeros(3)}, file)
    with pytest.raises(UserError, match="holds no VAE; use the file that Lightricks published"):
        encoders.vae_geometry(file)
    file.write_bytes(b"no")
    with pytest.raises(UserError, match="not a whole safetensors file"):
        encoders.vae_geometry(file)
