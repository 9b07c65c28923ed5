"""A tiny Open-Sora 2 of random weights, in a pipeline's layout."""

from __future__ import annotations

import json
import math
import string
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tests.support.models import move
from transpixeler.demo.model import t5_tokenizer
from transpixeler.families.opensora.config import OpenSoraConfig, published_config
from transpixeler.families.opensora.model import OpenSoraModel
from transpixeler.families.opensora.names import NAMES
from transpixeler.models.names import split_rows

TINY: dict[str, Any] = {
    "num_heads": 2,
    "hidden_size": 32,
    "axes_dim": (4, 6, 6),
    "in_channels": 16,
    "context_in_dim": 24,
    "vec_in_dim": 20,
    "depth": 2,
    "depth_single_blocks": 2,
}
SHOWN = TINY | {"cond_embed": True}
VAE: dict[str, Any] = {
    "block_out_channels": (32, 32, 32, 32),
    "layers_per_block": 1,
    "latent_channels": TINY["in_channels"] // 4,
}


def make(config: dict[str, Any] = TINY, *, streams: tuple[str, ...] = ("rgb",), seed: int = 0) -> OpenSoraModel:
    """Build a tiny model with every parameter moved."""
    model = OpenSoraModel(OpenSoraConfig.read(config), streams=streams)
    move(model, seed=seed)
    return model


def stored(model: OpenSoraModel, spelling: str = "diffusers") -> dict[str, torch.Tensor]:
    """Return the weights as a file has them, apart as published or together."""
    found: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        spelled = NAMES.parameter(name, source="internal", to=spelling)
        found |= {part: rows.contiguous() for part, rows in split_rows(value, spelled).items()}
    return found


def write_encoders(folder: Path) -> None:
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    letters = [(letter, -math.log(95)) for letter in ("▁", *string.printable[:94])]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), *letters]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        sizes = {"d_model": TINY["context_in_dim"], "d_kv": 8, "num_heads": 2, "d_ff": 32, "num_layers": 2}
        t5 = T5EncoderModel(T5Config(vocab_size=len(vocabulary), feed_forward_proj="gated-gelu", **sizes))
        narrow = {"hidden_size": TINY["vec_in_dim"], "intermediate_size": 32, "num_hidden_layers": 2}
        ends = {"vocab_size": 64, "bos_token_id": 62, "eos_token_id": 63, "pad_token_id": 63}
        clip = CLIPTextModel(CLIPTextConfig(num_attention_heads=2, **narrow, **ends))
        vae = AutoencoderKLHunyuanVideo(**VAE)
    words = folder / "tokenizer"
    words.mkdir(parents=True)
    (words / "vocab.json").write_text(json.dumps({letter: place for place, letter in enumerate(_clip_words())}))
    (words / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(str(words / "vocab.json"), str(words / "merges.txt"), model_max_length=77).save_pretrained(words)
    t5_tokenizer(vocabulary, length=512).save_pretrained(folder / "tokenizer_2")
    clip.save_pretrained(folder / "text_encoder")
    t5.save_pretrained(folder / "text_encoder_2")
    vae.save_pretrained(folder / "vae")


def write_folder(folder: Path, config: dict[str, Any] = TINY) -> Path:
    write_encoders(folder)
    (place := folder / "transformer").mkdir()
    (place / "config.json").write_text(json.dumps(published_config(config)))
    save_file(stored(make(config, seed=3)), place / "diffusion_pytorch_model.safetensors")
    return folder


def _clip_words() -> list[str]:
    """List letters within and at the end of a word, and the two marks at the ends of a text."""
    letters = string.ascii_lowercase
    found = [*letters, *(f"{letter}</w>" for letter in letters)]
    return [*found, *(f"<{n}>" for n in range(62 - len(found))), "<|startoftext|>", "<|endoftext|>"]
