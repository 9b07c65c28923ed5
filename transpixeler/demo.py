"""A folder in, a small world in it: a tiny Wan pipeline, synthetic RGBA pairs, and a config that trains on them.

It lets everyone see every command work in minutes, on a CPU and without a network. The same seed and the same library
versions give byte-identical files; another ffmpeg build may encode the same pictures to other bytes, and another torch
build or processor may round the VAE's measured latent scale differently.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
import string
from collections import Counter
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from transpixeler.config import UserError
from transpixeler.data.synthetic import Format, Scene, all_attributes, render, scenes
from transpixeler.data.write import (
    write_mp4,
    write_png,
    write_png_sequence,
    write_prores4444,
    write_webm_alpha,
)

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan
    from transformers import T5TokenizerFast

log = logging.getLogger("transpixeler")

# Raised when the files below change, so that an older demo is not taken for this one.
RECIPE = 2
MARKER = "demo.txt"
PARTS = ("model", "data/train", "data/eval", "data/rgba", "config.yaml")
RGBA_CLIPS = 3
FORMATS = tuple(
    Format(width, height, frames, Fraction(fps))
    for width, height, frames, fps in (
        (64, 64, 17, "16"),
        (96, 64, 27, "24"),
        (64, 64, 21, "16"),
        (64, 112, 33, "30000/1001"),
        (128, 72, 33, "30"),
        (64, 64, 1, "16"),
        (64, 80, 65, "60"),
        (80, 80, 11, "16"),
    )
)

TEXT_DIM = 64
TRANSFORMER = {
    "num_attention_heads": 4,
    "attention_head_dim": 24,  # splits over time, height and width as 8/8/8
    "num_layers": 6,  # enough to be cut into pipeline stages
    "ffn_dim": 256,
    "text_dim": TEXT_DIM,
}
VAE = {"base_dim": 8, "num_res_blocks": 1}
TEXT_ENCODER = {"d_model": TEXT_DIM, "d_kv": 16, "num_heads": 4, "d_ff": 128, "num_layers": 2}

CONFIG = """\
# Trains the demo's tiny model on the demo's clips: `transpixeler train config.yaml`; small enough for a CPU.
# Paths are relative to this file.
output_dir: output

model:
  family: wan
  path: model

streams: {rgb: "", seg: "_seg"}       # NAME.mp4 and NAME_seg.mp4, with their caption in NAME.txt

data:
  train: data/train
  eval: data/eval                     # attribute combinations that no training clip has
  cache_dir: data/cache
  fps: 16
  resolutions: [64]                   # the side of a square of the same area
  frames: [1, 9, 17]

lora:
  rank: 8

optim:
  lr: 1.0e-3
  warmup_steps: 5

train:
  max_steps: 40
  global_batch: 4
  micro_batch: 2

checkpoint:
  every_steps: 20

save:
  every_steps: 20

eval:
  samples: 2                          # held-out captions made into videos at each evaluation

sample:
  prompts: ["a red circle drifts left, half transparent"]
  size: [64, 64, 17]                  # width, height, frames
  steps: 20
"""


def write_demo(folder: Path, *, seed: int = 0, train_clips: int = 48, eval_clips: int = 8, force: bool = False) -> None:
    """Writes the whole demo; one that is already there with the same seed and sizes stays as it is."""
    recipe = f"recipe {RECIPE}, seed {seed}, {train_clips} training clips, {eval_clips} eval clips"
    started, finished = f"unfinished: {recipe}\n", f"{recipe}\n"
    found = _found(folder)
    if found == finished and not force:
        log.info("%s: the demo of seed %d is already there", folder, seed)
        return
    if found not in (None, started) and not force:
        raise UserError(f"{folder}: is not empty; choose another folder, or --force to replace its {', '.join(PARTS)}")
    _write_text(folder / MARKER, started)
    _clear(folder)
    log.info("%s: a tiny Wan pipeline", folder / "model")
    write_model(folder / "model", seed=seed)
    train = scenes(train_clips, formats=FORMATS, held_out=False, seed=seed)
    held_out = scenes(eval_clips, formats=FORMATS, held_out=True, seed=seed)
    for name, clips in (("train", train), ("eval", held_out)):
        log.info("%s: %d pairs", folder / "data" / name, len(clips))
        write_pairs(folder / "data" / name, clips)
    log.info("%s: some of them with alpha, as ProRes 4444, VP9 and PNG sequences", folder / "data/rgba")
    write_rgba(folder / "data/rgba", [scene for scene in train if scene.format.frames > 1][:RGBA_CLIPS])
    _write_text(folder / "config.yaml", CONFIG)
    _write_text(folder / MARKER, finished)
    log.info("%s: trains on it", folder / "config.yaml")


def write_pairs(folder: Path, clips: Sequence[Scene]) -> None:
    """NAME.mp4, NAME_seg.mp4 and NAME.txt for each clip, as .png where it is one frame; the caption last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in zip(_names(clips), clips):
        rgb = (frame[..., :3] for frame in render(scene))
        matte = (np.repeat(frame[..., 3:], 3, axis=2) for frame in render(scene))
        for stem, frames in ((name, rgb), (f"{name}_seg", matte)):
            if scene.format.frames == 1:
                write_png(folder / f"{stem}.png", next(frames))
            else:
                write_mp4(folder / f"{stem}.mp4", frames, fps=scene.format.fps)
        _write_text(folder / f"{name}.txt", scene.attributes.caption + "\n")


def write_rgba(folder: Path, clips: Sequence[Scene]) -> None:
    """Each clip with its alpha inside, in every form that the import tools read."""
    for name, scene in zip(_names(clips), clips):
        write_prores4444(folder / f"{name}.mov", render(scene), fps=scene.format.fps)
        write_webm_alpha(folder / f"{name}.webm", render(scene), fps=scene.format.fps)
        write_png_sequence(folder / name, render(scene))
        _write_text(folder / f"{name}.txt", scene.attributes.caption + "\n")


def write_model(folder: Path, *, seed: int) -> None:
    """A Wan pipeline of the real classes in diffusers' layout, tiny and with seeded random weights."""
    from diffusers import (
        AutoencoderKLWan,
        UniPCMultistepScheduler,
        WanPipeline,
        WanTransformer3DModel,
    )
    from transformers import UMT5Config, UMT5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    tokenizer = _tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        transformer = WanTransformer3DModel(**TRANSFORMER)
        vae = AutoencoderKLWan(**VAE)
        text_encoder = UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), dropout_rate=0.0, **TEXT_ENCODER))
    _measure_latents(vae.eval(), seed)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.eval(),
        vae=vae,
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    unfinished = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    pipeline.save_pretrained(unfinished)
    unfinished.replace(folder)


def _tokenizer() -> T5TokenizerFast:
    """Each word of the caption grammar is a token, and every printable character, for words from outside; scores are
    counted, as the library's own trainer gives other pieces at each run."""
    from transformers import T5TokenizerFast

    words: Counter[str] = Counter()
    for attributes in all_attributes():
        words.update(re.findall(r"▁?\w+|[^\w▁]", "▁" + attributes.caption.replace(" ", "▁")))
    total = sum(words.values())
    pieces = [(word, math.log(count / total)) for word, count in sorted(words.items())]
    rare = -2.0 * math.log(total)
    letters = [letter for letter in ("▁", *string.printable[:94]) if letter not in words]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    return T5TokenizerFast(
        vocab=[*special, *pieces, *((letter, rare) for letter in letters)], extra_ids=0, model_max_length=512
    )


@torch.no_grad()
def _measure_latents(vae: AutoencoderKLWan, seed: int) -> None:
    """Puts the latents' mean and deviation into the VAE's config, so that what the transformer sees has unit scale."""
    size = Format(64, 64, 9, Fraction(16))
    clips = [np.stack(list(render(scene))) for scene in scenes(4, formats=[size], held_out=False, seed=seed)]
    pictures = [view for clip in clips for view in (clip[..., :3], np.repeat(clip[..., 3:], 3, axis=3))]
    videos = torch.from_numpy(np.stack(pictures)).permute(0, 4, 1, 2, 3) / 127.5 - 1
    latents = vae.encode(videos).latent_dist.mean.transpose(0, 1).flatten(1)
    mean, deviation = latents.mean(1), latents.std(1)
    vae.register_to_config(
        latents_mean=[round(value, 4) for value in mean.tolist()],
        latents_std=[round(value, 4) for value in deviation.tolist()],
    )


def _names(clips: Sequence[Scene]) -> Iterable[str]:
    return (f"{number:03d}" for number in range(1, len(clips) + 1))


def _found(folder: Path) -> str | None:
    """What the folder's marker says: None for a new or empty folder, nothing where other files stand."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file, where the demo needs a folder")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    marker = folder / MARKER
    return marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() else ""


def _clear(folder: Path) -> None:
    """Removes what an earlier demo wrote, and nothing else."""
    for part in PARTS:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        else:
            (folder / part).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f".{path.name}.tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(path)
