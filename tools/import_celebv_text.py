"""CelebV-Text goes in as it is published, a manifest for training on one stream comes out.

ROOT/videos/…/ID.mp4 are the clips, ROOT/texts/KIND/ID.txt their captions, one a line. The manifest (jsonl) has a row
for each caption, with the clip's size, length and rate. With --seconds each clip's beginning is cut out without
encoding anew, and the manifest names the cuts. Clips are looked at as they come; the same command goes on where it was
stopped, and takes in what has been downloaded since.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooling import folder_given, run, summary
from tqdm import tqdm

from transpixeler.config import UserError
from transpixeler.data.media.clip import VIDEO_ENDINGS, BadMedia, reasons
from transpixeler.data.media.decode import probe
from transpixeler.files import whole


@dataclass(frozen=True)
class Options:
    texts: tuple[Path, ...]
    out: Path
    captions: int
    seconds: float

    @property
    def cuts(self) -> Path:
        return self.out.with_name(f"{self.out.stem}-{self.seconds:g}s")


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    root = folder_given(arguments.root, "the folder of CelebV-Text")
    videos = folder_given(root / "videos", "CelebV-Text, whose clips lie in videos")
    kinds = folder_given(root / "texts", "CelebV-Text, whose captions lie in texts")
    if arguments.out.suffix != ".jsonl":
        raise UserError(f"--out: {arguments.out} does not end in .jsonl")
    if arguments.captions < 0 or arguments.seconds < 0 or arguments.jobs < 1:
        raise UserError("--captions and --seconds must not be below 0, --jobs must be at least 1")
    texts = (kinds, *sorted(path for path in kinds.iterdir() if path.is_dir()))
    options = Options(texts, arguments.out, arguments.captions, arguments.seconds)
    rows, clips, left_out = _write(videos, options, jobs=arguments.jobs)
    summary(f"{arguments.out}: {rows} captions of {clips} clips", left_out)
    if not rows:
        raise UserError(f"{root}: no clip with a caption was found")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("root", type=Path, help="the folder that holds videos/ and texts/")
    add("--out", type=Path, required=True, help="the manifest, *.jsonl; its paths are relative to it")
    add("--captions", type=int, default=0, help="at most so many captions of a clip, chosen by its name; 0: all")
    add("--seconds", type=float, default=0.0, help="at most so much of a clip's beginning; 0: all of it, uncut")
    add("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="clips at a time")
    return parser


def _write(videos: Path, options: Options, *, jobs: int) -> tuple[int, int, list[tuple[str, str]]]:
    """Rows are kept as they come in a file beside the manifest, which then takes its name."""
    part = options.out.with_name(f".{options.out.name}.part")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _take_up(part, options)
    done, rows = _known(part)
    left_out: list[tuple[str, str]] = []
    with part.open("a", encoding="utf-8") as file, ThreadPoolExecutor(jobs) as pool:
        new = (path for path in _clips(videos) if path.stem not in done)
        bar = tqdm(_in_order(pool, new, options, ahead=4 * jobs), unit=" clips", initial=len(done), disable=None)
        for path, found in bar:
            if isinstance(found, str):
                left_out.append((path.stem, found))
                continue
            done.add(path.stem)
            rows += len(found)
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found))
            file.flush()
    part.replace(options.out)
    return rows, len(done), left_out


def _take_up(part: Path, options: Options) -> None:
    """What is there is gone on with, if it was made with the same options."""
    stamp = json.dumps({"captions": options.captions, "seconds": options.seconds})
    memory = part.with_suffix(".options")
    if memory.exists() and memory.read_text(encoding="utf-8") != stamp:
        raise UserError(f"{options.out}: was begun with {memory.read_text(encoding='utf-8')}; choose another --out")
    memory.write_text(stamp, encoding="utf-8")
    if not part.exists() and options.out.exists():
        with whole(part) as unfinished:
            unfinished.write_bytes(options.out.read_bytes())


def _known(part: Path) -> tuple[set[str], int]:
    """The clips whose rows are all written, which is not sure of the last: it is cut away and done again."""
    clips: dict[str, int] = {}  # a clip's rows stand together
    last, start, end = "", 0, 0
    if not part.exists():
        return set(), 0
    with part.open("rb+") as file:
        for line in file:
            clip = Path(json.loads(line)["video"]).stem if line.endswith(b"\n") else last
            if clip != last:
                last, start = clip, end
            clips[clip] = clips.get(clip, 0) + 1
            end += len(line)
        file.truncate(start)
    clips.pop(last, None)
    return set(clips), sum(clips.values())


def _clips(folder: Path) -> Iterator[Path]:
    """A listing at a time, never all of it."""
    with os.scandir(folder) as entries:
        found = sorted(entries, key=lambda entry: entry.name)
    for entry in found:
        if entry.is_dir():
            yield from _clips(Path(entry.path))
        elif Path(entry.name).suffix.lower() in VIDEO_ENDINGS and not entry.name.startswith("."):
            yield Path(entry.path)


def _in_order(
    pool: ThreadPoolExecutor, clips: Iterator[Path], options: Options, *, ahead: int
) -> Iterator[tuple[Path, list[dict[str, Any]] | str]]:
    """A few at a time are looked at, so that nothing is opened long before it is written down."""
    waiting: deque[tuple[Path, Future]] = deque()
    for path in clips:
        waiting.append((path, pool.submit(_rows, path, options)))
        if len(waiting) >= ahead:
            path, future = waiting.popleft()
            yield path, future.result()
    for path, future in waiting:
        yield path, future.result()


def _rows(path: Path, options: Options) -> list[dict[str, Any]] | str:
    try:
        captions = _captions(path.stem, options)
        if not captions:
            return "has no caption in texts"
        video = _cut(path, options) if options.seconds else path
        media = probe(video)
    except BadMedia as error:
        return str(error)
    facts = {"num_frames": media.frames, "height": media.height, "width": media.width, "fps": str(media.fps)}
    name = os.path.relpath(video.resolve(), options.out.parent.resolve())
    return [{"video": name, "text": text, **facts} for text in captions]


def _captions(clip: str, options: Options) -> list[str]:
    lines: list[str] = []
    for folder in options.texts:
        file = folder / f"{clip}.txt"
        try:
            lines += file.read_text(encoding="utf-8-sig").splitlines() if file.is_file() else []
        except UnicodeDecodeError:
            raise BadMedia(f"its captions in {file} are not UTF-8") from None
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if options.captions and len(captions) > options.captions:
        drawn = sorted(captions, key=lambda text: hashlib.sha256(f"{clip}\0{text}".encode()).digest())
        captions = [text for text in captions if text in drawn[: options.captions]]
    return captions


def _cut(path: Path, options: Options) -> Path:
    """The packets before the first that is shown later than wanted: all frames that they hold can be decoded."""
    import av

    target = options.cuts / path.name
    if target.exists():
        return target
    with whole(target) as unfinished, reasons(), av.open(f"file:{path}") as source:
        if not source.streams.video:
            raise BadMedia("has no video stream")
        stream = source.streams.video[0]
        end = (stream.start_time or 0) + options.seconds / stream.time_base
        packets = itertools.takewhile(lambda packet: packet.size and (packet.pts or 0) < end, source.demux(stream))
        kind = {".mkv": "matroska", ".webm": "webm", ".mov": "mov"}.get(path.suffix.lower(), "mp4")
        with av.open(str(unfinished), "w", format=kind) as out:
            copy = out.add_stream_from_template(stream)
            for packet in packets:
                packet.stream = copy
                out.mux(packet)
    return target


if __name__ == "__main__":
    raise SystemExit(run("import_celebv_text", main))
