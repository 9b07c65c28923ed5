"""A data set goes in; its problems come out: as values, as text, and as one HTML page to look at.

Every sample is opened and judged from a few frames. Flags mark what a person should look at: a matte that is blank,
opaque, frozen or no matte at all, and colours that are hidden under it. `dataset_page` lays the page out.
"""

from __future__ import annotations

import io
import os
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.buckets import rate
from transpixeler.data.features.files import old_formats
from transpixeler.data.features.needs import Needs, check_features
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.decode import read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import DATA
from transpixeler.data.sources.candidate import BadSample
from transpixeler.data.sources.samples import Sample
from transpixeler.data.survey import survey
from transpixeler.files import write_text
from transpixeler.publishing.dataset_page import CUT_OUT, STRIP_GAP, render
from transpixeler.publishing.inspection import FLAGS, Card, Inspection, Used
from transpixeler.sampling.files import histogram

PAGE = "inspect.html"
TILE = (200, 150)  # width and height that a frame is fitted into
JUDGED_FRAMES = 5  # of a clip
SHOWN_FRAMES = slice(0, None, 2)  # of those: the first, the middle and the last
# All in levels of 0 to 255; motion is the mean change from one judged frame to the next.
BLANK_ALPHA, OPAQUE_ALPHA = 3, 252
STILL_MATTE, MOVING_PICTURE = 0.5, 1.0
COLORED_SPREAD = 10  # between a matte's channels
FILL_DISTANCE = 10  # of hidden colour from the fill


def inspect_dataset(
    sources: Sequence[SourceConfig],
    out: Path,
    *,
    streams: Mapping[str, str],
    data: DataConfig,
    needs: Needs,
    seed: int,
) -> Inspection:
    """Open and judge every sample, and write the page, into `out` if it is a folder; no bad sample stops it."""
    page = _page_at(out)
    found = survey(sources, streams, replace(data, on_bad="skip"), geometry=needs.geometry, seed=seed, needs=needs)
    with old_formats(), ThreadPoolExecutor(os.cpu_count()) as pool:
        judged = list(pool.map(lambda sample: _card(sample, data, needs), found.samples))
    cards = [card for card in judged if isinstance(card, Card)]
    bad = (*found.bad, *(card for card in judged if isinstance(card, BadSample)))
    usable = {card.sample.id for card in cards}
    clips = Counter(bucket for sample, _, bucket in found.clips if sample.id in usable)
    buckets = sorted(clips.items(), key=lambda item: item[0], reverse=True)
    dropped = tuple((name, reason) for name, reason in found.dropped if name in usable)
    counts = Counter(flag for card in cards for flag in card.flags)
    flags = tuple((flag, counts[flag]) for flag in FLAGS)
    used = tuple(used_frames([card.sample for card in cards], (clip for _, clip, _ in found.clips), rate(data)))
    report = Inspection(len(cards), bad, dropped, tuple(buckets), flags, page, _expected(streams), found.notes, used)
    write_text(page, render(report, cards, sources))
    return report


def used_frames(samples: Iterable[Sample], clips: Iterable[Clip], fps: Fraction) -> Iterator[tuple[str, Used]]:
    """Yield for each video the frames that its clips take, whatever their sizes."""
    ranges = defaultdict(list)
    for clip in clips:
        first = round(clip.start * fps)
        ranges[clip.sample_id].append((first, first + clip.frames))
    for sample in samples:
        if not sample.media.image and not sample.features.latents:
            media, told = sample.media, f"{float(fps):.4g}"
            other = bool(media.fps) and f"{float(media.fps):.4g}" != told
            yield sample.id, Used(tuple(_joined(ranges[sample.id])), media.frames_at(fps), told if other else "")


def _joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the same frames in ranges that lie apart, in order."""
    joined: list[tuple[int, int]] = []
    for first, last in sorted(ranges):
        if joined and first <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(last, joined[-1][1]))
        else:
            joined.append((first, last))
    return joined


def _page_at(out: Path) -> Path:
    """Return the page's path; refuse a place that cannot be written before the work, not after it."""
    try:
        page = out / PAGE if out.is_dir() else out
        there = next(place for place in (page, *page.parents) if place.exists())
        with there.open("ab") if there == page else tempfile.TemporaryFile(dir=there):
            return page
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror}; name another place") from None


def _expected(streams: Mapping[str, str]) -> str:
    videos = ", ".join(f"NAME{suffix}.mp4" for suffix in streams.values())
    return f"{videos} and NAME.txt in a folder, or a manifest of such files; other video and image endings work too"


# --- judging ---------------------------------------------------------------------------------------------------------


def _card(sample: Sample, data: DataConfig, needs: Needs) -> Card | BadSample:
    try:
        check_features(sample.features, needs)
        if sample.features.latents:
            return Card(sample, (), ())
        frames = _judged_frames(sample, Fill(alpha=data.alpha, transfer=data.transfer))
    except BadMedia as error:
        return BadSample(sample.id, str(sample.paths[0][1]), str(error))
    names = list(frames)
    flags = flags_of(frames[names[0]], frames[names[1]], data) if len(names) > 1 else ()
    shown = {name: stack[SHOWN_FRAMES] if len(stack) > 1 else stack for name, stack in frames.items()}
    strips = [(name, _strip(stack)) for name, stack in shown.items()]
    if len(names) > 1:
        strips.append((CUT_OUT, _strip(np.concatenate([shown[names[0]], shown[names[1]][..., :1]], axis=3))))
    levels = histogram(frames[names[1]].mean(-1).astype(np.uint8)) if len(names) > 1 else []
    return Card(sample, tuple(strips), flags, len(shown[names[0]]), tuple(levels))


def _judged_frames(sample: Sample, fill: Fill) -> dict[str, np.ndarray]:
    """Read small frames [n,h,w,3] of each stream at the same few frame numbers, each sought by itself."""
    media = sample.media
    scale = min(TILE[0] / media.width, TILE[1] / media.height)
    size = {"height": max(2, round(media.height * scale)), "width": max(2, round(media.width * scale)), "threads": 1}
    last, count = media.frames - 1, 1 if media.image else JUDGED_FRAMES
    numbers = [round(last * k / max(1, count - 1)) for k in range(count)]
    if sample.rgba:
        pairs = [read_rgba(sample.paths[0][1], [number], fill=fill, **size) for number in numbers]
        return dict(zip(dict(sample.paths), map(np.concatenate, zip(*pairs))))
    found = {}
    for name, path in sample.paths:
        light = DATA if found else fill.light
        found[name] = np.concatenate([read_frames(path, [number], light=light, **size) for number in numbers])
    return found


def flags_of(rgb: np.ndarray, alpha: np.ndarray, data: DataConfig) -> tuple[str, ...]:
    """Return the flags that a few frames uint8 [n,h,w,3] of a picture and its matte raise."""
    picture, matte = rgb.astype(np.int16), alpha.astype(np.int16)
    found = []
    if matte.max() <= BLANK_ALPHA:
        found.append("blank alpha")
    elif matte.min() >= OPAQUE_ALPHA:
        found.append("all opaque")
    elif len(matte) > 1 and _motion(matte) < STILL_MATTE and _motion(picture) > MOVING_PICTURE:
        found.append("static alpha")
    if (matte.max(axis=3) - matte.min(axis=3)).mean() > COLORED_SPREAD:
        found.append("colored alpha")
    hidden = picture[matte[..., 0] <= BLANK_ALPHA]
    fill = {"black": (0, 0, 0), "color": data.fill_color}.get(data.fill)
    if fill is not None and len(hidden) and np.abs(hidden - np.array(fill)).mean() > FILL_DISTANCE:
        found.append("hidden color")
    return tuple(found)


def _motion(frames: np.ndarray) -> float:
    """Return the largest mean change from one frame to the next."""
    return float(np.abs(np.diff(frames, axis=0)).mean(axis=(1, 2, 3)).max())


def _strip(frames: np.ndarray) -> bytes:
    """Lay frames side by side as one image; the gaps are transparent."""
    from PIL import Image

    count, height, width, channels = frames.shape
    strip = np.zeros((height, count * (width + STRIP_GAP) - STRIP_GAP, 4), np.uint8)
    for k, frame in enumerate(frames):
        left = k * (width + STRIP_GAP)
        strip[:, left : left + width, :channels] = frame
        if channels == 3:
            strip[:, left : left + width, 3] = 255
    out = io.BytesIO()
    Image.fromarray(strip).save(out, "WEBP", quality=72, method=2)
    return out.getvalue()
