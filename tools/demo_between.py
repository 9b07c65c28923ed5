"""Teach the demo's base to make frames between frames and to go on from a clip, and measure both on held-out scenes.

Clips whose captions say neither colour nor direction are written and the whole base is trained on them, so that the
motion can only come from the given frames. Then of each held-out scene every fourth frame, or the first five,
are given, RGB and alpha, and the rest is made. Its motion is right where the shape moves the true way, stays near the
true path, and is one shape and not two that fade. Measured as well are what must fail this, the nearest given frame
held still and given frames that fade into each other, and what must pass it, the VAE's round trip of the truth. Prints
a table and ends with one line of JSON. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from demo_figures import true_streams
from demo_image import SQUARE, WHOLE_BASE, center_distance, round_trips, train, write_clips
from demo_measures import add_captions, direction, silhouette, silhouette_iou
from tooling import figures_table, run
from torch import Tensor

from transpixeler.data.sampled import video_layout
from transpixeler.demo.scenes import Attributes, scenes
from transpixeler.flow.tasks import Task, tasks
from transpixeler.models.family import open_model
from transpixeler.models.streams import frames_beside
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel, load_saved
from transpixeler.sampling.texts import encode_prompts
from transpixeler.sampling.video import Video

STAGES = {
    "taught": (
        *WHOLE_BASE,
        "objective.tasks={interpolate: 0.65, extend: 0.35, joint: null, rgb_to_aux: null}",
        *("optim.lr=0.015", "optim.ema=0.98", "optim.warmup_steps=30", "train.max_steps=600", "train.micro_batch=8"),
    )
}
NEAR = {
    "interpolate": 1.0,
    "extend": 4.0,
}  # pixels, mean over the frames that are made; a step of a shape is 1.2 to 1.8
EVERY_NEAR = 1.0  # pixels, in every one of those frames
PARTLY_LIT = (0.25, 0.75)  # of a frame's brightness: the soft edge of one shape, and all of what fades
EDGE = 1.5  # times the truth's share of such pixels; the VAE's round trips have up to 1.4, what fades from 1.6 on
Streams = Mapping[str, np.ndarray]  # uint8 [F, H, W, 3] by name


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the folder to work in; what is finished there is not done again")
    parser.add_argument("overrides", nargs="*", help="config keys, such as train.max_steps=400")
    parser.add_argument("--clips", type=int, default=192, help="training clips (default: %(default)s)")
    add_captions(parser, default=20)
    arguments = parser.parse_intermixed_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    write_clips(arguments.out, arguments.clips, caption=still_words)
    trained = train(arguments.out, arguments.overrides, stages=STAGES)
    source = load_saved(str(trained), [word for word in arguments.overrides if word.startswith("sample.")])
    with running() as runtime:
        figures = measure(source, runtime, count=arguments.captions)
    print(table(figures))
    print(json.dumps(figures))


def still_words(attributes: Attributes) -> str:
    """Return the caption without colour and direction."""
    return f"a {attributes.shape} drifts, {attributes.opacity}"


def measure(source: SavedModel, runtime: Runtime, *, count: int) -> dict[str, float]:
    """Return means over held-out scenes, by task, of what was made and of the controls."""
    asked = scenes(count, formats=[SQUARE], held_out=True, seed=source.config.sample.seed + 1)
    truths, figures = [true_streams(scene) for scene in asked], dict[str, float]()
    trips = round_trips(source, runtime, truths)
    known = tasks(tuple(source.config.streams), source.config.objective)
    for name in NEAR:
        captions = [still_words(scene.attributes) for scene in asked]
        made, equal = filled(source, runtime, known[name], captions, truths)
        frames = made_frames(known[name], SQUARE.frames)
        held = [{key: video[nearest(frames)] for key, video in true.items()} for true in truths]
        fades = {"_faded": [faded(true, frames) for true in truths]} if known[name].between else {}
        for column, videos in {"": made, "_held": held, **fades, "_vae": trips}.items():
            rows = [measured(one, true, frames, NEAR[name]) for one, true in zip(videos, truths, strict=True)]
            figures |= {f"{name}_{key}{column}": float(np.mean([row[key] for row in rows])) for key in rows[0]}
        figures[f"{name}_given_latents_bit_equal"] = float(np.mean(equal))
    return figures


def made_frames(task: Task, frames: int) -> list[int]:
    """Return the frames that a task leaves to make, of a VAE whose stride in time is four."""
    given = {0, *frames_beside(task.every, frames)} if task.between else set(range(4 * (task.begin - 1) + 1))
    return [number for number in range(frames) if number not in given]


def nearest(made: Sequence[int]) -> list[int]:
    """Return for every frame the given one that is nearest, the earlier of two."""
    given = [number for number in range(SQUARE.frames) if number not in made]
    return [min(given, key=lambda other: (abs(other - number), other)) for number in range(SQUARE.frames)]


def faded(true: Streams, made: Sequence[int]) -> dict[str, np.ndarray]:
    """Return the video whose frames between given ones fade from the one to the other."""
    given = [number for number in range(SQUARE.frames) if number not in made]
    before = [max(other for other in given if other <= number) for number in range(SQUARE.frames)]
    after = [min(other for other in given if other >= number) for number in range(SQUARE.frames)]
    parts = [(n - a) / max(1, b - a) for n, (a, b) in enumerate(zip(before, after, strict=True))]
    share = np.array(parts)[:, None, None, None]
    return {
        name: ((1 - share) * video[before] + share * video[after]).round().astype(np.uint8)
        for name, video in true.items()
    }


def filled(
    source: SavedModel, runtime: Runtime, task: Task, captions: Sequence[str], truths: Sequence[Streams]
) -> tuple[list[Streams], list[bool]]:
    """Make what a task leaves of each true video; tell also of each whether the given latents are as they were."""
    config, layout = fit_layout(source.config, runtime, asked=False)
    source = dataclasses.replace(source, config=config)
    model = open_model(config.model)
    mesh, frames = meshes.build(layout, runtime), Frames(model, runtime.device)
    shape = task.cut(video_layout(config, model).with_beside(task.beside, SQUARE.frames))
    first = 4 * (task.begin - 1) + 1
    texts = encode_prompts(config, captions, model, runtime)
    videos = []
    for number, (caption, true) in enumerate(zip(captions, truths, strict=True)):
        begin = {n: frames.encode(true[name][:first]) for n, name in enumerate(shape.names)}
        beside = {
            one.stream: frames.encode_alone(true[shape.names[one.stream]][one.every :: one.every])
            for one in shape.beside
        }
        seed = config.sample.seed + number
        videos.append(Video(f"{number}", caption, texts.by_prompt[caption], seed, shape, begin, beside))
    sampler = Sampler(open_engine(source, mesh), mesh, config.sample, texts.negative, model)
    latents = [made for _, made in sampler.each(videos)]
    kept = [given_kept(video, one) for video, one in zip(videos, latents, strict=True)]
    return [frames.decode(one, shape) for one in latents], kept


def given_kept(video: Video, made: Tensor) -> bool:
    """Return whether packed latents [N] hold what was given, bit by bit."""
    pairs = zip(video.layout.segments, video.layout.unpack(made[None]), strict=True)
    held = [((video.beside if one.alone else video.given)[one.stream], part[0]) for one, part in pairs]
    return all(torch.equal(part[:, : given.shape[1]], given) for given, part in held)


def measured(streams: Streams, true: Streams, frames: Sequence[int], near: float) -> dict[str, float]:
    """Measure the frames that were made, of one video, against its scene."""
    rgb, alpha = streams["rgb"][frames], streams["seg"][frames].mean(-1) / 255
    shown = true["rgb"][frames]
    offs = [center_distance(rgb[n : n + 1], shown[n : n + 1]) for n in range(len(frames))]
    right = {
        "way": direction(rgb) == direction(true["rgb"]),
        "near": float(np.mean(offs)) <= near,
        "one": partly_lit(rgb) <= EDGE * partly_lit(shown),
    }
    motion = {**right, "motion": all(right.values()), "every": all(right.values()) and max(offs) <= EVERY_NEAR}
    figures = {"center_off": float(np.mean(offs)), "alpha_iou": silhouette_iou(rgb, alpha)}
    return {name: float(one) for name, one in motion.items()} | figures


def partly_lit(rgb: np.ndarray) -> float:
    """Return how many pixels are neither dark nor bright, as a share of the shape's; 1 where there is no shape."""
    brightness, shape = rgb.max(-1), silhouette(rgb)
    peaks = np.percentile(brightness.reshape(len(rgb), -1), 98, axis=1)[:, None, None]
    low, high = (share * peaks for share in PARTLY_LIT)
    return np.count_nonzero((brightness > low) & (brightness < high)) / np.count_nonzero(shape) if shape.any() else 1.0


ROWS = {
    "way": "{task}: what is made moves the right way",
    "near": "{task}: its centre is within {near:g} pixels of the truth's, mean over the frames",
    "one": "{task}: it is one shape, of which no more fades than {EDGE:g} times the truth's",
    "motion": "{task}: its motion is right, all three",
    "every": "{task}: and its centre is within {EVERY_NEAR:g} pixel in every frame",
    "center_off": "{task}: its centre differs from the truth's by (pixels)",
    "alpha_iou": "{task}: alpha lies on the RGB's shape (IoU at 0.5)",
    "given_latents_bit_equal": "{task}: given latents are bit-equal after sampling",
}


def table(figures: Mapping[str, float]) -> str:
    rows = (
        (
            title.format(task=task, near=near, EDGE=EDGE, EVERY_NEAR=EVERY_NEAR),
            [figures.get(f"{task}_{key}{column}") for column in ("", "_held", "_faded", "_vae")],
        )
        for task, near in NEAR.items()
        for key, title in ROWS.items()
    )
    return figures_table("held-out scenes", ("made", "held", "faded", "VAE"), rows, widths=(76, 8))


if __name__ == "__main__":
    raise SystemExit(run("demo_between", main))
