"""An inspected data set goes in; its page comes out: what is wrong, and a card for each sample that opens a player."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from transpixeler.config.sections import SourceConfig
from transpixeler.data.buckets import Bucket
from transpixeler.publishing import page
from transpixeler.publishing.inspection import FLAGS, NOT_FITTING, Card, Inspection, Used, share

STRIP_GAP = 4  # pixels between frames, as player.js has them
CUT_OUT = "cut out"  # title of the strip that shows RGB through its matte
PAGE_CARDS = 400  # more slow a browser down; flagged samples come first
PLAYED = {".mp4", ".m4v", ".mov", ".webm"}  # endings of files that a browser may play, or not: the player sees
PICTURES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif"}
BODY = """<main>
<h1>{title}</h1>
<div class="totals">{totals}</div>
<div class="top">
<section><h2>Problems</h2>{problems}</section>
<section><h2>Clips in each bucket</h2>{buckets}</section>
</div>
<div class="tools">{filters}
<input type="search" placeholder="Find in names and captions" aria-label="Find in names and captions">
<span id="shown" role="status"></span></div>
<p class="none">{note}</p>
<div class="cards">{cards}</div>
</main>"""


def render(report: Inspection, cards: Sequence[Card], sources: Sequence[SourceConfig]) -> str:
    """Return the page, which needs nothing but the files that its player shows at full size."""
    shown = sorted(cards, key=lambda card: not card.flags)[:PAGE_CARDS]
    shown.sort(key=lambda card: card.sample.id)
    title, used = ", ".join(Path(source.path).resolve().name for source in sources), dict(report.used)
    left_out = f"{len(shown)} of {len(cards)} samples are shown, flagged ones first." if len(shown) < len(cards) else ""
    body = BODY.format(
        title=html.escape(title),
        totals=_totals(report),
        problems=_problems(report),
        buckets=_histogram(report.buckets),
        filters=_filters(report),
        note=left_out,
        cards="\n".join(_card_html(card, used.get(card.sample.id)) for card in shown),
    )
    clips = [_clip(card, used.get(card.sample.id), report.page) for card in shown]
    styles, scripts = ("player.css", "inspect.css"), ("player.js", "inspect.js")
    return page.build(title, styles=styles, scripts=scripts, value={"clips": clips}, body=body)


def _clip(card: Card, used: Used | None, made: Path) -> dict[str, Any]:
    """Return what the player shows of a sample: its own files where a browser may play them, else the page's strips."""
    sample, media = card.sample, card.sample.media
    names, kinds = [name for name, _ in sample.paths], PICTURES if media.image else PLAYED
    files = {name: page.address(path, made) for name, path in sample.paths[: 1 if sample.rgba else None]}
    played = all(path.suffix.lower() in kinds for _, path in sample.paths)
    return {
        "title": sample.id,
        "facts": " · ".join([*_facts(card, used), sample.caption]),
        "fps": float(media.fps) or 1.0,
        "frames": media.frames,
        "files": files if played else {},
        "alpha": names[1] if len(names) > 1 else None,
        "inside": sample.rgba,
        "still": media.image,
        "shown": card.shown,
        "histogram": card.histogram or None,
    }


def _totals(report: Inspection) -> str:
    flagged = sum(count for _, count in report.flags)
    used, frames = report.frames
    clips = sum(count for _, count in report.buckets)
    figures = [
        ("samples", report.samples, ""),
        ("clips", clips, ""),
        *([(f"of {frames:,} frames used, {share(used, frames)}", used, "")] if frames else []),
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
        tables.append(_table("Clips dropped", ("sample", "reason"), report.dropped, opened=not report.buckets))
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
        return f"<p class=none>No clip fits: {NOT_FITTING}."
    most = max(count for _, count in buckets)
    return "".join(
        f"<div class=bar><span>{bucket.width}×{bucket.height}</span><span>{_length(bucket.frames)}</span>"
        f'<i style="--share:{count / most:.4f}"></i><b>{count:,}</b></div>'
        for bucket, count in buckets
    )


def _length(frames: int) -> str:
    return "image" if frames == 1 else f"{frames} frames"


def _filters(report: Inspection) -> str:
    all_of_them = '<button data-flag="" aria-pressed="true">all</button>' if any(n for _, n in report.flags) else ""
    return all_of_them + "".join(
        f'<button data-flag="{flag}" title="{FLAGS[flag]}" aria-pressed=false>{flag} <i>{count:,}</i></button>'
        for flag, count in report.flags
        if count
    )


def _figure(name: str, data: bytes, *, sample: str) -> str:
    source = f"data:image/webp;base64,{base64.b64encode(data).decode()}"
    kind = "class=cut" if name == CUT_OUT else f'data-stream="{html.escape(name)}"'
    name = html.escape(name)
    image = f'<img {kind} alt="{name}" decoding=async src="{source}">'
    label = f"Open {html.escape(sample)} at full size"
    return f'<figure><figcaption>{name}</figcaption><button class=open aria-label="{label}">{image}</button></figure>'


def _facts(card: Card, used: Used | None) -> list[str]:
    media = card.sample.media
    facts = [f"{media.width}×{media.height}", _length(media.frames)]
    if media.fps and not media.image:
        facts += [f"{float(media.fps):.4g} fps", f"{float(media.duration):.1f} s"]
    return facts + ([str(used)] if used else [])


def _timeline(used: Used | None) -> str:
    """Draw the frames that are used on the length of the clip, where they are not all."""
    if used is None or used.count >= used.frames:
        return ""
    parts = "".join(f'<i style="--from:{a / used.frames:.4f};--to:{b / used.frames:.4f}"></i>' for a, b in used.ranges)
    said = ", ".join(f"{first + 1}–{last}" for first, last in used.ranges) or "none"
    return f'<div class=used title="frames used: {said} of {used.frames}">{parts}</div>'


def _card_html(card: Card, used: Used | None) -> str:
    sample = card.sample
    strips = "".join(_figure(name, data, sample=sample.id) for name, data in card.strips)
    kind = '"strips still"' if sample.media.image else "strips"
    flags = "".join(f'<span class=flag title="{FLAGS[flag]}">{flag}</span>' for flag in card.flags)
    return (
        f'<article data-flags="{"|".join(card.flags)}"><header><h3>{html.escape(sample.id)}</h3>'
        f"<small>{' · '.join(_facts(card, used))}</small></header><div class={kind}>{strips}</div>{_timeline(used)}"
        f"<p class=caption>{html.escape(sample.caption)}</p><footer>{flags}</footer></article>"
    )
