"""Count what `plan` takes for many rows of a folder of shards: seconds of CPU time and memory, by the rows.

The rows name two files each, which are empty, and whose probes are remembered as if they had been looked at before: so
what is counted is reading rows, asking the file system, recalling probes, and putting clips in order. Each plan is a
process of its own, so that its largest memory is its own; a plan of few rows tells what all plans take.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from fractions import Fraction
from pathlib import Path

ROWS = (10, 100_000, 1_000_000)
SHARDS = 20
LONG_AGO = 10**18  # of every file: in nanoseconds
WORDS = ("a red star", "round ring", "of fire", "smoke", "flies slowly", "turns", "falls over", "dark", "at night")
CONFIG = """\
model: {path: model}
streams: {rgb: "", seg: _seg}
train: {epochs: 1}
data: {train: set, cache_dir: cache, resolutions: [480], frames: [33, 81]}
"""
# The largest memory that the system tells of a process begins with that of the process which started it: this asks for
# the program's own.
PLAN = """
import sys
from transpixeler.cli import main
code = main(sys.argv[1:])
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
raise SystemExit(code)
"""


def write_set(folder: Path, rows: int) -> None:
    """Write a folder of shards, their files, the memory of their probes, and a config; the demo's model is beside."""
    from transpixeler.demo.model import write_model

    write_model(folder / "model", seed=0)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "set").mkdir()
    each = -(-rows // SHARDS)
    for shard in range(SHARDS):
        some = range(shard * each, min(rows, shard * each + each))
        with (folder / "set" / f"part{shard:02}.jsonl").open("w", encoding="utf-8") as out:
            for number in some:
                first = f"../files/{number // 1000:04}/{number:07}"
                caption = " ".join(random.Random(number).choices(WORDS, k=16)) + f" {number}"
                row = {"rgb": f"{first}.mp4", "seg": f"{first}_seg.mp4", "text": caption, "num_frames": 81}
                out.write(json.dumps(row) + "\n")
    _write_probes(folder, rows)


def _write_probes(folder: Path, rows: int) -> None:
    """Make the files, and remember them as videos of two shapes."""
    from transpixeler.data.media.clip import Media
    from transpixeler.data.media.probe import Probes, stamp_of

    kinds = [Media(81, *size, Fraction(16), Fraction(81, 16), False) for size in ((480, 832), (832, 480))]
    probes = Probes(folder / "cache")
    for number in range(rows):
        first = folder / "set" / ".." / "files" / f"{number // 1000:04}" / f"{number:07}"
        if number % 1000 == 0:
            (folder / "files" / f"{number // 1000:04}").mkdir(parents=True)
        for path in (f"{first}.mp4", f"{first}_seg.mp4"):
            os.close(os.open(path, os.O_CREAT))
            os.utime(path, ns=(LONG_AGO, LONG_AGO))
            probes.remember(Path(path), stamp_of(path) or (0, 0), kinds[number % 2])
    probes.save()


def plan(config: Path, *words: str) -> dict[str, float]:
    """Plan in a process of its own."""
    command = [sys.executable, "-c", PLAN, "plan", str(config), *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    *_, kilobytes = process.stdout.read().split()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit("a plan has failed; it said why above")
    figures = {"cpu_s": used.ru_utime + used.ru_stime, "mb": int(kilobytes) / 1000}
    return figures | {"wall_s": time.perf_counter() - started}


def main() -> None:
    import harness

    given = harness.parser(__doc__)
    given.add_argument("--rows", type=int, nargs="+", default=ROWS)
    given.add_argument("--keep", type=Path, metavar="FOLDER", help="a folder for the sets, which stay there")
    options = given.parse_args()
    figures: dict[str, object] = {}
    with tempfile.TemporaryDirectory() as made:
        for rows in options.rows:
            folder = (options.keep or Path(made)) / str(rows)
            if not (folder / "cache" / "probes.tsv").exists():
                write_set(folder, rows)
            found = {name: round(value, 1) for name, value in plan(folder / "config.yaml").items()}
            print(f"{rows:>9,} rows: {found}", flush=True)
            figures[str(rows)] = found
    harness.finish("rows", figures, record=not options.no_record)


if __name__ == "__main__":
    main()
