"""Adapters as files: any published spelling comes in as an `Adapter`, and goes out as another program reads it.

A file is written so that nothing half-written is ever found, and read back before it counts as written.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.adapters import peft_config
from transpixeler.adapters.adapter import MAGNITUDE, TENSORS, Adapter, stream_of
from transpixeler.adapters.joined import join_parts
from transpixeler.adapters.peft_config import CONFIG_FILE, most
from transpixeler.adapters.readers import is_one_file, with_whole_blocks
from transpixeler.adapters.saved import ADAPTER_FILE, LATEST, expert_folders, is_save, newest_save
from transpixeler.adapters.spelling import (
    BIAS_CHANGE,
    CHANGE,
    DORA_SCALE,
    EMBEDDING,
    FORMATS,
    OURS,
    SCALED_BIAS_CHANGE,
    Spelling,
    is_known,
    mark,
    parse,
)
from transpixeler.adapters.tensorfile import open_tensors, save_tensors
from transpixeler.config.sections import UserError, family_names
from transpixeler.files import whole, write_text
from transpixeler.models.family import Family, families, find_family
from transpixeler.models.names import Names, UnknownName, pieces, split_rows
from transpixeler.models.resolve import resolve
from transpixeler.models.streams import Scope

VERSION = "1"

# header keys that the tensors decide
_DERIVED = ("format", "version", "kind", "rank", "alpha", "scope", "scopes", "per_stream", "folded", "zeros")
_PUBLISHED_EMBEDDINGS = ("diffusion_model.modality_embedding", "transformer.modality_embedding")
_PUBLISHED_UNMASKED = ("cross_attn.k", "cross_attn.v", "cross_attn.o")


def join(parts: Iterable[Adapter]) -> Adapter:
    """One adapter of what the stages of a pipeline hold."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    scopes: dict[str, Scope] = {}
    embeddings: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    changes: dict[str, Tensor] = {}
    for part in parts:
        assert not set(alphas) & set(part.alphas), "two stages hold the same target"
        tensors |= part.tensors
        alphas |= part.alphas
        scopes |= part.scopes
        embeddings |= part.stream_embeddings
        metadata |= part.metadata
        changes |= part.changes
    return Adapter(tensors, alphas, scopes, embeddings, metadata, changes)


# -- out


def write_adapter(adapter: Adapter, path: str | Path, *, format: str = "transpixeler") -> Path:
    """Write a `.safetensors` file, or a folder of it and its config; returns the file, read back and found equal."""
    if format not in FORMATS:
        raise UserError(f"--format: {format} is unknown; there are {', '.join(FORMATS)}")
    if format == "diffusers" and adapter.must_fuse:
        raise UserError(
            f"--format: diffusers cannot apply {adapter.must_fuse}, which this adapter has; use comfyui or merged"
        )
    path = Path(path)
    file = path if is_one_file(path) else path / ADAPTER_FILE
    loaders, spelling = adapter.family.names.loaders, FORMATS[format]
    if adapter.is_plain and not loaders.alpha_keys and spelling.modules != "flat":
        spelling = spelling._replace(alpha=None)
    stored = (format in loaders.whole_blocks and with_whole_blocks(adapter)) or adapter
    header = _header(stored, folded=spelling.alpha is None)
    read = "diffusers" in loaders.read_by.get(format, ())
    if read and (not stored.is_dora or format == "diffusers"):  # it reads a DoRA's norms in this format alone
        header |= peft_config.in_header(stored)
    if zeros := [target for target in stored.targets if target not in adapter.alphas]:
        header[f"{OURS}zeros"] = json.dumps(zeros)
    if file != path:
        write_text(path / CONFIG_FILE, peft_config.beside(stored, _ours(header)))
    with whole(file, synced=True) as draft:
        save_tensors(_spelled(stored, spelling), draft, header)
        assert adapter.matches(_read_file(draft, alpha=None, stream="")), (
            f"{draft} does not read back as it was written"
        )
    return file


def _spelled(adapter: Adapter, spelling: Spelling) -> dict[str, Tensor]:
    """Return an adapter's tensors under the keys of a format."""
    stored, names = {}, adapter.family.names
    marked = "" if adapter.is_plain else OURS
    for target in adapter.targets:
        whole_name = (marked and mark(target)) + spelling.module(target, names)
        folded = 1.0 if spelling.alpha else adapter.scale(target)
        for module, up in split_rows(adapter.up(target), whole_name).items():
            stored[module + spelling.down] = adapter.down(target).clone()  # safetensors stores no tensor twice
            stored[module + spelling.up] = (up * folded).contiguous()
            if spelling.alpha:
                stored[module + spelling.alpha] = torch.tensor(adapter.alphas[target])
        if (magnitude := adapter.magnitude(target)) is not None:
            stored |= _spelled_magnitude(magnitude, whole_name, spelling)
    for name, change in adapter.changes.items():
        module, leaf = (name.removesuffix(".bias"), ".diff_b") if name.endswith(".bias") else (name, ".diff")
        parts = split_rows(change, marked + spelling.module(module.removesuffix(".weight"), names))
        stored |= {part + leaf: own.contiguous() for part, own in parts.items()}
    for stream, embedding in adapter.stream_embeddings.items():
        stored[EMBEDDING + stream] = embedding.contiguous()
    return stored


def _spelled_magnitude(magnitude: Tensor, module: str, spelling: Spelling) -> dict[str, Tensor]:
    """Return a DoRA's norms under their keys: of rows, or of columns, which every part of a module has whole."""
    if magnitude.ndim > 1:
        return {part.name + spelling.magnitude: magnitude.reshape(1, -1).clone() for part in pieces(module)}
    shape = (-1, 1) if spelling.magnitude == DORA_SCALE else (-1,)
    parts = split_rows(magnitude, module).items()
    return {part + spelling.magnitude: own.reshape(shape).contiguous() for part, own in parts}


def _header(adapter: Adapter, *, folded: bool) -> dict[str, str]:
    """Return what a reader needs beside the tensors; every value a string, as safetensors wants it."""
    assert not set(adapter.metadata) & set(_DERIVED), "these follow from the tensors"
    ranks = {target: adapter.rank(target) for target in adapter.targets}
    shared = {target: own for target, own in adapter.scopes.items() if not stream_of(target)}
    scope = most(shared.values(), adapter.own_streams or "all")
    fields = {
        "format": "adapter",
        "version": VERSION,
        "rank": str(most(ranks.values(), 0)),
        "alpha": repr(most(adapter.alphas.values(), 0.0)),
        "scope": _scope_text(scope),
        **adapter.metadata,
    }
    odd = {target: _scope_text(own) for target, own in shared.items() if own != scope}
    if odd:
        fields["scopes"] = json.dumps(odd)
    if adapter.is_dora:
        fields["kind"] = "dora"
    if adapter.own_streams:
        fields["per_stream"] = ",".join(adapter.own_streams)
    if folded:
        fields["folded"] = json.dumps(dict(adapter.alphas))
    return {"format": "pt"} | {OURS + key: value for key, value in fields.items()}


def step_header(metadata: Mapping[str, str]) -> dict[str, str]:
    """For weights that are no adapter: what `step_of` reads."""
    return {f"{OURS}step": metadata["step"]} if "step" in metadata else {}


def _ours(header: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(OURS): value for key, value in header.items() if key.startswith(OURS)}


def _scope_text(scope: Scope) -> str:
    return scope if isinstance(scope, str) else json.dumps(scope)


def _scope_of(file: Path, text: object) -> Scope:
    if isinstance(text, str) and not text.startswith("["):
        return text
    names = _header_value(file, {f"{OURS}scope": text}, "scope", []) if isinstance(text, str) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: damaged, its header's scope is no stream and no list of streams")
    return tuple(names)


def _header_value(file: Path, header: Mapping[str, str], key: str, default: Any) -> Any:
    """Return the JSON value of one of our header keys, which must be of the default's type."""
    try:
        value = json.loads(header.get(OURS + key, "null"))
    except (ValueError, RecursionError) as fault:
        raise UserError(f"{file}: damaged, its header's {key} cannot be read: {fault}") from None
    if value is not None and not isinstance(value, type(default)):
        raise UserError(f"{file}: damaged, its header's {key} holds {type(value).__name__}")
    return default if value is None else value


# -- in


def read_adapter(path: str | Path, *, alpha: float | None = None, stream: str = "seg", key: str = "adapter") -> Adapter:
    """Read an adapter of ours, of ComfyUI, diffusers, PEFT, kohya or the published TransPixeler code, from anywhere.

    `alpha` stands in where the file says nothing of its strength; `stream` names the published code's one companion.
    """
    found = resolve(path, only=("*.safetensors", CONFIG_FILE), key=key)
    try:
        return _read_file(adapter_file(found), alpha=alpha, stream=stream)
    except UserError as fault:
        raise UserError(f"{key}: {fault}") from fault


def read_experts(path: Path, read: Callable[[Path], Adapter]) -> dict[str, Adapter]:
    """Read a save's adapters by expert; the one of a model of one expert, or of which nothing is said, has no name."""
    save = path
    if path.is_dir() and not is_save(path):
        save = newest_save(path / LATEST if (path / LATEST).exists() else path) or path
    parts = expert_folders(save)
    found = [read(part) for part in (parts.values() if parts else [path])]
    return {adapter.expert: adapter for adapter in found}


def read_embeddings(path: str | Path, *, key: str) -> dict[str, Tensor]:
    """Read the stream embeddings alone of an adapter of ours."""
    handle, _ = open_tensors(adapter_file(resolve(path, only=("*.safetensors", CONFIG_FILE), key=key)))
    names = [name for name in handle.keys() if name.startswith(EMBEDDING)]  # noqa: SIM118
    return {name.removeprefix(EMBEDDING): handle.get_tensor(name).float() for name in names}


def adapter_file(path: Path) -> Path:
    """Find the file in an adapter folder, or in the newest save of a run."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: adapters are read from .safetensors files only")
        return path
    if (path / ADAPTER_FILE).exists():
        return path / ADAPTER_FILE
    newest = newest_save(path / LATEST if (path / LATEST).exists() else path)
    if newest is not None:
        return adapter_file(newest)
    if parts := expert_folders(path):
        raise UserError(f"{path} holds an adapter for each expert: name one, {' or '.join(map(str, parts.values()))}")
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files and no {ADAPTER_FILE}; name the file itself")
    return files[0]


def _read_file(file: Path, *, alpha: float | None, stream: str) -> Adapter:
    handle, header = open_tensors(file)
    stored = {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
    embeddings = {key.removeprefix(EMBEDDING): stored.pop(key) for key in list(stored) if key.startswith(EMBEDDING)}
    published = [stored.pop(key) for key in _PUBLISHED_EMBEDDINGS if key in stored]
    if published:  # an averaged file holds it twice: the first is averaged as its LoRA keys are, the second is not
        embeddings = {stream: published[0].flatten()}
    left_alone = _header_value(file, header, "zeros", [])
    family = _family_of(file, header, stored)
    config_of = cache(partial(peft_config.read, file, header))  # which a file that says its alphas does not need
    alpha_of = partial(_alpha_of_rank, file, config_of, alpha, not published)
    stored = join_parts(file, stored, family.names, alpha_of)
    found = _by_target(file, stored, family.names)
    parts = {t: part for t, part in found.items() if "lora_A" in part and t not in left_alone}
    tensors = {f"{t}.{kind}": parts[t][kind] for t in parts for kind in TENSORS if kind in parts[t]}
    ranks = {target: tensors[f"{target}.lora_A"].shape[0] for target in parts}
    alphas, folded = _alphas(file, header, parts, ranks, alpha_of)
    for target in parts if folded else ():
        tensors[f"{target}.lora_B"] /= alphas[target] / ranks[target]
    ours = _ours(header)
    metadata = {"family": family.name} | {key: value for key, value in ours.items() if key not in _DERIVED}
    scopes = _scopes(file, header, parts, published=bool(published))
    changes = _changes(found, {target: alphas[target] / ranks[target] for target in parts}, family.names)
    if not parts and not embeddings and not changes:
        raise UserError(f"{file} holds no LoRA weights")
    return Adapter(tensors, alphas, scopes, embeddings, metadata, changes)


def _family_of(file: Path, header: Mapping[str, str], keys: Iterable[str]) -> Family:
    """Return the family that the header names, or else the one in whose names all keys are."""
    if f"{OURS}family" in header:
        name = header[f"{OURS}family"]
        if name not in (known := family_names()):
            raise UserError(f"{file}: is for {name!r}, which is not one of {', '.join(known)}; update transpixeler")
        return find_family(name)
    keys = list(keys)
    unknown = {family: [key for key in keys if not is_known(key, family.names)] for family in families()}
    near = min(unknown, key=lambda family: len(unknown[family]))
    if unknown[near]:
        odd, known = unknown[near], ", ".join(family.title for family in unknown)
        raise UserError(
            f"{file} is no LoRA of a model that we know ({known}): {len(odd)} strange keys: {', '.join(odd[:10])}"
        )
    return near


def _by_target(file: Path, stored: Mapping[str, Tensor], names: Names) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of a file by the linear that they adapt."""
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in stored.items():
        try:
            target, kind = parse(key, names)
        except UnknownName:
            raise UserError(f"{file}: its header and its key {key} are of different models") from None
        part = parts.setdefault(target, {})
        if kind in part:
            raise UserError(f"{file}: says the {kind} of {target} twice, the second time as {key}")
        part[kind] = tensor
    for target, part in parts.items():
        if set(part) - {CHANGE, BIAS_CHANGE}:
            _check_pair(file, target, part)
    return parts


def _check_pair(file: Path, target: str, part: dict[str, Tensor]) -> None:
    """Refuse a target without two matrices that fit; make matrices of a convolution's, and a DoRA's norms a vector."""
    shapes = {kind: list(tensor.shape) for kind, tensor in part.items()}
    down, up = part.get("lora_A"), part.get("lora_B")
    if down is None or up is None or min(down.ndim, up.ndim) < 2 or up.numel() != up.shape[0] * down.shape[0]:
        raise UserError(f"{file}: {target} is not a pair of low-rank matrices: {shapes}")
    if CHANGE in part:
        raise UserError(f"{file}: {target} has low-rank matrices and a whole change, which programs add differently")
    part |= {"lora_A": down.flatten(1), "lora_B": up.flatten(1)}
    magnitude = part.get(MAGNITUDE)
    if magnitude is None:
        return
    if magnitude.shape in ((up.shape[0],), (up.shape[0], *[1] * (down.ndim - 1))):
        part[MAGNITUDE] = magnitude.flatten()
    elif magnitude.shape != (1, down.shape[1]) or down.ndim > 2:
        raise UserError(f"{file}: the dora_scale of {target} is neither one number a row nor one a column: {shapes}")


def _changes(found: Mapping[str, Mapping[str, Tensor]], scales: Mapping[str, float], names: Names) -> dict[str, Tensor]:
    """Return what is added to whole parameters; speed-ups list many that are zero."""
    changes = {}
    for target, part in found.items():
        if CHANGE in part:
            changes[names.weight_of(target)] = part[CHANGE]
        biases = [part[BIAS_CHANGE]] if BIAS_CHANGE in part else []
        biases += [part[SCALED_BIAS_CHANGE] * scales[target]] if SCALED_BIAS_CHANGE in part else []
        if biases:
            changes[f"{target}.bias"] = sum(biases[1:], biases[0])
    return {name: change for name, change in changes.items() if change.any()}


def _alphas(
    file: Path,
    header: Mapping[str, str],
    parts: Mapping[str, Mapping[str, Tensor]],
    ranks: Mapping[str, int],
    alpha_of: Callable[[int], float],
) -> tuple[dict[str, float], bool]:
    """Each target's alpha, and whether its scale is folded into the weights already (and is to be taken out)."""
    if f"{OURS}folded" in header:
        folded = _header_value(file, header, "folded", {})
        known = [value for value in folded.values() if isinstance(value, int | float) and 0 < abs(value) < 1e30]
        if not set(parts) <= set(folded) or len(known) < len(folded):
            raise UserError(f"{file}: damaged, its header's folded alphas are not those of its targets")
        return folded, True
    own = {target: part["alpha"].item() for target, part in parts.items() if "alpha" in part}
    return own | {target: alpha_of(ranks[target]) for target in parts if target not in own}, False


def _alpha_of_rank(
    file: Path, config_of: Callable[[], Mapping[str, Any]], alpha: float | None, guess: bool, rank: int
) -> float:
    """Return the alpha of a pair without its own: the given one, or what the config beside it says of its rank."""
    config = config_of()
    if alpha is not None:
        return alpha
    if "lora_alpha" in config:
        return peft_config.alpha_of(file, config, rank)
    if guess:  # ComfyUI and diffusers both take scale 1 for a file without alpha
        return float(rank)
    raise UserError(
        f"{file} says nothing of its alpha, and without alpha its strength is unknown; put its {CONFIG_FILE} "
        f"beside it, or {peft_config.way_out(file)}"
    )


def _scopes(file: Path, header: Mapping[str, str], targets: Iterable[str], *, published: bool) -> dict[str, Scope]:
    """Ours say it; the published code masks all but three linears of cross-attention; others touch all tokens."""
    if published:
        return {target: "all" if target.endswith(_PUBLISHED_UNMASKED) else "aux" for target in targets}
    default = _scope_of(file, header.get(f"{OURS}scope", "all"))
    odd = {target: _scope_of(file, text) for target, text in _header_value(file, header, "scopes", {}).items()}
    own = {target: (stream,) for target in targets if (stream := stream_of(target))}
    return {target: own.get(target, odd.get(target, default)) for target in targets}
