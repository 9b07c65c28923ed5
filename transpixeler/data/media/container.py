"""Video files through PyAV: when each frame is shown, and the frames of given numbers, decoded as a stream.

A frame's number is its place in the order of presentation. Numbers, not times, are what the streams of a sample share.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from transpixeler.data.media.clip import SLACK, BadMedia, Clip, Media, check_size, reasons

if TYPE_CHECKING:
    import av

ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}  # FFmpeg's own decoders of these drop the alpha plane
COARSE = ("gif",)  # times are rounded to ticks of a hundredth of a second
HDR = {16: "PQ", 18: "HLG"}  # by FFmpeg's numbers of transfer characteristics
HIDDEN_FRAMES = ("vp8",)  # packets may hold frames that are never shown: only decoding tells
LOCAL = {"protocol_whitelist": "file"}  # a playlist that calls itself .mp4 reaches nothing else
SKIPPING = ("h264", "hevc")  # decoders that can be told packet by packet to leave out what nothing depends on
UNTIMED = ("avi",)  # no presentation times: frames are counted as they come out of the decoder


@dataclass(frozen=True, slots=True)
class Timeline:
    """When each frame is shown; `times` is None where a container does not say and frames can only be counted."""

    frames: int
    time_base: Fraction
    times: Sequence[int] | None  # ascending, in units of time_base
    rate: Fraction
    rounding: Fraction = Fraction(0)  # seconds by which times may be off

    def number_at(self, seconds: Fraction) -> int:
        """The frame on display at a moment after the first frame."""
        if self.times is None:
            return min(self.frames - 1, int((seconds + SLACK) * self.rate))
        ticks = int((seconds + max(SLACK, self.rounding)) / self.time_base)
        return bisect.bisect_right(self.times, self.times[0] + ticks) - 1

    @property
    def duration(self) -> Fraction:
        """Up to the end of the last frame, which is taken to last as long as the mean of the others."""
        if self.times is None or self.frames == 1:
            return self.frames / self.rate
        span = (self.times[-1] - self.times[0]) * self.time_base - self.rounding
        return span + span / (self.frames - 1)


@contextmanager
def opened(path: Path, threads: int = 1) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """The container and its picture stream, with a bounded number of decoder threads."""
    import av
    from av.stream import Disposition

    with reasons(), av.open(f"file:{path}", options=LOCAL, metadata_errors="replace") as container:
        streams = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not streams:
            raise BadMedia("has no video stream")
        stream = streams[0]
        if stream.codec_context is None:
            raise BadMedia("is in a format that this build of FFmpeg cannot decode")
        check_size(stream.codec_context.width, stream.codec_context.height)
        stream.codec_context.thread_count = threads or os.cpu_count() or 1
        stream.thread_type = "AUTO"
        yield container, stream


def timeline(container: av.container.InputContainer, stream: av.VideoStream) -> Timeline:
    """From the header where that says all (a sample table of constant rate), else from every packet."""
    table = getattr(stream, "index_entries", ())  # a complete sample table is what mp4 and mov have
    if len(table) == stream.frames > 1 and stream.start_time is not None and container.format.name not in UNTIMED:
        steps = {b.timestamp - a.timestamp for a, b in itertools.pairwise(table)}
        if len(steps) == 1 and (step := steps.pop()) > 0 and not any(entry.is_discard for entry in table):
            times = range(stream.start_time, stream.start_time + step * len(table), step)
            return Timeline(len(table), stream.time_base, times, 1 / (step * stream.time_base))
    return _scanned(container, stream)


def _timeline(path: Path) -> Timeline:
    """Remembered for the clips that one file gives: reading all its packets for each would be quadratic."""
    with reasons():
        stat = path.stat()
    return _timeline_of(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _timeline_of(path: Path, _: tuple[int, int]) -> Timeline:
    with opened(path) as (container, stream):
        return timeline(container, stream)


def _scanned(container: av.container.InputContainer, stream: av.VideoStream) -> Timeline:
    decoded = stream.codec_context.name in HIDDEN_FRAMES
    units = container.decode(stream) if decoded else container.demux(stream)
    times = [unit.pts for unit in units if decoded or (unit.size and not unit.is_discard)]
    container.seek(0, backward=True)
    if not times:
        raise BadMedia("has no frames")
    rates = [rate for rate in (stream.base_rate, stream.average_rate) if rate]
    timed = container.format.name not in UNTIMED and None not in times and len(set(times)) == len(times)
    if len(times) == 1 or not timed:
        if not rates and len(times) > 1:
            raise BadMedia("says neither when its frames are shown nor at what rate")
        return Timeline(len(times), stream.time_base, None, rates[-1] if rates else Fraction(1))
    times.sort()
    mean = Fraction(len(times) - 1, times[-1] - times[0]) / stream.time_base
    rounding = Fraction(2, times[-1] - times[0])  # timestamps are rounded, the header's rate is not
    close = [rate for rate in rates if abs(mean / rate - 1) <= rounding]
    rounded = stream.time_base / 2 if container.format.name in COARSE else Fraction(0)
    return Timeline(len(times), stream.time_base, tuple(times), close[0] if close else mean, rounded)


def probe(path: Path) -> Media:
    """Opens the file and decodes its first frame, which alone knows rotation and alpha for sure."""
    with opened(path) as (container, stream):
        line = timeline(container, stream)
        told = stream.codec_context.color_trc  # by the container: decoding forgets what the codec itself does not say
        frame = next(_decoded(container, stream, alpha=False), None)
        if frame is None:
            raise BadMedia("has no frame that can be decoded")
        if kind := HDR.get(frame.color_trc) or HDR.get(told):
            raise BadMedia(f"is HDR ({kind}), which would be trained washed out; convert it to SDR BT.709 first")
        width, height = shown_size(frame, stream)
        check_size(width, height)
        return Media(line.frames, height, width, line.rate, line.duration, _has_alpha(stream, frame))


def _has_alpha(stream: av.VideoStream, frame: av.VideoFrame) -> bool:
    return _tagged_with_alpha(stream) or any(part.is_alpha for part in frame.format.components)


def _tagged_with_alpha(stream: av.VideoStream) -> bool:
    """Matroska names the tag in capitals where it was written as one, in small letters where the track says it."""
    return any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())


def _alpha_decoder(stream: av.VideoStream) -> str | None:
    return ALPHA_DECODERS.get(stream.codec_context.name) if _tagged_with_alpha(stream) else None


def shown_size(frame: av.VideoFrame, stream: av.VideoStream) -> tuple[int, int]:
    """(width, height) with square pixels, the right way up; a turn is obeyed, a mirroring is refused."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if a * d < b * c:
            raise BadMedia("has a display matrix that mirrors the picture; re-encode it")
    aspect = stream.sample_aspect_ratio or 1
    width, height = max(1, round(frame.width * aspect)), frame.height
    return (height, width) if frame.rotation % 180 else (width, height)


def numbers(path: Path, clip: Clip) -> tuple[int, ...]:
    """The frame numbers of a clip in the file that sets the time (stream 0)."""
    line = _timeline(path)
    return tuple(line.number_at(clip.start + k / clip.fps) for k in range(clip.frames))


def frames(
    path: Path, wanted: Sequence[int], *, alpha: bool, threads: int
) -> Iterator[tuple[av.VideoFrame, tuple[int, int]]]:
    """(frame, shown size) for each of `wanted`, which are ascending frame numbers without repeats."""
    line = _timeline(path)
    with opened(path, threads) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        if wanted[-1] >= line.frames:
            raise BadMedia(f"has {line.frames} frames, so there is no frame {wanted[-1]}")
        for number, frame in zip(wanted, _picked(container, stream, line, wanted, alpha=alpha)):
            if frame.is_corrupt:
                raise BadMedia(f"is damaged: frame {number} is a guess of the decoder's; copy or encode it again")
            if (frame.width, frame.height) != size:
                raise BadMedia(f"changes its size from {size[0]}×{size[1]} to {frame.width}×{frame.height}")
            yield frame, shown_size(frame, stream)


def _picked(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    line: Timeline,
    wanted: Sequence[int],
    *,
    alpha: bool,
) -> Iterator[av.VideoFrame]:
    """Seeks to just before the first wanted frame; starts over from the beginning where the seek came out late."""
    if line.times is None:
        yield from _counted(_decoded(container, stream, alpha=alpha), wanted)
        return
    due = [line.times[number] for number in wanted]
    found = 0
    whole = wanted[0] == 0 or (alpha and _alpha_decoder(stream))  # key frames of colour and alpha may differ
    for seek in (None,) if whole else (due[0], None):
        for frame in _decoded(container, stream, alpha=alpha, seek=seek, due=frozenset(due)):
            if frame.pts is None or frame.pts > due[found]:
                break
            if frame.pts == due[found]:
                yield frame
                found += 1
                if found == len(due):
                    return
        if found:
            break
    raise BadMedia(f"frame {wanted[found]} cannot be decoded")


def _counted(decoded: Iterator[av.VideoFrame], wanted: Sequence[int]) -> Iterator[av.VideoFrame]:
    due = iter(wanted)
    number = next(due)
    for count, frame in enumerate(decoded):
        if count == number:
            yield frame
            number = next(due, None)
            if number is None:
                return
    raise BadMedia(f"frame {number} cannot be decoded")


def _decoded(
    container: av.container.InputContainer,
    stream: av.VideoStream,
    *,
    alpha: bool,
    seek: int | None = None,
    due: frozenset[int] = frozenset(),
) -> Iterator[av.VideoFrame]:
    """Frames in order of presentation, from the key frame before `seek` on, else from the start.

    Where it is known which frames are `due`, the decoder leaves out others that none depends on: half the work.
    """
    import av

    _seek(container, stream, seek)
    decoder = stream.codec_context
    if alpha and (name := _alpha_decoder(stream)):
        decoder = av.CodecContext.create(name, "r")
        decoder.thread_count = stream.codec_context.thread_count
    for packet in container.demux(stream):  # the last one is empty and drains the decoder
        spare = bool(due) and packet.size > 0 and packet.pts not in due
        if spare and decoder.codec.intra_only:
            continue
        if decoder.name in SKIPPING:
            decoder.skip_frame = "NONREF" if spare else "DEFAULT"
        yield from decoder.decode(packet)


def _seek(container: av.container.InputContainer, stream: av.VideoStream, moment: int | None) -> None:
    """To the key frame before a moment, else to the start, which lies before 0 where an mp4 was cut in its header."""
    table = getattr(stream, "index_entries", ())
    if moment is None and not table:
        container.seek(0, backward=True)
    else:
        container.seek(min(0, table[0].timestamp) if moment is None else moment, stream=stream, backward=True)
