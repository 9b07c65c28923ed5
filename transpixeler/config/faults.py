"""Find what the types and limits of single keys cannot show: settings that contradict each other or name nothing.

In: a `Config`. Out: pairs of a key and what is wrong with it. Torch is never imported here.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

from transpixeler.config.sections import (
    BESIDE_STREAMS,
    COLUMNS,
    FEATURES,
    REPO,
    STREAM,
    Config,
    DataConfig,
    family_names,
    is_path,
)

NAME_BYTES = 255  # the most that file systems take for one name


def faults(config: Config) -> Iterator[tuple[str, str]]:
    """Yield what the types and limits of single keys cannot show: (key, what is wrong and what to do)."""
    yield from _stream_faults(config)
    yield from _data_faults(config.data)
    yield from _column_faults(config)
    if config.model.family and config.model.family not in (known := family_names()):
        yield "model.family", f"{config.model.family!r} is not one of {', '.join(known)}; leave it out to be detected"
    yield from _training_faults(config)
    if isinstance(config.sample.guidance, dict) and not config.sample.guidance:
        yield "sample.guidance", "names no expert; give a number, or one for each, as in {high: 4, low: 3}"
    if config.train.deterministic and config.model.attention in ("cudnn", "efficient", "flex", "fa3", "fa4"):
        other = f"model.attention={config.model.attention} sums gradients in any order"
        yield "train.deterministic", f"{other}; set it to auto, flash or math"
    for key, empty in (
        ("eval.times", not config.eval.times),
        ("data.frames", not config.data.frames),
        ("data.resolutions", not config.data.resolutions),
        ("model.trainable", not config.model.trainable and not config.lora.enabled),
    ):
        if empty:
            yield key, "the list is empty; leave the key out to use the default"
    if "composite" in config.sample.formats and len(config.streams) > 1 and not config.sample.background:
        yield "sample.background", "set it to an image or a video: the format composite puts samples on top of it"
    if not _is_folder_name(config.run_name):
        yield "run_name", f"{config.run_name!r} is not a plain folder name; runs are folders inside output_dir"
    if config.hub.repo and not REPO.fullmatch(config.hub.repo):
        yield "hub.repo", f"{config.hub.repo!r} is not a Hub id; write it as user/name"


def _column_faults(config: Config) -> Iterator[tuple[str, str]]:
    features = (*FEATURES, *(f"{stream}_latent" for stream in list(config.streams)[1:]))
    known = (*config.streams, *COLUMNS, *features)
    for name, column in config.data.columns.items():
        if name not in known:
            yield f"data.columns.{name}", f"is nothing that a manifest tells; there are {', '.join(known)}"
        elif not column and name not in features:  # which are left unread so
            yield f"data.columns.{name}", "names no column; leave it out, or name the manifest's own"


def _stream_faults(config: Config) -> Iterator[tuple[str, str]]:
    streams, scope = config.suffixes, config.lora.scope
    if not streams or next(iter(streams.values())) != "":
        yield "streams", 'the first stream must have the suffix "", as in {rgb: "", seg: "_seg"}'
    elif config.scales[0] != 1:
        first = next(iter(streams))
        yield f"streams.{first}.scale", f"the others are laid over {first}, so it has scale 1; scale a companion"
    if len(set(streams.values())) != len(streams):
        yield "streams", "two streams have the same suffix and would read the same files"
    for name in streams:
        if not STREAM.fullmatch(name):
            yield "streams", f"{name!r} is not a stream name; use letters, digits, _ and -, starting with a letter"
        if name in BESIDE_STREAMS:
            yield "streams", f"{name!r} is the name of another file of a sample; choose another name"
    if config.lora.enabled and scope == "aux" and len(streams) == 1:
        yield "lora.scope", "there is only one stream, so none is aux; set lora.scope=all"
    for name in () if isinstance(scope, str) else scope:
        if name not in streams:
            yield "lora.scope", f"{name!r} is not a stream; streams are {', '.join(streams)}"
    for name in config.objective.stream_weights:
        if name not in streams:
            yield f"objective.stream_weights.{name}", f"is not a stream; streams are {', '.join(streams)}"


def _data_faults(data: DataConfig) -> Iterator[tuple[str, str]]:
    for key, frames in _of_all_sources(data, "frames"):
        if frames < 1:
            yield key, f"{frames} is no number of frames"
    for key, resolution in _of_all_sources(data, "resolutions"):
        least = resolution if isinstance(resolution, int) else min(resolution)
        if least < 16:
            yield key, f"{least} is too small for a side; the least is 16 pixels"
    if data.aspect_min > data.aspect_max:
        yield "data.aspect_min", f"must not be above data.aspect_max ({data.aspect_max:g})"


def _training_faults(config: Config) -> Iterator[tuple[str, str]]:
    objective, optim, lora = config.objective, config.optim, config.lora
    if objective.t_min >= objective.t_max:
        yield "objective.t_min", f"must be below objective.t_max ({objective.t_max:g})"
    if sum(objective.tasks.values()) <= 0:
        yield "objective.tasks", "give at least one task a weight above zero, as in {joint: 1.0}"
    if objective.interpolate_every == ():
        yield "objective.interpolate_every", "give at least one, as in [2, 4]"
    if config.quantized and not lora.enabled:
        yield "model.quantize", "a quantized base cannot be fully fine-tuned: set lora.enabled=true, or none here"
    if lora.init_from and not lora.enabled:
        yield (
            "lora.init_from",
            "no adapter is trained while lora.enabled is false; to add an adapter to the base, use model.fuse",
        )
    if optim.groups and not optim.lr:
        yield "optim.lr", "0 also keeps the rates in optim.groups at 0, which follow the same schedule; set it above 0"
    if optim.lr_min > optim.lr:
        yield "optim.lr_min", f"must not be above optim.lr ({optim.lr:g})"


def _of_all_sources(data: DataConfig, name: str) -> Iterator[tuple[str, Any]]:
    """Yield (key, value) for each entry of a list that a single source may also set."""
    lists = {f"data.{name}": getattr(data, name)}
    for part, sources in (("train", data.train), ("eval", data.eval)):
        lists |= {f"data.{part}.{i}.{name}": getattr(source, name) or () for i, source in enumerate(sources)}
    for key, values in lists.items():
        yield from ((f"{key}.{i}", value) for i, value in enumerate(values))


def _is_folder_name(text: str) -> bool:
    """Return whether a text, which may be empty, can name a run: no path, no control characters, not too long."""
    odd = any(letter in "/\\\x7f" or letter < " " for letter in text) or text in (".", "..", "latest")
    return not odd and is_path(text) and len(os.fsencode(text)) <= NAME_BYTES
