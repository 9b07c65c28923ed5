"""Tell which videos are made already: requests and a folder of samples go in, the samples that answer them come out.

A sample answers a request when everything that makes its pixels and files is the same, whatever its name; what that is,
is written into it as one digest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.adapters.adapter import Adapter
from transpixeler.config.sections import SampleConfig, UserError
from transpixeler.data.media.files import files_of
from transpixeler.data.prompts import negative_prompt
from transpixeler.files import read_json
from transpixeler.models.family import ModelFolder
from transpixeler.sampling.files import FACTS, bytes_of
from transpixeler.sampling.requests import Request
from transpixeler.sampling.saves import SavedModel

ASKED = "asked"  # the digest's key in sample.json
# Keys of `sample` that a request says itself, or that change no pixel.
NOT_ASKED = ("prompts", "prompts_file", "negative_prompt", "size", "seed", "rgb_memory")


DATA = ("fps", "fill", "fill_color", "alpha", "transfer", "sequence_fps")  # that change what is read or written


def asked_for(requests: Sequence[Request], source: SavedModel, model: ModelFolder) -> list[str]:
    """Return the digest of all that each video is made from: settings, weights, and the bytes of given files."""
    config = source.config
    common = {
        "sample": {key: value for key, value in asdict(config.sample).items() if key not in NOT_ASKED},
        "model": asdict(config.model),
        "streams": {name: str(one) for name, one in config.streams.items()},
        "data": {key: getattr(config.data, key) for key in DATA},
        "background": _background(config.sample),
        **({"history": config.objective.history} if config.objective.history != "auto" else {}),
        "weights": _weights(source),
    }
    usual, contents = negative_prompt(config.sample, model.family), dict[str, str]()
    found = []
    for one in requests:
        negative = usual if usual is None or one.negative is None else one.negative
        given = {name: _content(path, contents) for name, path in one.given.named.items()}
        own = [one.prompt, one.seed, one.size, negative, given]
        own += [repr(one.course)] if one.course else []
        found.append(hashlib.sha256(json.dumps([common, own], sort_keys=True).encode()).hexdigest()[:32])
    return found


def _background(config: SampleConfig) -> str:
    return _content(config.background, {}) if config.background and "composite" in config.formats else ""


def find_made(folder: Path, requests: Sequence[Request], asked: Sequence[str]) -> dict[int, Path]:
    """Return by number the requests whose sample is in a folder already, and whole.

    One that has the name of a video yet to be made does not count: it would be replaced.
    """
    there: dict[str, Path] = {}
    for facts in sorted(folder.glob(f"*/{FACTS}")):
        if not facts.parent.name.startswith(".") and (digest := _answered(facts)):
            there.setdefault(digest, facts.parent)
    made = {number: there[digest] for number, digest in enumerate(asked) if digest in there}
    for number, request in enumerate(requests):
        if asked[number] in there and _answered(folder / request.name / FACTS) == asked[number]:
            made[number] = folder / request.name  # of several that answer, the one under its own name
    while True:
        names = {request.name for number, request in enumerate(requests) if number not in made}
        lost = [number for number, path in made.items() if path.name in names]
        if not lost:
            return made
        for number in lost:
            del made[number]


def _answered(facts: Path) -> str:
    """Return the digest of what a sample was asked for; nothing where it is damaged, or of files that changed since."""
    try:
        said = read_json(facts)
    except UserError:  # a sample that cannot be read is made again
        return ""
    digest, sizes = said.get(ASKED), said.get("bytes")
    if not isinstance(digest, str) or not isinstance(sizes, dict) or not sizes:
        return ""
    places = {name: facts.parent / name for name in sizes}
    return digest if all(p.exists() and bytes_of(p) == sizes[name] for name, p in places.items()) else ""


def _weights(source: SavedModel) -> list[Any]:
    """Return what tells a model's weights from others: an adapter's values, a whole model's files."""
    files = sorted(path for path in source.weights.rglob("*") if path.is_file()) if source.weights else []
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return [stats, {name: _digest(adapter) for name, adapter in source.adapters.items()}]


def _digest(adapter: Adapter) -> str:
    digest = hashlib.sha256(repr([sorted(adapter.alphas.items()), sorted(adapter.scopes.items())]).encode())
    for kind in (adapter.tensors, adapter.stream_embeddings, adapter.changes):
        for name, tensor in sorted(kind.items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(_bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _content(path: str, known: dict[str, str]) -> str:
    """Return the digest of a file's bytes, or of all files of a folder or of a sequence of images."""
    if path not in known:
        digest = hashlib.sha256()
        for file in files_of(Path(path)):
            digest.update(hashlib.sha256(file.read_bytes()).digest() if file.is_file() else b"")
        known[path] = digest.hexdigest()
    return known[path]
