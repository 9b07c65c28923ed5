"""Files of a run's folder go in, which anyone may have made; values of the expected shape come out, or one clear line.

The report and a push read runs only through here: no link and no name leads out of the folder, and damage is named:
what only informs is left out with a warning, and what is needed is a `UserError`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from transpixeler.config.loading import BAD_YAML
from transpixeler.config.sections import UserError
from transpixeler.files import read_json
from transpixeler.runs.folder import MANIFEST, METRICS, SAMPLES, sampled
from transpixeler.runs.metrics_file import read_records
from transpixeler.sampling.files import FACTS

logger = logging.getLogger("transpixeler")

DEEPEST = 40  # levels of lists and tables; what we write has far fewer
LARGEST = 2**63  # of whole numbers

NUMBER = (int, float, NoneType)
TEXT = (str, NoneType)
# A shape is the types that a value may have, a list of one shape, or a table of shapes by key ("*": every other key).
Shape = tuple[type, ...] | list["Shape"] | dict[str, "Shape"]

MANIFEST_SHAPE: Shape = {
    "versions": {"*": TEXT},
    "git": TEXT,
    "machine": {"host": TEXT, "device": TEXT},
    "command": [TEXT],
    "layout": {"*": (int,)},
    "steps": (int,),
    "clips": {"*": (int,)},
    "skipped": [[TEXT]],
    "model": {"path": TEXT, "vae": TEXT},
}
EVAL_SHAPE: Shape = {"loss": {"*": {"*": NUMBER}}, "loss_ema": {"*": {"*": NUMBER}}, "metrics": {"*": NUMBER}}
LINE_SHAPE: Shape = {
    "step": (int,),
    "epoch": (int,),
    "expert": TEXT,
    "loss": NUMBER,
    "seconds": (int, float),
    "loss_by_t": [NUMBER],
    "eval": {"*": EVAL_SHAPE},
}
SAMPLE_SHAPE: Shape = {
    "prompt": TEXT,
    "seed": (int, NoneType),
    "step": (int, NoneType),
    "streams": [(str,)],
    "fps": TEXT,
    "width": (int,),
    "height": (int,),
    "frames": (int,),
    "task": TEXT,
    "given": [TEXT],
    "metrics": {"*": NUMBER},
    "alpha_histogram": [NUMBER],
    "files": {},
}


# --- files -----------------------------------------------------------------------------------------------------------


def check_within(path: Path, folder: Path) -> Path:
    """Return `path`; refuse one that a link leads out of the folder."""
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: leads out of {folder}; put the file itself there instead of a link")
    return path


def own_file(folder: Path, name: object) -> Path | None:
    """Return the file of that plain name in a folder; None, with a warning, for a path and a link."""
    if not isinstance(name, str) or not name or "\0" in name or name != Path(name).name:
        logger.warning("%s: %.100r is no name of a file in it and is left out", folder, name)
        return None
    path = folder / name
    try:
        if path.is_symlink():
            logger.warning("%s is a link and is left out", path)
            return None
        return path if path.is_file() else None
    except OSError:  # a name too long to be a file's
        return None


def own_samples(run: Path) -> Iterator[tuple[int, Path, dict[str, Any]]]:
    """Yield (step, folder, facts) of every sample, the latest step first; a damaged one is logged and left out."""
    if (run / SAMPLES).is_symlink():
        logger.warning("%s is a link and is left out", run / SAMPLES)
        return
    for step, place in sampled(run).items():
        for folder in sorted(place.iterdir()) if not place.is_symlink() else ():
            if folder.is_symlink() or not folder.is_dir() or folder.name.startswith("."):
                continue
            if own_file(folder, FACTS) is None:
                continue
            try:
                yield step, folder, read_table(folder / FACTS, SAMPLE_SHAPE)
            except UserError as fault:
                logger.warning("%s; the sample is left out", fault)


def sample_files(folder: Path, facts: Mapping[str, Any]) -> dict[str, Path]:
    """Return a sample's files by stream or format, without those that are not there."""
    found = {key: own_file(folder, name) for key, name in facts.get("files", {}).items()}
    return {key: file for key, file in found.items() if file is not None}


# --- values ----------------------------------------------------------------------------------------------------------


def read_manifest(run: Path) -> dict[str, Any]:
    """Return a run's manifest; nothing where it has none, or a damaged one."""
    path = check_within(run / MANIFEST, run)
    try:
        return read_table(path, MANIFEST_SHAPE) if path.is_file() else {}
    except UserError as fault:
        logger.warning("%s; it is left out", fault)
        return {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Return the good lines of a run's metrics."""
    path, good = check_within(run / METRICS, run), []
    for record in read_records(path):
        try:
            good.append(_checked(record, LINE_SHAPE, f"{path}: step {str(record['step'])[:20]}"))
        except UserError as fault:
            logger.warning("%s; the line is left out", fault)
    return good


def read_table(path: Path, shape: Shape) -> dict[str, Any]:
    """Read a JSON file and check its shape."""
    return _checked(read_json(path), shape, str(path))


class NoAliases(yaml.SafeLoader):
    """Safe YAML without aliases: no run's config has one, and a few of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(None, None, "an alias is not read here", self.peek_event().start_mark)
        return super().compose_node(parent, index)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a config as plain values, without the files that it may build on."""
    try:
        text = path.read_text(encoding="utf-8")
        value = yaml.load(text, Loader=NoAliases)
    except (OSError, *BAD_YAML) as error:
        raise UserError(f"{path}: damaged, cannot be read: {_short(error)}") from None
    return _checked(value, {}, str(path))


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _checked(value: Any, shape: Shape, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"{place}: damaged, holds {_kind(value)}, where `key: value` pairs are expected")
    plain = _plain(value, place, 0)
    _check_shape(plain, shape, place, "")
    return plain


def _plain(value: Any, place: str, depth: int) -> Any:
    """Return a value of JSON's kinds alone, whose numbers and texts every program can take."""
    if depth > DEEPEST:
        raise UserError(f"{place}: damaged, is nested more than {DEEPEST} levels deep")
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise UserError(f"{place}: damaged, the key {odd[0]!r} is not text")
        return {_plain(key, place, depth): _plain(part, place, depth + 1) for key, part in value.items()}
    if isinstance(value, list):
        return [_plain(part, place, depth + 1) for part in value]
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
    if isinstance(value, int) and abs(value) >= LARGEST:
        raise UserError(f"{place}: damaged, holds a whole number of {value.bit_length()} bits")
    if not isinstance(value, bool | int | float | NoneType):
        raise UserError(f"{place}: damaged, holds {_kind(value)}, which no run's file does")
    return value


def _check_shape(value: Any, shape: Shape, place: str, key: str) -> None:
    """Refuse a value that is not as expected; keys that are not known may hold anything."""
    where = f"{place}: damaged, `{key}`" if key else f"{place}: damaged,"
    if isinstance(shape, tuple):
        right = isinstance(value, shape) and not (isinstance(value, bool) and bool not in shape)
        if shape and not right:
            names = {int: "a whole number", float: "a number", str: "text", NoneType: "null"}
            raise UserError(f"{where} holds {_kind(value)}, not {' or '.join(names[part] for part in shape)}")
    elif isinstance(shape, list):
        if not isinstance(value, list):
            raise UserError(f"{where} holds {_kind(value)}, not a list")
        for part in value:
            _check_shape(part, shape[0], place, key)
    else:
        if not isinstance(value, dict):
            raise UserError(f"{where} holds {_kind(value)}, where `key: value` pairs are expected")
        for name, part in value.items():
            if (inner := shape.get(name, shape.get("*"))) is not None:
                _check_shape(part, inner, place, f"{key}.{name}" if key else name)


def _kind(value: Any) -> str:
    if isinstance(value, dict | list):
        return "`key: value` pairs" if isinstance(value, dict) else "a list"
    if isinstance(value, float) and not math.isfinite(value):
        return "a number that is not finite"
    return {str: "text", NoneType: "null", bool: "true or false"}.get(type(value), f"a {type(value).__name__}")
