"""Turn VideoMatte240K as it is published into a folder of training pairs.

ROOT/train/fgr*/STEM.mp4 is the picture, ROOT/train/pha/STEM.mp4 its alpha, and a JSON file holds the captions: as
{STEM: caption}, or as a list of objects. They become STEM.mp4, STEM_seg.mp4 and STEM.txt, linked or copied. Folders of
images will do for videos. Clips without partner or caption, or unlike their partner, are listed and left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tooling import check_counts, folder_given, run, summary
from tqdm import tqdm

from transpixeler.config.sections import UserError
from transpixeler.data.media.files import VIDEO_ENDINGS
from transpixeler.data.sources.candidate import BadSample, Candidate
from transpixeler.data.sources.folder import is_sequence
from transpixeler.data.sources.pairs import examined
from transpixeler.files import write_text

NAMES = ("video", "file", "file_name", "filename", "name", "path", "id")
TEXTS = ("caption", "text", "prompt", "description")


@dataclass(frozen=True)
class Pair:
    """The files and the caption of one clip."""

    stem: str
    picture: Path
    matte: Path
    caption: str


def main(argv: Sequence[str]) -> None:
    arguments = _parser().parse_args(argv)
    check_counts(jobs=arguments.jobs)
    split = folder_given(folder_given(arguments.root, "the folder of VideoMatte240K") / arguments.split, "its split")
    pictures = _media(_picture_folder(split, arguments.fgr))
    mattes = _media(folder_given(split / "pha", "VideoMatte240K, whose alpha lies in pha"))
    captions = _captions(arguments.captions or _caption_file(split))
    pairs, left_out = _joined(pictures, mattes, captions, arguments.caption)
    place = _linked if arguments.mode == "link" else _copied
    done = 0
    with ThreadPoolExecutor(arguments.jobs) as pool:
        work = pool.map(lambda pair: _import(pair, arguments.out, place), pairs)
        for pair, reason in zip(pairs, tqdm(work, total=len(pairs), unit=" pairs", disable=None)):
            done += reason is None
            left_out += [(pair.stem, reason)] if reason else []
    summary(f"{arguments.out}: {done} pairs", left_out)
    if not done:
        raise UserError(f"{split}: no pair came out; the reasons are above")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("root", type=Path, help="the folder that holds train/")
    add("--out", type=Path, required=True, help="the folder of pairs")
    add("--split", default="train", help="train or test")
    add("--fgr", default="", help="the folder of pictures, where there is more than one fgr*")
    add("--captions", type=Path, help="the JSON file of captions; default: the only one in the split")
    add("--caption", default="", help="for clips without one in the file")
    add("--mode", choices=("link", "copy"), default="link", help="links take no space; copies may be moved")
    add("--jobs", type=int, default=os.cpu_count() or 1, help="pairs at a time")
    return parser


# --- finding ---------------------------------------------------------------------------------------------------------


def _picture_folder(split: Path, name: str) -> Path:
    if name:
        return folder_given(split / name, "the folder of pictures")
    found = sorted(path for path in split.glob("fgr*") if path.is_dir())
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise UserError(f"{split}: holds {names}; choose one folder of pictures with --fgr" if found else
                        f"{split}: holds no folder fgr*; give the folder of VideoMatte240K")  # fmt: skip
    return found[0]


def _media(folder: Path) -> dict[str, Path]:
    found = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.suffix.lower() in VIDEO_ENDINGS or (path.is_dir() and is_sequence(path)):
            found[path.name if path.is_dir() else path.stem] = path
    if not found:
        raise UserError(f"{folder}: holds neither videos nor folders of images")
    return found


def _caption_file(split: Path) -> Path | None:
    found = sorted({*split.glob("*.json"), *split.parent.glob("*.json")})
    if len(found) > 1:
        raise UserError(f"{split}: holds {', '.join(path.name for path in found)}; choose one with --captions")
    return found[0] if found else None


def _captions(path: Path | None) -> dict[str, str]:
    if path is None:
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: captions cannot be read: {error}") from None
    captions = {Path(str(name)).stem: _text(value) for name, value in _entries(path, content)}
    return {name: text for name, text in captions.items() if text}


def _entries(path: Path, content: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        yield from content.items()
        return
    for entry in content if isinstance(content, list) else [content]:
        name = next((entry[key] for key in NAMES if key in entry), None) if isinstance(entry, dict) else None
        if name is None:
            raise UserError(f"{path}: is neither {{name: caption}} nor a list of objects with a name and a caption")
        yield name, entry


def _text(value: Any) -> str:
    """Return a caption that is text, the first of a list, or inside an object."""
    if isinstance(value, Mapping):
        value = next((value[key] for key in TEXTS if key in value), "")
    if isinstance(value, list):
        value = value[0] if value else ""
    return value.strip() if isinstance(value, str) else ""


def _joined(
    pictures: Mapping[str, Path], mattes: Mapping[str, Path], captions: Mapping[str, str], default: str
) -> tuple[list[Pair], list[tuple[str, str]]]:
    pairs, left_out = [], []
    for stem in sorted({*pictures, *mattes}):
        caption = captions.get(stem, default)
        if stem not in mattes:
            left_out.append((stem, "has no alpha in pha"))
        elif stem not in pictures:
            left_out.append((stem, "has an alpha but no picture"))
        elif not caption:
            left_out.append((stem, "has no caption; --caption sets one for all such clips"))
        else:
            pairs.append(Pair(stem, pictures[stem], mattes[stem], caption))
    return pairs, left_out


# --- placing ---------------------------------------------------------------------------------------------------------


def _import(pair: Pair, out: Path, place: Any) -> str | None:
    """Place a pair, its caption last; return the reason if it cannot be used."""
    candidate = Candidate(pair.stem, (("rgb", pair.picture), ("seg", pair.matte)), pair.caption)
    found = examined(candidate, 0, False)
    if isinstance(found, BadSample):
        return f"{Path(found.path).name} {found.reason}"
    for source, suffix in ((pair.matte, "_seg"), (pair.picture, "")):
        place(source, out / f"{pair.stem}{suffix}{'' if source.is_dir() else source.suffix.lower()}")
    write_text(out / f"{pair.stem}.txt", pair.caption + "\n")
    return None


_unfinished = itertools.count()


def _beside(target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    return target.with_name(f".{target.name}.{os.getpid()}-{next(_unfinished)}.tmp")


def _linked(source: Path, target: Path) -> None:
    if target.is_symlink() and target.resolve() == source.resolve():
        return
    _check_free(source, target)
    unfinished = _beside(target)
    unfinished.symlink_to(source.resolve())
    unfinished.replace(target)


def _copied(source: Path, target: Path) -> None:
    _check_free(source, target)
    if target.exists() and not target.is_symlink() and _same(source, target):
        return
    unfinished = _beside(target)
    try:
        if source.is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(source, unfinished)
        else:
            shutil.copyfile(source, unfinished)
            shutil.copystat(source, unfinished)
        unfinished.replace(target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True) if unfinished.is_dir() else unfinished.unlink(missing_ok=True)


def _check_free(source: Path, target: Path) -> None:
    if target.exists() and not target.is_symlink() and target.samefile(source):
        raise UserError(f"{target}: is the source itself; choose another --out")


def _same(source: Path, target: Path) -> bool:
    if source.is_dir():
        return {p.name: p.stat().st_size for p in source.iterdir()} == {
            p.name: p.stat().st_size for p in target.iterdir()
        }
    ours, theirs = target.stat(), source.stat()
    return (ours.st_size, ours.st_mtime_ns) == (theirs.st_size, theirs.st_mtime_ns)


if __name__ == "__main__":
    raise SystemExit(run("import_videomatte", main))
