"""Write safetensors files whose bytes depend only on their content: identical runs give identical files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

LENGTH_BYTES = 8  # the header's length, before the header


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors and header metadata to a new file."""
    save_file(dict(tensors), path, metadata=dict(metadata))
    _sort_metadata(path)


def _sort_metadata(path: Path) -> None:
    """Put the metadata in order, in place: safetensors writes it in the random order of a hash map."""
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(LENGTH_BYTES), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(header.get("__metadata__", {}).items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= length, "another order is no longer"
        file.seek(LENGTH_BYTES)
        file.write(text.ljust(length))  # the format pads a header with spaces
