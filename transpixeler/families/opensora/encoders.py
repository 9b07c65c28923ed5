"""Open-Sora 2's autoencoder, HunyuanVideo's, and its two text encoders, T5 and CLIP.

The networks are diffusers' and transformers', imported when one is loaded and never before. Read are the folders of a
diffusers pipeline, and what is published beside the weights: the autoencoder as one file, whose names are diffusers'
too, and the encoders in the folders of those who published them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from transpixeler.families.opensora.config import TEXT_LEN
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import (
    ClipTextEncoder,
    LatentVae,
    Network,
    T5AndClipTextEncoder,
    fingerprint,
    folder_with,
    load_network,
    load_t5_and_clip,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.weights import WeightSource, as_stored

EXAMPLE = "hpcai-tech/Open-Sora-v2"
VAE_FILE = "hunyuan_vae.safetensors"
T5_FOLDER, CLIP_FOLDER = "google/t5-v1_1-xxl", "openai/clip-vit-large-patch14"
_VAE_CONFIG = "vae/config.json"
_VAE_FILES = ("vae/*", VAE_FILE)
_PARTS = ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
_TEXT_FILES = tuple(f"{place}/*" for place in (*_PARTS, T5_FOLDER, CLIP_FOLDER))
_CONFIGS = ("text_encoder/config.json", "text_encoder_2/config.json")
_PUBLISHED_CONFIGS = (f"{CLIP_FOLDER}/config.json", f"{T5_FOLDER}/config.json")


class OpenSoraVae(LatentVae):
    """`AutoencoderKLHunyuanVideo`. As published it goes by tiles of 256 pixels, and takes all frames at once."""

    tiled_latents = tiled_pixels = 0  # the network itself leaves what is no larger than a tile whole


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> OpenSoraVae:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    network: Network
    folder = _vae_folder(path)
    if (folder / _VAE_CONFIG).is_file():
        network = load_network(AutoencoderKLHunyuanVideo, folder / "vae", dtype=dtype)
    else:
        with naming_damage(folder / VAE_FILE):
            network = AutoencoderKLHunyuanVideo(**_config_of_file(folder / VAE_FILE))
            network.load_state_dict(load_file(folder / VAE_FILE))
        network.to(dtype)
    network.use_framewise_encoding = network.use_framewise_decoding = False
    ones = torch.ones(network.config.latent_channels)
    scale = torch.zeros_like(ones), ones / network.config.scaling_factor
    return OpenSoraVae(network, scale, partial(vae_fingerprint, path), device=device)


def load_text_encoder(
    path: str | Path, *, device: torch.device, dtype: torch.dtype, part: str = ""
) -> T5AndClipTextEncoder | ClipTextEncoder:
    """part: the field of one of the two networks, to load it alone."""
    folder = _text_folder(path)
    clip, t5, clip_words, t5_words = (folder / part for part in _PARTS)
    if not (folder / _CONFIGS[0]).is_file():
        t5 = t5_words = folder / T5_FOLDER
        clip = clip_words = folder / CLIP_FOLDER
    hashed = partial(text_fingerprint, path)
    return load_t5_and_clip(
        t5=(t5, t5_words),
        clip=(clip, clip_words),
        length=TEXT_LEN,
        hashed=hashed,
        device=device,
        dtype=dtype,
        part=part,
    )


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def vae_geometry(path: str | Path) -> tuple[tuple[int, int, int], int]:
    """(stride in frames, height and width; latent channels), read off the config, or off the published file."""
    folder = _vae_folder(path, only=(_VAE_CONFIG, VAE_FILE))
    if not (folder / _VAE_CONFIG).is_file():
        config = _config_of_file(folder / VAE_FILE)
        return (4, 8, 8), config["latent_channels"]
    config = read_config(folder / _VAE_CONFIG)
    with naming_damage(folder / _VAE_CONFIG):
        time, side = (int(config[f"{axis}_compression_ratio"]) for axis in ("temporal", "spatial"))
        return (time, side, side), int(config["latent_channels"])


def _config_of_file(file: Path) -> dict[str, Any]:
    """Return arguments of diffusers' class, read off the tensors of a file."""
    source = WeightSource(file, as_stored)
    with naming_damage(file):
        levels = [name for name in source.names() if name.endswith("resnets.0.conv1.conv.weight")]
        levels = sorted(name for name in levels if name.startswith("encoder.down_blocks."))
        first = [name for name in source.names() if name.startswith("encoder.down_blocks.0.resnets.")]
        return {
            "block_out_channels": tuple(source.shape(name)[0] for name in levels),
            "layers_per_block": len({name.split(".")[4] for name in first}),
            "latent_channels": source.shape("post_quant_conv.weight")[0],
        }


def _vae_folder(path: str | Path, *, only: Sequence[str] = _VAE_FILES) -> Path:
    return folder_with(path, [(_VAE_CONFIG,), (VAE_FILE,)], "VAE", only=only, example=EXAMPLE)


def _text_folder(path: str | Path) -> Path:
    either = [_CONFIGS, _PUBLISHED_CONFIGS]
    return folder_with(path, either, "pair of text encoders", only=_TEXT_FILES, example=EXAMPLE)
