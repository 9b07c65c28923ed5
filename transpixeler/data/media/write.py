"""Write media: frames in; whole video files out (near-lossless H.264, ProRes 4444 and VP9 with alpha, PNG sequences).

Frames are an iterable of arrays [H, W, 3 or 4], uint8 or uint16, alpha straight and last; one is held at a time.
A file appears under its name only when it is whole. The same frames give the same bytes on the same PyAV build;
other builds of ffmpeg, x264 or libvpx may choose other bytes for the same pictures.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.config.sections import UserError
from transpixeler.files import whole

if TYPE_CHECKING:
    import av

_LAYOUTS = {
    (3, "uint8"): "rgb24",
    (4, "uint8"): "rgba",
    (3, "uint16"): "rgb48le",
    (4, "uint16"): "rgba64le",
}
_PNG_LAYOUTS = {"rgb24": "rgb24", "rgba": "rgba", "rgb48le": "rgb48be", "rgba64le": "rgba64be"}
_PNG_HEAD = 8 + 25  # bytes of the signature and IHDR, after which text chunks may follow
# swscale's bicubic | full chroma interpolation | accurate rounding | bit-exact (the same result on every CPU).
_SCALING = 0x4 | 0x2000 | 0x40000 | 0x80000
_BT709, _LIMITED_RANGE = 1, 1
# At most one level off: quantizer 1, and no psychovisual optimisation.
_X264_EXACT = {
    "qp": "1",
    "bf": "0",
    "x264-params": "no-psy=1:trellis=0:no-dct-decimate=1:deadzone-inter=0:deadzone-intra=0",
}
# Looks like the original at a fraction of the size.
_X264_VIEW = {"crf": "16", "preset": "medium"}
# Playable while it loads, and with metadata keys of our own.
_MP4_FLAGS = {"movflags": "+faststart+use_metadata_tags"}
# Fixed, since the bytes that x264 and libvpx write depend on the number of threads.
_THREADS = 4


def write_mp4(path: Path, frames: Iterable[np.ndarray], *, fps: Fraction, lossless: bool = False) -> None:
    """Write H.264 that every player reads and that keeps a grey matte within 2/255.

    `lossless` keeps colour as well, at any size, but as 4:4:4, which browsers do not play.
    """
    pixels, options = ("yuv444p", {"qp": "0"}) if lossless else ("yuv420p", _X264_EXACT)
    _write_video(path, frames, fps=fps, container="mp4", codec="libx264", pixels=pixels, options=options)


def write_browser_mp4(
    path: Path, frames: Iterable[np.ndarray], *, fps: Fraction, exact: bool, facts: Mapping[str, str] | None = None
) -> None:
    """Write H.264 that a browser plays while it loads: as exact as `write_mp4`, or small and good to look at."""
    options = _X264_EXACT if exact else _X264_VIEW
    _write_video(
        path, frames, fps=fps, container="mp4", codec="libx264", pixels="yuv420p", options=options,
        muxing=_MP4_FLAGS, facts=facts,
    )  # fmt: skip


def write_prores4444(
    path: Path, frames: Iterable[np.ndarray], *, fps: Fraction, facts: Mapping[str, str] | None = None
) -> None:
    """Write ProRes 4444 with alpha, for editors; `facts` become tags of the file."""
    options = {"profile": "4444", "alpha_bits": "16", "qscale": "1"}
    _write_video(
        path, frames, fps=fps, container="mov", codec="prores_ks", pixels="yuva444p10le", options=options,
        muxing=_MP4_FLAGS if facts else None, facts=facts,
    )  # fmt: skip


def write_webm_alpha(
    path: Path, frames: Iterable[np.ndarray], *, fps: Fraction, facts: Mapping[str, str] | None = None
) -> None:
    """Write lossless VP9 with alpha, for browsers. Only ffmpeg's libvpx-vp9 decoder returns the alpha."""
    options = {"lossless": "1", "deadline": "good", "cpu-used": "2", "auto-alt-ref": "0"}
    tags = {"alpha_mode": "1"}
    _write_video(
        path, frames, fps=fps, container="webm", codec="libvpx-vp9", pixels="yuva420p", options=options,
        tags=tags, facts=facts,
    )  # fmt: skip


def write_png_sequence(folder: Path, frames: Iterable[np.ndarray], *, facts: Mapping[str, str] | None = None) -> None:
    """Write numbered, exact PNG files into a new folder: 8 bits a channel for uint8 frames, 16 for uint16."""
    if folder.exists():
        raise UserError(f"{folder}: already exists; a PNG sequence needs a folder of its own")
    first, frames = _peek(folder, frames)
    with whole(folder) as unfinished:
        unfinished.mkdir(parents=True)
        for number, frame in enumerate(frames):
            assert frame.shape == first.shape and frame.dtype == first.dtype, "frames of one sequence differ"
            (unfinished / f"{number:05d}.png").write_bytes(_png(frame, facts))


def write_png(path: Path, frame: np.ndarray) -> None:
    """Write one exact PNG file."""
    with whole(path) as unfinished:
        unfinished.write_bytes(_png(frame))


def _write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction,
    container: str,
    codec: str,
    pixels: str,
    options: dict[str, str],
    tags: Mapping[str, str] | None = None,
    muxing: Mapping[str, str] | None = None,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Encode frame by frame, converted to and tagged as BT.709 in limited range, so that readers invert it exactly."""
    import av
    from av.video.stream import VideoStream

    first, frames = _peek(path, frames)
    height, width, channels = first.shape
    assert channels == (4 if pixels.startswith("yuva") else 3), f"{channels} channels for {pixels}"
    if "420" in pixels and (height % 2 or width % 2):
        raise UserError(f"{path}: {width}x{height} is an odd size; this format needs even sizes, so crop or resize")
    with (
        whole(path) as unfinished,
        av.open(unfinished, "w", format=container, container_options={"fflags": "+bitexact", **(muxing or {})}) as out,
    ):
        out.metadata.update(facts or {})
        stream = out.add_stream(codec, rate=fps, options=options)
        assert isinstance(stream, VideoStream)
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        stream.metadata.update(tags or {})
        context = stream.codec_context
        context.thread_count = _THREADS
        context.colorspace = context.color_primaries = context.color_trc = _BT709
        context.color_range = _LIMITED_RANGE
        for number, frame in enumerate(frames):
            assert frame.shape == first.shape, f"frame {number} is {frame.shape}, the first is {first.shape}"
            out.mux(stream.encode(_video_frame(frame, pixels, number, 1 / fps)))
        out.mux(stream.encode(None))


def _video_frame(frame: np.ndarray, pixels: str, number: int, time_base: Fraction) -> av.VideoFrame:
    source = _array_frame(frame)
    converted = source.reformat(
        format=pixels, dst_colorspace=_BT709, dst_color_range=_LIMITED_RANGE, interpolation=_SCALING
    )
    converted.color_primaries = converted.color_trc = _BT709  # ProRes keeps these in each frame
    converted.pts, converted.time_base = number, time_base
    return converted


def _array_frame(frame: np.ndarray) -> av.VideoFrame:
    import av

    return av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format=_layout(frame))


def _layout(frame: np.ndarray) -> str:
    layout = _LAYOUTS.get((frame.shape[-1], frame.dtype.name)) if frame.ndim == 3 else None
    assert layout, f"a frame is [H, W, 3 or 4] in uint8 or uint16, not {frame.shape} in {frame.dtype}"
    return layout


def _png(frame: np.ndarray, facts: Mapping[str, str] | None = None) -> bytes:
    import av

    pixels = _PNG_LAYOUTS[_layout(frame)]
    encoder = av.CodecContext.create("png", "w")
    encoder.height, encoder.width = frame.shape[:2]
    encoder.pix_fmt, encoder.time_base = pixels, Fraction(1)
    picture = _array_frame(frame).reformat(format=pixels)
    picture.pts = 0
    encoded = b"".join(bytes(packet) for packet in (*encoder.encode(picture), *encoder.encode(None)))
    texts = b"".join(_png_text(key, value) for key, value in (facts or {}).items())
    return encoded[:_PNG_HEAD] + texts + encoded[_PNG_HEAD:]


def _png_text(key: str, value: str) -> bytes:
    """Return a tEXt chunk."""
    body = b"tEXt" + key.encode("latin-1") + b"\0" + value.encode("latin-1", "replace")
    return struct.pack(">I", len(body) - 4) + body + struct.pack(">I", zlib.crc32(body))


def _peek(path: Path, frames: Iterable[np.ndarray]) -> tuple[np.ndarray, Iterator[np.ndarray]]:
    """Return the first frame, which fixes the size, and an iterator over all of them."""
    iterator = iter(frames)
    first = next(iterator, None)
    if first is None:
        raise UserError(f"{path}: there are no frames to write")
    return first, chain((first,), iterator)
