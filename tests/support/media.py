"""Small clips whose frames carry their own number, written in any rate and container."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np

from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import probe
from transpixeler.data.sources.samples import Sample

BITS, BLOCK = 12, 16
HEIGHT, WIDTH = 2 * BLOCK, BITS // 2 * BLOCK


def marked(number: int) -> np.ndarray:
    """uint8 [32,96,3]: the number as two rows of black and white blocks."""
    bits = np.array([number >> bit & 1 for bit in range(BITS)], np.uint8).reshape(2, -1) * 255
    return bits.repeat(BLOCK, 0).repeat(BLOCK, 1)[:, :, None].repeat(3, 2)


def marks(frames: np.ndarray) -> list[int]:
    """The numbers that frames [F,H,W,3] of any size carry."""
    height, width = frames.shape[1] // 2, frames.shape[2] // (BITS // 2)
    centres = frames[:, height // 2 :: height, width // 2 :: width, 0] > 127
    return [sum(1 << bit for bit, on in enumerate(frame.ravel()) if on) for frame in centres]


def write_timed(
    path: Path,
    frames: Iterable[np.ndarray],
    times: Sequence[int],
    time_base: Fraction,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    prepare: Callable[[object], None] = lambda context: None,
) -> None:
    """Shows each frame at its own time, in units of `time_base`."""
    import av

    with av.open(path, "w", container_options=container_options or {}) as out:
        stream = out.add_stream(codec, rate=1 / time_base, options=options or {})
        stream.codec_context.time_base = time_base
        prepare(stream.codec_context)
        for time, array in zip(times, frames):
            if time == times[0]:
                stream.height, stream.width, stream.pix_fmt = *array.shape[:2], pixels
            frame = av.VideoFrame.from_ndarray(array, format="rgb24" if array.shape[2] == 3 else "rgba")
            frame.pts, frame.time_base = time, time_base
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))


def write_marked(path: Path, numbers: Sequence[int], *, fps: Fraction, **options: object) -> None:
    """Frames of these numbers at a constant rate."""
    write_timed(path, map(marked, numbers), range(len(numbers)), 1 / fps, **options)


def packet_at(path: Path, number: int) -> tuple[int, int]:
    """Where a packet of a video begins in its file, and its bytes."""
    import av

    with av.open(path) as container:
        return [(packet.pos, packet.size) for packet in container.demux(video=0) if packet.size][number]


def clip_of(frames: int, *, start: Fraction = Fraction(0), fps: int = 16, height: int = 16, width: int = 48) -> Clip:
    return Clip("a", start, frames, Fraction(fps), height, width)


def pair(rgb: Path, seg: Path) -> Sample:
    return Sample("a", (("rgb", rgb), ("seg", seg)), "a caption", 0, False, probe(rgb))


def scene(height: int, width: int) -> np.ndarray:
    """Grey waves of all lengths, without colour so that no chroma subsampling blurs the comparison."""
    y, x = np.mgrid[:height, :width]
    grey = 128 + 60 * np.sin(x * x / 90 + y / 9) + 50 * np.cos(y * y / 70)
    return grey.clip(0, 255).astype(np.uint8)[:, :, None].repeat(3, 2)
