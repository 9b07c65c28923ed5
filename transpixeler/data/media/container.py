"""Video files, read through PyAV: a path in; a timeline, and frames by number decoded one at a time, out.

A frame's number is its place in presentation order. The streams of a sample share frame numbers, not times.
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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from transpixeler.data.media.clip import SLACK, Clip, Media
from transpixeler.data.media.errors import BadMedia, as_bad_media, check_size

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.index import IndexEntry
    from av.video.stream import VideoStream

ALPHA_DECODERS = {"vp9": "libvpx-vp9", "vp8": "libvpx"}  # FFmpeg's own decoders of these drop the alpha plane
COARSE = ("gif",)  # formats whose times are rounded to hundredths of a second
HDR = {16: "PQ", 18: "HLG"}  # by FFmpeg's numbers of transfer characteristics
HIDDEN_FRAMES = ("vp8",)  # packets may hold frames that are never shown, which only decoding tells
LOCAL = {"protocol_whitelist": "file"}  # a playlist renamed to .mp4 cannot make us open URLs
SKIPPING = ("h264", "hevc")  # decoders whose skip_frame may change from packet to packet
UNTIMED = ("avi",)  # no presentation times: frames are counted in decoding order


@dataclass(frozen=True, slots=True)
class Timeline:
    """Say when each frame is shown; `times` is None where the container does not, and frames can only be counted."""

    frames: int
    time_base: Fraction
    times: Sequence[int] | None  # ascending, in units of time_base
    rate: Fraction
    rounding: Fraction = Fraction(0)  # seconds by which times may be off

    def number_at(self, seconds: Fraction) -> int:
        """Return the frame on display so long after the first frame."""
        if self.times is None:
            return min(self.frames - 1, int((seconds + SLACK) * self.rate))
        ticks = int((seconds + max(SLACK, self.rounding)) / self.time_base)
        return bisect.bisect_right(self.times, self.times[0] + ticks) - 1

    @property
    def duration(self) -> Fraction:
        """Return the seconds up to the end of the last frame, assumed to last as long as the others on average."""
        if self.times is None or self.frames == 1:
            return self.frames / self.rate
        span = (self.times[-1] - self.times[0]) * self.time_base - self.rounding
        return span + span / (self.frames - 1)


@contextmanager
def opened(path: Path, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and its picture stream with a bounded number of decoder threads."""
    import av
    from av.stream import Disposition

    with as_bad_media(), av.open(f"file:{path}", options=LOCAL, **_lenient(av.__version__)) as container:
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


def _lenient(version: str) -> dict[str, Any]:
    """Return the option with which PyAV reads tags that are not UTF-8; from version 19 on it needs and has none."""
    return {"metadata_errors": "replace"} if int(version.partition(".")[0]) < 19 else {}


def timeline(container: InputContainer, stream: VideoStream) -> Timeline:
    """Read frame times from the header if its sample table is complete and even (mp4, mov), else from all packets."""
    table, unit = _sample_table(stream), _time_base(stream)
    if len(table) == stream.frames > 1 and stream.start_time is not None and container.format.name not in UNTIMED:
        steps = {b.timestamp - a.timestamp for a, b in itertools.pairwise(table)}
        if len(steps) == 1 and (step := steps.pop()) > 0 and not any(entry.is_discard for entry in table):
            times = range(stream.start_time, stream.start_time + step * len(table), step)
            return Timeline(len(table), unit, times, 1 / (step * unit))
    return _scanned(container, stream)


def _sample_table(stream: VideoStream) -> Sequence[IndexEntry]:
    return getattr(stream, "index_entries", ())


def _time_base(stream: VideoStream) -> Fraction:
    if not stream.time_base:
        raise BadMedia("does not say in which unit its times are")
    return stream.time_base


def _timeline(path: Path) -> Timeline:
    """Return a file's timeline, remembered: reading all packets anew for every clip would be quadratic."""
    with as_bad_media():
        stat = path.stat()
    return _timeline_of(path, (stat.st_size, stat.st_mtime_ns))


@functools.lru_cache(maxsize=16)
def _timeline_of(path: Path, _: tuple[int, int]) -> Timeline:
    with opened(path) as (container, stream):
        return timeline(container, stream)


def _scanned(container: InputContainer, stream: VideoStream) -> Timeline:
    """Build the timeline from the presentation time of every packet."""
    unit = _time_base(stream)
    decoded = stream.codec_context.name in HIDDEN_FRAMES
    if decoded:
        found = [frame.pts for frame in container.decode(stream)]
    else:
        found = [packet.pts for packet in container.demux(stream) if packet.size and not packet.is_discard]
    container.seek(0, backward=True)
    if not found:
        raise BadMedia("has no frames")
    times = sorted(time for time in found if time is not None)
    rates = [rate for rate in (stream.base_rate, stream.average_rate) if rate]
    timed = container.format.name not in UNTIMED and len(set(times)) == len(found)
    if len(found) == 1 or not timed:
        if not rates and len(found) > 1:
            raise BadMedia("says neither when its frames are shown nor at what rate")
        return Timeline(len(found), unit, None, rates[-1] if rates else Fraction(1))
    mean = Fraction(len(times) - 1, times[-1] - times[0]) / unit
    rounding = Fraction(2, times[-1] - times[0])  # timestamps are rounded, the header's rate is not
    close = [rate for rate in rates if abs(mean / rate - 1) <= rounding]
    rounded = unit / 2 if container.format.name in COARSE else Fraction(0)
    return Timeline(len(times), unit, tuple(times), close[0] if close else mean, rounded)


def probe(path: Path) -> Media:
    """Open the file and decode its first frame, the only reliable source for rotation and alpha."""
    with opened(path) as (container, stream):
        line = timeline(container, stream)
        told = stream.codec_context.color_trc  # read now: decoding overwrites what only the container says
        frame = next(_decoded(container, stream, alpha=False), None)
        if frame is None:
            raise BadMedia("has no frame that can be decoded")
        if kind := HDR.get(frame.color_trc) or HDR.get(told):
            raise BadMedia(f"is HDR ({kind}), which would be trained washed out; convert it to SDR BT.709 first")
        shown = orientation(frame, stream)
        check_size(shown.width, shown.height)
        return Media(line.frames, shown.height, shown.width, line.rate, line.duration, _has_alpha(stream, frame))


def _has_alpha(stream: VideoStream, frame: VideoFrame) -> bool:
    return _tagged_with_alpha(stream) or any(part.is_alpha for part in frame.format.components)


def _tagged_with_alpha(stream: VideoStream) -> bool:
    """Look for Matroska's alpha_mode, which is upper or lower case depending on where in the file it stands."""
    return any(name.lower() == "alpha_mode" and value == "1" for name, value in stream.metadata.items())


def _alpha_decoder(stream: VideoStream) -> str | None:
    return ALPHA_DECODERS.get(stream.codec_context.name) if _tagged_with_alpha(stream) else None


class Orientation(NamedTuple):
    """The size of a decoded picture as a player shows it, and the quarter turns (counter-clockwise) up to there."""

    width: int
    height: int
    turns: int = 0


def orientation(frame: VideoFrame, stream: VideoStream) -> Orientation:
    """Return the upright size with square pixels; a display matrix that rotates is obeyed, one that mirrors refused.

    Side data is read from a tiny copy: reading it ties PyAV's frame into a reference cycle, which keeps the pixels
    until the garbage collector comes, and training runs with that turned off.
    """
    matrix = frame.reformat(width=16, height=16).side_data.get("DISPLAYMATRIX")
    if matrix is not None:
        a, b, _, c, d, *_ = np.frombuffer(matrix, np.int32).tolist()
        if a * d < b * c:
            raise BadMedia("has a display matrix that mirrors the picture; re-encode it")
    aspect = stream.sample_aspect_ratio or 1
    width, height = max(1, round(frame.width * aspect)), frame.height
    turns = frame.rotation // 90
    return Orientation(height, width, turns) if turns % 2 else Orientation(width, height, turns)


def numbers(path: Path, clip: Clip) -> tuple[int, ...]:
    """Return the frame numbers of a clip in the file whose times count (stream 0)."""
    line = _timeline(path)
    return tuple(line.number_at(clip.start + k / clip.fps) for k in range(clip.frames))


def frames(path: Path, wanted: Sequence[int], *, alpha: bool, threads: int) -> Iterator[tuple[VideoFrame, Orientation]]:
    """Yield (frame, orientation) for each of `wanted`, which are ascending frame numbers without repeats."""
    line = _timeline(path)
    with opened(path, threads) as (container, stream):
        size = (stream.codec_context.width, stream.codec_context.height)
        if wanted[-1] >= line.frames:
            raise BadMedia(f"has {line.frames} frames, so there is no frame {wanted[-1]}")
        shown: Orientation | None = None
        for number, frame in zip(wanted, _picked(container, stream, line, wanted, alpha=alpha)):
            if frame.is_corrupt:
                raise BadMedia(f"is damaged: frame {number} is a guess of the decoder; copy or encode the file again")
            if (frame.width, frame.height) != size:
                raise BadMedia(f"changes its size from {size[0]}×{size[1]} to {frame.width}×{frame.height}")
            shown = shown or orientation(frame, stream)
            if frame.rotation // 90 != shown.turns:
                raise BadMedia(f"turns its picture at frame {number}; re-encode it")
            yield frame, shown


def _picked(
    container: InputContainer,
    stream: VideoStream,
    line: Timeline,
    wanted: Sequence[int],
    *,
    alpha: bool,
) -> Iterator[VideoFrame]:
    """Seek to just before the first wanted frame; start over from the beginning if the seek lands too late."""
    if line.times is None:
        yield from _counted(_decoded(container, stream, alpha=alpha), wanted)
        return
    due = [line.times[number] for number in wanted]
    found = 0
    from_start = wanted[0] == 0 or (alpha and _alpha_decoder(stream))  # key frames of colour and alpha may differ
    for seek in (None,) if from_start else (due[0], None):
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


def _counted(decoded: Iterator[VideoFrame], wanted: Sequence[int]) -> Iterator[VideoFrame]:
    """Yield the frames of these numbers where frames can only be counted."""
    found = 0
    for count, frame in enumerate(decoded):
        if count == wanted[found]:
            yield frame
            found += 1
            if found == len(wanted):
                return
    raise BadMedia(f"frame {wanted[found]} cannot be decoded")


def _decoded(
    container: InputContainer,
    stream: VideoStream,
    *,
    alpha: bool,
    seek: int | None = None,
    due: frozenset[int] = frozenset(),
) -> Iterator[VideoFrame]:
    """Yield frames in presentation order, from the key frame before `seek` or from the start.

    `due`: the times of the wanted frames; the decoder skips other frames that nothing refers to, half the work.
    """
    from av.video.codeccontext import VideoCodecContext

    _seek(container, stream, seek)
    decoder = stream.codec_context
    if alpha and (name := _alpha_decoder(stream)):
        decoder = VideoCodecContext.create(name, "r")
        assert isinstance(decoder, VideoCodecContext)
        decoder.thread_count = stream.codec_context.thread_count
    for packet in container.demux(stream):  # the last one is empty and drains the decoder
        spare = bool(due) and packet.size > 0 and packet.pts not in due
        if spare and decoder.codec.intra_only:
            continue
        if decoder.name in SKIPPING:
            decoder.skip_frame = "NONREF" if spare else "DEFAULT"
        yield from decoder.decode(packet)


def _seek(container: InputContainer, stream: VideoStream, moment: int | None) -> None:
    """Seek to the key frame before a moment, or to the start: before 0 where an mp4's edit list cuts its beginning."""
    table = _sample_table(stream)
    if moment is None and not table:
        container.seek(0, backward=True)
    else:
        container.seek(min(0, table[0].timestamp) if moment is None else moment, stream=stream, backward=True)
