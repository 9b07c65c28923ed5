"""A data set goes in; its problems come out: as values, as text, and as one HTML page to look at.

Every sample is opened and judged from a few frames. Flags mark what a person should look at: a matte that is blank,
opaque, frozen or no matte at all, and colours that are hidden under it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.buckets import Bucket
from transpixeler.data.features.files import old_formats
from transpixeler.data.features.needs import Needs, check_features
from transpixeler.data.media.decode import read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import DATA
from transpixeler.data.sources.candidate import BadSample, Note
from transpixeler.data.sources.pairs import Sample
from transpixeler.data.survey import survey
from transpixeler.files import write_text

PAGE = "inspect.html"
FLAGS = {
    "blank alpha": "the matte is empty in every frame that was looked at",
    "all opaque": "the matte hides nothing, so there is nothing to learn from it",
    "static alpha": "the matte stays the same while the picture moves",
    "colored alpha": "the matte has colours: perhaps the wrong file, or a picture",
    "hidden color": "the colour under zero alpha is not the fill that data.fill names",
}
TILE = (200, 150)  # width and height that a frame is fitted into
JUDGED_FRAMES = 5  # of a clip
SHOWN_FRAMES = slice(0, None, 2)  # of those: the first, the middle and the last
STRIP_GAP = 4  # pixels between frames
CUT_OUT = "cut out"  # title of the strip that shows RGB through its matte
PAGE_CARDS = 400  # more slow a browser down; flagged samples come first
# All in levels of 0 to 255; motion is the mean change from one judged frame to the next.
BLANK_ALPHA, OPAQUE_ALPHA = 3, 252
STILL_MATTE, MOVING_PICTURE = 0.5, 1.0
COLORED_SPREAD = 10  # between a matte's channels
FILL_DISTANCE = 10  # of hidden colour from the fill


@dataclass(frozen=True)
class Card:
    """A sample as the page shows it: a strip of frames for each stream, as image bytes."""

    sample: Sample
    strips: tuple[tuple[str, bytes], ...]
    flags: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """Everything that was found, for the terminal and for exit codes."""

    samples: int
    bad: tuple[BadSample, ...]
    dropped: tuple[tuple[str, str], ...]
    buckets: tuple[tuple[Bucket, int], ...]
    flags: tuple[tuple[str, int], ...]
    page: Path
    expected: str  # the files that make a sample
    notes: tuple[Note, ...] = ()

    def lines(self) -> Iterator[str]:
        """Yield what the page says, without its pictures."""
        yield f"{self.samples} samples can be used, {len(self.bad)} cannot"
        if not self.samples:
            yield f"expected {self.expected}"
        yield from (f"  {bad.id}: {bad.reason} ({bad.path})" for bad in self.bad)
        yield from (f"  {note}" for note in self.notes)
        yield f"{sum(count for _, count in self.buckets)} clips in {len(self.buckets)} buckets"
        yield from (f"  {bucket}: {count}" for bucket, count in self.buckets)
        if self.dropped:
            yield f"{len(self.dropped)} clips dropped"
            yield from (f"  {count} × {reason}" for reason, count in Counter(r for _, r in self.dropped).most_common())
        yield from (f"{count} samples flagged: {flag} ({FLAGS[flag]})" for flag, count in self.flags if count)
        yield f"page: {self.page}"


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
    report = Inspection(len(cards), bad, dropped, tuple(buckets), flags, page, _expected(streams), found.notes)
    write_text(page, _page(report, cards, sources))
    return report


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
    return Card(sample, tuple(strips), flags)


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


# --- the page --------------------------------------------------------------------------------------------------------


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


def _page(report: Inspection, cards: Sequence[Card], sources: Sequence[SourceConfig]) -> str:
    """Fill in the template; the page needs nothing else."""
    shown = sorted(cards, key=lambda card: not card.flags)[:PAGE_CARDS]
    shown.sort(key=lambda card: card.sample.id)
    parts = {
        "title": html.escape(", ".join(Path(source.path).resolve().name for source in sources)),
        "totals": _totals(report),
        "problems": _problems(report),
        "buckets": _histogram(report.buckets),
        "filters": _filters(report),
        "note": f"{len(shown)} of {len(cards)} samples are shown, flagged ones first."
        if len(shown) < len(cards)
        else "",
        "cards": "\n".join(map(_card_html, shown)),
    }
    page = (Path(__file__).parent / "assets" / "inspect.html").read_text(encoding="utf-8")
    head, *rest = page.split("<!--")
    return head + "".join(_filled(piece, parts) for piece in rest)


def _filled(piece: str, parts: Mapping[str, str]) -> str:
    name, after = piece.split("-->", 1)
    return parts[name.strip()] + after


def _totals(report: Inspection) -> str:
    flagged = sum(count for _, count in report.flags)
    clips = sum(count for _, count in report.buckets)
    figures = [
        ("samples", report.samples, ""),
        ("clips", clips, ""),
        ("cannot be used", len(report.bad), "bad"),
        ("clips dropped", len(report.dropped), "warn"),
        ("flags", flagged, "warn"),
    ]
    return "".join(
        f'<div class="figure {kind if count else ""}"><b>{count:,}</b><span>{name}</span></div>'
        for name, count, kind in figures
    )


def _problems(report: Inspection) -> str:
    tables = []
    if report.bad:
        rows = ((bad.id, bad.reason, bad.path) for bad in report.bad)
        tables.append(_table("Cannot be used", ("sample", "reason", "file"), rows, opened=True))
    if report.dropped:
        tables.append(_table("Clips dropped", ("sample", "reason"), report.dropped, opened=False))
    if report.notes:
        rows = ((f"{note.count:,}", note.text, note.path) for note in report.notes)
        tables.append(_table("Notes", ("files", "what", "such as"), rows, opened=False))
    return "".join(tables) or "<p class=none>None: every file belongs to a sample, and every sample to a bucket."


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]], *, opened: bool) -> str:
    body = ["".join(f'<td data-head="{head}">{html.escape(cell)}' for head, cell in zip(heads, row)) for row in rows]
    head = "".join(f"<th>{name}" for name in heads)
    lines = "".join(f"<tr>{row}" for row in body)
    return (
        f"<details{' open' if opened else ''}><summary>{title} <i>{len(body):,}</i></summary>"
        f"<div class=scroll><table><thead><tr>{head}<tbody>{lines}</table></div></details>"
    )


def _histogram(buckets: Sequence[tuple[Bucket, int]]) -> str:
    if not buckets:
        return "<p class=none>No clip fits a bucket; the dropped clips say why."
    most = max(count for _, count in buckets)
    return "".join(
        f"<div class=bar><span>{bucket.width}×{bucket.height}</span><span>{_length(bucket.frames)}</span>"
        f'<i style="--share:{count / most:.4f}"></i><b>{count:,}</b></div>'
        for bucket, count in buckets
    )


def _length(frames: int) -> str:
    return "image" if frames == 1 else f"{frames} frames"


def _filters(report: Inspection) -> str:
    return "".join(
        f'<button data-flag="{flag}" title="{FLAGS[flag]}" aria-pressed=false>{flag} <i>{count:,}</i></button>'
        for flag, count in report.flags
        if count
    )


def _figure(name: str, data: bytes) -> str:
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    cut = " class=cut" if name == CUT_OUT else ""
    name = html.escape(name)
    return f'<figure><figcaption>{name}</figcaption><img{cut} alt="{name}" decoding=async src="{source}"></figure>'


def _card_html(card: Card) -> str:
    sample, media = card.sample, card.sample.media
    facts = [f"{media.width}×{media.height}", _length(media.frames)]
    if media.fps and not media.image:
        facts += [f"{float(media.fps):.4g} fps", f"{float(media.duration):.1f} s"]
    strips = "".join(_figure(name, data) for name, data in card.strips)
    kind = '"strips still"' if media.image else "strips"
    flags = "".join(f'<span class=flag title="{FLAGS[flag]}">{flag}</span>' for flag in card.flags)
    return (
        f'<article data-flags="{"|".join(card.flags)}"><header><h3>{html.escape(sample.id)}</h3>'
        f"<small>{' · '.join(facts)}</small></header><div class={kind}>{strips}</div>"
        f"<p class=caption>{html.escape(sample.caption)}</p><footer>{flags}</footer></article>"
    )
