"""Weights of a base model: a local path or a Hub id comes in, the tensors that a rank keeps come out, and nothing more.

A model of tens of gigabytes is built on meta and cut to its stage and shard first; then each parameter asks here for
its own slice. `WeightSource` hides what the files look like: a diffusers folder, an original one, or one ComfyUI file.
"""

from __future__ import annotations

import json
import pickle
import re
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from transpixeler.config.sections import UserError
from transpixeler.files import read_json
from transpixeler.models.backbone import Backbone
from transpixeler.models.damage import naming_damage
from transpixeler.models.linear import Linear
from transpixeler.models.lora import is_adapter
from transpixeler.models.names import pieces
from transpixeler.models.quantize import quantize_weight
from transpixeler.models.resolve import resolve
from transpixeler.models.shards import Slices, local, local_slices

Names = Callable[[Iterable[str]], Mapping[str, str]]  # stored names of a file → {internal name: stored name}

PACKED_PREFIX = "model.diffusion_model."  # of a transformer's weights in a file that may hold other parts too

_INDEX = "diffusion_pytorch_model.safetensors.index.json"
_SHARDS = "diffusion_pytorch_model*.safetensors"
_PICKLED = "diffusion_pytorch_model*.pth"
_SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
_HELPER_SUFFIXES = (*_SCALE_SUFFIXES, ".scale_input", ".input_scale", ".comfy_quant")  # of ComfyUI's quantized files
_MARKER = "scaled_fp8"
# what torch.load raises of files that are no pickle of tensors, or are cut short
UNREADABLE = (pickle.UnpicklingError, RuntimeError, EOFError, LookupError, ValueError, TypeError, AttributeError)
_CALLED = re.compile(r"GLOBAL (\S+)")
_LISTED = 10


class _File(Protocol):
    def shapes(self) -> dict[str, tuple[int, ...]]: ...
    def read(self, name: str, slices: Slices) -> Tensor: ...


class _Safetensors:
    def __init__(self, path: Path) -> None:
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as fault:
            raise UserError(f"{path} is not a whole safetensors file ({fault}); copy or download it again") from fault

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(self._file.get_slice(name).get_shape()) for name in self._file.keys()}  # noqa: SIM118

    def read(self, name: str, slices: Slices) -> Tensor:
        return self._file.get_slice(name)[slices] if slices else self._file.get_tensor(name)


class _Pickled:
    def __init__(self, path: Path) -> None:
        self._tensors = load_pickled(path)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self._tensors.items()}

    def read(self, name: str, slices: Slices) -> Tensor:
        return self._tensors[name][slices].clone()


def load_pickled(path: Path) -> dict[str, Tensor]:
    """Load the tensors of a `.pth`, memory-mapped where its format allows; nothing in it is ever executed."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except UNREADABLE as fault:  # torch advises to run what the file says, which is not passed on
        if called := _CALLED.search(str(fault)):
            reason = f"it would run {called[1]}, which is never done"
            raise UserError(f"{path} does not hold plain weights: {reason}; get them as safetensors") from fault
        raise UserError(f"{path} does not hold plain weights, or is damaged; download it again") from fault
    for holder in ("state_dict", "module"):
        if isinstance(state, dict) and isinstance(state.get(holder), dict):
            state = state[holder]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"{path} does not hold a plain dictionary of tensors; convert it to safetensors")
    return state


def _weight_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path]
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if (folder / _INDEX).exists():
        index = read_json(folder / _INDEX)
        with naming_damage(folder / _INDEX):
            files = [folder / name for name in sorted(set(index["weight_map"].values()))]
        absent = [file.name for file in files if not file.exists()]
        if absent:
            raise UserError(f"{folder / _INDEX} names files that are not there: {_listing(absent)}; download them")
        return files
    files = sorted(folder.glob(_SHARDS)) or sorted(folder.glob(_PICKLED))
    if not files:
        raise UserError(
            f"{folder} holds no {_SHARDS}: model.path must be a model in diffusers' layout or in the original one"
        )
    return files


def as_stored(names: Iterable[str]) -> dict[str, str]:
    """Leave names as they are in a file: for what is no transformer, or to tell whose it is."""
    return {name: name for name in names}


class WeightSource:
    """Tensors by internal name, read when asked for and counted in `bytes_read`.

    part: the folder or file in `path` that holds them, where that is not a pipeline's one transformer.
    """

    def __init__(self, path: str | Path, names: Names, *, part: str = "") -> None:
        parts = (part, f"{part}/*") if part else ("config.json", "transformer/*", _INDEX, _SHARDS, _PICKLED)
        self.path = resolve(path, only=parts) / part
        self.bytes_read = 0
        self._file_of: dict[str, _File] = {}
        self._stored_shape: dict[str, tuple[int, ...]] = {}
        for file_path in _weight_files(self.path):
            file = _Safetensors(file_path) if file_path.suffix == ".safetensors" else _Pickled(file_path)
            for name, shape in file.shapes().items():
                self._file_of[name] = file
                self._stored_shape[name] = shape
        packed = [name for name in self._file_of if name.startswith(PACKED_PREFIX)]  # beside a VAE's, say
        plain = {name.removeprefix(PACKED_PREFIX): name for name in packed or self._file_of}
        self._scaled = _MARKER in plain or _MARKER in self._file_of
        weights = [name for name in plain if name != _MARKER and not name.endswith(_HELPER_SUFFIXES)]
        self._stored = {
            internal: [part._replace(name=plain[part.name]) for part in pieces(name)]
            for internal, name in names(weights).items()
        }

    def names(self) -> tuple[str, ...]:
        return tuple(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        first, *others = shapes = [self._stored_shape[part.name] for part in self._stored[name]]
        if not others:
            return first
        rows = (part.rows(shape[0]) for part, shape in zip(self._stored[name], shapes, strict=True))
        return sum(part.stop - part.start for part in rows), *first[1:]

    def read(self, name: str) -> Tensor:
        return self.read_slice(name, ())

    def read_slice(self, name: str, slices: Slices) -> Tensor:
        """Read the slice alone from the disk; a quantized file's scale is multiplied back."""
        parts = self._stored[name]
        if len(parts) == 1:
            return self._read_scaled(name, parts[0].name, slices)
        rows, *rest = slices or (slice(None),)
        start, stop, _ = rows.indices(self.shape(name)[0])
        found, before = [], 0
        for part in parts:
            own = part.rows(self._stored_shape[part.name][0])
            first, last = own.start + max(start - before, 0), min(own.start + stop - before, own.stop)
            if first < last:
                found.append(self._read_scaled(name, part.name, (slice(first, last), *rest)))
            before += own.stop - own.start
        return torch.cat(found)

    def _read_scaled(self, name: str, stored: str, slices: Slices) -> Tensor:
        piece = self._read(stored, slices)
        scale = self._scale(stored, slices)
        if scale is not None:
            return piece.float() * scale
        if not piece.is_floating_point() or (self._scaled and piece.itemsize == 1):
            raise UserError(
                f"{self.path}: {name} is quantized ({piece.dtype}) without a scale that we know; "
                "use the bf16, fp16 or fp8_scaled file of this model"
            )
        return piece

    def _read(self, stored: str, slices: Slices) -> Tensor:
        piece = self._file_of[stored].read(stored, slices)
        self.bytes_read += piece.numel() * piece.itemsize
        return piece

    def _scale(self, stored: str, slices: Slices) -> Tensor | None:
        """Read the factor of a quantized weight's slice: one number, or one a row."""
        module, _, leaf = stored.rpartition(".")
        found = [module + suffix for suffix in _SCALE_SUFFIXES if module + suffix in self._file_of]
        if leaf != "weight" or not found:
            return None
        self._check_quantization(module)
        scale = self._read(found[0], ()).float()
        rows, dims = self._stored_shape[stored][0], len(self._stored_shape[stored])
        if scale.numel() == 1:
            return scale.reshape(())
        if scale.numel() != rows or scale.shape[0] != rows:
            raise UserError(f"{self.path}: {found[0]} scales blocks, which we cannot read; use the bf16 file instead")
        return scale.reshape(rows, *[1] * (dims - 1))[slices[:1]]

    def _check_quantization(self, module: str) -> None:
        """Refuse a number format, named beside the weight in newer files, that is not plain fp8."""
        if f"{module}.comfy_quant" not in self._file_of:
            return
        described = json.loads(bytes(self._read(f"{module}.comfy_quant", ()).tolist()))
        if described.get("format") not in ("float8_e4m3fn", "float8_e5m2"):
            raise UserError(f"{self.path}: {module} is stored as {described.get('format')}; use the bf16 or fp8 file")


class Readable(Protocol):
    """The methods that `load_weights` calls on a source, so that a source may be wrapped."""

    path: Path

    def names(self) -> tuple[str, ...]: ...
    def shape(self, name: str) -> tuple[int, ...]: ...
    def read_slice(self, name: str, slices: Slices) -> Tensor: ...


def load_weights(model: Backbone, source: Readable, *, device: torch.device | None = None) -> None:
    """Fill every base parameter of a model, a stage or a shard of one, reading only the slice that this rank keeps.

    A linear that is quantized (by its shapes, on meta) is read in its rows and quantized here, row by row, one linear
    after the other, on `device`: a GPU takes seconds where a CPU takes minutes, also for weights that wait on the CPU.
    """
    parameters = _base_parameters(model)
    _check_fit(model, parameters, source)
    with torch.no_grad():
        for name, parameter in parameters.items():
            own = local(parameter)
            assert not own.is_meta, f"{name} has no memory yet: to_empty comes before load_weights"
            if not own.numel():
                continue
            piece = source.read_slice(name, local_slices(parameter))
            linear = model.get_submodule(name.rpartition(".")[0])
            if isinstance(linear, Linear) and linear.quantized and name.endswith(".weight"):
                data, scale = quantize_weight(piece.to(device or own.device), linear.quantized)
                own.copy_(data)
                local(linear.weight_scale).copy_(scale)
            else:
                own.copy_(piece)


def _base_parameters(model: nn.Module) -> dict[str, Tensor]:
    """List what a base's file must give, by its name there: a quantized weight counts as the weight it was."""
    return {
        name.replace(".weight_data", ".weight"): parameter
        for name, parameter in model.named_parameters()
        if not is_adapter(name) and not name.endswith((".weight_scale", ".weight_norm"))
    }


def _check_fit(model: Backbone, parameters: Mapping[str, Tensor], source: Readable) -> None:
    stored = set(source.names())
    missing = [name for name in parameters if name not in stored]
    unexpected = [name for name in sorted(stored - set(parameters)) if not _lives_elsewhere(model, name)]
    misshapen = [
        f"{name} {list(source.shape(name))} for {list(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in stored and source.shape(name) != tuple(parameter.shape)
    ]
    faults = [("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen)]
    found = [f"{len(names)} {kind}: {_listing(names)}" for kind, names in faults if names]
    if found:
        raise UserError(f"{source.path} does not fit the model: {'; '.join(found)}")


def _lives_elsewhere(model: Backbone, name: str) -> bool:
    """Tell whether a weight belongs to a part that the model has given to another stage."""
    part, _, rest = name.partition(".")
    if part == "blocks":
        index = rest.partition(".")[0]
        return index not in model.blocks and (model.embed is None or model.head is None)
    return part in ("embed", "head") and getattr(model, part) is None


def _listing(names: Sequence[Any]) -> str:
    return ", ".join(map(str, names[:_LISTED])) + (", …" if len(names) > _LISTED else "")
