"""How fast the 33 frames of a clip come out of a 300-frame 1080p video, against decoding the whole file.

The other way is the common one: every frame to an RGB array, then Pillow resizes those that are wanted. Both run by
turns in this process. A second part shows that memory does not grow with the length of a video.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np

from transpixeler.data.video import Clip, frame_numbers, read_frames

FPS = Fraction(30)
HEIGHT, WIDTH = 480, 832
SOURCE = (1080, 1920)


def pictures(count: int) -> Iterator[np.ndarray]:
    """A textured picture that moves, so that the encoder has motion and detail to code."""
    from PIL import Image

    random = np.random.default_rng(0)
    size = (SOURCE[1] + 512, SOURCE[0] + 256)
    coarse = Image.fromarray(random.integers(0, 256, (size[1] // 32, size[0] // 32, 3), dtype=np.uint8))
    grain = random.integers(-8, 9, (size[1], size[0], 1))
    canvas = (np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)) + grain).clip(0, 255).astype(np.uint8)
    for i in range(count):
        top, left = i % 256, 2 * i % 512
        yield canvas[top : top + SOURCE[0], left : left + SOURCE[1]]


def write_clip(path: Path, count: int) -> None:
    """H.264 as cameras and platforms make it: a bit rate of some Mbit/s, key frames far apart."""
    import av

    with av.open(path, "w") as out:
        stream = out.add_stream("libx264", rate=FPS, options={"preset": "veryfast", "crf": "20"})
        stream.height, stream.width, stream.pix_fmt = *SOURCE, "yuv420p"
        for picture in pictures(count):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")))
        out.mux(stream.encode(None))


def cached_clip(count: int) -> Path:
    path = Path(tempfile.gettempdir()) / f"transpixeler-bench-{count}x{SOURCE[0]}.mp4"
    if not path.exists():
        unfinished = path.with_suffix(".tmp.mp4")
        write_clip(unfinished, count)
        unfinished.replace(path)
    return path


def clip_at(first: int) -> Clip:
    return Clip("bench", Fraction(first, 16), 33, Fraction(16), HEIGHT, WIDTH)


def ours(path: Path, first: int) -> np.ndarray:
    clip = clip_at(first)
    return read_frames(path, frame_numbers(path, clip), height=HEIGHT, width=WIDTH)


def whole_file(path: Path, first: int) -> np.ndarray:
    """Every frame to an array, the wanted ones through Pillow's antialiased bicubic, then the centre crop."""
    import av
    from PIL import Image

    with av.open(path) as container:
        container.streams.video[0].thread_type = "AUTO"
        arrays = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    numbers = [int((first + k) * FPS / 16) for k in range(33)]
    scale = max(HEIGHT / SOURCE[0], WIDTH / SOURCE[1])
    size = (max(WIDTH, round(SOURCE[1] * scale)), max(HEIGHT, round(SOURCE[0] * scale)))
    top, left = (size[1] - HEIGHT) // 2, (size[0] - WIDTH) // 2
    resized = (np.asarray(Image.fromarray(arrays[n]).resize(size, Image.Resampling.BICUBIC)) for n in numbers)
    return np.stack([picture[top : top + HEIGHT, left : left + WIDTH] for picture in resized])


def timed(work: Callable[[Path, int], np.ndarray], path: Path, first: int) -> float:
    start = time.perf_counter()
    work(path, first)
    return time.perf_counter() - start


def peak_rss_mb(path: Path) -> float:
    """Of a child process that reads the clip from the middle of a video."""
    code = (
        "import sys; from pathlib import Path; from tools.bench.decode import ours; ours(Path(sys.argv[1]), 16);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code, path], cwd=root, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    path = cached_clip(300)
    figures: dict[str, float] = {}
    for name, first in (("", 0), ("_middle", 63)):
        spent = [(timed(whole_file, path, first), timed(ours, path, first)) for _ in range(repeats)]
        theirs, mine = (statistics.median(column) for column in zip(*spent))
        ratios = sorted(a / b for a, b in spent)
        print(f"frames {first}…{first + 32} at 16 fps: whole file {theirs:.3f} s, ours {mine:.3f} s, "
              f"ratio {statistics.median(ratios):.1f} ({ratios[0]:.1f} … {ratios[-1]:.1f})")  # fmt: skip
        figures[f"x_whole_file{name}"] = round(statistics.median(ratios), 2)
        figures[f"frames_per_s{name}"] = round(33 / mine, 1)
    off = np.abs(ours(path, 0).astype(int) - whole_file(path, 0)).mean()
    short, long = peak_rss_mb(path), peak_rss_mb(cached_clip(1200))
    print(f"mean difference from Pillow {off:.2f} of 255; peak RSS {short:.0f} MB at 300 frames, {long:.0f} at 1200")
    print(json.dumps({**figures, "mean_difference": round(float(off), 3), "rss_mb_300": round(short, 1),
                      "rss_mb_1200": round(long, 1)}))  # fmt: skip


if __name__ == "__main__":
    main()
