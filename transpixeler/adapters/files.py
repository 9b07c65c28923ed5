"""Adapters as files: any published spelling comes in as an `Adapter`, and goes out as another program reads it.

The `Adapter` value stands between files and models: tensors by internal name, the strength and the scope of each
target. It is written so that nothing half-written is ever found, and read back before it counts as written.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from transpixeler.adapters import peft_config
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.peft_config import CONFIG_FILE, most
from transpixeler.adapters.tensorfile import save_tensors
from transpixeler.config import UserError
from transpixeler.families.wan import names as wan_names
from transpixeler.files import whole, write_text
from transpixeler.models.streams import Scope
from transpixeler.models.weights import resolve

ADAPTER_FILE = "adapter_model.safetensors"
MODEL_FOLDER = "transformer"  # in a save, a model that was trained in full
VERSION = "1"

_OURS = "transpixeler."  # of header keys, and of what is no LoRA weight
_EMBEDDING = f"{_OURS}stream_embedding."
# header keys that the tensors decide
_DERIVED = ("format", "version", "rank", "alpha", "scope", "scopes", "folded", "zeros")
_PUBLISHED_EMBEDDINGS = ("diffusion_model.modality_embedding", "transformer.modality_embedding")
_PUBLISHED_UNMASKED = ("cross_attn.k", "cross_attn.v", "cross_attn.o")
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "base_model.model.")
_FLAT_PREFIX = "lora_unet_"
_SUFFIXES = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".alpha": "alpha",
}


class Spelling(NamedTuple):
    """A format's names of a target's three tensors; without an alpha key the scale is folded into `up`."""

    module: Callable[[str], str]  # internal module name → stored one
    down: str
    up: str
    alpha: str | None
    whole_blocks: bool = False  # readers take every linear of a block for granted


def _original(module: str) -> str:
    return f"diffusion_model.{wan_names.from_internal(module)}"


def _diffusers(module: str) -> str:
    return f"transformer.{wan_names.module_to_diffusers(wan_names.from_internal(module))}"


def _kohya(module: str) -> str:
    return _FLAT_PREFIX + wan_names.module_to_flat(wan_names.from_internal(module))


FORMATS = {
    "transpixeler": Spelling(_original, ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "comfyui": Spelling(_original, ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "diffusers": Spelling(_diffusers, ".lora_A.weight", ".lora_B.weight", None),
    "kohya": Spelling(_kohya, ".lora_down.weight", ".lora_up.weight", ".alpha", whole_blocks=True),
}


def join(parts: Iterable[Adapter]) -> Adapter:
    """One adapter of what the stages of a pipeline hold."""
    tensors: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    scopes: dict[str, Scope] = {}
    embeddings: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for part in parts:
        assert not set(alphas) & set(part.alphas), "two stages hold the same target"
        tensors |= part.tensors
        alphas |= part.alphas
        scopes |= part.scopes
        embeddings |= part.stream_embeddings
        metadata |= part.metadata
    return Adapter(tensors, alphas, scopes, embeddings, metadata)


# -- out


def write_adapter(adapter: Adapter, path: str | Path, *, format: str = "transpixeler") -> Path:
    """Write a `.safetensors` file, or a folder of it and its config; returns the file, read back and found equal."""
    if format not in FORMATS:
        raise UserError(f"--format: {format} is unknown; there are {', '.join(FORMATS)}")
    path = Path(path)
    file = path if path.suffix == ".safetensors" else path / ADAPTER_FILE
    stored = (FORMATS[format].whole_blocks and with_whole_blocks(adapter)) or adapter
    header = _header(stored, folded=FORMATS[format].alpha is None)
    if zeros := [target for target in stored.targets if target not in adapter.alphas]:
        header[f"{_OURS}zeros"] = json.dumps(zeros)
    if file != path:
        write_text(path / CONFIG_FILE, peft_config.beside(stored, _ours(header)))
    with whole(file, synced=True) as draft:
        save_tensors(_spelled(stored, FORMATS[format]), draft, header)
        assert adapter.matches(_read_file(draft, alpha=None, stream="")), (
            f"{draft} does not read back as it was written"
        )
    return file


def with_whole_blocks(adapter: Adapter) -> Adapter | None:
    """Add pairs of zeros to a plain adapter for what it leaves alone in its blocks; None where that cannot be had.

    Their rank is the usual one: readers take the most frequent for all of which nothing else is said.
    """
    names = [target.split(".", 2) for target in adapter.targets]
    if not adapter.is_plain or any(name[-1] not in wan_names.BLOCK_LINEARS for name in names):
        return None
    sizes: dict[str, int] = {}
    for target, (*_, part) in zip(adapter.targets, names):
        sizes |= zip(wan_names.BLOCK_LINEARS[part], (adapter.down(target).shape[1], adapter.up(target).shape[0]))
    if len(sizes) < 2:
        return None
    rank, alpha = most(map(adapter.rank, adapter.targets), 0), most(adapter.alphas.values(), 0.0)
    tensors, alphas, scopes = dict(adapter.tensors), dict(adapter.alphas), dict(adapter.scopes)
    for block, part in itertools.product(range(1 + max(int(name[1]) for name in names)), wan_names.BLOCK_LINEARS):
        if (target := f"blocks.{block}.{part}") not in alphas:
            inner, outer = (sizes[side] for side in wan_names.BLOCK_LINEARS[part])
            tensors |= {f"{target}.lora_A": torch.zeros(rank, inner), f"{target}.lora_B": torch.zeros(outer, rank)}
            alphas[target], scopes[target] = alpha, "all"
    return replace(adapter, tensors=tensors, alphas=alphas, scopes=scopes)


def _spelled(adapter: Adapter, spelling: Spelling) -> dict[str, Tensor]:
    stored = {}
    for target in adapter.targets:
        module = spelling.module(target)
        folded = 1.0 if spelling.alpha else adapter.scale(target)
        stored[module + spelling.down] = adapter.down(target).contiguous()
        stored[module + spelling.up] = (adapter.up(target) * folded).contiguous()
        if spelling.alpha:
            stored[module + spelling.alpha] = torch.tensor(adapter.alphas[target])
    for stream, embedding in adapter.stream_embeddings.items():
        stored[_EMBEDDING + stream] = embedding.contiguous()
    return stored


def _header(adapter: Adapter, *, folded: bool) -> dict[str, str]:
    """Return what a reader needs beside the tensors; every value a string, as safetensors wants it."""
    assert not set(adapter.metadata) & set(_DERIVED), "these follow from the tensors"
    ranks = {target: adapter.rank(target) for target in adapter.targets}
    scope = most(adapter.scopes.values(), "all")
    fields = {
        "format": "adapter",
        "version": VERSION,
        "rank": str(most(ranks.values(), 0)),
        "alpha": repr(most(adapter.alphas.values(), 0.0)),
        "scope": _scope_text(scope),
        **adapter.metadata,
    }
    odd = {target: _scope_text(own) for target, own in adapter.scopes.items() if own != scope}
    if odd:
        fields["scopes"] = json.dumps(odd)
    if folded:
        fields["folded"] = json.dumps(dict(adapter.alphas))
    return {"format": "pt", **peft_config.in_header(adapter)} | {_OURS + key: value for key, value in fields.items()}


def step_header(metadata: Mapping[str, str]) -> dict[str, str]:
    """For weights that are no adapter: what `step_of` reads."""
    return {f"{_OURS}step": metadata["step"]} if "step" in metadata else {}


def _ours(header: Mapping[str, str]) -> dict[str, str]:
    return {key.removeprefix(_OURS): value for key, value in header.items() if key.startswith(_OURS)}


def _scope_text(scope: Scope) -> str:
    return scope if isinstance(scope, str) else json.dumps(scope)


def _scope_of(file: Path, text: object) -> Scope:
    if isinstance(text, str) and not text.startswith("["):
        return text
    names = _header_value(file, {f"{_OURS}scope": text}, "scope", []) if isinstance(text, str) else []
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{file}: damaged, its header's scope is no stream and no list of streams")
    return tuple(names)


def _header_value(file: Path, header: Mapping[str, str], key: str, default: Any) -> Any:
    """Return the JSON value of one of our header keys, which must be of the default's type."""
    try:
        value = json.loads(header.get(_OURS + key, "null"))
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


def adapter_file(path: Path) -> Path:
    """Find the file in an adapter folder, or in the newest save of a run."""
    if path.is_file():
        if path.suffix != ".safetensors":
            raise UserError(f"{path}: adapters are read from .safetensors files only")
        return path
    if (path / ADAPTER_FILE).exists():
        return path / ADAPTER_FILE
    newest = newest_save(path / "latest" if (path / "latest").exists() else path)
    if newest is not None and (newest / ADAPTER_FILE).exists():
        return newest / ADAPTER_FILE
    files = sorted(path.glob("*.safetensors"))
    if len(files) != 1:
        raise UserError(f"{path} holds {len(files)} .safetensors files and no {ADAPTER_FILE}; name the file itself")
    return files[0]


def is_save(folder: Path) -> bool:
    """Return whether a folder holds what training saves: an adapter, or a model that was trained in full."""
    return (folder / MODEL_FOLDER).is_dir() or (folder / ADAPTER_FILE).is_file()


def newest_save(run: Path) -> Path | None:
    """Return the save of a run's last step; None where nothing is saved yet."""
    saves = [folder for pattern in ("epoch*", "step*") for folder in run.glob(pattern) if is_save(folder)]
    return max(saves, key=lambda save: (saved_step(save), _weights_of(save).stat().st_mtime), default=None)


def saved_step(save: Path) -> int:
    """Return the step that a save's weights are of, as their header says; -1 where it does not."""
    weights = _weights_of(save)
    files = sorted(weights.glob("*.safetensors")) if weights.is_dir() else [weights]
    return step_of(files[0]) if files else -1


def _weights_of(save: Path) -> Path:
    return save / MODEL_FOLDER if (save / MODEL_FOLDER).is_dir() else save / ADAPTER_FILE


def step_of(file: Path) -> int:
    """Return the step that a file's weights are of, as its header says; -1 where it does not."""
    return step_number(_open(file)[1].get(f"{_OURS}step", ""))


def step_number(text: str) -> int:
    """Return the step that a header's text says; -1 where it says none."""
    return int(text) if text.isdecimal() and len(text) < 19 else -1


def _open(file: Path) -> tuple[Any, dict[str, str]]:
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as fault:
        raise UserError(f"{file} is not a whole safetensors file ({fault}); copy or download it again") from fault
    return handle, handle.metadata() or {}


def _read_file(file: Path, *, alpha: float | None, stream: str) -> Adapter:
    handle, header = _open(file)
    stored = {key: handle.get_tensor(key).float() for key in handle.keys()}  # noqa: SIM118
    embeddings = {key.removeprefix(_EMBEDDING): stored.pop(key) for key in list(stored) if key.startswith(_EMBEDDING)}
    published = [stored.pop(key) for key in _PUBLISHED_EMBEDDINGS if key in stored]
    if published:  # an averaged file holds it twice: the first is averaged as its LoRA keys are, the second is not
        embeddings = {stream: published[0].flatten()}
    left_alone = _header_value(file, header, "zeros", [])
    parts = {target: part for target, part in _by_target(file, stored).items() if target not in left_alone}
    if not parts and not embeddings:
        raise UserError(f"{file} holds no LoRA weights")
    tensors = {f"{target}.{kind}": parts[target][kind] for target in parts for kind in ("lora_A", "lora_B")}
    ranks = {target: tensors[f"{target}.lora_A"].shape[0] for target in parts}
    alphas, folded = _alphas(file, header, parts, ranks, alpha=alpha, guess=not published)
    for target in parts if folded else ():
        tensors[f"{target}.lora_B"] /= alphas[target] / ranks[target]
    ours = _ours(header)
    metadata = {key: value for key, value in ours.items() if key not in _DERIVED}
    scopes = _scopes(file, header, parts, published=bool(published))
    return Adapter(tensors, alphas, scopes, embeddings, metadata)


def _by_target(file: Path, stored: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """Group the tensors of a file by the linear that they adapt."""
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in stored.items():
        try:
            target, kind = _parse(key)
        except wan_names.UnknownName:
            unknown.append(key)
            continue
        parts.setdefault(target, {})[kind] = tensor
    if unknown:
        listed = ", ".join(unknown[:10])
        raise UserError(f"{file} is no LoRA of Wan that we know how to read: {len(unknown)} strange keys: {listed}")
    for target, part in parts.items():
        down, up = part.get("lora_A"), part.get("lora_B")
        if down is None or up is None or down.ndim != 2 or up.ndim != 2 or down.shape[0] != up.shape[1]:
            shapes = {kind: list(tensor.shape) for kind, tensor in part.items()}
            raise UserError(f"{file}: {target} is not a pair of low-rank matrices: {shapes}")
    return parts


def _parse(key: str) -> tuple[str, str]:
    """`lora_unet_blocks_0_ffn_0.lora_down.weight` → (`blocks.0.ffn.0`, `lora_A`), for every spelling."""
    suffix = next((suffix for suffix in _SUFFIXES if key.endswith(suffix)), None)
    if suffix is None:
        raise wan_names.UnknownName(key)
    module = key.removesuffix(suffix)
    if module.startswith(_FLAT_PREFIX):
        return wan_names.to_internal(wan_names.module_from_flat(module.removeprefix(_FLAT_PREFIX))), _SUFFIXES[suffix]
    prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
    return wan_names.to_internal(_original_module(module.removeprefix(prefix))), _SUFFIXES[suffix]


def _original_module(module: str) -> str:
    try:
        wan_names.module_to_diffusers(module)
    except wan_names.UnknownName:
        return wan_names.module_from_diffusers(module)
    return module


def _alphas(
    file: Path,
    header: Mapping[str, str],
    parts: Mapping[str, Mapping[str, Tensor]],
    ranks: Mapping[str, int],
    *,
    alpha: float | None,
    guess: bool,
) -> tuple[dict[str, float], bool]:
    """Each target's alpha, and whether its scale is folded into the weights already (and is to be taken out)."""
    if f"{_OURS}folded" in header:
        folded = _header_value(file, header, "folded", {})
        known = [value for value in folded.values() if isinstance(value, int | float) and 0 < abs(value) < 1e30]
        if not set(parts) <= set(folded) or len(known) < len(folded):
            raise UserError(f"{file}: damaged, its header's folded alphas are not those of its targets")
        return folded, True
    own = {target: part["alpha"].item() for target, part in parts.items() if "alpha" in part}
    absent = [target for target in parts if target not in own]
    if not absent:
        return own, False
    config = peft_config.read(file, header)
    if alpha is not None:
        rest = dict.fromkeys(absent, alpha)
    elif "lora_alpha" in config:
        rest = {target: peft_config.alpha_of(file, config, ranks[target]) for target in absent}
    elif guess:  # ComfyUI and diffusers both take scale 1 for a file without alpha
        rest = {target: float(ranks[target]) for target in absent}
    else:
        raise UserError(
            f"{file} says nothing of its alpha, and without alpha its strength is unknown; put its {CONFIG_FILE} "
            f"beside it, or {peft_config.way_out(file)}"
        )
    return own | rest, False


def _scopes(file: Path, header: Mapping[str, str], targets: Iterable[str], *, published: bool) -> dict[str, Scope]:
    """Ours say it; the published code masks all but three linears of cross-attention; others touch all tokens."""
    if published:
        return {target: "all" if target.endswith(_PUBLISHED_UNMASKED) else "aux" for target in targets}
    default = _scope_of(file, header.get(f"{_OURS}scope", "all"))
    odd = {target: _scope_of(file, text) for target, text in _header_value(file, header, "scopes", {}).items()}
    return {target: odd.get(target, default) for target in targets}
