"""Compare a companion that lies in the channels of RGB's tokens with one that has tokens of its own, on the demo.

In the channels: one linear adds the companion's noisy latents to RGB's tokens, and one beside the head reads its
velocity off them. Both start at zero and train beside an adapter of all streams. Two bases of RGB are asked, the demo's
and one twice as wide, which is the demo's with each feature twice; both learn RGB further first. On each, companions of
either kind learn pairs alone (no mattes) from the same batches, noise and times. They are measured on held-out clips
after the same steps and after the same CPU seconds, and on samples of held-out captions. Prints a table, writes the
samples beside each other, and ends with one line of JSON. The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import demo_trainings
import numpy as np
from demo_figures import SHEET_ROWS, Videos, mean_figures, measured, sample, write_sheet
from demo_half_size import beside, write_rgb_rows
from demo_image import LEARN_ALL, write_clips
from demo_joined import Curve, Joined, Kind, Row, apart, losses_of, widened
from demo_measures import add_captions, held_out_captions
from demo_trainings import Trainings
from tooling import figures_table, run

from transpixeler.adapters.bases import on_trained_base
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.demo.model import ASSETS, trained_parts, write_pipeline
from transpixeler.demo.scenes import Format, scenes
from transpixeler.demo.write import write_pairs
from transpixeler.evaluation import metrics
from transpixeler.files import whole, write_text
from transpixeler.parallel.runtime import Runtime, log_to_terminal, quiet_libraries, running
from transpixeler.runs import metrics_file
from transpixeler.runs.folder import METRICS
from transpixeler.sampling.saves import base_model, load_saved

log = logging.getLogger("transpixeler")

FORMAT = Format(64, 64, 9, Fraction(16))
NOISE = 0.03  # of the wide base's matrices at its start, as a share of their deviation
WIDTHS = ("narrow", "wide")  # 192, the demo's, and 384
RATES = (1.0, 5.0, 20.0)  # of the new linears, times the adapter's
KEYS = (
    *demo_trainings.KEYS,
    "eval.samples=0",
    "sample.prompts=[]",
    "optim.schedule=constant",  # more steps are the same training, gone on with
)
MEAN = "optim.ema=0.95"  # of all trainings, as they are short
JOINT = "objective.tasks={joint: 1.0, rgb_to_aux: null}"
RGB_ALONE = ("data.eval=[]", "streams.seg=null", JOINT, *LEARN_ALL)
KINDS = {
    "channels": Kind("channels"),
    "channels_gated": Kind("gated", reading="gated"),
    "channels_whole": Kind("whole base", whole_base=True),
    "channels_mlp": Kind("MLP", reading="mlp"),
}


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    arguments = _parser().parse_intermixed_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    out: Path = arguments.out
    write_clips(out, arguments.clips, caption=lambda attributes: attributes.caption, format=FORMAT)
    write_rgb_rows(out)
    write_held_out(out, arguments.held_out)
    off = write_bases(out)
    with running() as runtime:
        experiment = Experiment(out, runtime, arguments)
        found: dict[str, Row] = {}
        plain, *others = KINDS
        for width in WIDTHS:
            found[f"{width}_tokens"] = experiment.tokens(width)
            found[f"{width}_{plain}"] = experiment.joined(width, plain)
        for name, width in itertools.product(others, WIDTHS):
            found[f"{width}_{name}"] = experiment.joined(width, name)
        tried = {
            f"{width}_rate_{rate:g}": row["seg"] for width in WIDTHS for rate, row in experiment.rates(width).items()
        }
    figures = {name: found[name] for width in WIDTHS for name in found if name.startswith(f"{width}_")}
    beside(out / "beside.png", [out / f"figures/{name}.png" for name in figures])
    print(table(figures))
    flat = {f"{name}_{key}": round(value, 4) for name, row in figures.items() for key, value in row.items()}
    print(json.dumps({"widening_off": off, **tried, **flat}))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("overrides", nargs="*", help="config keys of all trainings and of sampling, such as sample.steps=8")
    add("--clips", type=int, default=256, help="training clips (default: %(default)s)")
    add("--held-out", type=int, default=24, help="clips that losses are measured on (default: %(default)s)")
    add("--base-steps", type=int, default=200, help="steps of either base on RGB (default: %(default)s)")
    add("--steps", type=int, default=300, help="steps of a companion with tokens (default: %(default)s)")
    add("--rate-steps", type=int, default=100, help="steps that each rate is tried for (default: %(default)s)")
    add("--every", type=int, default=50, help="steps between two measurements (default: %(default)s)")
    add_captions(parser, default=16)
    return parser


# --- data and bases --------------------------------------------------------------------------------------------------


def write_held_out(out: Path, count: int) -> None:
    """Write the clips on which losses are measured, of captions that no training clip has."""
    if not (out / "held_out").is_dir():
        with whole(out / "held_out") as unfinished:
            write_pairs(unfinished, scenes(count, formats=[FORMAT], held_out=True, seed=13))


def write_bases(out: Path) -> float:
    """Write the pipelines that the bases start from; return how far the wide one is from the other without noise."""
    parts = trained_parts(ASSETS)
    off = apart(parts.transformer, widened(parts.transformer))
    assert off < 1e-5, f"widening changes what is computed, by {off:g}"
    if not (out / "bases/wide").is_dir():
        write_pipeline(out / "bases/narrow", parts)
        write_pipeline(out / "bases/wide", replace(parts, transformer=widened(parts.transformer, noise=NOISE)))
    return off


# --- trainings -------------------------------------------------------------------------------------------------------


class Experiment:
    """Train and measure, each as far as it is not there yet."""

    def __init__(self, out: Path, runtime: Runtime, arguments: argparse.Namespace) -> None:
        self.out, self.runtime, self.arguments = out.resolve(), runtime, arguments
        self.trainings = Trainings(out, runtime, self.config)
        self._made: dict[str, Videos] = {}  # by the bases alone

    def rates(self, width: str) -> dict[float, Row]:
        """Return the held-out losses with each rate of the new linears, after the same few steps."""
        found: dict[float, Row] = {}
        for rate in RATES:
            joined = self._joined(width, "channels", KINDS["channels"], rate)
            joined.until(self.arguments.rate_steps)
            found[rate] = joined.curve[self.arguments.rate_steps]
        return found

    def base(self, width: str) -> Path:
        """Return the run of a base that has learned RGB further."""
        begin = (f"model.path={self.out / 'bases' / width}", f"data.train={self.out / 'rgb.jsonl'}")
        keys = (*begin, *RGB_ALONE, "optim.schedule=cosine")
        return self.trainings.until(f"{width}_base", self.arguments.base_steps, *keys).parent

    def tokens(self, width: str) -> Row:
        """Return the figures of the product's own training, with tokens for the companion."""
        name, steps, every = f"{width}_tokens", self.arguments.steps, self.arguments.every
        keys = (f"model.path={self.base(width)}", JOINT, f"eval.every_steps={every}")
        save = self.trainings.until(name, steps, *keys)
        records = metrics_file.read_records(save.parent / METRICS)
        curve = {record["step"]: losses_of(record["eval"], "loss_ema") for record in records if "eval" in record}
        cpu = self.trainings.seconds(name)
        source = load_saved(str(save), self._sampling())
        made = partial(sample, source, self.runtime)
        row = {"step_cpu_seconds": cpu, "steps": steps} | told(curve, steps)
        return row | self._sampled(width, name, made, f"tokens {steps}")

    def joined(self, width: str, name: str) -> Row:
        """Return the figures of a companion in the channels, with the rate that is best with a linear on this base."""
        tried, kind, steps = self.rates(width), KINDS[name], self.arguments.steps
        joined = self._joined(width, name, kind, min(tried, key=lambda rate: tried[rate]["seg"]))
        joined.until(self.arguments.rate_steps)  # its seconds a step are known from here on
        cpu = self.trainings.seconds(f"{width}_tokens")
        joined.until(max(steps, round(steps * cpu / joined.seconds)))
        row = {"step_cpu_seconds": joined.seconds, "steps": joined.step} | told(joined.curve, steps)
        with joined.ema.swapped():
            made = partial(sample, base_model(joined.config), self.runtime, opened=lambda *_: joined.engine)
            state = f"{joined.kept.name} {joined.step}"
            return row | self._sampled(width, f"{width}_{name}", made, state)

    def _joined(self, width: str, name: str, kind: Kind, rate: float) -> Joined:
        """Return a training in the channels, as far as it has come."""
        vectors = json.dumps([{"pattern": "*companion*", "lr": 6e-3 * rate}])
        how = LEARN_ALL if kind.whole_base else ("lora.scope=all", "optim.lr=6e-3", f"optim.groups={vectors}")
        place = self.out / f"{width}_{name}{'' if kind.whole_base else f'_{rate:g}'}.pt"
        words = (f"model.path={self.base(width)}", JOINT, "train.max_steps=100000", *how)
        return Joined(self.config(*words), self.runtime, kind, place, self.arguments.every)

    def config(self, *keys: str) -> Config:
        """Return the demo's config for this size, with keys on top."""
        size = f"[{FORMAT.width}, {FORMAT.height}, {FORMAT.frames}]"
        sets = (f"data.train={self.out / 'clips'}", f"data.eval={self.out / 'held_out'}")
        places = (*sets, f"data.cache_dir={self.out / 'cache'}", f"data.sizes=[{size}]", f"sample.size={size}")
        words = [*places, *KEYS, *keys, MEAN, *self.arguments.overrides]
        return on_trained_base(loading.load(self.out / "demo/config.yaml", words))

    def _sampling(self) -> list[str]:
        return [word for word in self.arguments.overrides if word.startswith("sample.")]

    def _sampled(self, width: str, name: str, made: Callable[[Sequence[str]], Videos], state: str) -> Row:
        """Return means over samples of held-out captions, and draw the first; RGB drifts from the base's alone."""
        done, count = self.out / f"figures/{name}.json", self.arguments.captions
        asked = {"state": state, "captions": count, "sampling": self._sampling()}
        if done.is_file() and (found := json.loads(done.read_text()))["asked"] == asked:
            return found["figures"]
        log.info("%s: is measured", name)
        wanted = held_out_captions(count)
        captions = [one.caption for one in wanted]
        videos = made(captions)
        base = self._by_base(width, captions)
        drifts = [metrics.rgb_drift(*(of[n]["rgb"] / np.float32(255) for of in (videos, base))) for n in videos]
        rows = [measured(videos[n], one) for n, one in enumerate(wanted)]
        figures = mean_figures(rows) | {"rgb_drift": float(np.mean(drifts))}
        write_sheet(self.out / f"figures/{name}.png", [videos[n] for n in range(min(count, SHEET_ROWS))])
        write_text(done, json.dumps({"asked": asked, "figures": figures}))
        log.info("%s: %s", name, figures)
        return figures

    def _by_base(self, width: str, captions: Sequence[str]) -> Videos:
        """Return what a base alone makes of the captions."""
        if width not in self._made:
            config = self.config(f"model.path={self.base(width)}", *RGB_ALONE)
            self._made[width] = sample(base_model(config), self.runtime, captions)
        return self._made[width]


def told(curve: Curve, steps: int) -> Row:
    """Return the losses after so many steps, and at the end as `…_end`; of the base, where that was measured."""
    last = curve[max(curve)]
    row = {f"loss_{name}": value for name, value in curve[steps].items()}
    row |= {f"loss_{name}_end": value for name, value in last.items()}
    return row | ({"loss_rgb_base": curve[0]["rgb"]} if 0 in curve else {})


# --- for people ------------------------------------------------------------------------------------------------------

ROWS = {
    "step_cpu_seconds": "CPU seconds of a step",
    "steps": "steps in all, as many seconds as tokens' or more",
    "loss_seg": "companion's loss after as many steps as tokens'",
    "loss_seg_end": "companion's loss at the end",
    "loss_rgb_base": "RGB's loss before the first step, the base's",
    "loss_rgb": "RGB's loss after as many steps as tokens'",
    "loss_rgb_end": "RGB's loss at the end",
    "alpha_iou": "alpha lies on the RGB's shape (IoU at 0.5)",
    "alpha_opaque": "alpha of what is said to be opaque",
    "alpha_half_transparent": "alpha of what is said to be half transparent",
    "color": "RGB has the caption's colour",
    "direction": "RGB moves the caption's way",
    "rgb_drift": "RGB differs from the base's (mean, 0 to 1)",
}


def table(figures: Mapping[str, Row]) -> str:
    """Lay out a table for each base."""
    parts = []
    for width in WIDTHS:
        columns = {name: row for name, row in figures.items() if name.startswith(f"{width}_")}
        titles = [KINDS[end].title if (end := name.removeprefix(f"{width}_")) in KINDS else end for name in columns]
        rows = ((title, [row.get(name) for row in columns.values()]) for name, title in ROWS.items())
        parts.append(figures_table(f"held out, on the {width} base", titles, rows, widths=(50, 11)))
    return "\n".join(parts)


if __name__ == "__main__":
    raise SystemExit(run("demo_channels", main))
