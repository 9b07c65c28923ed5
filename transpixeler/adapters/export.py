"""Between models and files: an adapter goes onto a model and comes off it; whole models are merged and written.

In: a built model, weights of a base, an `Adapter`. Out: the model adapted, a source of fused weights, or a folder that
diffusers reads. Tensors pass one at a time, so a full model is merged and written in little more memory than a shard.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import FORMATS, read_adapter, step_header, with_whole_blocks, write_adapter
from transpixeler.adapters.tensorfile import save_tensors
from transpixeler.config import LoraConfig, UserError
from transpixeler.families.wan import names as wan_names
from transpixeler.families.wan.model import WanConfig, WanModel
from transpixeler.files import whole
from transpixeler.models.backbone import VideoModel
from transpixeler.models.lora import LoraLinear, inject, load_adapter, lora_linears
from transpixeler.models.streams import Scope
from transpixeler.models.weights import Slices, WeightSource, assign

logger = logging.getLogger("transpixeler")

MERGED = "merged"
SHARD_BYTES = 5 * 2**30
_STREAM_EMBEDDING = "embed.stream_embedding."
_WEIGHTS = "diffusion_pytorch_model"


# -- an adapter on a model


def inject_adapter(model: VideoModel, adapter: Adapter) -> None:
    """Give a whole model (on meta too) the linears that an adapter needs, with its ranks, strengths and scopes."""
    if not adapter.targets:
        return
    ranks = {target: adapter.rank(target) for target in adapter.targets}
    inject(model, LoraConfig(targets=adapter.targets, ranks=ranks, scope="all"), scopes=adapter.scopes)
    for target, module in lora_linears(model):
        module.scale = adapter.scale(target)


def apply_adapter(model: VideoModel, adapter: Adapter) -> None:
    """Fill a model's adapter, or its stage's or shard's part of it, so that it computes what the given one does.

    A whole model that has none yet gets the adapter's own; one that was injected by its config keeps its own strength.
    A stage without any linear that is adapted stays so.
    """
    linears = dict(lora_linears(model))
    if not linears and model.embed is not None and model.head is not None:
        inject_adapter(model, adapter)
        linears = dict(lora_linears(model))
    tensors = dict(adapter.tensors)
    for target, module in linears.items():
        if target in adapter.alphas and adapter.scale(target) != module.scale:
            tensors[f"{target}.lora_B"] = adapter.up(target) * (adapter.scale(target) / module.scale)
    tensors |= {_STREAM_EMBEDDING + stream: tensor for stream, tensor in adapter.stream_embeddings.items()}
    load_adapter(model, tensors, assign=assign)


def adapter_of(
    model: VideoModel, metadata: Mapping[str, str], *, values: Mapping[str, Tensor] | None = None
) -> Adapter:
    """Collect the adapter of a model, or of its stage of a pipeline: its own values, or averages of them by name.

    Every rank of a shard calls it: whole tensors are gathered.
    """
    parameters = dict(model.named_parameters())
    given = values or {}
    linears = dict(lora_linears(model))
    names = [f"{target}.{kind}" for target in linears for kind in ("lora_A", "lora_B")]
    embeddings = [name for name in parameters if name.startswith(_STREAM_EMBEDDING)]
    held = {name: _whole(given.get(name, parameters[name])) for name in names + embeddings}
    return Adapter(
        tensors={name: held[name] for name in names},
        alphas={target: _single(module.scale * module.rank) for target, module in linears.items()},
        scopes={target: _scope(module, model.streams) for target, module in linears.items()},
        stream_embeddings={name.removeprefix(_STREAM_EMBEDDING): held[name] for name in embeddings},
        metadata=dict(metadata),
    )


def _whole(tensor: Tensor) -> Tensor:
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", torch.float32, copy=True)


def _single(number: float) -> float:
    """Round a number as a file of fp32 does."""
    return torch.tensor(number, dtype=torch.float32).item()


def _scope(module: LoraLinear, streams: Sequence[str]) -> Scope:
    if module.span is None:
        return "all"
    return "aux" if module.span == (1, len(streams)) else tuple(streams[slice(*module.span)])


# -- an adapter in the weights


class FusedSource:
    """A base's weights with plain adapters added as they are read, slice by slice, on any layout."""

    def __init__(self, source: WeightSource, adapters: Sequence[Adapter]) -> None:
        self.path, self._source, self._adapters = source.path, source, tuple(adapters)
        for adapter in adapters:
            if not adapter.is_plain:
                raise UserError(
                    "this adapter acts on some streams only, and all streams share the base's weights: "
                    "it cannot be merged or fused; only a plain adapter (one stream, scope all) can"
                )
            self._check(adapter)

    def _check(self, adapter: Adapter) -> None:
        names = set(self._source.names())
        for target in adapter.targets:
            name = f"{target}.weight"
            delta = (adapter.up(target).shape[0], adapter.down(target).shape[1])
            if name not in names or self.shape(name) != delta:
                there = list(self.shape(name)) if name in names else "absent"
                raise UserError(f"the adapter changes {name} {list(delta)}, which in {self.path} is {there}")

    @property
    def bytes_read(self) -> int:
        return self._source.bytes_read

    def names(self) -> tuple[str, ...]:
        return self._source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(name)

    def read(self, name: str) -> Tensor:
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: Slices) -> Tensor:
        piece = self._source.read_slice(name, slices)
        kept = piece.dtype if piece.itemsize > 1 else torch.bfloat16  # eight bits would round most of a change away
        target = name.removesuffix(".weight")
        for adapter in self._adapters:
            if target in adapter.alphas and name != target:
                rows, columns = (*slices, slice(None), slice(None))[:2]
                delta = adapter.up(target)[rows] @ adapter.down(target)[:, columns] * adapter.scale(target)
                piece = (piece.float() + delta).to(kept)
        return piece


def read_fused(paths: Sequence[str]) -> list[Adapter]:
    return [read_adapter(path, key="model.fuse") for path in paths]


def merge_adapter(base: str | Path, adapters: Sequence[Adapter], folder: str | Path) -> Path:
    """Write the base with plain adapters merged into it, tensor by tensor; returns the transformer's folder."""
    source = FusedSource(WeightSource(base, wan_names.internal_names), adapters)
    state = ((name, source.read(name)) for name in source.names())
    return save_model(state, folder, config=WanModel.read_config(base))


# -- whole models


def save_model(
    state: Iterable[tuple[str, Tensor]],
    folder: str | Path,
    *,
    config: Mapping[str, Any],
    metadata: Mapping[str, str] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write FOLDER/transformer for `WanTransformer3DModel.from_pretrained` from whole tensors by internal name.

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
        _write_shards(_without_embeddings(state, embeddings), draft, shard_bytes, header)
        (draft / "config.json").write_text(json.dumps(diffusers_config(config), indent=2) + "\n")
        _check_written(draft, config)
        if embeddings:
            write_adapter(Adapter({}, {}, {}, embeddings, metadata or {}), folder)
    return target


def diffusers_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Translate a config of either published spelling into diffusers' words."""
    fixed = {"_class_name": "WanTransformer3DModel", "qk_norm": "rms_norm_across_heads"}
    return fixed | asdict(WanConfig.read(config))


def _without_embeddings(
    state: Iterable[tuple[str, Tensor]], embeddings: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    for name, tensor in state:
        if name.startswith(_STREAM_EMBEDDING):
            embeddings[name.removeprefix(_STREAM_EMBEDDING)] = _whole(tensor)
        else:
            yield wan_names.to_diffusers(wan_names.from_internal(name)), tensor.detach().cpu().contiguous()


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
    save_tensors(tensors, file, header)
    with file.open("rb") as written:
        os.fsync(written.fileno())


def _check_written(folder: Path, config: Mapping[str, Any]) -> None:
    """Check by its own header that what was written is a whole model of this config."""
    with torch.device("meta"):
        wanted: nn.Module = WanModel.from_config(dict(config), streams=("rgb",))
    source = WeightSource(folder, wan_names.internal_names)
    found = {name: source.shape(name) for name in source.names()}
    expected = {name: tuple(parameter.shape) for name, parameter in wanted.named_parameters()}
    odd = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    assert not odd, f"{folder} would not be a whole model: {odd[:10]}"


# -- the command


def export_command(
    path: str | Path,
    *,
    format: str,
    out: str | Path,
    base: str | Path = "",
    alpha: float | None = None,
    stream: str = "seg",
) -> Path:
    """`transpixeler export`: an adapter, or a run's newest, in another spelling or merged into its base."""
    if format not in (*FORMATS, MERGED):
        raise UserError(f"--format: {format} is unknown; there are {', '.join(FORMATS)}, {MERGED}")
    if (Path(path) / "transformer").is_dir():
        raise UserError(f"{path} holds a whole model, not an adapter; its transformer/ is in diffusers' layout already")
    adapter = read_adapter(path, alpha=alpha, stream=stream)
    if format == MERGED:
        base = base or adapter.metadata.get("base_model", "")
        if not base:
            raise UserError(f"{path} does not say which base it was trained on; give one with `--base`")
        return merge_adapter(base, [*read_fused(adapter.fused), adapter], out)
    if format != "transpixeler" and not adapter.is_plain:
        logger.warning(
            "this adapter acts on some streams only: a program that knows no streams will refuse it or apply it wrongly"
        )
    elif FORMATS[format].whole_blocks and with_whole_blocks(adapter) is None:
        logger.warning(
            "diffusers reads %s's names of whole blocks only, which this adapter cannot be made to fill: "
            "for diffusers, use --format diffusers",
            format,
        )
    if adapter.fused:
        logger.warning("this adapter was trained with %s in its base: it is right beside them only", adapter.fused)
    return write_adapter(adapter, out, format=format)
