"""Read a checkpoint's `.metadata` without running anything that it names.

torch writes `.metadata` as a pickle, which can call any function when it is loaded. The manifest's hashes are no help:
who wrote the one wrote the other. In: the folder of a checkpoint. Out: torch's `Metadata`, rebuilt from checked values.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    STORAGE_TYPES,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from transpixeler.runs.checkpoint import METADATA, CheckpointFault, ListedFile, read_manifest

_METADATA = "torch.distributed.checkpoint.metadata"
# All that the metadata of plain tensors names. Whole names, not prefixes: torch's modules import `os`. No
# BytesStorageMetadata: torch would unpickle the entry's content without any check.
_STOOD_IN_FOR = {
    (_METADATA, "Metadata"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("pathlib", "PosixPath"),
    ("pathlib._local", "PosixPath"),  # Python 3.13
}
_DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}


class _StandIn:
    """Takes the place of a class or function that the pickle names, and keeps what it is given without acting on it."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Unpickles stand-ins and dtypes; every other name is an error."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _STOOD_IN_FOR:
            return type(name, (_StandIn,), {})  # a new class each time: what a pickle does to it harms nobody
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        raise CheckpointFault(f"{METADATA} names {module}.{name}, which no checkpoint of ours does")


class CheckedReader(FileSystemReader):
    """Reads tensors by metadata that was checked, instead of unpickling the file again."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._checked = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the checked metadata."""
        return self._checked


def read_metadata(folder: Path) -> Metadata:
    """Return the metadata of a checkpoint; raise `CheckpointFault` unless it describes tensors in listed files."""
    files = read_manifest(folder)
    if METADATA not in files:
        raise CheckpointFault(f"the manifest does not list {METADATA}")
    try:
        return _metadata(_Unpickler(io.BytesIO((folder / METADATA).read_bytes())).load(), files)
    except CheckpointFault:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointFault(f"{METADATA} cannot be read: {type(error).__name__}: {error}") from error


def _metadata(found: object, files: Mapping[str, ListedFile]) -> Metadata:
    state = _state(found, "Metadata")
    tensors: dict[str, STORAGE_TYPES] = {
        _text(name): _tensor(entry) for name, entry in _table(state["state_dict_metadata"]).items()
    }
    places = {_index(index): _place(place, files) for index, place in _table(state["storage_data"]).items()}
    return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(), version=state.get("version"))


def _tensor(found: object) -> TensorStorageMetadata:
    state = _state(found, "TensorStorageMetadata")
    dtype = _instance(state["properties"], "TensorProperties").state[0]
    if not isinstance(dtype, torch.dtype):
        raise CheckpointFault(f"{METADATA}: {dtype!r} is not a dtype")
    chunks = [_chunk(chunk) for chunk in _list(state["chunks"])]
    return TensorStorageMetadata(TensorProperties(dtype), _size(state["size"]), chunks)


def _chunk(found: object) -> ChunkStorageMetadata:
    state = _state(found, "ChunkStorageMetadata")
    return ChunkStorageMetadata(_size(state["offsets"]), _size(state["sizes"]))


def _index(found: object) -> MetadataIndex:
    state = _state(found, "MetadataIndex")
    index = state.get("index")
    return MetadataIndex(_text(state["fqn"]), _size(state["offset"]), None if index is None else _count(index))


def _place(found: object, files: Mapping[str, ListedFile]) -> _StorageInfo:
    state = _state(found, "_StorageInfo")
    name, offset, length = _text(state["relative_path"]), _count(state["offset"]), _count(state["length"])
    if name not in files:
        raise CheckpointFault(f"{METADATA} reads {name!r}, which the manifest does not list")
    if offset + length > files[name].size:
        raise CheckpointFault(f"{METADATA} reads beyond the end of {name}")
    if state.get("transform_descriptors"):
        raise CheckpointFault(f"{METADATA}: {name} is transformed, which no checkpoint of ours is")
    return _StorageInfo(name, offset, length)


# --- values ----------------------------------------------------------------------------------------------------------


def _instance(found: object, name: str) -> _StandIn:
    if not isinstance(found, _StandIn) or type(found).__name__ != name:
        raise CheckpointFault(f"{METADATA}: found {type(found).__name__} instead of {name}")
    return found


def _state(found: object, name: str) -> dict[Any, Any]:
    return _table(_instance(found, name).state)


def _table(found: object) -> dict[Any, Any]:
    if not isinstance(found, dict):
        raise CheckpointFault(f"{METADATA}: found {type(found).__name__} instead of a table")
    return found


def _list(found: object) -> list[Any]:
    if not isinstance(found, list):
        raise CheckpointFault(f"{METADATA}: found {type(found).__name__} instead of a list")
    return found


def _text(found: object) -> str:
    if not isinstance(found, str):
        raise CheckpointFault(f"{METADATA}: found {type(found).__name__} instead of text")
    return found


def _count(found: object) -> int:
    if not isinstance(found, int) or found < 0:
        raise CheckpointFault(f"{METADATA}: {found!r} is not a count")
    return found


def _size(found: object) -> torch.Size:
    (numbers,) = _instance(found, "Size").arguments
    return torch.Size(_count(number) for number in numbers)
