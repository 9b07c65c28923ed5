"""Feed damaged configs, manifests, media, adapters and TOML files to the commands that read them.

Every command must end with exit code 0 or 2 and, where it fails, with one line: no traceback, in seconds, and without
growing memory.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import random
import resource
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from campaign import QUIET, ROOT, Figures, command, finished, main, write_demo

from transpixeler import cli
from transpixeler.adapters.saved import ADAPTER_FILE

SECONDS = 60.0  # the most that one command may take
INSPECTED = ("data.resolutions=[64]", "data.frames=[1, 9]", "data.upscale=true")
Answer = Callable[[], int]
NOISE = b"\0\xff\n\t[]{}:,\"'-#&*!|>%@`01e9.~=\\/"


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return how the commands answered."""
    draw = random.Random(arguments.seed)
    config = write_demo(folder / "demo")
    words = ["train", config, *QUIET, f"output_dir={folder / 'out'}", "run_name=run", "train.max_steps=1"]
    finished(command(*words))
    kinds = {
        "config": (config, lambda: cli.main(["plan", str(config)])),
        "manifest": _manifest(folder, config),
        "media": _media(folder, config),
        "adapter": _adapter(folder),
        "toml": _toml(folder),
    }
    for kind, (_, answer) in kinds.items():
        with contextlib.redirect_stdout(io.StringIO()):
            assert answer() == 0, f"the {kind} is refused as it is"
    figures: Figures = {"accepted": 0, "refused": 0, "wrong": 0, "slowest_s": 0.0}
    grown = 0
    for number in range(arguments.rounds):
        kind = list(kinds)[number % len(kinds)]
        file, answer = kinds[kind]
        whole = file.read_bytes()
        file.write_bytes(mutated(whole, draw))
        _judge(kind, answer, figures)
        file.write_bytes(whole)
        if number == len(kinds) * 2:
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    figures["grown_mib"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - grown) // 1024 if grown else 0
    return figures


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Cut, flip, repeat or insert something at a random place, up to three times."""
    for _ in range(draw.randint(1, 3)):
        place = draw.randrange(len(content) + 1)
        span = draw.choice((1, 8, 64))
        match draw.randrange(5):
            case 0:
                content = content[:place]
            case 1:
                content = content[:place] + content[place + span :]
            case 2:
                content = content[:place] + bytes(draw.choices(NOISE, k=span)) + content[place + span :]
            case 3:
                content = content[:place] + bytes(draw.choices(NOISE, k=draw.randint(1, 4))) + content[place:]
            case _:
                content = content[:place] + content[place : place + span] * 2 + content[place + span :]
    return content


def _judge(kind: str, answer: Answer, figures: Figures) -> None:
    """Run a command and count its answer; print what should not be."""
    said, start = io.StringIO(), time.monotonic()
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = answer()
        lines = [line for line in said.getvalue().splitlines() if line.startswith(("transpixeler: ", "migrate: "))]
        good = code == 0 or (code == 2 and len(lines) <= 1)
    except BaseException:
        code, good = -1, False
        said.write(traceback.format_exc())
    seconds = time.monotonic() - start
    figures["slowest_s"] = round(max(figures["slowest_s"], seconds), 1)
    if good and seconds < SECONDS:
        figures["accepted" if code == 0 else "refused"] += 1
        return
    figures["wrong"] += 1
    print(f"{kind}: exit code {code} after {seconds:.1f} s\n{said.getvalue()[-1500:]}", file=sys.stderr)


def _manifest(folder: Path, config: Path) -> tuple[Path, Answer]:
    clips = sorted((config.parent / "data" / "train").glob("*_seg.*"))[:3]
    rows = [f'{{"rgb": "{c.with_name(c.name.replace("_seg", ""))}", "seg": "{c}", "text": "a"}}\n' for c in clips]
    file = folder / "clips.jsonl"
    file.write_text("".join(rows))
    return file, lambda: cli.main(["inspect", str(file), *INSPECTED, "--out", str(folder / "page.html")])


def _media(folder: Path, config: Path) -> tuple[Path, Answer]:
    home = folder / "media"
    home.mkdir()
    clip = sorted((config.parent / "data" / "train").glob("*_seg.*"))[0]
    for suffix in ("", "_seg"):
        found = clip.with_name(clip.name.replace("_seg", suffix))
        shutil.copy(found, home / f"a{suffix}{found.suffix}")
    (home / "a.txt").write_text("a")
    words = ["inspect", str(home), *INSPECTED, "--out", str(folder / "media.html")]
    return home / f"a{clip.suffix}", lambda: cli.main(words)


def _adapter(folder: Path) -> tuple[Path, Answer]:
    file = folder / "out" / "run" / "step1" / ADAPTER_FILE
    out = folder / "exported.safetensors"
    return file, lambda: cli.main(["export", str(file), "--format", "comfyui", "--out", str(out)])


def _toml(folder: Path) -> tuple[Path, Answer]:
    sys.path.insert(0, str(ROOT / "tools"))
    migrate, tooling = importlib.import_module("migrate"), importlib.import_module("tooling")
    (folder / "clips").mkdir()
    (folder / "pairs.toml").write_text('mode = "pair"\nresolutions = [64]\n[[directory]]\npath = "clips"\n')
    file = folder / "train.toml"
    file.write_text(
        'dataset = "pairs.toml"\nepochs = 2\nmicro_batch_size_per_gpu = 1\neval_datasets = []\n[model]\ntype = "wan"\n'
        'dtype = "bfloat16"\n[adapter]\ntype = "lora"\nrank = 8\n[optimizer]\ntype = "adamw"\nbetas = [0.9, 0.99]\n'
    )
    words = [str(file), "--root", str(folder), "--out", str(folder / "made.yaml"), "--force"]
    return file, lambda: tooling.run("migrate", migrate.main, words)


if __name__ == "__main__":
    raise SystemExit(main("inputs", __doc__, campaign, rounds=150))
