"""A shape and an existing model go in; a base with random weights and the same encoders comes out: `transpixeler init`.

Tensors are drawn one by one, each from (seed, name), so that a model of any size is written in little memory.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn

from transpixeler.adapters.merge import save_model
from transpixeler.adapters.readers import OTHER_WEIGHTS
from transpixeler.adapters.saved import MODEL_FOLDER
from transpixeler.config.sections import UserError, family_names
from transpixeler.files import read_json, whole, writing_to
from transpixeler.flow.draws import generator
from transpixeler.models.backbone import Backbone
from transpixeler.models.family import Family, ModelFolder, find_family
from transpixeler.models.meta import on_meta
from transpixeler.models.resolve import resolve

# A model folder holds these of its transformer; everything else in it belongs to the encoders or the pipeline, but for
# weights that no encoder reads: a published transformer in one file or in a folder of another name, and its variants.
_OF_TRANSFORMER = ("transformer*", "config.json", "diffusion_pytorch_model*", ".*")
_OF_PIPELINE = ("model_index.json", "scheduler/*")
_WEIGHTS = OTHER_WEIGHTS | {".safetensors"}


def init_command(family: str, *, shape: str, encoders: str, out: str, seed: int = 0) -> Path:
    """Write OUT: a transformer of random weights, and the other parts of the model in `encoders`."""
    if family not in family_names():
        raise UserError(f"--family: {family} is unknown; there are {', '.join(family_names())}")
    place, found = Path(out).expanduser(), find_family(family)
    config = _shape(found, shape)
    if place.exists() and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"--out: {place} is not empty; name a new folder")
    source = resolve(encoders, only=_OF_PIPELINE, key="--encoders")
    if not source.is_dir():
        raise UserError(f"--encoders: {source} is a file; give a model's folder")
    with writing_to(place, "--out"), whole(place) as draft, TemporaryDirectory() as scratch:
        transformer = Path(scratch) / MODEL_FOLDER
        transformer.mkdir()
        (transformer / "config.json").write_text(json.dumps(config))
        model = found.open(scratch, encoders)  # of a Hub id, each encoder's files are fetched when they are asked for
        read = _encoder_files(model)
        _check_encoders(model, source)
        draft.mkdir()
        _take_parts(source, draft, read)
        save_model(random_weights(model, seed), draft, model=model)
    return place


def random_weights(model: ModelFolder, seed: int) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter of a base by its internal name, drawn as torch draws a new network's."""
    with on_meta():
        backbone: Backbone = model.build(streams=("rgb",))
    for place, module in backbone.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            path = f"{place}.{name}" if place else name
            if path in backbone.zero_start:
                yield path, torch.zeros(parameter.shape)
                continue
            yield path, _draw(module, name, tuple(parameter.shape), generator("init", seed, path))


def _draw(module: nn.Module, name: str, shape: tuple[int, ...], draws: torch.Generator) -> Tensor:
    """Draw a weight within ±1/√inputs, a table of vectors with deviation 1/√width; norms start as ones, biases at 0."""
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        if name == "bias":
            return torch.zeros(shape)
        return (torch.rand(shape, generator=draws) * 2 - 1) / math.sqrt(math.prod(shape[1:]))
    if len(shape) == 1:
        return torch.zeros(shape) if name == "bias" else torch.ones(shape)
    return torch.randn(shape, generator=draws) / math.sqrt(shape[-1])


def _shape(family: Family, asked: str) -> dict[str, Any]:
    """Return the transformer's config that a name or a JSON file says."""
    named: Mapping[str, Any] | None = family.shapes.get(asked.lower())
    if named is None:
        file = Path(asked).expanduser()
        if not file.is_file():
            known = ", ".join(family.shapes) or "none"
            raise UserError(f"--shape: {asked} is neither a file nor a shape of {family.title} ({known})")
        named = read_json(file)
    said = named.get("_class_name", family.transformer_class)
    if said != family.transformer_class:
        raise UserError(f"--shape: {asked} is of a {said}, and {family.title}'s is a {family.transformer_class}")
    return {"_class_name": said, **named}


def _encoder_files(model: ModelFolder) -> set[Path]:
    """Return the files that the encoders read; a model without them is refused."""
    read: set[Path] = set()

    def note(path: Path) -> str:
        read.add(path.resolve())
        return ""

    model.vae_fingerprint(note)
    model.text_fingerprint(note)
    if any(field.source == "image" for field in model.fields):
        model.image_fingerprint(note)
    return read


def _check_encoders(model: ModelFolder, source: Path) -> None:
    """Refuse a shape that does not take what the encoders make."""
    config = model.diffusers_config()
    texts = source / "text_encoder" / "config.json"  # where the layout says it without loading a weight
    made = read_json(texts).get("d_model") if texts.is_file() else None
    taken = model.fields[0].width
    if made not in (None, taken):
        keys = " or ".join(name for name, value in config.items() if value == taken)
        raise UserError(
            f"--shape: reads texts of width {taken} ({keys}), and the text encoder in {source} makes {made}"
        )
    said, channels = config.get("out_channels"), model.geometry.channels
    if said not in (None, channels):
        raise UserError(f"--shape: makes {said} channels, and the VAE in {source} reads {channels}")


def _take_parts(source: Path, draft: Path, read: set[Path]) -> None:
    """Link or, on another disk, copy all that is not the transformer's. read: by the encoders."""
    for entry in sorted(source.iterdir()):
        files = [entry] if entry.is_file() else [*entry.rglob("*")]
        weights = [file.resolve() for file in files if file.suffix.lower() in _WEIGHTS]
        if any(entry.match(pattern) for pattern in _OF_TRANSFORMER) or (weights and read.isdisjoint(weights)):
            continue
        if entry.is_dir():
            shutil.copytree(entry, draft / entry.name, copy_function=_take)
        else:
            _take(str(entry), str(draft / entry.name))


def _take(source: str, target: str) -> str:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:
        shutil.copyfile(source, target)
    return target
