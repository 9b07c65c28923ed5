"""Lightricks' own file: one safetensors goes in, the transformer's config and the VAE's state for diffusers come out.

Such a file holds the transformer under `model.diffusion_model.` and the VAE under `vae.`. Its header may hold their
configs; where it does not, the version is told by the weights.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from transpixeler.config.sections import UserError

VAE_FILE_PREFIX = "vae."

_SHARED = {"latent_channels": 128, "patch_size": 4, "patch_size_t": 1, "scaling_factor": 1.0}
_FROM_0_9_1 = {  # the decoder that takes a timestep
    "decoder_block_out_channels": (256, 512, 1024),
    "decoder_spatio_temporal_scaling": (True, True, True),
    "timestep_conditioning": True,
    "upsample_factor": (2, 2, 2),
    "upsample_residual": (True, True, True),
}
VAE_CONFIGS: dict[str, dict[str, Any]] = {
    "0.9.0": {
        **_SHARED,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_block_out_channels": (128, 256, 512, 512),
        "decoder_inject_noise": (False, False, False, False, False),
        "decoder_layers_per_block": (4, 3, 3, 3, 4),
        "decoder_spatio_temporal_scaling": (True, True, True, False),
        "layers_per_block": (4, 3, 3, 3, 4),
        "spatio_temporal_scaling": (True, True, True, False),
        "timestep_conditioning": False,
    },
    "0.9.1": {
        **_SHARED,
        **_FROM_0_9_1,
        "block_out_channels": (128, 256, 512, 512),
        "decoder_inject_noise": (True, True, True, False),
        "decoder_layers_per_block": (5, 6, 7, 8),
        "layers_per_block": (4, 3, 3, 3, 4),
        "spatio_temporal_scaling": (True, True, True, False),
    },
    "0.9.5": {  # and all later ones
        **_SHARED,
        **_FROM_0_9_1,
        "block_out_channels": (128, 256, 512, 1024, 2048),
        "decoder_inject_noise": (False, False, False, False),
        "decoder_layers_per_block": (5, 5, 5, 5),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "layers_per_block": (4, 6, 6, 2, 2),
        "spatial_compression_ratio": 32,
        "spatio_temporal_scaling": (True, True, True, True),
        "temporal_compression_ratio": 8,
    },
}


def stored_names(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def header_config(path: Path, part: str) -> dict[str, Any] | None:
    """Return the config of a part ("transformer") that the file's header holds, if it does."""
    with _opened(path) as file:
        text = (file.metadata() or {}).get("config")
    return json.loads(text).get(part) if text else None


def vae_version(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Tell which VAE a file holds, from the shapes of its weights."""
    if shapes["vae.encoder.conv_out.conv.weight"][1] == 2048:
        return "0.9.5"
    return "0.9.1" if "vae.decoder.last_scale_shift_table" in shapes else "0.9.0"


def original_vae_config(path: Path) -> dict[str, Any]:
    """Return arguments of `AutoencoderKLLTXVideo`."""
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(VAE_FILE_PREFIX)]  # noqa: SIM118
        return VAE_CONFIGS[vae_version({name: tuple(file.get_slice(name).get_shape()) for name in names})]


def original_vae_state(path: Path) -> dict[str, Tensor]:
    """Return the VAE's weights under the names of diffusers' `AutoencoderKLLTXVideo`."""
    with _opened(path) as file:
        names = [name for name in file.keys() if name.startswith(VAE_FILE_PREFIX)]  # noqa: SIM118
        return renamed({name: file.get_tensor(name) for name in names})


def renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Translate a VAE's weights by diffusers' own table, which knows all three versions."""
    from diffusers.loaders.single_file_utils import convert_ltx_vae_checkpoint_to_diffusers

    return convert_ltx_vae_checkpoint_to_diffusers(dict(state))


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as fault:
        raise UserError(f"{path} is not a whole safetensors file ({fault}); copy or download it again") from fault
