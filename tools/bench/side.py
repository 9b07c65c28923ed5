"""Run one checkout's side of a comparison: its bench's actions, one at a time, when the other end asks for one.

`python side.py PACKAGE_ROOT BENCH_FOLDER BENCH [option …]`. Out, a JSON line each: the names of the actions, then a
reading for every name that comes in. Each side is a process of its own, since two checkouts of one package cannot be
imported into one.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys

from readings import measure


def main() -> None:
    """Answer until the other end closes the pipe."""
    root, folder, bench, *argv = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a bench prints is no answer
    del sys.modules["readings"]  # the bench's own comes from its own checkout
    sys.path[:1] = [folder, root]
    actions = importlib.import_module(bench).actions(argv)
    answers.write(json.dumps(list(actions)) + "\n")
    for name in sys.stdin:
        answers.write(json.dumps(dataclasses.asdict(measure(actions[name.strip()]))) + "\n")


if __name__ == "__main__":
    main()
