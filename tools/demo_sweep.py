"""Train and measure one adapter for each of several changes to the demo's config; print them as a Markdown table.

Rows that were measured before are not done again, so that the same command goes on where it stopped. On two CPU cores
a row takes about two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from demo_measures import add_captions
from tooling import processes, run, torchrun

from transpixeler.config.sections import UserError
from transpixeler.demo.model import weights_digest
from transpixeler.files import write_text
from transpixeler.parallel.runtime import log_to_terminal

FIGURES = Path(__file__).with_name("demo_figures.py")
NOTHING_BESIDE_TRAINING = (
    "eval.every_epochs=0",
    "eval.before_first_step=false",
    "checkpoint.every_steps=0",
    "save.every_steps=0",
)
BOTH_TASKS = "objective.tasks={joint: 0.8, rgb_to_aux: 0.2}"  # mattes are measured even if the row did not train them


@dataclass(frozen=True)
class Row:
    """One adapter: its name in the table, the config keys that differ, and what is measured."""

    name: str
    keys: tuple[str, ...] = ()
    raw: bool = False
    depth: bool = False

    @property
    def run_name(self) -> str:
        """Return the name of the run folder."""
        return re.sub(r"\W+", "-", self.name if self.keys or self.depth else "the demo's config").strip("-")


ROWS = (
    Row("the demo's config"),
    Row("its weights themselves, not their running mean", raw=True),
    Row("rank 4", ("lora.rank=4",)),
    Row("rank 16", ("lora.rank=16",)),
    Row("rank 64", ("lora.rank=64",)),
    Row("a DoRA of the same rank", ("lora.kind=dora",)),
    Row("scope all", ("lora.scope=all",)),
    Row("the RGB does not attend the companion", ("model.rgb_attends_aux=false",)),
    Row("joint alone, no matting", ("objective.tasks={joint: 1.0, rgb_to_aux: null}",)),
    Row("three streams", depth=True),
    Row("three streams, each companion its own matrices", ("lora.per_stream=true",), depth=True),
)
COLUMNS = {
    "alpha_iou": "alpha on the RGB's shape, IoU",
    "alpha_opaque": "alpha, opaque",
    "alpha_half_transparent": "alpha, half transparent",
    "channel_spread": "channel spread",
    "color": "colour",
    "direction": "direction",
    "rgb_drift": "RGB against the base's",
    "matte_seg_iou": "matte, IoU",
    "matte_seg_mad": "matte, MAD",
    "matte_depth_mad": "depth, MAD",
}


def main(argv: Sequence[str]) -> None:
    """Measure the rows that were asked for and print them."""
    arguments = _parser().parse_intermixed_args(argv)
    log_to_terminal(0)
    rows = [row for row in ROWS if not arguments.only or row.name in arguments.only]
    unknown = sorted({*arguments.only} - {row.name for row in rows})
    if unknown:
        raise UserError(f"--only: there is no row {unknown[0]!r}; there are {', '.join(row.name for row in ROWS)}")
    found = {row.name: _measured(row, arguments.out, arguments) for row in rows}
    print(table(found))
    print(json.dumps(found))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is measured there is not done again")
    add("overrides", nargs="*", help="config keys for every row, such as train.max_steps=400")
    add("--only", action="append", default=[], metavar="ROW", help="this row, by its name; may be given again")
    add_captions(parser, default=20)
    add("--nproc", type=int, help="processes (default: one a GPU, two without)")
    return parser


def _measured(row: Row, out: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Train a row's adapter and return its figures, or those that were measured before."""
    asked = {"captions": arguments.captions, "keys": arguments.overrides, "weights": weights_digest()}
    done = out / "figures" / f"{row.run_name}{'-raw' if row.raw else ''}.json"
    if done.is_file():
        found = json.loads(done.read_text())
        if found["asked"] != asked:
            raise UserError(f"{done}: was measured with {found['asked']}, not {asked}; choose another folder")
        return found["figures"]
    folder, launcher = out / ("triple" if row.depth else "pair"), torchrun(arguments.nproc or processes())
    _run("-m", "transpixeler", "demo", folder, *(["--depth"] if row.depth else []))
    trained = folder / "output" / row.run_name
    if not any(trained.glob("step*")):  # a training that was stopped begins anew: it had no checkpoint
        shutil.rmtree(trained, ignore_errors=True)
        keys = (*NOTHING_BESIDE_TRAINING, *row.keys, *arguments.overrides, f"run_name={row.run_name}")
        _run(*launcher, "-m", "transpixeler", "train", folder / "config.yaml", *keys)
    command = (*launcher, FIGURES, trained, BOTH_TASKS, "--captions", arguments.captions)
    said = _run(*command, *(["--raw"] if row.raw else []))
    figures = json.loads(said.splitlines()[-1])
    write_text(done, json.dumps({"asked": asked, "figures": figures}))
    return figures


def _run(*words: object) -> str:
    """Run a Python program, its log on the terminal, and return what it prints."""
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env={"OMP_NUM_THREADS": "1"} | os.environ)
    if done.returncode:
        raise UserError(f"{' '.join(command[1:])}: ended with {done.returncode}; what it said stands above")
    return done.stdout


def table(found: Mapping[str, Mapping[str, float]]) -> str:
    """Write the Markdown table: the base, then a row for each adapter."""
    base = {name.removesuffix("_base"): value for name, value in next(iter(found.values())).items() if "_base" in name}
    lines = [f"| trained | {' | '.join(COLUMNS.values())} |", f"|---{'|---' * len(COLUMNS)}|"]
    for name, figures in {"nothing: the base": base, **found}.items():
        cells = (f"{figures[column]:.3f}" if column in figures else "–" for column in COLUMNS)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(run("demo_sweep", main))
