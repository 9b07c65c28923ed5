"""List what a config samples from: a config and prompt files in; prompts with their settings, and texts to cache, out.

A prompt file is plain text with a prompt a line, or JSON lines (`.jsonl`) whose keys are the fields of `Prompt`.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transpixeler.config.sections import Config, SampleConfig, Size, UserError, is_path, parse_size
from transpixeler.data.names import is_utf8
from transpixeler.models.family import Family


@dataclass(frozen=True)
class GivenFiles:
    """The files that a video is made from, and where they were asked for."""

    rgb: str = ""  # a clip to make mattes of
    alpha: str = ""  # a clip of mattes to paint
    image: str = ""  # the first frame: of RGB, and of the alpha that it may have
    last: str = ""  # the last frame, likewise
    between: str = ""  # a clip to make frames between
    factor: int = 0  # how many times as many frames that is; 0: as was trained
    extend: str = ""  # a clip to go on from
    frames: int = 0  # of the video, the clip's included; 0: as many as are made at a time
    reference: str = ""  # one of rgb, alpha, image and last, whichever the model's tasks are given
    where: str = field(default="", compare=False)  # FILE:LINE; empty: options of the command line

    @property
    def named(self) -> dict[str, str]:
        """Return the files by the name that they were given under."""
        return {name: value for name in GIVEN if (value := getattr(self, name))}

    def label(self, name: str) -> str:
        """Return what to call a file in an error."""
        return f"{self.where}: {name}" if self.where else f"--{name}"


GIVEN = ("rgb", "alpha", "image", "last", "between", "extend", "reference")
LENGTHS = {"factor": "between", "frames": "extend"}  # numbers, and the file that each goes with
NOTHING_GIVEN = GivenFiles()


@dataclass(frozen=True)
class Prompt:
    """A prompt, and what its line asks for besides; None stands for what the config says."""

    text: str
    seed: int | None = None
    negative: str | None = None
    size: Size | None = None  # width, height, frames
    given: GivenFiles = NOTHING_GIVEN
    where: str = field(default="", compare=False)  # FILE:LINE of a line with settings


def prompt_lines(path: str, *, key: str) -> list[Prompt]:
    """Return the prompts of a file, or none for an empty path; a line that cannot be used is named."""
    if path.endswith(".json"):
        raise UserError(
            f"{key}: {path} is one JSON text; give .jsonl with an object a line, or .txt with a prompt a line"
        )
    try:
        text = Path(path).read_text(encoding="utf-8-sig") if path else ""
    except UnicodeDecodeError:
        raise UserError(f"{key}: {path} is no text in UTF-8; give .txt or .jsonl") from None
    except OSError as fault:
        raise UserError(f"{key}: {path} cannot be read: {fault}") from None
    if path and not text.strip():
        raise UserError(f"{key}: {path} holds no prompt; write one a line")
    if not path.endswith(".jsonl"):
        return [Prompt(line.strip()) for line in text.splitlines() if line.strip()]
    # split at newlines alone: a JSON text may hold other separators, such as U+2028
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1)]
    return [_read_line(line, Path(path), number) for number, line in lines if line]


def read_prompts(config: SampleConfig) -> tuple[Prompt, ...]:
    """Return `sample.prompts` and the lines of `sample.prompts_file`."""
    return (*map(Prompt, config.prompts), *prompt_lines(config.prompts_file, key="sample.prompts_file"))


def is_guided(config: SampleConfig) -> bool:
    """Return whether samples are led away from a negative prompt, or from a video that is shown nothing."""
    return follows_text(config) or config.image_guidance != 1


def follows_text(config: SampleConfig) -> bool:
    """Return whether samples are led away from a negative prompt, by any expert."""
    given = config.guidance.values() if isinstance(config.guidance, dict) else (config.guidance,)
    return any(guidance != 1 for guidance in given)


def negative_prompt(config: SampleConfig, family: Family) -> str | None:
    """Return the negative prompt, or None where guidance is off."""
    if not is_guided(config):
        return None
    return family.sampling.negative_prompt if config.negative_prompt is None else config.negative_prompt


def texts_of(config: SampleConfig, pairs: Sequence[tuple[str, str | None]]) -> tuple[str, ...]:
    """Return the texts to encode for prompts and negative prompts of their own, which count where guidance is on."""
    negatives = [negative for _, negative in pairs if negative is not None] if is_guided(config) else []
    return tuple(dict.fromkeys((*(text for text, _ in pairs), *negatives)))


def sampled_texts(config: Config, family: Family) -> tuple[str, ...]:
    """Return the texts that evaluations sample from besides the clips' own captions."""
    prompts, negative = read_prompts(config.sample), negative_prompt(config.sample, family)
    sampled = bool(prompts) or (config.eval.samples > 0 and bool(config.data.eval))
    texts = texts_of(config.sample, [(prompt.text, prompt.negative) for prompt in prompts])
    return (*texts, *([negative] if sampled and negative is not None else []))


# --- a line of JSON --------------------------------------------------------------------------------------------------


def _read_line(line: str, path: Path, number: int) -> Prompt:
    where = f"{path}:{number}"
    values = _object(line, where)
    for name, value in values.items():
        if name not in _READERS:
            near = difflib.get_close_matches(name, _READERS, n=1, cutoff=0.5)
            way = f"did you mean {near[0]}?" if near else f"known are {', '.join(_READERS)}"
            raise UserError(f"{where}: {name}: unknown key; {way}")
        wanted, read = _READERS[name]
        values[name] = read(value)
        if values[name] is None and value is not None:
            raise UserError(f"{where}: {name}: expected {wanted}, found {json.dumps(value, ensure_ascii=False)}")
    values = {name: value for name, value in values.items() if value is not None}
    lengths = {name: values.pop(name) for name in LENGTHS if name in values}
    files = {name: str(path.parent / values.pop(name)) for name in GIVEN if name in values}
    for name in lengths:
        if LENGTHS[name] not in files:
            raise UserError(f"{where}: {name}: goes with {LENGTHS[name]}, which must name a clip")
    if len(files) > 1 and "reference" in files:
        others = " and ".join(name for name in files if name != "reference")
        raise UserError(f"{where}: reference: stands beside {others}; name each file as rgb, alpha, image or last")
    if "prompt" not in values and not files:
        raise UserError(f'{where}: prompt: must be given, such as {{"prompt": "a paper boat burns"}}')
    return Prompt(values.pop("prompt", ""), **values, given=GivenFiles(**files, **lengths, where=where), where=where)


def _object(line: str, where: str) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{where}: {twice[0]}: is given twice")
        return dict(pairs)

    try:
        found = json.loads(line, object_pairs_hook=once)
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{where}: is not JSON: {fault}") from None
    if not isinstance(found, dict):
        raise UserError(f'{where}: expected an object such as {{"prompt": "a paper boat burns", "seed": 7}}')
    return found


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) and is_utf8(value) else None


def _seed(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63 else None


def _factor(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 1 else None


def _size(value: Any) -> Size | None:
    if isinstance(value, list) and all(isinstance(side, int) and not isinstance(side, bool) for side in value):
        return parse_size("x".join(map(str, value)))
    return parse_size(value) if isinstance(value, str) else None


def _file(value: Any) -> str | None:
    return value if isinstance(value, str) and value and is_path(value) else None


_READERS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "prompt": ("a text", _text),
    "seed": ("a whole number ≥ 0", _seed),
    "negative": ("a text", _text),
    "size": ("[width, height, frames], such as [832, 480, 33]", _size),
    **dict.fromkeys(GIVEN, ("the path of a file", _file)),
    **dict.fromkeys(LENGTHS, ("a whole number > 1", _factor)),
}
