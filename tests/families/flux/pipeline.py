"""A tiny FLUX.1 pipeline that diffusers writes."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import torch

from tests.support.models import move
from transpixeler.demo.model import t5_tokenizer

TINY: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "axes_dims_rope": (4, 6, 6),
    "in_channels": 16,
    "joint_attention_dim": 24,
    "pooled_projection_dim": 20,
    "num_layers": 2,
    "num_single_layers": 2,
    "guidance_embeds": True,
}


def published(**overrides: Any) -> Any:
    """Build diffusers' class with every parameter moved."""
    from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

    model = FluxTransformer2DModel(**(TINY | overrides))
    move(model, seed=3)
    return model


def write_pipeline(folder: Path, **overrides: Any) -> None:
    """Write a pipeline of random weights in diffusers' layout."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = [(letter, -math.log(95)) for letter in ("▁", *string.printable[:94])]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sizes = {"d_model": TINY["joint_attention_dim"], "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
        t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes))
        width = TINY["pooled_projection_dim"]
        narrow = {"hidden_size": width, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        ends = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63}
        clip = CLIPTextModel(CLIPTextConfig(**narrow, **ends))
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            norm_num_groups=4,
            latent_channels=TINY["in_channels"] // 4,
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        )
    schnell = not (TINY | overrides)["guidance_embeds"]
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=not schnell, shift=1.0 if schnell else 3.0)
    words = {letter: place for place, letter in enumerate(_clip_words())}
    parts = folder / "tokenizer"
    parts.mkdir(parents=True)
    (parts / "vocab.json").write_text(json.dumps(words))
    (parts / "merges.txt").write_text("#version: 0.2\n")
    FluxPipeline(
        tokenizer=CLIPTokenizer(str(parts / "vocab.json"), str(parts / "merges.txt"), model_max_length=77),
        text_encoder=clip.eval(),
        tokenizer_2=t5_tokenizer(vocabulary, length=512),
        text_encoder_2=t5.eval(),
        vae=vae,
        transformer=published(**overrides),
        scheduler=scheduler,
    ).save_pretrained(folder)


def _clip_words() -> list[str]:
    """List letters within and at the end of a word, and the two marks at the ends of a text."""
    letters = string.ascii_lowercase
    found = [*letters, *(f"{letter}</w>" for letter in letters)]
    return [*found, *(f"<{n}>" for n in range(62 - len(found))), "<|startoftext|>", "<|endoftext|>"]
