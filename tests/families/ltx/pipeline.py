"""A tiny LTX-Video pipeline that diffusers writes, of each version's kind of VAE."""

from __future__ import annotations

import math
import string
from pathlib import Path
from typing import Any

import torch

from tests.families.ltx.tiny import TINY, published
from transpixeler.demo.model import t5_tokenizer

VAES: dict[str, dict[str, Any]] = {
    "0.9.0": {
        "block_out_channels": (8, 8, 16, 16),
        "decoder_block_out_channels": (8, 8, 16, 16),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1, 1),
    },
    "0.9.1": {  # a decoder that takes a timestep and draws noise inside
        "block_out_channels": (8, 8, 16, 16),
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (True, True, True, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
    },
    "0.9.5": {  # another encoder
        "block_out_channels": (8, 16, 32, 64, 64),
        "down_block_types": ("LTXVideo095DownBlock3D",) * 4,
        "downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal"),
        "spatio_temporal_scaling": (True, True, True, True),
        "decoder_block_out_channels": (8, 16, 32),
        "layers_per_block": (1, 1, 1, 1, 1),
        "decoder_layers_per_block": (1, 1, 1, 1),
        "decoder_spatio_temporal_scaling": (True, True, True),
        "decoder_inject_noise": (False, False, False, False),
        "upsample_residual": (True, True, True),
        "upsample_factor": (2, 2, 2),
        "timestep_conditioning": True,
        "spatial_compression_ratio": 32,
        "temporal_compression_ratio": 8,
    },
}


def write_pipeline(folder: Path, *, version: str = "0.9.0") -> None:
    """Write a pipeline of random weights in diffusers' layout."""
    from diffusers.pipelines.ltx.pipeline_ltx import LTXPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = [(letter, -math.log(95)) for letter in ("▁", *string.printable[:94])]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    tokenizer = t5_tokenizer(vocabulary, length=128)
    sizes = {"d_model": TINY["caption_channels"], "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        encoder = T5EncoderModel(T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes))
        vae = random_vae(version)
    pipeline = LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=encoder.eval(),
        vae=vae,
        transformer=published(),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    pipeline.save_pretrained(folder)


def random_vae(version: str) -> Any:
    """Build a VAE whose latents have a mean and a deviation, and whose decoder really adds the noise it draws."""
    from diffusers.models.autoencoders.autoencoder_kl_ltx import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(latent_channels=TINY["in_channels"], **VAES[version])
    vae.latents_mean.normal_()
    vae.latents_std.uniform_(0.5, 2.0)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if "per_channel_scale" in name:
                parameter.normal_()
    return vae.eval()
