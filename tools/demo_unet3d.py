"""Teach a tiny 3D U-Net the demo's RGBA scenes from nothing, on pixels, and measure how alpha lies on RGB.

`transpixeler init` makes the network beside a random text encoder, whose mean tells captions by their words. It is
trained in full on pairs of RGB and alpha, joined in its channels; held-out captions are then sampled. Prints a table,
writes a picture, and ends with one line of JSON.

The same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

from demo_figures import measure, plain, table
from demo_measures import add_captions
from tooling import run

from transpixeler.config.sections import UserError
from transpixeler.demo.model import TEXT_DIM, random_parts
from transpixeler.demo.scenes import Format, scenes
from transpixeler.demo.write import write_pairs
from transpixeler.files import whole, write_text
from transpixeler.parallel.runtime import log_to_terminal, quiet_libraries, running
from transpixeler.sampling.saves import load_saved

CLIP = Format(32, 32, 4, Fraction(8))
SHAPE: dict[str, Any] = {
    "dim": 16,
    "dim_mults": [1, 2, 4],
    "cond_dim": TEXT_DIM,
    "heads": 2,
    "head_dim": 16,
    "first_kernel": 5,
}
CONFIG = """\
output_dir: {out}/output
run_name: joint
model: {{family: unet3d, path: {out}/base}}
streams: {{rgb: "", seg: _seg}}
data: {{train: {out}/data/train, cache_dir: {out}/cache, fps: 8, resolutions: [32], frames: [4]}}
lora: {{enabled: false}}
objective: {{density: uniform}}
optim: {{lr: 2.0e-3, warmup_steps: 50, schedule: cosine, weight_decay: 0.0, ema: 0.99}}
train: {{max_steps: {steps}, global_batch: {batch}, micro_batch: {batch}}}
checkpoint: {{every_steps: 100, keep: 1}}
save: {{every_epochs: 0, every_steps: {steps}}}
eval: {{every_epochs: 0, before_first_step: false, samples: 0}}
sample: {{size: [32, 32, 4], steps: 100, guidance: 2, scheduler: ddpm, shift: auto, negative_prompt: ""}}
"""


def main(argv: Sequence[str]) -> None:
    """Do each part that is not there yet, and measure."""
    arguments = _parser().parse_args(argv)
    log_to_terminal(0)
    quiet_libraries()
    out: Path = arguments.out.absolute()
    if not (out / "data/train").is_dir():
        with whole(out / "data/train") as unfinished:
            write_pairs(unfinished, scenes(arguments.clips, formats=[CLIP], held_out=False, seed=0))
    _base(out)
    folder = _train(out, arguments.steps, arguments.batch)
    with running() as runtime:
        settings = [f"sample.scheduler={arguments.scheduler}", f"sample.steps={arguments.sample_steps}"]
        source = load_saved(str(folder), settings)
        figures = measure(source, runtime, count=arguments.captions, picture=out / f"{arguments.scheduler}.png")
    print(table(figures))
    print(json.dumps(plain(figures)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("out", type=Path, help="the folder to work in; what is finished there is not done again")
    add("--clips", type=int, default=600, help="training pairs (default: %(default)s)")
    add("--steps", type=int, default=1000, help="steps of the training (default: %(default)s)")
    add("--batch", type=int, default=8, help="samples a step (default: %(default)s)")
    add("--scheduler", choices=("ddpm", "ddim"), default="ddpm", help="for the samples (default: %(default)s)")
    add("--sample-steps", type=int, default=100, help="steps of a sample (default: %(default)s)")
    add_captions(parser, default=20)
    return parser


def _base(out: Path) -> None:
    """Write the network of random weights, and the text encoder that it is told captions by."""
    if (out / "base").is_dir():
        return
    if not (out / "encoders").is_dir():
        parts = random_parts(0)
        with whole(out / "encoders") as unfinished:
            parts.text_encoder.save_pretrained(unfinished / "text_encoder")
            parts.tokenizer.save_pretrained(unfinished / "tokenizer")
    write_text(out / "shape.json", json.dumps(SHAPE))
    words = ["--family", "unet3d", "--shape", out / "shape.json", "--encoders", out / "encoders", "--out", out / "base"]
    subprocess.run([sys.executable, "-m", "transpixeler", "init", *map(str, words)], check=True)


def _train(out: Path, steps: int, batch: int) -> Path:
    """Train, or go on with a training; return the save's folder."""
    folder = out / "output/joint"
    if (folder / f"step{steps}").is_dir():
        return folder
    write_text(out / "config.yaml", CONFIG.format(out=out, steps=steps, batch=batch))
    resume = ["--resume", str(folder)] if folder.is_dir() else []
    command = [sys.executable, "-m", "transpixeler", "train", str(out / "config.yaml"), *resume]
    if subprocess.run(command).returncode:
        raise UserError(f"{out}: the training did not come to its end; the same command goes on from there")
    return folder


if __name__ == "__main__":
    raise SystemExit(run("demo_unet3d", main))
