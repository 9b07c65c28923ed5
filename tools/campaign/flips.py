"""Flip single bits of checkpoints, caches and adapters, and see whether anything wrong is read without a word.

A flip in a checkpoint must be found before its tensors are read. One in the cache must be found by `cache --verify`, or
lie where nothing is read. A safetensors file has no checksum: in an adapter, a flip in the header must be found or
change nothing that it says, and one in a tensor cannot be found (`unseen` counts these).
"""

from __future__ import annotations

import argparse
import contextlib
import io
import random
import shutil
from pathlib import Path

from campaign import QUIET, Figures, command, finished, main, write_demo

from transpixeler import cli
from transpixeler.adapters.files import read_adapter
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.config.sections import UserError
from transpixeler.runs import checkpoint


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return how many flips were found, harmless, unseen and wrong."""
    draw = random.Random(arguments.seed)
    config = write_demo(folder / "demo")
    words = ["train", config, *QUIET, f"output_dir={folder / 'out'}", "run_name=run", "train.max_steps=2"]
    finished(command(*words))
    run = folder / "out" / "run"
    figures: Figures = {"found": 0, "harmless": 0, "unseen": 0, "wrong": 0}
    for _ in range(arguments.rounds):
        _flip_checkpoint(next(iter(checkpoint.candidates(run / "checkpoints"))), draw, figures)
        _flip_adapter(run / "step2" / ADAPTER_FILE, draw, figures)
        _flip_cache(config, draw, figures)
    return figures


def flip(file: Path, draw: random.Random) -> int:
    """Flip one bit and return the position of its byte."""
    content = bytearray(file.read_bytes())
    place = draw.randrange(len(content))
    content[place] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return place


def _flip_checkpoint(folder: Path, draw: random.Random, figures: Figures) -> None:
    file = draw.choice([path for path in sorted(folder.iterdir()) if path.stat().st_size])
    whole = file.read_bytes()
    before = checkpoint.read_manifest(folder)
    flip(file, draw)
    try:
        checkpoint.check(folder)
        same = file.name == checkpoint.MANIFEST and checkpoint.read_manifest(folder) == before
        figures["harmless" if same else "wrong"] += 1
    except checkpoint.CheckpointFault:
        figures["found"] += 1
    finally:
        file.write_bytes(whole)


def _flip_adapter(file: Path, draw: random.Random, figures: Figures) -> None:
    damaged = file.with_name("damaged.safetensors")
    shutil.copy(file, damaged)
    header = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    place = flip(damaged, draw)
    try:
        same = read_adapter(damaged).matches(read_adapter(file))
    except UserError:
        figures["found"] += 1
        return
    if same:
        figures["harmless"] += 1
    else:
        figures["unseen" if place >= header else "wrong"] += 1


def _flip_cache(config: Path, draw: random.Random, figures: Figures) -> None:
    cache = config.parent / "data" / "cache"
    file = draw.choice([path for path in sorted(cache.iterdir()) if path.suffix in (".seg", ".idx")])
    kept = cache.with_name("kept")
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(cache, kept)
    before = _cached(config)
    flip(file, draw)
    code, said = _answer("cache", str(config), "--verify")
    if code not in (0, 1, 2) or "Traceback" in said:
        figures["wrong"] += 1
    else:
        figures["found" if code else "harmless"] += 1
        if not code and _cached(config) != before:
            figures["wrong"] += 1
    shutil.rmtree(cache)
    kept.rename(cache)


def _cached(config: Path) -> str:
    return _answer("cache", str(config), "--list")[1]


def _answer(*words: str) -> tuple[int, str]:
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = cli.main(words)
    return code, said.getvalue()


if __name__ == "__main__":
    raise SystemExit(main("flips", __doc__, campaign, rounds=100))
