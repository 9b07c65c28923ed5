"""Open safetensors files, and write ones whose bytes depend only on their content: identical runs, identical files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from transpixeler.config.sections import UserError

LENGTH_BYTES = 8  # the header's length, before the header
_ENTRY_BYTES = 256  # a tensor's type, shape and offsets in the header take less
_TYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


def open_tensors(file: Path) -> tuple[Any, dict[str, str]]:
    """Open a file to read tensors by name; return it with its header metadata."""
    try:
        handle = safe_open(file, framework="pt", device="cpu")
    except SafetensorError as fault:
        raise UserError(f"{file} is not a whole safetensors file ({fault}); copy or download it again") from fault
    return handle, handle.metadata() or {}


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and header metadata to a new file."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    _sort_metadata(path)


def stream_tensors(
    state: Iterable[tuple[str, Tensor]], path: Path, *, names: Sequence[str], metadata: Mapping[str, str]
) -> None:
    """Write a file of any size with one tensor in memory at a time; `names` are those that will come.

    Types and shapes are known only when a tensor comes: room for the header is kept, and filled at the end.
    """
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))}
    longest = len(_encoded(header | {name: {} for name in names})) + _ENTRY_BYTES * len(names)
    length = -longest % 8 + longest  # the data is aligned to eight bytes
    with path.open("wb") as file:
        file.seek(LENGTH_BYTES + length)
        end = 0
        for name, tensor in state:
            whole = tensor.detach().cpu().contiguous()
            begin, end = end, end + whole.nbytes
            header[name] = {"dtype": _TYPES[whole.dtype], "shape": list(whole.shape), "data_offsets": [begin, end]}
            file.write(whole.reshape(-1).view(torch.uint8).numpy().data)
        text = _encoded(header)
        assert len(text) <= length, "more tensors came than were named"
        file.seek(0)
        file.write(length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length))


def _encoded(header: Mapping[str, Any]) -> bytes:
    return json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, in place: safetensors writes it in the random order of a hash map."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = _encoded(header)
        assert len(text) <= length, "another order is no longer"
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))  # the format pads a header with spaces
