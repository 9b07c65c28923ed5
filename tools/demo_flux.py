"""Teach a tiny FLUX.1 to paint the demo's stills, then to paint them with their alpha, and measure that.

From nothing: an autoencoder learns the stills, RGB and alpha as grey; `transpixeler init` makes a transformer beside it
and two random text encoders; it is trained in full on RGB alone, then a joint LoRA on pairs. Held-out captions are
painted with the adapter and without it. Prints a table, writes a picture, and ends with one line of JSON.

The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import string
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from demo_figures import measure, plain, table
from demo_measures import add_captions
from demo_vae import views
from safetensors.torch import load_file, save_file
from tooling import run

from transpixeler.config.sections import UserError
from transpixeler.demo.model import random_parts
from transpixeler.demo.scenes import Format, scenes
from transpixeler.demo.write import write_pairs
from transpixeler.files import whole, write_text
from transpixeler.parallel.runtime import log_to_terminal, quiet_libraries, running
from transpixeler.sampling.saves import load_saved

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

log = logging.getLogger("transpixeler")

STILL = Format(64, 64, 1, Fraction(16))
CHANNELS = 8  # of a latent, which covers 4×4 pixels
VECTOR, WIDTH = 32, 48  # of CLIP's text, of T5's
TRANSFORMER: dict[str, Any] = {
    "num_layers": 2,
    "num_single_layers": 2,
    "num_attention_heads": 4,
    "attention_head_dim": 24,
    "axes_dims_rope": [4, 10, 10],
    "in_channels": 4 * CHANNELS,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": VECTOR,
    "guidance_embeds": False,
}
VAE: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (16, 24, 32),
    "norm_num_groups": 4,
    "layers_per_block": 1,
    "latent_channels": CHANNELS,
    "mid_block_add_attention": False,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
}
VAE_BATCH, VAE_RATE, NOISE = 8, 3e-3, 0.1

CONFIG = """\
output_dir: {out}/output
run_name: {name}
model: {{family: flux, path: {model}}}
streams: {streams}
data: {{train: {out}/data/train, cache_dir: {out}/cache, fps: 16, resolutions: [64], frames: [1]}}
lora: {{enabled: {lora}, rank: 32}}
objective: {{density: uniform, shift: 1.5}}
optim:
{optim}
  warmup_steps: 20
  schedule: cosine
  ema: 0.98
train: {{max_steps: {steps}, global_batch: {batch}, micro_batch: {batch}}}
checkpoint: {{every_steps: 100, keep: 1}}
save: {{every_epochs: 0, every_steps: {steps}}}
eval: {{every_epochs: 0, before_first_step: false, samples: 0}}
sample: {{size: [64, 64, 1], steps: 12, guidance: 2, shift: 1.5, scheduler: euler, negative_prompt: ""}}
"""
FULL = """\
  name: muon
  lr: 0.02
  groups:  # what is no matrix between features
    - {pattern: "*.bias", lr: 1.2e-3}
    - {pattern: "*norm*", lr: 1.2e-3}
    - {pattern: "embed.img_in.weight", lr: 1.2e-3}"""
ADAPTER = "  lr: 4.0e-3"


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    arguments = _parser().parse_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    out: Path = arguments.out.absolute()
    _stills(out, arguments.stills)
    _base(out, arguments.vae_steps)
    alone: dict[str, Any] = {"streams": '{rgb: ""}', "lora": "false", "optim": FULL, "batch": arguments.batch}
    rgb = _train(out, "rgb", out / "base", arguments.steps, **alone)
    pairs = alone | {"streams": '{rgb: "", seg: _seg}', "lora": "true", "optim": ADAPTER}
    joint = _train(out, "joint", rgb, arguments.adapter_steps, **pairs)
    with running() as runtime:
        figures = measure(load_saved(str(joint), []), runtime, count=arguments.captions, picture=out / "samples.png")
    print(table(figures))
    print(json.dumps(plain(figures)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("--stills", type=int, default=480, help="training pairs (default: %(default)s)")
    add("--vae-steps", type=int, default=900, help="steps of the autoencoder (default: %(default)s)")
    add("--steps", type=int, default=900, help="steps of the transformer on RGB (default: %(default)s)")
    add("--batch", type=int, default=16, help="samples a step of both (default: %(default)s)")
    add("--adapter-steps", type=int, default=500, help="steps of the joint LoRA (default: %(default)s)")
    add_captions(parser, default=40)
    return parser


def _stills(out: Path, count: int) -> None:
    if not (out / "data/train").is_dir():
        with whole(out / "data/train") as unfinished:
            write_pairs(unfinished, scenes(count, formats=[STILL], held_out=False, seed=0))


def _train(out: Path, name: str, model: Path, steps: int, **words: Any) -> Path:
    """Train, or go on with a training; return the run's folder."""
    folder = out / "output" / name
    if (folder / f"step{steps}").is_dir():
        return folder
    config = out / f"{name}.yaml"
    write_text(config, CONFIG.format(out=out, name=name, model=model, steps=steps, **words))
    resume = ["--resume", str(folder)] if folder.is_dir() else []
    if subprocess.run([sys.executable, "-m", "transpixeler", "train", str(config), *resume]).returncode:
        raise UserError(f"{config}: the training did not come to its end; the same command goes on from there")
    return folder


# --- the base --------------------------------------------------------------------------------------------------------


def _base(out: Path, steps: int) -> None:
    """Write the pipeline that the transformer starts from: a trained autoencoder, all else random."""
    if (out / "base").is_dir():
        return
    _write_encoders(out / "encoders", _vae(out / "vae.safetensors", steps))
    write_text(out / "shape.json", json.dumps(TRANSFORMER))
    words = ["--family", "flux", "--shape", out / "shape.json", "--encoders", out / "encoders", "--out", out / "base"]
    subprocess.run([sys.executable, "-m", "transpixeler", "init", *map(str, words)], check=True)


def _vae(file: Path, steps: int) -> AutoencoderKL:
    """Return the trained autoencoder, whose latents have unit scale."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    drawn = scenes(240, formats=[STILL], held_out=False, seed=1)
    pictures = np.concatenate([view for scene in drawn for view in views(scene)])
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).float() / 127.5 - 1
    vae = AutoencoderKL(**VAE)
    if file.is_file():
        vae.load_state_dict(load_file(file))
    else:
        _learn(vae, pixels, steps)
        with whole(file) as unfinished:
            save_file(vae.state_dict(), unfinished)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part, return_dict=False)[0].mode() for part in pixels.split(32)])
        vae.register_to_config(scaling_factor=round(1 / float(latents.std()), 4), shift_factor=float(latents.mean()))
    return vae


def _learn(vae: AutoencoderKL, pixels: torch.Tensor, steps: int) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, betas=(0.9, 0.99), weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: 0.51 + 0.49 * math.cos(math.pi * n / steps))
    for step in range(steps):
        some = pixels[torch.randint(len(pixels), (VAE_BATCH,))]
        latents: Any = vae.encode(some, return_dict=False)[0].mode()
        made = vae.decode(latents + NOISE * torch.randn_like(latents), return_dict=False)[0]
        shape = 1 + 2 * (some.amax(1, keepdim=True) > -1)  # most pixels are ground
        loss = (shape * (made - some).square()).mean() + 1e-3 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rate.step()
        if step % 100 == 0:
            log.info("the autoencoder learns: step %d of %d, loss %.4f", step, steps, loss.item())


def _write_encoders(folder: Path, vae: AutoencoderKL) -> None:
    """Write the autoencoder, and text encoders that stay as their seed made them: the captions' words are tokens."""
    from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel

    words = random_parts(0).tokenizer
    letters = [*string.ascii_lowercase, *(f"{letter}</w>" for letter in string.ascii_lowercase), ",</w>"]
    letters += ["<|startoftext|>", "<|endoftext|>"]
    end = len(letters) - 1
    ends: dict[str, Any] = {"bos_token_id": end - 1, "eos_token_id": end, "pad_token_id": end}
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "d_model": WIDTH,
        "d_kv": 16,
        "num_heads": 4,
        "d_ff": 96,
        "num_layers": 2,
        "dropout_rate": 0.0,
    }
    narrow: dict[str, Any] = {
        "hidden_size": VECTOR,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    with whole(folder) as unfinished:
        (unfinished / "tokenizer").mkdir(parents=True)
        write_text(unfinished / "vocab.json", json.dumps({letter: n for n, letter in enumerate(letters)}))
        write_text(unfinished / "merges.txt", "#version: 0.2\n")
        spelled = CLIPTokenizer(str(unfinished / "vocab.json"), str(unfinished / "merges.txt"), model_max_length=77)
        for name, part in {
            "tokenizer": spelled,
            "text_encoder": CLIPTextModel(CLIPTextConfig(vocab_size=len(letters), **narrow, **ends)),
            "tokenizer_2": words,
            "text_encoder_2": T5EncoderModel(T5Config(vocab_size=len(words), feed_forward_proj="gated-gelu", **sizes)),
            "vae": vae,
            "scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0),
        }.items():
            part.save_pretrained(unfinished / name)


if __name__ == "__main__":
    raise SystemExit(run("demo_flux", main))
