"""Tiny Wan pipelines of random weights that diffusers writes, and our sampler beside them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.support.models import move
from transpixeler.config.sections import SampleConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.flow.solver import denoise, start_noise
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.models.weights import WeightSource, load_weights
from transpixeler.sampling import sampler
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

PIXELS = (9, 64, 96)
CPU = torch.device("cpu")
PROMPT, NEGATIVE = "a red circle drifts left", "a grey square"
STEPS, SCALE = 4, 3.0
VAE_22: dict[str, Any] = {  # a tiny one of Wan 2.2's kind
    "base_dim": 4,
    "decoder_base_dim": 8,
    "z_dim": 48,
    "dim_mult": [1, 2, 4, 4],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_temporal": 4,
    "scale_factor_spatial": 16,
}
CLIP: dict[str, Any] = {  # 257 tokens, of pictures of 32×32
    "hidden_size": 160,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 2,
    "hidden_act": "gelu",
}
FIVE = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 48,
    "out_channels": 48,
    "text_dim": 64,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 2,
}


def vae_22(**overrides: Any) -> Any:
    """Build diffusers' class with moved weights, whose latents have a mean and a deviation."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    draws = torch.Generator().manual_seed(2)
    scales = {"latents_mean": torch.randn(48, generator=draws), "latents_std": 0.5 + torch.rand(48, generator=draws)}
    vae = AutoencoderKLWan(**{**VAE_22, **{name: value.tolist() for name, value in scales.items()}, **overrides})
    move(vae, seed=4)
    with torch.no_grad():
        for name, parameter in vae.named_parameters():
            if name.endswith("gamma"):
                parameter.add_(1)
    return vae.eval()


def write_five(folder: Path) -> Path:
    """Write a tiny TI2V-5B: text-to-video and image-to-video in one transformer, with a time for each token."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from transformers.utils.logging import disable_progress_bar

    from transpixeler.demo.model import random_parts

    disable_progress_bar()
    parts = random_parts(3)
    transformer = WanTransformer3DModel(**FIVE)
    move(transformer, seed=3)
    pipeline = WanPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=vae_22(),
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        expand_timesteps=True,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_image_to_video(folder: Path, form: str) -> Path:
    """Write a tiny model of 36 channels: "clip" as Wan 2.1's, "last" as FLF2V, "plain" as an expert of Wan 2.2's."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel
    from transformers.utils.logging import disable_progress_bar

    from transpixeler.demo.model import random_parts

    disable_progress_bar()
    parts = random_parts(3)
    transformer = WanTransformer3DModel(**image_to_video(form))
    move(transformer, seed=3)
    encoder = None
    if form != "plain":
        encoder = CLIPVisionModel(CLIPVisionConfig(**CLIP))
        move(encoder, seed=5)
    pipeline = WanImageToVideoPipeline(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
        image_encoder=encoder.eval() if encoder else None,
        image_processor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32) if encoder else None,
    )
    pipeline.save_pretrained(folder)
    return folder


def write_experts(folder: Path, kind: str) -> Path:
    """Write a tiny model of two experts, as Wan 2.2's A14B: "t2v", or "i2v" with 36 channels."""
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline
    from diffusers.pipelines.wan.pipeline_wan_i2v import WanImageToVideoPipeline
    from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler
    from transformers.utils.logging import disable_progress_bar

    from transpixeler.demo.model import random_parts

    disable_progress_bar()
    config = image_to_video("plain") if kind == "i2v" else {**FIVE, "in_channels": 16, "out_channels": 16}
    high, low = WanTransformer3DModel(**config), WanTransformer3DModel(**config)
    move(high, seed=3)
    move(low, seed=7)
    parts, shift = random_parts(3), 5.0 if kind == "i2v" else 12.0
    pipeline = (WanImageToVideoPipeline if kind == "i2v" else WanPipeline)(
        tokenizer=parts.tokenizer,
        text_encoder=parts.text_encoder,
        vae=parts.vae,
        transformer=high,
        transformer_2=low,
        boundary_ratio=0.9 if kind == "i2v" else 0.875,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift),
    )
    pipeline.save_pretrained(folder)
    return folder


def image_to_video(form: str) -> dict[str, Any]:
    """Return the config of a tiny transformer of 36 channels."""
    config: dict[str, Any] = {**FIVE, "in_channels": 36, "out_channels": 16}
    if form != "plain":
        config |= {"image_dim": CLIP["hidden_size"], "added_kv_proj_dim": 48}
    return config | ({"pos_embed_seq_len": 514} if form == "last" else {})


def layout_of(folder: Path, pixels: tuple[int, int, int]) -> StreamLayout:
    geometry = WanFolder(str(folder)).geometry
    return StreamLayout.equal(("rgb",), geometry.latent(*pixels), geometry.patch)


def made(
    folder: Path,
    layout: StreamLayout,
    *,
    given: Mapping[int, Tensor] | None = None,
    shown: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Return the latents [1, C, F, H, W] of our sampler at its defaults."""
    opened = WanFolder(str(folder))
    model = opened.build(streams=layout.names)
    load_weights(model, WeightSource(str(folder), opened.family.internal_names))
    fields = texts(opened)
    fields[0] |= shown or {}
    engine: Any = SimpleNamespace(
        config=SimpleNamespace(pipeline=1),
        mesh=SimpleNamespace(device=CPU),
        forward=lambda x, inputs, layout, batch: model(x, *inputs, layout=layout),
    )
    velocity = sampler.guided(engine, layout, *fields, guidance=lambda _: SCALE)
    mesh: Any = None
    solver = Sampler(engine, mesh, SampleConfig(steps=STEPS), None, opened)._solver(Video("", "", {}, 0, layout))
    return layout.unpack(denoise(velocity, start_noise(layout, 3), layout, solver, given=given))[0]


def texts(model: ModelFolder) -> list[dict[str, Tensor]]:
    """Return the fields of the prompt and of the negative one, in fp32, where the cache holds bf16."""
    encoder = model.load_text_encoder(device=CPU, dtype=torch.float32)
    return [
        {"text": torch.nn.functional.pad(one["text"], (0, 0, 0, 512 - len(one["text"])))}
        for one in encoder.encode([PROMPT, NEGATIVE])
    ]


def run(pipeline: Any, pixels: tuple[int, int, int], layout: StreamLayout, **inputs: Any) -> Tensor:
    """Return the latents that diffusers' pipeline makes of the same noise."""
    frames, height, width = pixels
    return pipeline(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=height,
        width=width,
        num_frames=frames,
        num_inference_steps=STEPS,
        max_sequence_length=512,
        latents=layout.unpack(start_noise(layout, 3))[0].clone(),
        output_type="latent",
        **{"guidance_scale": SCALE, **inputs},
    ).frames


def pictures() -> np.ndarray:
    """Return a first and a last picture of `PIXELS`."""
    return np.random.default_rng(0).integers(0, 256, (2, *PIXELS[1:], 3), dtype=np.uint8)
