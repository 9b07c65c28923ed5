"""A base and an adapter go in; its weights with the adapter in them come out, as they are read or as a whole model.

Tensors pass one at a time, so a full model is merged and written in little more memory than a shard.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from transpixeler.adapters.adapter import MAGNITUDE, Adapter
from transpixeler.adapters.files import read_adapter, step_header, write_adapter
from transpixeler.adapters.on_model import STREAM_EMBEDDING, whole_tensor
from transpixeler.adapters.readers import is_one_file
from transpixeler.adapters.tensorfile import save_tensors, stream_tensors
from transpixeler.config.sections import FuseConfig, UserError
from transpixeler.files import sync, whole
from transpixeler.models.family import Family, ModelFolder
from transpixeler.models.meta import on_meta
from transpixeler.models.names import split_rows
from transpixeler.models.shards import Slices
from transpixeler.models.weights import Readable, WeightSource

SHARD_BYTES = 5 * 2**30
_WEIGHTS = "diffusion_pytorch_model"


class FusedSource:
    """A base's weights with adapters added as they are read, slice by slice, on any layout.

    The adapters act on all tokens; stream embeddings that they have are no weights of the base, and left to the caller.
    """

    def __init__(self, source: Readable, adapters: Sequence[Adapter]) -> None:
        self.path, self._source, self._adapters = source.path, source, tuple(adapters)
        for adapter in adapters:
            if not all(scope == "all" for scope in adapter.scopes.values()):
                raise UserError(
                    "this adapter acts on some streams only, and all streams share the base's weights: "
                    "it cannot be merged or fused; only one whose scope is all can"
                )
            self._check(adapter)

    def _check(self, adapter: Adapter) -> None:
        names = set(self._source.names())
        deltas = {f"{t}.weight": (adapter.up(t).shape[0], adapter.down(t).shape[1]) for t in adapter.targets}
        for name, wanted in (deltas | {name: tuple(change.shape) for name, change in adapter.changes.items()}).items():
            found = self.shape(name) if name in names else ()
            flat = (*found[:1], math.prod(found[1:])) if name in deltas else found  # a convolution's kernel is a matrix
            if name not in names or flat != wanted:
                there = list(found) if name in names else "absent"
                raise UserError(f"the adapter changes {name} {list(wanted)}, which in {self.path} is {there}")

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: Slices) -> Tensor:
        target = name.removesuffix(".weight") if name.endswith(".weight") else ""
        adapters = [adapter for adapter in self._adapters if target in adapter.alphas or name in adapter.changes]
        # a norm needs whole rows or columns, and a kernel's matrix is not cut as the kernel is
        whole = len(self.shape(name)) > 2 or any(adapter.magnitude(target) is not None for adapter in adapters)
        piece = self._source.read_slice(name, () if whole and adapters else slices)
        kept = piece.dtype if piece.itemsize > 1 else torch.bfloat16  # eight bits would round most of a change away
        for adapter in adapters:
            before = piece = piece.float()
            if name in adapter.changes:
                piece = piece + adapter.changes[name][() if whole else slices]
            if target in adapter.alphas:
                rows, columns = (slice(None), slice(None)) if whole else (*slices, slice(None), slice(None))[:2]
                low = adapter.up(target)[rows] @ adapter.down(target)[:, columns] * adapter.scale(target)
                piece = adapted(
                    piece, low.reshape(piece.shape), adapter.magnitude(target), of_base=adapter.norms_of_base
                )
            if adapter.strength != 1:
                piece = before + adapter.strength * (piece - before)
        return (piece[slices] if whole else piece).to(kept) if adapters else piece


def adapted(weight: Tensor, low: Tensor, magnitude: Tensor | None, *, of_base: bool = False) -> Tensor:
    """Return W + low, and of a DoRA with `magnitude` as the norms of its rows [out] or columns [1, in].

    of_base: the row's factor is magnitude / ‖W‖ and not magnitude / ‖W + low‖, as ComfyUI takes it.
    """
    if magnitude is None:
        return weight + low
    if magnitude.ndim > 1:
        norms = torch.linalg.vector_norm(weight + low, dim=0, keepdim=True)
        return (weight + low) * torch.where(norms > 0, magnitude / norms, 1.0)
    base, both = (torch.linalg.vector_norm(w.flatten(1), dim=1) for w in (weight, weight + low))
    factor = torch.where(base > 0, magnitude / (base if of_base else both), 1.0)  # a row of zeros has no direction
    return (weight + low) * factor.reshape(-1, *[1] * (weight.ndim - 1))


def with_norms_of_base(adapter: Adapter, base: ModelFolder) -> Adapter:
    """Give a DoRA the magnitudes with which ComfyUI's rule, which divides by the base's norms, computes the same."""
    source = FusedSource(weights_for(adapter, base), read_fused(adapter.fused, adapter.expert))
    FusedSource(source, [adapter])  # to refuse another base
    tensors = dict(adapter.tensors)
    for target in adapter.targets:
        if (magnitude := adapter.magnitude(target)) is not None:
            weight = source.read_slice(f"{target}.weight", ()).float()
            made = adapted(weight, adapter.up(target) @ adapter.down(target) * adapter.scale(target), None)
            base_norms, norms = (torch.linalg.vector_norm(w, dim=1) for w in (weight, made))
            tensors[f"{target}.{MAGNITUDE}"] = torch.where(base_norms > 0, magnitude / norms * base_norms, norms)
    return replace(adapter, tensors=tensors, metadata={**adapter.metadata, "norms": "base"})


def read_fused(listed: Sequence[str | FuseConfig], expert: str | None = None) -> list[Adapter]:
    """Read the adapters that are added to a base: to that of one of several experts, or all of them."""
    found = []
    for one in listed:
        one = FuseConfig(one) if isinstance(one, str) else one
        adapter = read_adapter(one.path, key="model.fuse")
        of = {"expert": one.expert} if one.expert else {}
        adapter = replace(adapter, strength=one.strength, metadata={**adapter.metadata, **of})
        if expert is None or adapter.expert in ("", expert):
            found.append(adapter)
    return found


def merge_adapter(base: ModelFolder, adapters: Sequence[Adapter], out: str | Path) -> Path:
    """Write the base with plain adapters merged into it, tensor by tensor; return the transformer's file or folder.

    out: a `.safetensors` file, in the family's original names, or a folder, in diffusers' layout.
    """
    source = FusedSource(weights_for(adapters[-1], base), adapters)
    if any(adapter.stream_embeddings for adapter in adapters):
        raise UserError(
            "this adapter has stream embeddings, for which other programs' models have no place: it cannot be merged; "
            "use it with `transpixeler sample`, or train on from it with model.path"
        )
    if is_one_file(out):
        return save_file(source, out, model=base)
    return save_model(((name, source.read(name)) for name in source.names()), out, model=base)


def weights_for(adapter: Adapter, base: ModelFolder) -> WeightSource:
    """Open a base's weights: of several experts, those that the adapter says it is for."""
    found = [expert for expert in base.experts if expert.name == adapter.expert]
    if not found:
        known = ", ".join(expert.name for expert in base.experts if expert.name) or "one, without a name"
        said = f"is for the expert {adapter.expert}" if adapter.expert else "does not say which expert it is for"
        raise UserError(f"the adapter {said}, and those of {base.path} are {known}")
    return WeightSource(base.path, base.family.internal_names, part=found[0].folder)


# -- whole models


def save_file(source: Readable, file: str | Path, *, model: ModelFolder) -> Path:
    """Write a whole model as one file in its family's original names, as the authors publish it and ComfyUI reads it.

    model: the folder that it was trained from, which knows its config.
    """
    file = Path(file)
    if file.exists():
        raise UserError(f"{file} is there already, and a saved model is never overwritten; choose another file")
    names, loaders = model.family.names, model.family.names.loaders
    stored = {loaders.file_prefix + names.parameter(n, source="internal", to="original"): n for n in source.names()}
    state = ((there, source.read_slice(ours, ())) for there, ours in stored.items())
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.", suffix=".tmp") as folder:
        draft = Path(folder) / file.name  # readers tell a model's file by its suffix
        header = {"format": "pt", **loaders.file_header(model.config)}
        stream_tensors(state, draft, names=list(stored), metadata=header)
        _check_written(draft, model)
        _check_config(draft, model)
        sync(draft)
        draft.replace(file)
    return file


def save_model(
    state: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    model: ModelFolder,
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write FOLDER/transformer in diffusers' layout from whole tensors by internal name.

    Stream embeddings, which diffusers does not know, go into an adapter file beside it.
    """
    folder = Path(folder)
    target = folder / "transformer"
    if target.exists():
        raise UserError(f"{target} is there already, and a saved model is never overwritten; choose another folder")
    embeddings: dict[str, Tensor] = {}
    with whole(target) as draft:
        draft.mkdir()
        header = {"format": "pt"} | step_header(metadata or {})
        _write_shards(_without_embeddings(state, embeddings, model.family), draft, shard_bytes, header)
        (draft / "config.json").write_text(json.dumps(model.diffusers_config(), indent=2) + "\n")
        _check_written(draft, model)
        if embeddings:
            told = {"family": model.family.name} | dict(metadata or {})
            write_adapter(Adapter({}, {}, {}, embeddings, told), folder)
    return target


def _without_embeddings(
    state: Iterable[tuple[str, Tensor]], embeddings: dict[str, Tensor], family: Family
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state:
        if name.startswith(STREAM_EMBEDDING):
            embeddings[name.removeprefix(STREAM_EMBEDDING)] = whole_tensor(tensor)
        else:
            stored = family.names.parameter(name, source="internal", to="diffusers")
            for part, rows in split_rows(tensor.detach().cpu(), stored).items():
                yield part, rows.contiguous()


def _write_shards(
    state: Iterable[tuple[str, Tensor]], folder: Path, shard_bytes: int, header: Mapping[str, str]
) -> None:
    """Files of at most `shard_bytes`, named for their number once that is known, and the index that finds them."""
    shards: list[list[str]] = []
    held: dict[str, Tensor] = {}
    size = total = 0

    def flush() -> None:
        _save(held, folder / f"{len(shards)}.part", header)
        shards.append(list(held))
        held.clear()

    for name, tensor in state:
        if held and size + tensor.nbytes > shard_bytes:
            flush()
            size = 0
        held[name] = tensor
        size += tensor.nbytes
        total += tensor.nbytes
    flush()
    files = [f"{_WEIGHTS}-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1)]
    files = files if len(shards) > 1 else [f"{_WEIGHTS}.safetensors"]
    for number, file in enumerate(files):
        (folder / f"{number}.part").rename(folder / file)
    if len(files) > 1:
        weight_map = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{_WEIGHTS}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _save(tensors: dict[str, Tensor], file: Path, header: Mapping[str, str]) -> None:
    save_tensors(tensors, file, metadata=dict(header))
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _check_config(file: Path, model: ModelFolder) -> None:
    """Refuse a model that readers of a file without a config would take for another, such as one of narrow heads."""
    wanted, found = model.diffusers_config(), model.family.open(str(file)).diffusers_config()
    odd = [f"{key} {wanted.get(key)!r} as {found.get(key)!r}" for key in wanted if wanted.get(key) != found.get(key)]
    if odd:
        raise UserError(
            f"--out: one file in {model.family.title}'s original names holds no config, and its readers would take "
            f"{', '.join(odd)}; give a folder, for diffusers' layout"
        )


def _check_written(folder: Path, model: ModelFolder) -> None:
    """Make sure that what was written is the whole model, by its own header."""
    with on_meta():
        wanted = model.build(streams=("rgb",))
    source = WeightSource(folder, model.family.internal_names)
    found = {name: source.shape(name) for name in source.names()}
    expected = {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not odd, f"{folder} would not be a whole model: {odd[:10]}"
