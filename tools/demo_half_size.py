"""Compare a companion at half size with one at full size on the demo's scenes at 128×128, where half shows shapes.

The demo's base goes on learning RGB at that size. From it two adapters are trained, whose companions have scale 1 and
scale 2: the same steps, and the one of half size further, for as many CPU seconds as the other took in all. Pairs are
made of held-out captions, and mattes of held-out RGB, also of rings and stars alone, which are the thinnest shapes. The
VAE's round trip of the true companion, at either size, is what no training can better. Prints a table, writes the
samples beside each other, and ends with one line of JSON. The same command goes on where it stopped; on one CPU core it
takes about an hour.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
from demo_figures import SHEET_ROWS, against, held_out_clips, mean_figures, measured, sample, true_streams, write_sheet
from demo_image import LEARN_ALL, write_clips
from demo_measures import add_captions, held_out_captions, silhouette
from demo_trainings import KEYS, Trainings
from tooling import figures_table, run

from transpixeler.adapters.bases import on_trained_base
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.media.write import write_png
from transpixeler.demo.scenes import OPACITIES, Attributes, Format
from transpixeler.evaluation import metrics
from transpixeler.files import write_text
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.saves import SavedModel, base_model, load_saved

log = logging.getLogger("transpixeler")

FORMAT = Format(128, 128, 9, Fraction(16))
THIN = ("ring", "star")
SCALES = {"tokens": 1, "half": 2}  # name of the run: scale of its companion
RGB_ALONE = ("streams.seg=null", "objective.tasks={joint: 1.0, rgb_to_aux: null}", *LEARN_ALL)
ADAPTER = ("optim.schedule=constant",)  # so that one training of more steps is the other, gone on with
Row = dict[str, float]


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    arguments = _parser().parse_intermixed_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    out: Path = arguments.out
    write_clips(out, arguments.clips, caption=lambda attributes: attributes.caption, format=FORMAT)
    write_rgb_rows(out)
    with running() as runtime:
        learning = Learning(out, runtime, arguments.overrides)
        saves = learning.both(arguments.base_steps, arguments.steps)
        figures = {name: measure_once(out, name, save, runtime, arguments) for name, save in saves.items()}
        source = load_saved(str(saves["half_same_seconds"]), _sampling(arguments))
        figures |= {f"vae_{name}": vae_alone(source, scale, arguments.captions) for name, scale in SCALES.items()}
    beside(out / "beside.png", [out / f"figures/{name}.png" for name in saves])
    print(table(figures))
    flat = {f"{name}_{key}": round(value, 4) for name, row in figures.items() for key, value in row.items()}
    print(json.dumps(flat | learning.account()))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("overrides", nargs="*", help="config keys of all trainings and of sampling, such as sample.steps=8")
    add("--clips", type=int, default=384, help="training clips (default: %(default)s)")
    add("--base-steps", type=int, default=400, help="steps of the base at the new size (default: %(default)s)")
    add("--steps", type=int, default=500, help="steps of the adapter of scale 1 (default: %(default)s)")
    add_captions(parser, default=24)
    return parser


def _sampling(arguments: argparse.Namespace) -> list[str]:
    return [word for word in arguments.overrides if word.startswith("sample.")]


# --- data and training -----------------------------------------------------------------------------------------------


def write_rgb_rows(out: Path) -> None:
    """Write the manifest of the clips' RGB, from which the base learns."""
    captions = sorted((out / "clips").glob("*.txt"))
    rows = [{"rgb": f"clips/{path.stem}.mp4", "text": path.read_text().strip()} for path in captions]
    write_text(out / "rgb.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


class Learning:
    """Train the base and both adapters, each as far as it is not there yet."""

    def __init__(self, out: Path, runtime: Runtime, overrides: Sequence[str]) -> None:
        self.out, self.overrides = out.resolve(), overrides
        self.trainings = Trainings(out, runtime, self.config)

    def both(self, base_steps: int, steps: int) -> dict[str, Path]:
        """Return the saves to measure, by name."""
        until, seconds = self.trainings.until, self.trainings.seconds
        base = until("base", base_steps, f"data.train={self.out / 'rgb.jsonl'}", *RGB_ALONE)
        keys = {
            name: (f"model.path={base.parent}", f"streams.seg={{suffix: _seg, scale: {scale}}}", *ADAPTER)
            for name, scale in SCALES.items()
        }
        saves = {name: until(name, steps, *keys[name]) for name in SCALES}
        further = round(steps * seconds("tokens") / seconds("half"))
        same_seconds = until("half", further, *keys["half"])
        return {"tokens": saves["tokens"], "half_same_steps": saves["half"], "half_same_seconds": same_seconds}

    def config(self, *keys: str) -> Config:
        """Return the demo's config for this size, with keys on top."""
        size = f"[{FORMAT.width}, {FORMAT.height}, {FORMAT.frames}]"
        places = (f"data.cache_dir={self.out / 'cache'}", f"data.sizes=[{size}]", f"sample.size={size}")
        words = [f"data.train={self.out / 'clips'}", "data.eval=[]", *places, *KEYS, *keys, *self.overrides]
        return on_trained_base(loading.load(self.out / "demo/config.yaml", words))

    def account(self) -> dict[str, float]:
        """Return the CPU seconds of a step of each run."""
        return {f"{name}_step_cpu_seconds": round(self.trainings.seconds(name), 4) for name in SCALES}


# --- measuring -------------------------------------------------------------------------------------------------------


def measure_once(out: Path, name: str, save: Path, runtime: Runtime, arguments: argparse.Namespace) -> Row:
    """Return the figures of a save and draw its first samples, or return what was measured before."""
    done, asked = out / f"figures/{name}.json", {"captions": arguments.captions, "sampling": _sampling(arguments)}
    if done.is_file():
        found = json.loads(done.read_text())
        if found["asked"] == asked and found["save"] == str(save):
            return found["figures"]
    log.info("%s: is measured", name)
    source = load_saved(str(save), _sampling(arguments))
    figures = measure(source, runtime, count=arguments.captions, picture=out / f"figures/{name}.png")
    write_text(done, json.dumps({"asked": asked, "save": str(save), "figures": figures}))
    return figures


def measure(source: SavedModel, runtime: Runtime, *, count: int, picture: Path) -> Row:
    """Return means over held-out captions and held-out RGB, and those of thin shapes with `_thin` appended."""
    wanted, clips = held_out_captions(count), held_out_clips(source, count)
    captions = [one.caption for one in wanted]
    made, base = (sample(one, runtime, captions) for one in (source, base_model(source.config)))
    write_sheet(picture, [made[number] for number in range(min(count, SHEET_ROWS))])
    given = [true_streams(clip)["rgb"] for clip in clips]
    mattes = sample(source, runtime, [clip.attributes.caption for clip in clips], given=given)
    pairs = [pair_figures(made[n], base[n]["rgb"], one) for n, one in enumerate(wanted)]
    matted = [against(mattes[n], clip) for n, clip in enumerate(clips)]
    return by_thinness(pairs, wanted) | by_thinness(matted, [clip.attributes for clip in clips])


def pair_figures(made: Mapping[str, np.ndarray], base: np.ndarray, wanted: Attributes) -> dict[str, float]:
    """Measure a pair of a caption as the demo is, and alpha against the RGB's shape at the opacity that is said."""
    shape, alpha = silhouette(made["rgb"]) * OPACITIES[wanted.opacity], made["seg"].mean(-1) / 255
    drift = metrics.rgb_drift(made["rgb"] / np.float32(255), base / np.float32(255))
    return measured(made, wanted) | {"alpha_mad": metrics.mad(alpha, shape), "rgb_drift": drift}


def vae_alone(source: SavedModel, scale: int, count: int) -> Row:
    """Return the figures of true companions that the VAE encodes at a scale and gives back beside the true RGB."""
    import torch

    model, rows, clips = open_model(source.config.model), [], held_out_clips(source, count)
    frames, names = Frames(model, torch.device("cpu")), tuple(source.config.streams)
    layout = model.geometry.layout(names, (1, scale), (FORMAT.frames, FORMAT.height, FORMAT.width))
    for clip in clips:
        true = true_streams(clip)
        parts = [frames.encode(true[name], scale=size)[None] for name, size in zip(names, (1, scale), strict=True)]
        rows.append(against(frames.decode(layout.pack(parts)[0], layout, {0: true["rgb"]}), clip))
    return by_thinness(rows, [clip.attributes for clip in clips])


def by_thinness(rows: Sequence[Row], attributes: Sequence[Attributes]) -> Row:
    """Return means over all rows, and over those of thin shapes with `_thin` appended."""
    thin = [row for row, one in zip(rows, attributes, strict=True) if one.shape in THIN]
    return mean_figures(rows) | {f"{name}_thin": value for name, value in mean_figures(thin).items()}


# --- for people ------------------------------------------------------------------------------------------------------

COLUMNS = {
    "tokens": "scale 1",
    "half_same_steps": "2, steps",
    "half_same_seconds": "2, seconds",
    "vae_tokens": "VAE, 1",
    "vae_half": "VAE, 2",
}
ROWS = {
    "alpha_iou": "alpha lies on the RGB's shape (IoU at 0.5)",
    "alpha_mad": "alpha differs from that shape at the said opacity",
    "alpha_opaque": "alpha of what is said to be opaque",
    "alpha_half_transparent": "alpha of what is said to be half transparent",
    "matte_seg_iou": "matte of a given RGB against the truth (IoU)",
    "matte_seg_mad": "matte of a given RGB differs from the truth",
    "rgb_drift": "RGB differs from the base's (mean, 0 to 1)",
    "color": "RGB has the caption's colour",
}
THIN_ROWS = "_thin", ", thin shapes"  # ends of a figure's name and of its title


def table(figures: Mapping[str, Row]) -> str:
    titles = ((name + end, title + of) for name, title in ROWS.items() for end, of in (("", ""), THIN_ROWS))
    rows = ((title, [figures[column].get(name) for column in COLUMNS]) for name, title in titles)
    return figures_table("held-out captions", [*COLUMNS.values()], rows, widths=(60, 10))


def beside(path: Path, pictures: Sequence[Path]) -> None:
    """Put pictures of one height beside each other."""
    from PIL import Image

    write_png(path, np.concatenate([np.asarray(Image.open(one).convert("RGB")) for one in pictures], axis=1))


if __name__ == "__main__":
    raise SystemExit(run("demo_half_size", main))
