"""Turn CelebV-Text as it is published into a manifest for training on one stream.

ROOT/videos/…/ID.mp4 are the clips, ROOT/texts/KIND/ID.txt their captions, one a line. The manifest (jsonl) has a row
for each caption, with the clip's size, length and rate. With --seconds each clip's beginning is cut out without
re-encoding, and the manifest names the cuts. A stopped run continues with the same command and adds new downloads.
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

from tooling import check_counts, folder_given, run, summary
from tqdm import tqdm

from transpixeler.config.sections import UserError
from transpixeler.data.media.decode import probe
from transpixeler.data.media.errors import BadMedia, as_bad_media
from transpixeler.data.media.files import VIDEO_ENDINGS
from transpixeler.data.sources.captions import caption_text
from transpixeler.files import whole


@dataclass(frozen=True)
class Options:
    """The command line, checked."""

    texts: tuple[Path, ...]
    out: Path
    captions: int
    seconds: float

    @property
    def cuts(self) -> Path:
        return self.out.with_name(f"{self.out.stem}-{self.seconds:g}s")


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    check_counts(jobs=arguments.jobs)
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
    add("--captions", type=int, default=0, help="most captions for each clip, drawn by its name; 0: all")
    add("--seconds", type=float, default=0.0, help="cut each clip after so many seconds; 0: do not cut")
    add("--jobs", type=int, default=2 * (os.cpu_count() or 1), help="clips at a time")
    return parser


def _write(videos: Path, options: Options, *, jobs: int) -> tuple[int, int, list[tuple[str, str]]]:
    """Append rows to a file beside the manifest, which takes its name in the end."""
    part = options.out.with_name(f".{options.out.name}.part")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    _continue(part, options)
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


def _continue(part: Path, options: Options) -> None:
    """Continue from what is there, if it was made with the same options."""
    stamp = json.dumps({"captions": options.captions, "seconds": options.seconds})
    memory = part.with_suffix(".options")
    if memory.exists() and memory.read_text(encoding="utf-8") != stamp:
        raise UserError(f"{options.out}: was made with {memory.read_text(encoding='utf-8')}; choose another --out")
    memory.write_text(stamp, encoding="utf-8")
    if not part.exists() and options.out.exists():
        with whole(part) as unfinished:
            unfinished.write_bytes(options.out.read_bytes())


def _known(part: Path) -> tuple[set[str], int]:
    """Return the finished clips and their rows; the last one may be incomplete, so it is cut off and done again."""
    clips: dict[str, int] = {}  # rows by clip; a clip's rows are consecutive
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
    """Walk the folders, holding one listing at a time."""
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
    """Yield results in order, with `ahead` clips at most in the pool."""
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
    files = [folder / f"{clip}.txt" for folder in options.texts]
    lines = [line for file in files if file.is_file() for line in caption_text(file).splitlines()]
    captions = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if options.captions and len(captions) > options.captions:
        drawn = sorted(captions, key=lambda text: hashlib.sha256(f"{clip}\0{text}".encode()).digest())
        captions = [text for text in captions if text in drawn[: options.captions]]
    return captions


def _cut(path: Path, options: Options) -> Path:
    """Copy the packets before the first that is shown too late: all frames that they hold can be decoded."""
    import av

    target = options.cuts / path.name
    if target.exists():
        return target
    with whole(target) as unfinished, as_bad_media(), av.open(f"file:{path}") as source:
        if not source.streams.video:
            raise BadMedia("has no video stream")
        stream = source.streams.video[0]
        if not stream.time_base:
            raise BadMedia("does not say in which unit its times are")
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
