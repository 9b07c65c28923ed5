"""How tests call the programs in tools/, and what they look at afterwards."""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import tooling

from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.media.decode import probe, read_frames
from transpixeler.data.sources.pairs import Scan, scan
from transpixeler.demo.scenes import Format, Scene, render, scenes

TOOLS = Path(__file__).parents[2] / "tools"
FPS = Fraction(16)
PAIR, SINGLE = {"rgb": "", "seg": "_seg"}, {"rgb": ""}
SCENES = scenes(3, formats=[Format(48, 32, 5, FPS), Format(32, 48, 9, Fraction(24))], held_out=False, seed=2)


@functools.cache
def tool(name: str) -> Callable[..., int]:
    spec = importlib.util.spec_from_file_location(f"tools_{name}", TOOLS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return lambda *argv: tooling.run(name, module.main, [str(word) for word in argv])


def scanned(source: Path, streams: dict[str, str] = PAIR) -> Scan:
    return scan([SourceConfig(str(source))], streams, DataConfig())


def all_frames(path: Path) -> np.ndarray:
    media = probe(path)
    return read_frames(path, range(media.frames), height=media.height, width=media.width)


def stack(scene: Scene) -> np.ndarray:
    return np.stack(list(render(scene)))


def multiplied(rgba: np.ndarray) -> np.ndarray:
    return np.concatenate([np.rint(rgba[..., :3] * (rgba[..., 3:] / 255)), rgba[..., 3:]], axis=-1).astype(np.uint8)


def one_line(capsys: pytest.CaptureFixture[str], said: str) -> None:
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and "Traceback" not in error
