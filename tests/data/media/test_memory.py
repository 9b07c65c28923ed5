"""Decoding holds a few frames, whatever is decoded and however seldom garbage is collected."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from transpixeler.data.media.write import write_mp4

LEAK = """
import gc, sys
from fractions import Fraction
from pathlib import Path
from transpixeler.data.media.decode import probe, read_frames, stream_rgba
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 2**20
def use(path):
    media = probe(path)
    read_frames(path, [0, 1], height=16, width=32, threads=1)
    for frame in stream_rgba(path, [0], media, threads=1):
        pass
gc.disable()
path = Path(sys.argv[1])
use(path)
before = resident()
for _ in range(50):
    use(path)
print(resident() - before)
"""
LOOK = """
import resource, sys
from pathlib import Path
from transpixeler.config.sections import DataConfig, SourceConfig
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.decode import read_frames, read_rgba
from transpixeler.data.sources.pairs import scan
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
source = SourceConfig(sys.argv[1], rgba=Path(sys.argv[1]).name == "rgba")
(sample,) = scan([source], {"rgb": "", "seg": "_seg"}, DataConfig()).samples
for _, path in sample.paths:
    if source.rgba:
        read_rgba(path, [0], height=150, width=150, fill=Fill(alpha="auto"))
    else:
        read_frames(path, [0], height=150, width=150)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024 - before)
"""


def megabytes(script: str, path: Path) -> float:
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return float(done.stdout)


def test_decoded_frames_are_let_go_without_the_garbage_collector(tmp_path: Path) -> None:
    """A frame of 1080p has 3 MB: one kept by each use of 50 would be 150 MB, and 600 MB all of them."""
    write_mp4(tmp_path / "a.mp4", [np.zeros((1080, 1920, 3), np.uint8)] * 2, fps=Fraction(16))
    assert megabytes(LEAK, tmp_path / "a.mp4") < 40


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "limit"), [("pair", 250), ("rgba", 375)])
def test_large_images_are_looked_at_in_little_memory(kind: str, limit: int, tmp_path: Path) -> None:
    """Unpacked, one has 64 MB; a few copies of it at a time are needed, and no floats of them."""
    folder = tmp_path / kind
    folder.mkdir()
    for name in ("a.png", "a_seg.png") if kind == "pair" else ("a.png",):
        color = (9, 99, 199) if kind == "pair" else (9, 99, 199, 40)
        Image.new("RGB" if kind == "pair" else "RGBA", (4096, 4096), color).save(folder / name, compress_level=1)
    (folder / "a.txt").write_text("blue")
    assert megabytes(LOOK, folder) < limit
