"""A folder goes in; a tiny Wan pipeline, synthetic RGBA pairs and a config that trains on them come out in it.

With it everyone can try every command in minutes, on a CPU and without a network. The same seed and library versions
give byte-identical files; another ffmpeg build may encode the same pictures to other bytes.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from safetensors import SafetensorError

from transpixeler.config.sections import UserError
from transpixeler.data.media.write import write_mp4, write_png, write_png_sequence, write_prores4444, write_webm_alpha
from transpixeler.demo.model import weights_digest, write_model
from transpixeler.demo.scenes import Format, Scene, heights, render, scenes
from transpixeler.files import check_place, write_text, writing_to

log = logging.getLogger("transpixeler")

# Raise it when the files below change, so that an older demo is not taken for this one.
RECIPE = 9
MARKER = "demo.txt"
WRITTEN = ("model", "data/train", "data/eval", "data/rgba", "config.yaml")
RGBA_CLIPS = 3  # clips that are written with their alpha inside as well
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

STREAMS_PAIR = 'streams: {rgb: "", seg: _seg}         # NAME.mp4 and NAME_seg.mp4, with their caption in NAME.txt'
STREAMS_WITH_DEPTH = (
    'streams: {rgb: "", seg: _seg, depth: _depth}   # NAME.mp4, NAME_seg.mp4 and NAME_depth.mp4, caption in NAME.txt'
)
CONFIG = f"""\
# Trains the demo's tiny model on the demo's clips: `transpixeler train config.yaml`; small enough for a CPU.
# Paths are relative to this file.
output_dir: output

model:
  family: wan
  path: model

{STREAMS_PAIR}

data:
  train: data/train
  eval: data/eval                     # attribute combinations that no training clip has
  cache_dir: data/cache
  fps: 16
  resolutions: [64]                   # the side of a square of the same area
  frames: [1, 9, 17]

lora:
  rank: 32

objective:
  density: uniform
  shift: 2                            # how transparent a thing is, is decided early, where noise is high
  tasks: {{joint: 0.8, rgb_to_aux: 0.2}}  # the adapter makes pairs from a caption, and mattes of a given video

optim:
  lr: 6.0e-3
  warmup_steps: 20
  schedule: cosine
  ema: 0.98

train:
  max_steps: 1000
  global_batch: 8
  micro_batch: 4

checkpoint:
  every_steps: 500

save:
  every_epochs: 0
  every_steps: 500

eval:
  every_epochs: 50                    # more than there are: before the first step, and at the end
  times: [0.2, 0.5, 0.8]
  samples: 2                          # held-out captions made into videos at each evaluation

sample:
  prompts: ["a red circle drifts left, half transparent"]
  size: [64, 64, 17]                  # width, height, frames
  steps: 12
  guidance: 2
  shift: 3
  negative_prompt: ""                 # this model has never read the stock one
"""


def write_demo(
    folder: Path,
    *,
    seed: int = 0,
    train_clips: int = 192,
    eval_clips: int = 8,
    depth: bool = False,
    force: bool = False,
) -> None:
    """Write the whole demo; one that is already there with the same seed and sizes stays as it is."""
    recipe = f"recipe {RECIPE}, weights {weights_digest()}, seed {seed}, {train_clips} training clips"
    recipe += f", {eval_clips} eval clips{', with depth' if depth else ''}"
    started, finished = f"unfinished: {recipe}\n", f"{recipe}\n"
    found = _read_marker(folder)
    if found == finished and all((folder / part).exists() for part in WRITTEN) and not force:
        log.info("%s: the demo of seed %d is already there", folder, seed)
        return
    if found not in (None, started, finished) and not force:
        problem = "is another demo or an older one" if found else "is not empty"
        raise UserError(
            f"{folder}: {problem}; choose another folder, or `transpixeler demo {folder} --force` to replace its "
            f"{', '.join(WRITTEN)}"
        )
    check_place(folder, "demo")
    with writing_to(folder, "demo"):
        write_text(folder / MARKER, started)
        _remove_written(folder)
        _write_parts(folder, seed=seed, train_clips=train_clips, eval_clips=eval_clips, depth=depth)
        write_text(folder / MARKER, finished)
    log.info("%s: trains on it", folder / "config.yaml")


def _write_parts(folder: Path, *, seed: int, train_clips: int, eval_clips: int, depth: bool) -> None:
    log.info("%s: a tiny Wan pipeline", folder / "model")
    try:
        write_model(folder / "model")
    except SafetensorError as fault:  # safetensors' own error for a disk that takes no more
        raise OSError(str(fault)) from fault
    train = scenes(train_clips, formats=FORMATS, held_out=False, seed=seed)
    held_out = scenes(eval_clips, formats=FORMATS, held_out=True, seed=seed)
    for name, clips in (("train", train), ("eval", held_out)):
        log.info("%s: %d pairs", folder / "data" / name, len(clips))
        write_pairs(folder / "data" / name, clips, depth=depth)
    log.info("%s: some of them with alpha, as ProRes 4444, VP9 and PNG sequences", folder / "data/rgba")
    write_rgba(folder / "data/rgba", [scene for scene in train if scene.format.frames > 1][:RGBA_CLIPS])
    write_text(folder / "config.yaml", CONFIG.replace(STREAMS_PAIR, STREAMS_WITH_DEPTH) if depth else CONFIG)


def write_pairs(folder: Path, clips: Sequence[Scene], *, depth: bool = False) -> None:
    """Write NAME.mp4, NAME_seg.mp4 and NAME.txt for each clip, or .png for one frame; the caption last."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, scene in zip(clip_names(clips), clips):
        _write_grey(folder, f"{name}_seg", (frame[..., 3:] for frame in render(scene)), scene.format)
        if depth:
            _write_grey(folder, f"{name}_depth", heights(scene), scene.format)
        write_rgb_clip(folder, name, scene)


def write_rgba(folder: Path, clips: Sequence[Scene]) -> None:
    """Write each clip with its alpha inside, in every form that the import tools read."""
    for name, scene in zip(clip_names(clips), clips):
        write_prores4444(folder / f"{name}.mov", render(scene), fps=scene.format.fps)
        write_webm_alpha(folder / f"{name}.webm", render(scene), fps=scene.format.fps)
        write_png_sequence(folder / name, render(scene))
        write_text(folder / f"{name}.txt", scene.attributes.caption + "\n")


def write_rgb_clip(folder: Path, name: str, scene: Scene) -> None:
    """Write a clip's RGB, then its caption: all that a text-to-video model learns from."""
    _write_video(folder, name, (frame[..., :3] for frame in render(scene)), scene.format)
    write_text(folder / f"{name}.txt", scene.attributes.caption + "\n")


def _write_grey(folder: Path, stem: str, frames: Iterable[np.ndarray], format: Format) -> None:
    _write_video(folder, stem, (np.repeat(frame, 3, axis=2) for frame in frames), format)


def _write_video(folder: Path, stem: str, frames: Iterable[np.ndarray], format: Format) -> None:
    if format.frames == 1:
        write_png(folder / f"{stem}.png", *frames)
    else:
        write_mp4(folder / f"{stem}.mp4", frames, fps=format.fps)


def clip_names(clips: Sequence[Scene]) -> Iterable[str]:
    """Name the clips by number, from 001."""
    return (f"{number:03d}" for number in range(1, len(clips) + 1))


def _read_marker(folder: Path) -> str | None:
    """Return the text of a demo's marker: None in a new or empty folder, "" where other files are."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder}: is a file; give a folder to write the demo to")
    if not folder.exists() or not any(folder.iterdir()):
        return None
    marker = folder / MARKER
    return marker.read_text(encoding="utf-8", errors="replace") if marker.is_file() else ""


def _remove_written(folder: Path) -> None:
    """Remove what an earlier demo wrote, and nothing else."""
    for part in WRITTEN:
        if (folder / part).is_dir():
            shutil.rmtree(folder / part)
        else:
            (folder / part).unlink(missing_ok=True)
