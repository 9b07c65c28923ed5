"""Wan's VAE and UMT5 text encoder: videos and captions in, normalised latents and embeddings out.

The networks are diffusers' and transformers', imported when one is loaded and never before: training needs neither once
everything is cached. Each video and caption is encoded by itself, so that no record depends on its neighbours.
"""

from __future__ import annotations

import html
import importlib.util
import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import torch

from transpixeler.config.sections import UserError
from transpixeler.families.wan.config import TEXT_LEN
from transpixeler.families.wan.original import (
    T5_FILE,
    TOKENIZER_FOLDER,
    VAE_FILES,
    original_t5_config,
    original_t5_state,
    original_vae_config,
    original_vae_state,
    vae_file,
)
from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.encoders import LatentVae, Network, T5TextEncoder, fingerprint, load_network, load_tokenizer
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.meta import on_meta
from transpixeler.models.resolve import resolve

_VAE_CONFIG = "vae/config.json"
_TEXT_CONFIG = "text_encoder/config.json"
_VAE_FILES = ("vae/*", *VAE_FILES)
_TEXT_FILES = ("text_encoder/*", "tokenizer/*", T5_FILE, f"{TOKENIZER_FOLDER}/*")


def clean_caption(text: str) -> str:
    """Clean as Wan's training did: encodings mended if ftfy is there, entities resolved twice, blanks collapsed."""
    mended = _mender()(text)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(mended))).strip()


@cache
def _mender() -> Callable[[str], str]:
    if importlib.util.find_spec("ftfy") is None:
        return str
    import ftfy

    return ftfy.fix_text


class WanVae(LatentVae):
    """`AutoencoderKLWan`, of Wan 2.1's kind and of 2.2's."""

    @property
    def tiled_latents(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]  the networks differ
        """Return as many cells as hold the activations of 480×832 in 2.1's decoder: 6,240 there, 2,340 in 2.2's.

        A larger frame's no longer fit beside a model on a small GPU.
        """
        config = self.network.config
        rows = config.scale_factor_spatial // (config.patch_size or 1)  # of the decoder's last level, for one latent's
        return 480 * 832 * 96 // ((config.decoder_base_dim or config.base_dim) * rows**2)


class WanTextEncoder(T5TextEncoder):
    """UMT5's encoder with Wan's cleaning."""

    length = TEXT_LEN
    clean = staticmethod(clean_caption)


def load_vae(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> WanVae:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    network: Network
    folder = _vae_folder(path)
    if (folder / _VAE_CONFIG).exists():
        network = load_network(AutoencoderKLWan, folder / "vae", dtype=dtype)
    else:
        network = AutoencoderKLWan(**original_vae_config(folder))
        with naming_damage(vae_file(folder)):
            network.load_state_dict(original_vae_state(folder))
        network.to(dtype)
    scale = torch.tensor(network.config.latents_mean), torch.tensor(network.config.latents_std)
    return WanVae(network, scale, partial(vae_fingerprint, folder), device=device)


def load_text_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> WanTextEncoder:
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    network: Network
    folder = _text_folder(path)
    if (folder / _TEXT_CONFIG).exists():
        tokenizer, encoder = folder / "tokenizer", folder / "text_encoder"
        network = load_network(UMT5EncoderModel, encoder, dtype=dtype)
    else:
        with on_meta():
            network = UMT5EncoderModel(UMT5Config(**original_t5_config(folder)))
        with naming_damage(folder / T5_FILE):
            network.load_state_dict(original_t5_state(folder), assign=True)
        network.to(dtype)
        tokenizer = folder / TOKENIZER_FOLDER
    return WanTextEncoder(network, load_tokenizer(tokenizer), partial(text_fingerprint, folder), device=device)


def vae_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash what cached latents depend on, without loading a weight."""
    return fingerprint(_vae_folder(path), _VAE_FILES, digest)


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash what cached texts depend on, without loading a weight."""
    return fingerprint(_text_folder(path), _TEXT_FILES, digest)


def has_vae(path: str | Path) -> bool:
    """Return whether a local model folder holds its VAE."""
    folder = Path(path).expanduser()
    return any((folder / name).exists() for name in (_VAE_CONFIG, *VAE_FILES))


def latent_statistics(path: str | Path) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the mean and deviation of each channel of raw latents; None where no config of a VAE is here."""
    file = Path(path).expanduser() / _VAE_CONFIG
    if not file.is_file():
        return None
    config = read_config(file)
    with naming_damage(file):
        found = [torch.tensor(config[name], dtype=torch.float32) for name in ("latents_mean", "latents_std")]
    return found[0], found[1]


def vae_geometry(path: str | Path) -> tuple[tuple[int, int, int], int]:
    """(stride in frames, height and width; latent channels), read off the config's levels."""
    folder = _vae_folder(path)
    if (folder / _VAE_CONFIG).exists():
        config = read_config(folder / _VAE_CONFIG)
    else:
        config = original_vae_config(folder)
    with naming_damage(folder / _VAE_CONFIG):
        levels = config.get("dim_mult", [1, 2, 4, 4])
        side = 2 ** (len(levels) - 1) * (config.get("patch_size") or 1)
        return (2 ** sum(config.get("temperal_downsample", [False, True, True])), side, side), config.get("z_dim", 16)


def _vae_folder(path: str | Path) -> Path:
    return _holding(resolve(path, only=_VAE_FILES), "VAE", (_VAE_CONFIG, *VAE_FILES))


def _text_folder(path: str | Path) -> Path:
    return _holding(resolve(path, only=_TEXT_FILES), "text encoder", (_TEXT_CONFIG, T5_FILE))


def _holding(folder: Path, what: str, either: tuple[str, ...]) -> Path:
    if not any((folder / name).exists() for name in either):
        raise UserError(
            f"model.path: {folder} holds no {what}: neither {' nor '.join(either)} is there; set model.encoders to a "
            "model that has it"
        )
    return folder
