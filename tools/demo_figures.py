"""Measure what the demo's training has taught: sample held-out captions with the adapter and without it.

Prints a table, writes a picture of the first samples, and ends with one line of JSON. Under torchrun the captions are
shared out.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from demo_measures import add_captions, follows, held_out_captions, silhouette, silhouette_iou
from tooling import figures_table, run

from transpixeler.config.sections import UserError
from transpixeler.data.media.write import write_png
from transpixeler.data.sampled import video_layout
from transpixeler.demo.scenes import Attributes, Format, Scene, heights, render, scenes
from transpixeler.evaluation import metrics
from transpixeler.models.family import open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel, base_model, load_saved
from transpixeler.sampling.texts import encode_prompts
from transpixeler.sampling.video import Video

SHEET_ROWS = 6  # samples in the picture
MATTING_TASK = "rgb_to_aux"
STREAMS = ("rgb", "seg", "depth")

Open = Callable[[SavedModel, meshes.Mesh], AnyEngine]
Videos = dict[int, dict[str, np.ndarray]]  # number of the sample: stream: uint8 [F, H, W, 3]


def main(argv: Sequence[str]) -> None:
    """Sample, measure, and print a table and a line of JSON."""
    arguments = _parser().parse_intermixed_args(argv)
    started = arguments.since or time.time()
    quiet_libraries()
    source = load_saved(str(arguments.run), arguments.overrides, ema=False if arguments.raw else None)
    _check(source, arguments.run)
    with running() as runtime:
        log_to_terminal(runtime.rank)
        figures = measure(source, runtime, count=arguments.captions, picture=arguments.picture)
        if runtime.is_main:
            print(table(figures))
            print(json.dumps(plain(figures) | {"seconds": round(time.time() - started)}))


def _check(source: SavedModel, asked: Path) -> None:
    """Refuse a run that cannot be measured, before minutes of sampling."""
    streams = tuple(source.config.streams)
    if len(streams) < 2:
        raise UserError(f"{asked}: was trained with one stream; there is no companion to measure")
    if not {*streams} <= {*STREAMS}:
        raise UserError(f"{asked}: has streams {', '.join(streams)}; the demo's are {', '.join(STREAMS)}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("run", type=Path, help="a run's folder, or a save")
    add("overrides", nargs="*", help="config keys, such as sample.steps=10")
    add_captions(parser, default=20)
    add("--raw", action="store_true", help="measure the weights themselves, not their running mean")
    add("--picture", type=Path, help="a PNG of the first samples")
    add("--since", type=float, help="start of the timed work, in seconds since 1970 (default: now)")
    return parser


Figures = dict[str, dict[str, float]]  # what was sampled: measure: value


def measure(source: SavedModel, runtime: Runtime, *, count: int, picture: Path | None = None) -> Figures:
    """Return means over the captions, with the adapter and for the base; mattes too if those were trained."""
    wanted = held_out_captions(count)
    captions = [attributes.caption for attributes in wanted]
    made, base = (sample(one, runtime, captions) for one in (source, base_model(source.config)))
    figures = {
        name: mean_figures([measured(videos[number], attributes) for number, attributes in enumerate(wanted)])
        for name, videos in (("adapter", made), ("base", base))
    }
    drifts = [metrics.rgb_drift(made[n]["rgb"] / np.float32(255), base[n]["rgb"] / np.float32(255)) for n in made]
    figures["adapter"]["rgb_drift"] = float(np.mean(drifts))
    if picture and runtime.is_main:
        write_sheet(picture, [made[number] for number in range(min(count, SHEET_ROWS))])
    if source.config.objective.tasks.get(MATTING_TASK, 0) > 0:
        clips = held_out_clips(source, count)
        given, captions = [true_streams(clip)["rgb"] for clip in clips], [clip.attributes.caption for clip in clips]
        for one, measures in ((source, figures["adapter"]), (base_model(source.config), figures["base"])):
            mattes = sample(one, runtime, captions, given=given)
            measures |= mean_figures([against(mattes[number], clip) for number, clip in enumerate(clips)])
    return figures


def sample(
    source: SavedModel,
    runtime: Runtime,
    captions: Sequence[str],
    *,
    given: Sequence[np.ndarray] | None = None,
    opened: Open = open_engine,
) -> Videos:
    """Sample a video of each caption, seeds counting up from `sample.seed`; every rank gets all of them.

    opened: gives the engine that samples, where that is not the saved model's own.
    """
    config, layout = fit_layout(source.config, runtime, asked=False)
    source = dataclasses.replace(source, config=config)
    model = open_model(config.model)
    shape, mesh = video_layout(config, model), meshes.build(layout, runtime)
    frames = Frames(model, runtime.device)
    texts = encode_prompts(config, captions, model, runtime)
    videos = [
        Video(f"{n}", caption, texts.by_prompt[caption], config.sample.seed + n, shape, _latents(given, n, frames))
        for n, caption in enumerate(captions)
    ]
    sampler = Sampler(opened(source, mesh), mesh, config.sample, texts.negative, model)
    own = {n: frames.decode(latents, shape) for n, latents in sampler.each(videos) if mesh.speaks}
    return {n: streams for part in runtime.gather(own) for n, streams in part.items()}


def _latents(given: Sequence[np.ndarray] | None, number: int, frames: Frames) -> Mapping:
    return {0: frames.encode(given[number])} if given is not None else {}


# --- measures --------------------------------------------------------------------------------------------------------


def measured(streams: Mapping[str, np.ndarray], wanted: Attributes) -> dict[str, float]:
    """Measure one sampled pair; opacity is the mean alpha inside the shape that the RGB shows."""
    rgb, aux, *_ = streams.values()
    alpha, shape = aux.mean(-1) / 255, silhouette(rgb)
    found = {
        "alpha_iou": silhouette_iou(rgb, alpha),
        "channel_spread": metrics.channel_spread(aux / np.float32(255)),
        **{name: float(right) for name, right in follows(rgb, wanted).items()},
    }
    if shape.any():
        found[f"alpha_{wanted.opacity.replace(' ', '_')}"] = float(alpha[shape].mean())
    return found


def against(streams: Mapping[str, np.ndarray], scene: Scene) -> dict[str, float]:
    """Compare every companion that was made of a given RGB with the truth."""
    true, found = true_streams(scene), {}
    for name in [*streams][1:]:
        ours, theirs = (video[name].mean(-1) / 255 for video in (streams, true))
        found |= {f"matte_{name}_mad": metrics.mad(ours, theirs), f"matte_{name}_iou": metrics.iou(ours, theirs)}
    return found


def mean_figures(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: float(np.mean([row[name] for row in rows if name in row])) for name in names}


def held_out_clips(source: SavedModel, count: int) -> Sequence[Scene]:
    model = open_model(source.config.model)
    frames, height, width = model.geometry.pixels(video_layout(source.config, model).shapes[0])
    format = Format(width, height, frames, Fraction(source.config.data.fps))
    return scenes(count, formats=[format], held_out=True, seed=source.config.sample.seed + 1)


def true_streams(scene: Scene) -> dict[str, np.ndarray]:
    """Render a scene's streams, uint8 [F, H, W, 3], by the names that the demo's config gives them."""
    frames, depth = np.stack(list(render(scene))), np.stack(list(heights(scene)))
    return dict(zip(STREAMS, (frames[..., :3], frames[..., 3:].repeat(3, -1), depth.repeat(3, -1)), strict=True))


# --- for people and for programs -------------------------------------------------------------------------------------

ROWS = {
    "alpha_iou": "alpha lies on the RGB's shape (IoU at 0.5)",
    "channel_spread": "channel spread of the companion (0 is grey)",
    "alpha_opaque": "alpha of what is said to be opaque",
    "alpha_half_transparent": "alpha of what is said to be half transparent",
    "color": "RGB has the caption's colour",
    "direction": "RGB moves the caption's way",
    "rgb_drift": "RGB differs from the base's (mean, 0 to 1)",
    "matte_seg_mad": "matte of a given RGB differs from the truth",
    "matte_seg_iou": "matte of a given RGB against the truth (IoU)",
    "matte_depth_mad": "depth of a given RGB differs from the truth",
}


def table(figures: Figures) -> str:
    with_adapter, base = figures["adapter"], figures["base"]
    rows = ((title, (with_adapter[name], base.get(name))) for name, title in ROWS.items() if name in with_adapter)
    return figures_table("held-out captions", ("adapter", "base"), rows, widths=(46, 8))


def plain(figures: Figures) -> dict[str, float]:
    """Flatten the figures: the adapter's under their names, the base's with `_base` appended."""
    flat = dict(figures["adapter"]) | {f"{name}_base": value for name, value in figures["base"].items()}
    return {name: round(value, 4) for name, value in flat.items()}


def write_sheet(path: Path, videos: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Draw a row for each sample: RGB, companion, and both over a checkerboard, at three times."""
    rows = []
    for streams in videos:
        rgb, aux, *_ = streams.values()
        board = (np.indices(rgb.shape[1:3]) // 8).sum(0) % 2 * 60 + 150
        alpha = aux.mean(-1, keepdims=True) / 255
        shown = (rgb * alpha + board[None, ..., None] * (1 - alpha)).astype(np.uint8)
        times = (0, len(rgb) // 2, len(rgb) - 1)
        rows.append(np.concatenate([view[t] for t in times for view in (rgb, aux, shown)], axis=1))
    write_png(path, np.ascontiguousarray(np.concatenate(rows)))


if __name__ == "__main__":
    raise SystemExit(run("demo_figures", main))
