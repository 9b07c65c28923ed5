"""Time reading a clip's 33 frames from a 300-frame 1080p video, against decoding the whole file.

The other way is the common one: every frame to an RGB array, then Pillow resizes those that are wanted. Both run by
turns in this process. A second part shows that memory does not grow with the length of a video.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
from harness import alternate, finish, parser
from rounds import COARSE

from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import frame_numbers, read_frames

FPS = Fraction(30)
HEIGHT, WIDTH = 480, 832
SOURCE = (1080, 1920)


def pictures(count: int) -> Iterator[np.ndarray]:
    """Yield a textured picture that moves, so that the encoder has motion and detail to code."""
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
    """Write H.264 as cameras and platforms make it: a bit rate of some Mbit/s, key frames far apart."""
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
    """Decode every frame, resize the wanted ones with Pillow's antialiased bicubic, then crop the centre."""
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


def peak_rss_mb(path: Path) -> float:
    """Return the peak memory of a child process that reads the clip from the middle of a video."""
    code = (
        "import sys; from pathlib import Path; from decode import ours; ours(Path(sys.argv[1]), 16);"
        "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    here = Path(__file__).parent
    done = subprocess.run([sys.executable, "-c", code, path], cwd=here, capture_output=True, text=True, check=True)
    return int(done.stdout) / 1024


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--frames", type=int, nargs=2, default=(300, 1200), help="of the short and the long video")
    options = given.parse_args()
    short, long = (cached_clip(count) for count in options.frames)
    figures: dict[str, float | str] = {}
    for name, first in (("", 0), ("_middle", 63)):
        print(f"frames {first}…{first + 32} at 16 fps")
        ways = {"whole file": partial(whole_file, short, first), "ours": partial(ours, short, first)}
        times = alternate(ways, repeats=options.repeats)
        figures[f"x_whole_file{name}"] = times.ratio("whole file", "ours", precision=COARSE).figure
        figures[f"frames_per_s{name}"] = round(33 / times["ours"].median, 1)
    off = np.abs(ours(short, 0).astype(int) - whole_file(short, 0)).mean()
    figures["mean_difference"] = round(float(off), 3)
    figures |= {"rss_mb_300": round(peak_rss_mb(short), 1), "rss_mb_1200": round(peak_rss_mb(long), 1)}
    finish("decode", figures, record=not options.no_record)


if __name__ == "__main__":
    main()
