"""Run a part of the tests in environments of their own: newest and oldest packages, on the Python that runs this.

In: pyproject.toml's ranges. Out: a row of a Markdown table for each environment; --record puts it into the guide. This
needs nothing but Python itself, so that any interpreter can run it:

    python3.13 tools/versions.py newest --folder /tmp/versions
    python3.10 tools/versions.py oldest --folder /tmp/versions tests/config tests/models
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import venv
from collections.abc import Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "transpixeler/docs/contributing.md"
# what touches torch, diffusers and each other most: the model, its layouts, training, one family after another
PART = (
    "tests/models",
    "tests/flow",
    "tests/parallel",
    "tests/training/test_optim.py",
    "tests/training/test_resume.py",
    "tests/families/conformance",
)
WORKERS = ("-p", "no:cacheprovider", "--numprocesses", "auto", "--maxprocesses", "8", "--dist", "worksteal")
SHOWN = ("torch", "diffusers", "transformers", "torchao", "safetensors", "av", "numpy", "peft")
HEAD = ("packages", "python", *SHOWN, "tests", "outcome")
LOWER = re.compile(r">=(?=[0-9.]+$)")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return 0 where all tests passed."""
    options = _parser().parse_intermixed_args(argv)
    python = _environment(options.packages, options.folder, fresh=options.fresh)
    chosen = options.tests or [*PART]
    done = subprocess.run(
        [python, "-m", "pytest", *WORKERS, *chosen, *(["-k", options.only] if options.only else [])],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    print(done.stdout, file=sys.stderr)
    row = (options.packages, platform.python_version(), *_versions(python), _named(options), _outcome(done))
    print(_line(HEAD), _line(["---"] * len(HEAD)), _line(row), sep="\n")
    if options.record:
        GUIDE.write_text(recorded(GUIDE.read_text(encoding="utf-8"), row), encoding="utf-8")
    return done.returncode


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="versions", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("packages", choices=("newest", "oldest"), help="of each range in pyproject.toml")
    parser.add_argument("tests", nargs="*", help="paths of tests, as pytest takes them; otherwise a part of the suite")
    parser.add_argument("-k", dest="only", default="", metavar="EXPRESSION", help="pytest's own -k")
    parser.add_argument(
        "--folder", type=Path, required=True, help="where environments are made, some GB each, and kept"
    )
    parser.add_argument("--fresh", action="store_true", help="make the environment anew")
    parser.add_argument("--record", action="store_true", help=f"put the row into {GUIDE.relative_to(ROOT)}")
    return parser


# -- environments


def _environment(packages: str, folder: Path, *, fresh: bool) -> str:
    """Return the Python of an environment with the packages, made where it is not there."""
    place = folder.resolve() / f"{packages}-{sys.version_info.major}.{sys.version_info.minor}"
    python, ready = str(place / "bin/python"), place / "ready"
    if fresh or not ready.is_file():
        ready.unlink(missing_ok=True)
        print(f"versions: making {place}", file=sys.stderr)
        venv.create(place, clear=True, with_pip=True)
        wanted = requirements((ROOT / "pyproject.toml").read_text(), oldest=packages == "oldest")
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*install, *wanted], check=True)
        ready.touch()
    return python


def requirements(pyproject: str, *, oldest: bool) -> list[str]:
    """Return what is always needed, at its lower bound where the oldest is asked for, and what the tests need."""
    needed, dev = (
        re.findall(r'"([^"]+)"', pyproject.split(f"\n{name} = [", 1)[1].split("\n]", 1)[0])
        for name in ("dependencies", "dev")
    )
    return [LOWER.sub("==", one) for one in needed] + dev if oldest else needed + dev


def _versions(python: str) -> list[str]:
    code = f"import importlib.metadata as m, json; print(json.dumps([m.version(n) for n in {SHOWN!r}]))"
    return json.loads(subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout)


# -- the table


def _named(options: argparse.Namespace) -> str:
    said = f"`{' '.join(options.tests)}`" if options.tests else "the usual part"
    return said + (f", `-k '{options.only}'`" if options.only else "")


def _outcome(done: subprocess.CompletedProcess[str]) -> str:
    """Return what pytest counted, without the time that it took."""
    last = done.stdout.strip().splitlines()[-1:] or ["nothing was run"]
    return re.sub(r" in [\d.]+s.*", "", last[0].strip("= "))


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def recorded(guide: str, row: Sequence[str]) -> str:
    """Return the guide with a row in its table, in place of one of the same packages and minor version of Python."""
    head = _line(HEAD)
    if head not in guide:
        raise SystemExit(f"versions: {GUIDE} has no table with the head {head}")
    before, rest = guide.split(head, 1)
    lines = rest.lstrip("\n").split("\n")
    end = next(number for number, line in enumerate([*lines, ""]) if not line.startswith("|"))
    kept = [line for line in lines[1:end] if not _same(line, row)]
    return before + "\n".join([head, lines[0], *sorted([*kept, _line(row)]), *lines[end:]])


def _same(line: str, row: Sequence[str]) -> bool:
    packages, python, *_ = (cell.strip() for cell in line.strip("|").split("|"))
    return packages == row[0] and python.split(".")[:2] == row[1].split(".")[:2]


if __name__ == "__main__":
    sys.exit(main())
