"""Teach the demo's base to continue an RGBA image as an RGBA video, and measure it on held-out scenes.

Clips of colourless captions ("a star drifts left, opaque") are written and the whole base is trained on them, so that
colour and place can only come from the image. Then each held-out scene's first frame, RGB and alpha, is given
and the rest is made. A control is given another scene's image and measured as before. Prints a table, writes strips of
frames over a checkerboard, and ends with one line of JSON. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import torch
from demo_figures import true_streams
from demo_measures import add_captions, silhouette, silhouette_iou
from tooling import figures_table, run
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.data.media.write import write_png
from transpixeler.data.sampled import video_layout
from transpixeler.demo.model import weights_digest
from transpixeler.demo.scenes import Attributes, Format, Scene, scenes
from transpixeler.demo.write import RECIPE, clip_names, write_demo, write_pairs
from transpixeler.evaluation import metrics
from transpixeler.files import whole, write_text
from transpixeler.flow.tasks import Task
from transpixeler.models.family import open_model
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel, load_saved
from transpixeler.sampling.texts import encode_prompts
from transpixeler.sampling.video import Video

log = logging.getLogger("transpixeler")

SQUARE = Format(64, 64, 17, Fraction(16))
KEYS = (
    "data.eval=[]",
    "data.frames=[17]",
    "eval.every_epochs=0",
    "eval.before_first_step=false",
    "sample.guidance=1",  # guidance leads towards the caption, which says no colour, and away from the image's
)
VECTORS = ("*.bias", "*norm*", "*patch_embedding.weight")  # what is no matrix between features
LEARN_ALL = (  # the base itself goes on learning
    *("lora.enabled=false", "optim.name=muon", "optim.lr=0.01", "optim.ema=0.99", "optim.warmup_steps=50"),
    f"optim.groups={json.dumps([{'pattern': pattern, 'lr': 6e-4} for pattern in VECTORS])}",
)
# From given frames; an adapter of scope all kept 70 % of the colours. They and motion are decided where noise is high.
WHOLE_BASE = (*LEARN_ALL, "objective.shift=4")
STAGES = {
    "taught": (
        *WHOLE_BASE,
        "objective.tasks={images_to_videos: 0.85, joint: 0.1, image_to_video: 0.05, rgb_to_aux: null}",
        "train.max_steps=2400",
    )
}
COLOR_NEAR = 32.0  # of 255, root mean square over the channels: the colours of the demo are 60 and more apart
CENTER_NEAR = 4.0  # pixels, mean over the frames: 1/16 of the side, where shapes drift by 18 to 25
OPACITY_NEAR = 0.1  # half transparent is 0.7, opaque 1
STRIP_FRAMES = 6
SHEET_ROWS = 8


@dataclasses.dataclass(frozen=True)
class Made:
    """One continued image: its streams as frames, and what became of the latents and pixels that were given."""

    streams: dict[str, np.ndarray]  # uint8 [F, H, W, 3]
    bit_equal: bool  # the given latents, in what was sampled
    pixels_off: int  # the largest difference of the first frame from the VAE's own round trip of the image, of 255


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    arguments = _parser().parse_intermixed_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    out: Path = arguments.out
    write_clips(out, arguments.clips)
    trained = train(out, arguments.overrides)
    source = load_saved(str(trained), [word for word in arguments.overrides if word.startswith("sample.")])
    with running() as runtime:
        figures = measure(source, runtime, count=arguments.captions, picture=out / "strips.png")
    print(table(figures))
    print(json.dumps(figures))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("overrides", nargs="*", help="config keys, such as train.max_steps=400")
    add("--clips", type=int, default=768, help="training clips (default: %(default)s)")
    add_captions(parser, default=40)
    return parser


# --- data and training -----------------------------------------------------------------------------------------------


def colorless(attributes: Attributes) -> str:
    """Return the caption without its colour."""
    return f"a {attributes.shape} drifts {attributes.direction}, {attributes.opacity}"


def write_clips(
    out: Path, count: int, *, caption: Callable[[Attributes], str] = colorless, format: Format = SQUARE
) -> None:
    """Write the demo and, beside its own clips, those with captions of another kind or of another format."""
    asked = json.dumps({"clips": count, "recipe": RECIPE, "weights": weights_digest()})
    begun = out / "begun.json"
    if begun.is_file() and begun.read_text() != asked:
        raise UserError(f"{out}: was begun with {begun.read_text()}, not {asked}; choose another folder")
    write_demo(out / "demo", train_clips=8, eval_clips=1)
    write_text(begun, asked)
    if (out / "clips").is_dir():
        return
    clips = scenes(count, formats=[format], held_out=False, seed=11)
    with whole(out / "clips") as unfinished:
        write_pairs(unfinished, clips)
        for name, scene in zip(clip_names(clips), clips):
            write_text(unfinished / f"{name}.txt", caption(scene.attributes) + "\n")


def train(out: Path, overrides: Sequence[str], *, stages: Mapping[str, tuple[str, ...]] | None = None) -> Path:
    """Train the stages that are not there yet, each from the one before, and return the last one's run."""
    before: Path | None = None
    for name, keys in (stages or STAGES).items():
        folder, learned = out / "demo/output" / name, out / f"{name}.learned"
        if not learned.is_file():
            resume = ("--resume",) * any(folder.glob("checkpoints/global_step*[0-9]"))
            if not resume:  # what was stopped before its first checkpoint begins anew
                shutil.rmtree(folder, ignore_errors=True)
            places = (f"data.train={out.resolve() / 'clips'}", f"data.cache_dir={out.resolve() / 'cache'}")
            begin = (f"lora.init_from={before.resolve()}",) if before else ()
            words = (*places, f"run_name={name}", *KEYS, *keys, *begin, *overrides, *resume)
            command = [sys.executable, "-m", "transpixeler", "train", str(out / "demo/config.yaml"), *words]
            log.info("learning: %s", " ".join(command[1:]))
            done = subprocess.run(command, stdout=subprocess.DEVNULL, env={"OMP_NUM_THREADS": "1"} | os.environ)
            if done.returncode:
                raise UserError(f"train ended with {done.returncode}; what it said stands above")
            write_text(learned, "")
        before = folder
    assert before is not None
    return before


# --- measuring -------------------------------------------------------------------------------------------------------


def measure(source: SavedModel, runtime: Runtime, *, count: int, picture: Path | None = None) -> dict[str, float]:
    """Return means over held-out scenes, with their own image and, as a control, with another scene's."""
    asked = scenes(count, formats=[SQUARE], held_out=True, seed=source.config.sample.seed + 1)
    truths = [true_streams(scene) for scene in asked]
    others = [truths[stranger(asked, number)] for number in range(count)]
    made = continued(source, runtime, asked, truths)
    control = continued(source, runtime, asked, others)
    if picture:
        write_strips(picture, [(true, one.streams) for true, one in zip(truths, made)][:SHEET_ROWS])
    figures = _means([measured(one.streams, true) for one, true in zip(made, truths)])
    figures["given_latents_bit_equal"] = float(np.mean([one.bit_equal for one in made]))
    figures["given_pixels_off"] = float(max(one.pixels_off for one in made))
    columns = {"control": [one.streams for one in control], "vae": round_trips(source, runtime, truths)}
    for column, videos in columns.items():
        means = _means([measured(streams, true) for streams, true in zip(videos, truths)])
        figures |= {f"{name}_{column}": value for name, value in means.items()}
    return figures


def round_trips(
    source: SavedModel, runtime: Runtime, truths: Sequence[Mapping[str, np.ndarray]]
) -> list[dict[str, np.ndarray]]:
    """Return true videos as the VAE gives them back: the best that any model with this VAE can make."""
    model = open_model(source.config.model)
    layout, frames = video_layout(source.config, model), Frames(model, runtime.device)
    encoded = [layout.pack([frames.encode(true[name])[None] for name in layout.names])[0] for true in truths]
    return [frames.decode(latents, layout) for latents in encoded]


def stranger(asked: Sequence[Scene], number: int) -> int:
    """Return the number of the next scene of another colour and another shape."""
    one = asked[number].attributes
    return next(
        other % len(asked)
        for other in range(number + 1, number + 1 + len(asked))
        if asked[other % len(asked)].attributes.color != one.color
        and asked[other % len(asked)].attributes.shape != one.shape
    )


def continued(
    source: SavedModel, runtime: Runtime, asked: Sequence[Scene], images: Sequence[Mapping[str, np.ndarray]]
) -> list[Made]:
    """Sample a video of each scene's colourless caption that begins with an image, RGB and alpha."""
    config, layout = fit_layout(source.config, runtime, asked=False)
    source = dataclasses.replace(source, config=config)
    model = open_model(config.model)
    mesh, frames = meshes.build(layout, runtime), Frames(model, runtime.device)
    shape = Task("", first=frozenset({0, 1})).cut(video_layout(config, model))
    captions = [colorless(scene.attributes) for scene in asked]
    texts = encode_prompts(config, captions, model, runtime)
    given = [{n: frames.encode(image[name][:1]) for n, name in enumerate(shape.names)} for image in images]
    videos = [
        Video(f"{n}", caption, texts.by_prompt[caption], config.sample.seed + n, shape, given[n])
        for n, caption in enumerate(captions)
    ]
    sampler = Sampler(open_engine(source, mesh), mesh, config.sample, texts.negative, model)
    return [_made(latents, videos[n], frames) for n, latents in sampler.each(videos)]


def _made(latents: Tensor, video: Video, frames: Frames) -> Made:
    """Decode what was sampled, and compare its beginning with what was given."""
    layout = video.layout
    streams = frames.decode(latents, layout)
    equal = given_kept([part[0] for part in layout.videos(latents[None])], video.given)
    image = StreamLayout(layout.names, tuple((c, 1, h, w) for c, _, h, w in layout.shapes), layout.patch)
    trip = frames.decode(image.pack([video.given[n][None] for n in sorted(video.given)])[0], image)
    offs = [int(np.abs(streams[name][:1].astype(int) - trip[name]).max()) for name in layout.names]
    return Made(streams, equal, max(offs))


def given_kept(made: Sequence[Tensor], given: Mapping[int, Tensor]) -> bool:
    """Return whether videos [C, F, H, W] begin with what was given, bit by bit."""
    return all(torch.equal(made[stream][:, : part.shape[1]], part) for stream, part in given.items())


def measured(streams: Mapping[str, np.ndarray], true: Mapping[str, np.ndarray]) -> dict[str, float]:
    """Measure one continued image against its scene; the given frame itself is left out."""
    rgb, alpha = streams["rgb"][1:], streams["seg"][1:].mean(-1) / 255
    image, matte = true["rgb"][:1], true["seg"].mean(-1) / 255
    shape, first = silhouette(rgb), silhouette(image)
    seen, opacity = (rgb[shape].mean(0), alpha[shape].mean()) if shape.any() else (np.full(3, 510.0), 2.0)
    color_off = float(np.sqrt(np.mean((seen - image[first].mean(0)) ** 2)))
    center_off = center_distance(rgb, true["rgb"][1:])
    goes_on = {"color": color_off <= COLOR_NEAR, "position": center_off <= CENTER_NEAR}
    return {
        "alpha_iou": silhouette_iou(rgb, alpha),
        "alpha_iou_truth": metrics.iou(alpha, matte[1:]),
        **{name: float(right) for name, right in goes_on.items()},
        "color_and_position": float(all(goes_on.values())),
        "opacity": float(abs(opacity - matte[:1][first].mean()) <= OPACITY_NEAR),
        "color_off": color_off,
        "center_off": center_off,
    }


def center_distance(rgb: np.ndarray, true: np.ndarray) -> float:
    """Return how many pixels the shape's centre is from the truth's, mean over the frames; the side where none is."""
    apart = [
        np.linalg.norm(np.argwhere(ours).mean(0) - np.argwhere(theirs).mean(0)) if ours.any() else len(ours)
        for ours, theirs in zip(silhouette(rgb), silhouette(true))
    ]
    return float(np.mean(np.array(apart, float)))


def _means(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}


# --- for people ------------------------------------------------------------------------------------------------------

ROWS = {
    "alpha_iou": "alpha lies on the continued RGB's shape (IoU at 0.5)",
    "alpha_iou_truth": "alpha against the scene's true alpha (IoU at 0.5)",
    "color": f"colour goes on from the image (within {COLOR_NEAR:g} of 255)",
    "position": f"position goes on (centre within {CENTER_NEAR:g} pixels of the truth)",
    "color_and_position": "both",
    "opacity": f"opacity goes on (within {OPACITY_NEAR:g})",
    "color_off": "colour differs from the image's by (of 255)",
    "center_off": "centre differs from the truth's by (pixels)",
    "given_latents_bit_equal": "given latents are bit-equal after sampling",
    "given_pixels_off": "largest difference of the given frame from the VAE's round trip",
}


def table(figures: Mapping[str, float]) -> str:
    rows = ((title, [figures.get(name + end) for end in ("", "_control", "_vae")]) for name, title in ROWS.items())
    return figures_table("held-out scenes", ("own image", "another", "VAE alone"), rows, widths=(66, 10))


def write_strips(path: Path, rows: Sequence[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]) -> None:
    """Draw two strips a scene, the truth's frames over what was made of its first: RGB over a checkerboard by alpha."""
    strips = []
    for pair in rows:
        for streams in pair:
            rgb, alpha = streams["rgb"], streams["seg"].mean(-1, keepdims=True) / 255
            board = ((np.indices(rgb.shape[1:3]) // 8).sum(0) % 2 * 60 + 150)[None, ..., None]
            shown = (rgb * alpha + board * (1 - alpha)).astype(np.uint8)
            times = np.linspace(0, len(rgb) - 1, STRIP_FRAMES).round().astype(int)
            strips.append(np.concatenate([view[t] for view in (shown, streams["seg"]) for t in times], axis=1))
    write_png(path, np.ascontiguousarray(np.concatenate(strips)))


if __name__ == "__main__":
    raise SystemExit(run("demo_image", main))
