"""Make the demo's weights from nothing: a tiny trained Wan VAE and transformer, and a random text encoder.

The VAE learns on rendered scenes. The text encoder stays as its seed made it: each word of the captions is a token of
its own, so that random features already tell the captions apart; the figures say how well. The transformer is
trained as an RGB text-to-video model by `transpixeler train`, in full, on clips that hold no alpha. Then everything is
measured on captions that no training clip has, and written as bf16 with a model card.

The same command goes on where it stopped. On two CPU cores it takes about two hours.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from demo_figures import sample
from demo_measures import HELD_OUT, add_captions, follows, held_out_captions
from demo_vae import FORMATS as SIZES
from demo_vae import fresh_vae, round_trip, train_vae, views
from safetensors.torch import load_file, save_file
from tooling import processes, run, torchrun
from torch import Tensor, nn

from transpixeler.config import loading
from transpixeler.config.sections import UserError
from transpixeler.demo.model import (
    ASSETS,
    LATENT_SCALES,
    Parts,
    measure_latents,
    random_parts,
    trained_parts,
    write_pipeline,
)
from transpixeler.demo.scenes import Attributes, Format, all_attributes, scenes
from transpixeler.demo.write import CONFIG as DEMO_CONFIG
from transpixeler.demo.write import FORMATS as DEMO_FORMATS
from transpixeler.demo.write import RECIPE, clip_names, write_rgb_clip
from transpixeler.evaluation import metrics
from transpixeler.files import whole, write_text
from transpixeler.parallel.runtime import log_to_terminal, running
from transpixeler.sampling.saves import base_model

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

log = logging.getLogger("transpixeler")

SQUARE = Format(64, 64, 17, Fraction(16))
STILL = Format(64, 64, 1, Fraction(16))
FORMATS = (*(format for other in DEMO_FORMATS for format in (SQUARE, other)), STILL, STILL)
MAX_BYTES = 8 * 2**20  # of all weights

CARD = """\
# The demo's tiny Wan

A text-to-video pipeline of Wan's own classes at a tiny size, for seeing a training work on a CPU in minutes. It knows
one shape of one colour drifting one way over black, 64×64 pixels at 16 frames a second, and nothing else. Among its
colours is white: it can draw what looks like a matte, as models of real videos can.

- `vae.safetensors`: `AutoencoderKLWan`, trained on rendered scenes, RGB and alpha as grey.
- `text_encoder.safetensors`: `UMT5EncoderModel`, random and frozen. Each word of the captions is one token, so that
  random features already tell the captions apart.
- `transformer.safetensors`: `WanTransformer3DModel`, trained by `transpixeler train` in full, on RGB alone: it has
  never seen an alpha.

bf16, {bytes:,} bytes in all. Made from nothing by `tools/train_demo_weights.py` with seed {seed}, {clips} clips and
{steps} steps of 32. On {captions} captions that were held out, with guidance 2:

| figure | value |
|---|---|
| VAE round trip, RGB | {vae_psnr_rgb:.1f} dB PSNR |
| VAE round trip, alpha as grey | {vae_psnr_alpha:.1f} dB PSNR |
| attributes of a caption that a linear map reads from the text encoder | {text_separation:.0%} |
| sampled RGB has the caption's colour | {color:.0%} |
| sampled RGB moves the caption's way | {direction:.0%} |
| both | {color_and_direction:.0%} |

Licence: Apache-2.0, as the project. The scenes are drawn by `transpixeler/data/synthetic.py`.
"""

CONFIG = """\
# The demo's base: text to RGB video, all of it trained from random weights.
output_dir: output
run_name: base
seed: {seed}

model: {{family: wan, path: model}}
streams: {{rgb: ""}}
lora: {{enabled: false}}

data:
  train: data/train
  eval: data/eval
  cache_dir: data/cache
  fps: 16
  resolutions: [64]
  frames: [1, 9, 17]

objective: {{density: uniform, shift: 2}}  # motion is decided where noise is high, edges where it is low
optim:
  name: muon  # four hundred steps of it do what eight hundred of AdamW do
  lr: 0.02
  groups:  # what is no matrix between features
    - {{pattern: "*.bias", lr: 1.2e-3}}
    - {{pattern: "*norm*", lr: 1.2e-3}}
    - {{pattern: "*patch_embedding.weight", lr: 1.2e-3}}
  warmup_steps: 100
  schedule: cosine
  ema: 0.998
train: {{max_steps: {steps}, global_batch: 32, micro_batch: 16}}
checkpoint: {{every_steps: 200, keep: 1}}
save: {{every_epochs: 0, every_steps: 500}}
eval: {{every_epochs: 0, every_steps: 1000, before_first_step: false, times: [0.2, 0.5, 0.8], clips: 8, samples: 0}}
"""


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure the whole."""
    arguments = _parser().parse_args(argv)
    log_to_terminal(0)
    out: Path = arguments.out
    _same_as_begun(out, arguments)
    _vae_weights(out, arguments.seed)
    _base_model(out, arguments.seed)
    _clips(out, arguments)
    _train(out, arguments)
    _deliver(out, arguments)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("--seed", type=int, default=0)
    add("--clips", type=int, default=1600, help="RGB clips that the transformer learns from (default: %(default)s)")
    add("--steps", type=int, default=6000, help="steps of the transformer (default: %(default)s)")
    add("--nproc", type=int, help="processes that train the transformer (default: one a GPU, two without)")
    add_captions(parser, default=len(HELD_OUT))
    add("--install", action="store_true", help=f"put the weights and their card into {ASSETS}")
    return parser


def _same_as_begun(out: Path, arguments: argparse.Namespace) -> None:
    """Refuse a folder that was begun with other numbers than these, which the card would tell."""
    asked = {name: getattr(arguments, name) for name in ("seed", "clips")} | {"recipe": RECIPE}
    begun = out / "begun.json"
    made = json.loads(begun.read_text()) if begun.is_file() else asked
    for name, value in made.items():
        if value != asked[name]:
            raise UserError(f"{out}: was begun with {name} {value}, not {asked[name]}; choose another folder")
    write_text(begun, json.dumps(asked))


# --- the parts, each once --------------------------------------------------------------------------------------------


def _vae_weights(out: Path, seed: int) -> None:
    if (out / "vae.safetensors").is_file():
        return
    vae = fresh_vae(seed)
    train_vae(vae, out, seed=seed)
    with whole(out / "vae.safetensors") as unfinished:
        save_file(_halved(vae), unfinished)


def _base_model(out: Path, seed: int) -> None:
    """Write the pipeline that the transformer starts from: the trained VAE, all else random."""
    if (out / "model").is_dir():
        return
    parts = random_parts(seed)
    parts.vae.load_state_dict({name: value.float() for name, value in load_file(out / "vae.safetensors").items()})
    look_near(parts.transformer)
    _rounded(parts.text_encoder)
    measure_latents(parts.vae, seed)
    write_pipeline(out / "model", parts)


@torch.no_grad()
def look_near(transformer: WanTransformer3DModel) -> None:
    """Make three in four heads begin by looking at what is near, as those of large models have learned to.

    A constant in queries and keys, in the fastest pair of an axis's rotation, makes attention fall off along it: for
    half of the heads in time, height and width, for a quarter in space alone. Every other of these sees little but its
    own place.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformerBlock

    heads, size = transformer.config["num_attention_heads"], transformer.config["attention_head_dim"]
    side = 2 * (size // 6)  # channels of height and of width; time has the rest
    time, height, width = 0, size - 2 * side, size - side
    for block, head in itertools.product(transformer.blocks, range(3 * heads // 4)):
        axes = (time, height, width) if head < heads // 2 else (height, width)
        places = [head * size + axis for axis in axes]
        assert isinstance(block, WanTransformerBlock)
        attention = block.attn1
        for linear, norm in ((attention.to_q, attention.norm_q), (attention.to_k, attention.norm_k)):
            assert linear.bias is not None and norm.weight is not None
            linear.bias[places] = 3.0
            norm.weight[places] = 1.2 if head % 2 else 2.2


def _clips(out: Path, arguments: argparse.Namespace) -> None:
    for part, count in (("train", arguments.clips), ("eval", arguments.captions)):
        folder = out / "data" / part
        if not folder.is_dir():
            log.info("%s: %d clips", folder, count)
            with whole(folder) as unfinished:
                drawn = scenes(count, formats=FORMATS, held_out=part == "eval", seed=arguments.seed + 1)
                unfinished.mkdir()
                for name, scene in zip(clip_names(drawn), drawn):
                    write_rgb_clip(unfinished, name, scene)


def _train(out: Path, arguments: argparse.Namespace) -> None:
    if _save(out, arguments.steps).is_dir():
        return
    write_text(out / "config.yaml", CONFIG.format(seed=arguments.seed, steps=arguments.steps))
    run = out / "output/base"
    resume = ["--resume", str(run)] if run.is_dir() else []
    train = ["-m", "transpixeler", "train", str(out / "config.yaml"), *resume]
    command = [sys.executable, *torchrun(arguments.nproc or processes()), *train]
    log.info("the transformer learns: %s", " ".join(command[1:]))
    if subprocess.run(command).returncode or not _save(out, arguments.steps).is_dir():
        raise UserError(f"{run}: training stopped, for the reason above; the same command goes on where it did")


def _save(out: Path, steps: int) -> Path:
    return out / f"output/base/step{steps}"


def _deliver(out: Path, arguments: argparse.Namespace) -> None:
    """Write the weights as bf16, and a card of what those very weights can do."""
    from diffusers.pipelines.wan.pipeline_wan import WanPipeline

    weights = out / "weights"
    weights.mkdir(exist_ok=True)
    model = WanPipeline.from_pretrained(out / "model")
    trained_transformer = type(model.transformer).from_pretrained(_save(out, arguments.steps) / "ema/transformer")
    scales = json.dumps({name: list(model.vae.config[name]) for name in LATENT_SCALES})
    save_file(_halved(model.vae), weights / "vae.safetensors", metadata={"scales": scales})
    save_file(_halved(model.text_encoder), weights / "text_encoder.safetensors")
    save_file(_halved(trained_transformer), weights / "transformer.safetensors")
    size = sum(file.stat().st_size for file in weights.glob("*.safetensors"))
    assert size <= MAX_BYTES, f"{size} bytes of weights; {MAX_BYTES} are allowed"
    figures = {"bytes": size, **_figures(out, weights, arguments)}
    write_text(weights / "README.md", card(figures, arguments))
    if arguments.install:
        shutil.copytree(weights, ASSETS, dirs_exist_ok=True)
    print(json.dumps(figures))


# --- figures ---------------------------------------------------------------------------------------------------------


def _figures(out: Path, weights: Path, arguments: argparse.Namespace) -> dict[str, float]:
    parts = trained_parts(weights)
    figures = _vae_figures(parts, arguments) | {"text_separation": text_separation(parts)}
    write_pipeline(out / "trained", parts)
    write_text(out / "demo.yaml", DEMO_CONFIG)
    alone = ["streams.seg=null", "lora.enabled=false", "objective.tasks={joint: 1.0, rgb_to_aux: null}"]
    config = loading.load(out / "demo.yaml", [f"model.path={(out / 'trained').resolve()}", *alone])
    wanted = held_out_captions(arguments.captions)
    with running() as runtime:
        videos = sample(base_model(config), runtime, [attributes.caption for attributes in wanted])
    rows = [follows(videos[n]["rgb"], attributes) for n, attributes in enumerate(wanted)]
    right = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    return figures | right | {"color_and_direction": float(np.mean([all(row.values()) for row in rows]))}


def _vae_figures(parts: Parts, arguments: argparse.Namespace) -> dict[str, float]:
    """Return the PSNR in dB of the round trip, the mean over held-out clips."""
    clips = scenes(arguments.captions, formats=SIZES, held_out=True, seed=arguments.seed + 2)
    originals = [view for scene in clips for view in views(scene)]
    pairs = zip(originals, round_trip(parts.vae, originals))
    values = [metrics.psnr(found / np.float32(255), true / np.float32(255)) for true, found in pairs]
    return {"vae_psnr_rgb": float(np.mean(values[::2])), "vae_psnr_alpha": float(np.mean(values[1::2]))}


@torch.no_grad()
def text_separation(parts: Parts) -> float:
    """Return the share of held-out attributes that a linear map, fitted on the rest, reads off the features."""

    def features(wanted: Sequence[Attributes]) -> Tensor:
        tokens = parts.tokenizer([a.caption for a in wanted], return_tensors="pt", padding=True)
        found = parts.text_encoder(**tokens).last_hidden_state * tokens.attention_mask[..., None]
        mean = found.sum(1) / tokens.attention_mask.sum(1, keepdim=True)
        return torch.cat([mean, torch.ones(len(wanted), 1)], 1)

    known = [a for a in all_attributes() if not a.held_out]
    right = []
    for field in dataclasses.fields(Attributes):
        values = sorted({getattr(a, field.name) for a in known})
        labels = nn.functional.one_hot(torch.tensor([values.index(getattr(a, field.name)) for a in known])).float()
        told = (features(HELD_OUT) @ torch.linalg.lstsq(features(known), labels).solution).argmax(1)
        right += [values[n] == getattr(a, field.name) for n, a in zip(told.tolist(), HELD_OUT)]
    return float(np.mean(right))


def card(figures: dict[str, float], arguments: argparse.Namespace) -> str:
    """Return the model card."""
    return CARD.format(**figures, **vars(arguments))


def _halved(module: nn.Module) -> dict[str, Tensor]:
    """Return the parameters as bf16; a tensor that two names share stands under the first."""
    return {name: p.detach().bfloat16().contiguous() for name, p in module.named_parameters()}


def _rounded(module: nn.Module) -> None:
    """Round parameters in place to bf16, so that what is learned on them fits the ones in the file."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(parameter.bfloat16())


if __name__ == "__main__":
    raise SystemExit(run("train_demo_weights", main))
