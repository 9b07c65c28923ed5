"""Split RGBA videos (ProRes 4444, VP9 with alpha, PNG sequences, animated WebP, GIF, APNG) into training pairs.

NAME.mov becomes NAME.mp4 and NAME_seg.mp4, with the same frames at the same numbers, and a copy of NAME.txt. Colour is
made straight, scaled multiplied by alpha, and filled where nothing is visible. Clips without alpha to learn from (none,
blank, opaque, not moving) are left out with the reason. A stopped run continues with the same command.
"""

from __future__ import annotations

import argparse
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Literal

import numpy as np
from tooling import run, summary
from tqdm import tqdm

from transpixeler.config.sections import UserError
from transpixeler.data.media.clip import Clip, Media
from transpixeler.data.media.decode import frame_numbers, is_premultiplied, probe, stream_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.extend import Backdrop
from transpixeler.data.media.files import files_of, is_pattern, spans_files, stem_of
from transpixeler.data.media.fill import Fill, fill_frame, scaled_straight
from transpixeler.data.media.light import Curve, Light
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.data.names import normal
from transpixeler.data.sources.candidate import Note, counted
from transpixeler.data.sources.captions import caption_text
from transpixeler.data.sources.folder import MEDIA_ENDINGS, is_sequence, listed
from transpixeler.files import write_text

BLANK, OPAQUE = 3, 252  # levels, the same as in `inspect`
STILL, MOVING = 0.5, 1.0  # mean change from frame to frame, in levels
BEST_FIRST = (".mov", "", ".mkv", ".png", ".webp", ".webm", ".gif")  # "": a folder of images
SEQUENCE_FPS = Fraction(16)


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    out: Path
    alpha: Literal["auto", "straight", "premultiplied"]
    transfer: Curve
    fill: Literal["extend", "black", "color", "random", "keep"]
    color: tuple[int, int, int]
    fps: Fraction | None
    short_side: int
    lossless: bool
    force: bool


@dataclass(frozen=True)
class Job:
    """One RGBA source and the name of its pair within the output folder."""

    source: Path
    name: Path
    caption: Path | None


@dataclass(frozen=True)
class Cut:
    """Frames to read from a source, and the way to turn them into a pair."""

    source: Path
    media: Media
    numbers: tuple[int, ...]
    fps: Fraction
    size: tuple[int, int]  # height and width of the pair
    premultiplied: bool
    fill: Fill
    light: Light

    def raw(self) -> Iterator[np.ndarray]:
        return stream_rgba(self.source, self.numbers, self.media, light=self.light)

    def straight(self) -> Iterator[np.ndarray]:
        """Yield uint8 [H,W,4], straight and scaled; cropped by less than a pixel to a size that 4:2:0 holds."""
        height, width = self.size
        scale = max(height / self.media.height, width / self.media.width)
        tall, wide = max(height, round(self.media.height * scale)), max(width, round(self.media.width * scale))
        for frame in self.raw():
            if (tall, wide) != frame.shape[:2]:
                frame = scaled_straight(frame, height=tall, width=wide, premultiplied=self.premultiplied)
            elif self.premultiplied:
                frame = unpremultiplied(frame)
            yield frame[:height, :width].copy()

    def mattes(self, backdrop: Backdrop) -> Iterator[np.ndarray]:
        """Yield alpha as grey uint8 [H,W,3]; each frame's colour goes to the backdrop on the way."""
        for frame in self.straight():
            if self.fill.policy == "extend":
                backdrop.add(frame)
            yield frame[..., 3:].repeat(3, axis=2)

    def colors(self, backdrop: Backdrop) -> Iterator[np.ndarray]:
        """Yield RGB uint8 [H,W,3], filled where alpha hides it. backdrop: of all frames."""
        for frame in self.straight():
            fill_frame(frame, self.fill, backdrop)
            yield frame[..., :3]


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    options = _options(arguments)
    jobs, left_out, notes = _jobs(arguments.sources, arguments.ending, options.out, stills=arguments.stills)
    if not jobs:
        raise UserError(f"{', '.join(map(str, arguments.sources))}: holds no video or image sequence")
    made = kept = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        work = pool.map(lambda job: _split(job, options), jobs)
        for job, found in zip(jobs, tqdm(work, total=len(jobs), unit=" clips", disable=None)):
            made, kept = made + (found is True), kept + (found is False)
            if isinstance(found, str):
                left_out.append((str(job.source), found))
    summary(f"{options.out}: {made} pairs written, {kept} were there", left_out)
    print(*(f"note: {note}" for note in notes), sep="\n", end="\n" * bool(notes))
    if made + kept == 0:
        raise UserError(f"{options.out}: no pair came out; the reasons are above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("sources", nargs="+", type=Path, help="files, image sequences, or folders of them")
    add("--out", type=Path, required=True, help="the folder of pairs")
    add("--alpha", choices=("auto", "straight", "premultiplied"), default="auto", help="how the file stores colour")
    add("--transfer", choices=("srgb", "rec709"), default="srgb", help="the curve that linear light (EXR) is shown by")
    add(
        "--fill",
        choices=("extend", "black", "color", "random", "keep"),
        default="extend",
        help="colour under zero alpha: extend the nearest, black, --color, random for each clip, or keep the file's",
    )
    add("--color", default="0,0,0", metavar="R,G,B", help="for --fill color, 0 to 255 each")
    add("--fps", help="resample to this rate, such as 24000/1001; default: the file's own, 16 for images")
    add("--short-side", type=int, default=0, help="scale down to this many pixels; 0 keeps the size")
    add("--ending", default="", help="take only files of this ending, such as .mov")
    add("--stills", action="store_true", help="numbered images are stills, not the frames of one clip")
    add("--lossless", action="store_true", help="lossless 4:4:4: larger, and browsers do not play it")
    add("--force", action="store_true", help="write pairs again that exist already")
    add("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="clips at a time")
    return parser  # fmt: skip


def _options(arguments: argparse.Namespace) -> Options:
    try:
        red, green, blue = (int(part) for part in arguments.color.split(","))
    except ValueError:
        raise UserError(f"--color: {arguments.color!r} is not three numbers such as 0,255,0") from None
    if not all(0 <= part <= 255 for part in (red, green, blue)):
        raise UserError(f"--color: {arguments.color!r} has a part outside 0 to 255")
    try:
        fps = Fraction(arguments.fps) if arguments.fps else None
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--fps: {arguments.fps!r} is not a rate such as 16 or 24000/1001") from None
    if fps is not None and fps <= 0:
        raise UserError(f"--fps: {arguments.fps!r} must be above 0")
    if arguments.jobs < 1 or arguments.short_side < 0 or arguments.short_side == 1:
        raise UserError("--jobs must be at least 1, and --short-side 0 or at least 2")
    color = (red, green, blue)
    short, lossless, force = arguments.short_side, arguments.lossless, arguments.force
    stored = (arguments.alpha, arguments.transfer)
    return Options(arguments.out, *stored, arguments.fill, color, fps, short, lossless, force)


# --- finding sources --------------------------------------------------------------------------------------------------


def _jobs(
    sources: Iterable[Path], ending: str, out: Path, *, stills: bool
) -> tuple[list[Job], list[tuple[str, str]], list[Note]]:
    """Return a job for each name: of files that share one, the best format is taken and the others are listed."""
    jobs, left_out, taken, notes = [], [], {}, {}
    found = [job for source in sources for job in _found(source, out.resolve(), notes, stills=stills)]
    wanted = [job for job in found if not ending or job.source.suffix.lower() == ending.lower()]
    for job in sorted(wanted, key=lambda job: (str(job.name), _rank(job.source))):
        if job.name in taken:
            left_out.append((str(job.source), f"{taken[job.name]} has this name and was taken; --ending chooses"))
        else:
            taken[job.name] = job.source.name
            jobs.append(job)
    return jobs, left_out, [notes[text] for text in sorted(notes)]


def _rank(source: Path) -> tuple[int, str]:
    ending = "" if spans_files(source) else source.suffix.lower()
    return BEST_FIRST.index(ending) if ending in BEST_FIRST else len(BEST_FIRST), ending


def _found(source: Path, out: Path, notes: dict[str, Note], *, stills: bool) -> Iterator[Job]:
    if not source.exists() and not is_pattern(source):
        raise UserError(f"{source}: does not exist; give a video, an image sequence, or a folder of them")
    if source.is_dir() and not is_sequence(source):
        yield from _inside(source, Path(), out, notes, stills=stills)
    elif spans_files(source) or source.suffix.lower() in MEDIA_ENDINGS:
        stem = stem_of(source)
        beside = listed(source.parent).captions.get(normal(stem), [None])
        yield Job(source, Path(stem), beside[0])
    else:
        raise UserError(f"{source}: is no video; known endings are {', '.join(sorted(MEDIA_ENDINGS))}")


def _inside(folder: Path, below: Path, out: Path, notes: dict[str, Note], *, stills: bool) -> Iterator[Job]:
    listing = listed(folder)
    for note in listing.notes:
        notes[note.text] = counted(note, notes.get(note.text))
    for stem, paths in listing.media.items():
        caption = listing.captions.get(stem, [None])[0]
        for path in paths:
            if path.is_dir() and path.resolve() == out:
                continue
            apart = is_pattern(path) and (stills or _are_clips(path))
            for one in files_of(path) if apart else (path,):
                yield Job(one, below / (stem_of(one) if apart else stem), None if apart else caption)
    for path in listing.folders:
        if path.resolve() != out:
            yield from _inside(path, below / path.name, out, notes, stills=stills)


def _are_clips(pattern: Path) -> bool:
    """Tell whether numbered images are animations, each of which is a clip."""
    try:
        return probe(files_of(pattern)[0]).frames > 1
    except BadMedia:  # the clip's own probe says why
        return False


# --- one clip --------------------------------------------------------------------------------------------------------


def _split(job: Job, options: Options) -> bool | str:
    """Return True for a pair that was written, False for one that existed, or the reason why there is none."""
    target = options.out / job.name
    try:
        text = caption_text(job.caption) if job.caption else None
        there = not options.force and any(_pair(target, ending)[0].is_file() for ending in (".mp4", ".png"))
        if not there:
            _write(target, _examined(job, options), lossless=options.lossless)
    except (BadMedia, UserError) as error:
        return str(error)
    if text is not None:
        write_text(target.with_name(target.name + ".txt"), text)
    return not there


def _pair(target: Path, ending: str) -> tuple[Path, Path]:
    return target.with_name(target.name + ending), target.with_name(f"{target.name}_seg{ending}")


def _examined(job: Job, options: Options) -> Cut:
    media = probe(job.source)
    if not media.alpha:
        raise BadMedia("has no alpha channel")
    fps = options.fps or media.fps or SEQUENCE_FPS
    resampled = options.fps is not None and bool(media.fps) and not media.image
    clip = Clip(str(job.name), Fraction(0), media.frames_at(fps), fps, media.height, media.width)
    numbers = frame_numbers(job.source, clip) if resampled else tuple(range(media.frames))
    light = Light(options.transfer, options.alpha)
    cut = Cut(job.source, media, numbers, fps, _size(media, options), False, _fill(job, options), light)
    _check_alpha(cut)
    return replace(cut, premultiplied=is_premultiplied(job.source, options.alpha))


def _size(media: Media, options: Options) -> tuple[int, int]:
    """Return the pair's (height, width): never larger than the source, and even where 4:2:0 needs it."""
    scale = min(1.0, options.short_side / min(media.height, media.width)) if options.short_side else 1.0
    unit = 1 if options.lossless or media.image else 2
    height, width = (round(side * scale) // unit * unit for side in (media.height, media.width))
    if min(height, width) < unit:
        raise BadMedia(f"is {media.width}×{media.height}, too small for a pair")
    return height, width


def _fill(job: Job, options: Options) -> Fill:
    if options.fill == "random":
        return Fill("color", random_color(job.name.as_posix()))
    return Fill(options.fill, options.color if options.fill == "color" else (0, 0, 0))


def random_color(name: str) -> tuple[int, int, int]:
    """Draw a colour by a clip's name, the same on every machine."""
    red, green, blue = hashlib.sha256(name.encode()).digest()[:3]
    return red, green, blue


def unpremultiplied(rgba: np.ndarray) -> np.ndarray:
    """Turn uint8 [H,W,4] colour times alpha into straight colour; pixels of zero alpha become black."""
    alpha = rgba[..., 3:].astype(np.float32)
    color = np.where(alpha > 0, rgba[..., :3] * (255 / np.maximum(alpha, 1)), 0)
    return np.concatenate([color.round().clip(0, 255).astype(np.uint8), rgba[..., 3:]], axis=2)


def _check_alpha(cut: Cut) -> None:
    """Refuse a clip whose alpha teaches nothing in any of its frames."""
    low, high, motion, picture_motion = 255, 0, 0.0, 0.0
    before = None
    for frame in cut.raw():
        alpha = frame[..., 3]
        low, high = min(low, int(alpha.min())), max(high, int(alpha.max()))
        if before is not None:
            change = np.abs(frame.astype(np.int16) - before).mean(axis=(0, 1))
            motion, picture_motion = max(motion, float(change[3])), max(picture_motion, float(change[:3].mean()))
        before = frame
    if high <= BLANK:
        raise BadMedia("its alpha is blank: it shows nothing in any frame")
    if low >= OPAQUE:
        raise BadMedia("its alpha is opaque in all frames: there is nothing to learn from it")
    if len(cut.numbers) > 1 and motion < STILL and picture_motion > MOVING:
        raise BadMedia("its alpha stands still while the picture moves")


def _write(target: Path, cut: Cut, *, lossless: bool) -> None:
    """Write both files, the first stream's last, so that it stands for a whole pair."""
    first, second = _pair(target, ".png" if cut.media.image else ".mp4")
    backdrop = Backdrop()
    _write_one(second, cut.mattes(backdrop), cut, lossless=lossless)
    _write_one(first, cut.colors(backdrop), cut, lossless=lossless)


def _write_one(path: Path, frames: Iterator[np.ndarray], cut: Cut, *, lossless: bool) -> None:
    if cut.media.image:
        write_png(path, next(frames))
    else:
        write_mp4(path, frames, fps=cut.fps, lossless=lossless)


if __name__ == "__main__":
    raise SystemExit(run("split_rgba", main))
