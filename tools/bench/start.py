"""Time `transpixeler train` from the command to the end of its first step, part by part.

Every run is a fresh process of the real command on a demo's clips, stopped after one step; evaluations are off. `cold`
finds an empty cache and encodes the clips first; the others find all of them encoded. What remains of the whole after
all parts is `other`: reading the config, opening the run, the optimizer, the loader, telemetry.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PARTS = ("interpreter", "torch", "imports", "group", "cache", "build", "weights", "first_step", "other")
ONE_STEP_ALONE = ("eval.before_first_step=false", "eval.every_epochs=0", "train.max_steps=1")


def child(spawned: float, argv: list[str]) -> None:
    """Run the command with a clock around its parts, and print them once the first step is told."""
    spent = {"interpreter": time.time() - spawned}
    taken(spent, "torch", lambda: __import__("torch"))
    taken(spent, "imports", lambda: __import__("transpixeler.training.trainer"))
    from transpixeler import cli
    from transpixeler.parallel import build, runtime
    from transpixeler.training import parts, trainer

    for owner, name, part in (
        (runtime, "start", "group"),
        (trainer, "encode_missing", "cache"),
        (parts, "build_engines", "build"),
        (build, "fill", "weights"),
    ):
        clock(spent, owner, name, part)
    train = trainer.Trainer.train

    def train_once(self: Any) -> None:
        spent["first_step"] = -time.perf_counter()
        train(self)

    def told(self: Any, *_: Any) -> None:
        spent["first_step"] += time.perf_counter()
        spent["build"] -= spent["weights"]
        whole = time.time() - spawned
        print(json.dumps(spent | {"whole": whole, "other": whole - sum(spent.values())}), flush=True)
        os._exit(0)

    for name, replacement in (("train", train_once), ("_record", told)):
        setattr(trainer.Trainer, name, replacement)
    cli.main(argv)


def taken(spent: dict[str, float], part: str, work: Callable[[], Any]) -> Any:
    start = time.perf_counter()
    try:
        return work()
    finally:
        spent[part] = spent.get(part, 0.0) + time.perf_counter() - start


def clock(spent: dict[str, float], owner: Any, name: str, part: str) -> None:
    work = getattr(owner, name)
    setattr(owner, name, lambda *args, **options: taken(spent, part, lambda: work(*args, **options)))


def run(config: Path, *overrides: str) -> dict[str, float]:
    """Return the seconds of each part of one start."""
    command = [
        sys.executable,
        __file__,
        "--child",
        repr(time.time()),
        "train",
        str(config),
        *ONE_STEP_ALONE,
        *overrides,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not done.stdout:
        raise SystemExit(f"the command failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def write(folder: Path) -> Path:
    """Write a demo without its cache, in a process of its own, since this one loads no encoders."""
    code = "import sys, pathlib; from transpixeler.demo.write import write_demo as w; w(pathlib.Path(sys.argv[1]), "
    made = [sys.executable, "-c", code + "train_clips=10, eval_clips=2)", str(folder)]
    subprocess.run(made, check=True, capture_output=True)
    return folder / "config.yaml"


def main() -> None:
    # not above: the child's clock would find torch loaded
    import harness
    from rounds import Times

    parser = harness.parser(__doc__)
    parser.add_argument("--cached", type=Path, help="config of a demo whose clips are encoded: no cold start then")
    options = parser.parse_args()
    cold: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as name:
        config, output = options.cached, f"output_dir={name}/output"
        if config is None:
            config = write(Path(name) / "demo")
            cold = run(config, output)
        runs = [run(config, output) for _ in range(options.repeats)]
    warm = {part: statistics.median(found[part] for found in runs) for part in (*PARTS, "whole")}
    whole = Times(tuple(found["whole"] for found in runs))
    print(f"{'':12} {'cold s':>8} {'second s':>9}")
    for part in (*PARTS, "whole"):
        print(f"{part:12} {cold.get(part, float('nan')):8.2f} {warm[part]:9.2f}")
    figures = {"seconds": round(whole.median, 2), "spread": round(whole.spread, 3)}
    figures |= {f"{part}_seconds": round(warm[part], 3) for part in PARTS}
    if cold:
        figures |= {"cold_seconds": round(cold["whole"], 2), "cold_cache_seconds": round(cold["cache"], 2)}
    harness.finish("start", figures, record=not options.no_record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
