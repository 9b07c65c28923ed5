"""Wan's VAE and text encoder give what diffusers' own pipeline gives."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

from tests.families.wan.test_original import original_vae_name
from transpixeler.config.sections import UserError
from transpixeler.families.wan import encoders
from transpixeler.families.wan.encoders import WanTextEncoder, WanVae, clean_caption
from transpixeler.families.wan.original import T5_FILE, TOKENIZER_FOLDER, VAE_FILE

if TYPE_CHECKING:
    from diffusers import WanPipeline

CPU = torch.device("cpu")
CAPTIONS = ["a red ball moves", "", "two  &amp;amp;\n blank\tspaces ", " ".join("letters" * 200), "Ünïcödé, 速い車"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transpixeler.demo.model import write_model

    folder = tmp_path_factory.mktemp("wan") / "model"
    write_model(folder, seed=1)
    return folder


@pytest.fixture(scope="module")
def pipeline(model: Path) -> "WanPipeline":
    from diffusers import WanPipeline

    return WanPipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def vae(model: Path) -> WanVae:
    return encoders.load_vae(model, device=CPU, dtype=torch.float32)


@pytest.fixture(scope="module")
def text(model: Path) -> WanTextEncoder:
    return encoders.load_text_encoder(model, device=CPU, dtype=torch.float32)


def test_captions_are_encoded_as_the_pipeline_does_at_their_true_length(
    text: WanTextEncoder, pipeline: "WanPipeline"
) -> None:
    with torch.no_grad():
        theirs, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False, max_sequence_length=512)
    ours = [fields["text"] for fields in text.encode(CAPTIONS)]
    assert [len(one) for one in ours][1] == 1 and len(ours[3]) == 512
    for one, padded in zip(ours, theirs):
        torch.testing.assert_close(one, padded[: len(one)], atol=1e-5, rtol=1e-5)
        assert not padded[len(one) :].any()
    assert (ours[0][:8] - ours[3][:8]).abs().max() > 1e-2  # other captions give other numbers


def test_a_caption_is_cleaned_once_and_for_all() -> None:
    assert clean_caption("  a &amp;lt; b \n\t c ") == "a < b c"
    assert clean_caption(clean_caption("x &amp;amp;amp; y")) == clean_caption("x & y")


def test_latents_are_the_posteriors_mean_scaled_by_the_config(vae: WanVae, pipeline: "WanPipeline") -> None:
    video = torch.randint(0, 256, (2, 5, 32, 48, 3), dtype=torch.uint8)
    pixels = video.permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        mean = pipeline.vae.encode(pixels).latent_dist.mean
    settings = pipeline.vae.config
    middle, width = (
        torch.tensor(values)[:, None, None, None] for values in (settings.latents_mean, settings.latents_std)
    )
    assert not torch.equal(width, torch.ones_like(width)) and middle.any()
    latents = vae.encode(video)
    assert latents.shape == (2, 16, 2, 4, 6) and latents.dtype == torch.float32
    torch.testing.assert_close(latents, (mean - middle) / width, atol=1e-4, rtol=1e-4)
    assert torch.equal(latents, vae.encode(pixels))
    with torch.no_grad():
        theirs = pipeline.vae.decode(latents * width + middle).sample
    torch.testing.assert_close(vae.decode(latents), theirs, atol=1e-4, rtol=1e-4)


def test_a_video_is_encoded_to_the_same_bits_in_any_company(vae: WanVae) -> None:
    """The broken twin shows why each goes by itself: the network's own batch gives other bits."""
    video = torch.randint(0, 256, (3, 5, 64, 64, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    alone = torch.cat([vae.encode(one) for one in video.split(1)])
    assert torch.equal(vae.encode(video), alone)
    pixels = video.permute(0, 4, 1, 2, 3) / 127.5 - 1
    with torch.no_grad():
        batch = vae.network.encode(pixels).latent_dist.mode()
        singles = torch.cat([vae.network.encode(one).latent_dist.mode() for one in pixels.split(1)])
    torch.testing.assert_close(batch, singles, atol=1e-4, rtol=1e-4)


def test_a_large_video_is_encoded_whole_also_after_one_was_decoded_in_tiles(
    vae: WanVae, monkeypatch: pytest.MonkeyPatch
) -> None:
    video = torch.randint(0, 256, (1, 1, 288, 288, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))
    before = vae.encode(video)
    monkeypatch.setattr(WanVae, "tiled_latents", 1)
    vae.decode(torch.zeros(1, before.shape[1], 1, 4, 4))
    assert vae.network.use_tiling and torch.equal(vae.encode(video), before)


def test_a_fingerprint_follows_the_content_and_needs_no_weights(model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(model, copy)
    assert encoders.vae_fingerprint(copy) == encoders.vae_fingerprint(model)
    before = encoders.vae_fingerprint(copy), encoders.text_fingerprint(copy)
    (copy / "tokenizer/tokenizer_config.json").write_text("{}")
    assert encoders.vae_fingerprint(copy) == before[0] and encoders.text_fingerprint(copy) != before[1]
    weights = copy / "vae/diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-3] ^= 4
    weights.write_bytes(data)
    assert encoders.vae_fingerprint(copy) != before[0]


def test_the_geometry_is_read_off_the_config(model: Path, tmp_path: Path) -> None:
    assert encoders.vae_geometry(model) == ((4, 8, 8), 16)
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae/config.json").write_text(
        '{"z_dim": 48, "dim_mult": [1, 2, 4, 4], "temperal_downsample": [false, true, true], "patch_size": 2}'
    )
    assert encoders.vae_geometry(tmp_path) == ((4, 16, 16), 48)


def test_a_folder_without_encoders_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"model\.path: .* holds no VAE: neither vae/config\.json nor Wan2\.1_VAE\.pth"):
        encoders.vae_geometry(tmp_path)
    with pytest.raises(UserError, match="holds no text encoder"):
        encoders.load_text_encoder(tmp_path, device=CPU, dtype=torch.float32)


def test_wans_own_folder_gives_the_same_encoders(text: WanTextEncoder, model: Path, tmp_path: Path) -> None:
    import shutil

    from diffusers import AutoencoderKLWan

    torch.manual_seed(0)
    network = AutoencoderKLWan(base_dim=4, dim_mult=[1, 2, 2, 4])
    torch.save({original_vae_name(name): value for name, value in network.state_dict().items()}, tmp_path / VAE_FILE)
    video = torch.rand(1, 3, 5, 16, 16) * 2 - 1
    scale = torch.tensor(network.config.latents_mean), torch.tensor(network.config.latents_std)
    theirs = WanVae(network, scale, str, device=CPU)
    ours = encoders.load_vae(tmp_path, device=CPU, dtype=torch.float32)
    assert torch.equal(ours.encode(video), theirs.encode(video))
    assert encoders.vae_geometry(tmp_path) == ((4, 8, 8), 16)

    torch.save(original_t5(text.network), tmp_path / T5_FILE)
    shutil.copytree(model / "tokenizer", tmp_path / TOKENIZER_FOLDER)
    again = encoders.load_text_encoder(tmp_path, device=CPU, dtype=torch.float32)
    for one, two in zip(*([fields["text"] for fields in encoder.encode(CAPTIONS)] for encoder in (again, text))):
        torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)  # a kernel may look at how weights lie in memory
    assert len({encoders.text_fingerprint(tmp_path), encoders.text_fingerprint(model), ours.fingerprint}) == 3


def original_t5(encoder: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A text encoder's weights under Wan's own names."""
    state = {"token_embedding.weight": encoder.shared.weight, "norm.weight": encoder.encoder.final_layer_norm.weight}
    for index, block in enumerate(encoder.encoder.block):
        (attention, ffn), name = block.layer, f"blocks.{index}"
        state |= {f"{name}.attn.{part}.weight": getattr(attention.SelfAttention, part).weight for part in "qkvo"}
        state |= {
            f"{name}.pos_embedding.embedding.weight": attention.SelfAttention.relative_attention_bias.weight,
            f"{name}.norm1.weight": attention.layer_norm.weight,
            f"{name}.norm2.weight": ffn.layer_norm.weight,
            f"{name}.ffn.gate.0.weight": ffn.DenseReluDense.wi_0.weight,
            f"{name}.ffn.fc1.weight": ffn.DenseReluDense.wi_1.weight,
            f"{name}.ffn.fc2.weight": ffn.DenseReluDense.wo.weight,
        }
    return {name: value.detach() for name, value in state.items()}
