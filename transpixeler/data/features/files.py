"""Read files of features: a path in; its tensors by name, and what its header says, out.

Read are safetensors, pickles of plain tensors, and arrays of numpy; all are mapped, so that looking at shapes is cheap.
Nothing in them is ever executed.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.media.errors import BadMedia, as_bad_media

ENDINGS = (".safetensors", ".pt", ".pth", ".npy")
MASKS = ("mask", "attention_mask", "prompt_attention_mask")  # of text, as encoders of other programs name them
BESIDE = re.compile(r"(_last|_every\d+)$")  # ends the names of frames beside a stream's video, each encoded alone
NAMED = {"family", "scale"}  # what our own headers say; see `export`


@dataclass(frozen=True)
class Opened:
    """The tensors of one file, not yet read from disk, and the facts in its header."""

    path: Path
    tensors: Mapping[str, Tensor]
    facts: Mapping[str, str] = field(default_factory=dict)

    def pick(self, names: Sequence[str]) -> Tensor:
        """Return the first tensor that has one of these names, or the only one that could be meant."""
        for name in names:
            if name in self.tensors:
                return self.numbers(name)
        left = [name for name in self.tensors if name not in MASKS and not BESIDE.search(name)]
        if len(left) != 1:
            held = ", ".join(sorted(self.tensors)) or "no tensor"
            raise BadMedia(f"holds {held[:160]}; one tensor should be named {names[0]}")
        return self.numbers(left[0])

    def numbers(self, name: str) -> Tensor:
        """Return a tensor of floating-point numbers, each stored by itself."""
        tensor = self.tensors[name]
        if not _is_plain(tensor) or not tensor.is_floating_point():
            kind = f"{str(tensor.dtype).removeprefix('torch.')} values"
            raise BadMedia(f"holds {kind} in place of plain floating-point ones")
        return tensor.detach()

    def mask(self, names: Sequence[str]) -> Tensor | None:
        """Return the first tensor that has one of these names, [n], true where something is."""
        tensor = next((self.tensors[name] for name in names if name in self.tensors), None)
        if tensor is not None and not _is_plain(tensor):
            raise BadMedia("has a mask that is no plain tensor")
        return None if tensor is None else tensor.reshape(-1).bool()


@contextmanager
def old_formats() -> Iterator[None]:
    """Keep torch from warning of old formats, which are read all the same.

    What Python warns of is set for all threads at once: enter this where threads are started, never in one of them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "TypedStorage is deprecated", UserWarning)
        yield


def open_features(path: Path) -> Opened:
    """Open a file; raise `BadMedia` with the reason where it holds no plain tensors."""
    if not path.is_file():
        raise BadMedia("is a folder, not a file" if path.is_dir() else "does not exist")
    ending = path.suffix.lower()
    if ending not in ENDINGS:
        raise BadMedia(f"ends in {ending or 'nothing'}; features are read from {', '.join(ENDINGS)}")
    with as_bad_media():
        if ending == ".safetensors":
            return _safetensors(path)
        return Opened(path, _array(path) if ending == ".npy" else _pickled(path))


def _safetensors(path: Path) -> Opened:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            facts = {name: text for name, text in (file.metadata() or {}).items() if name in NAMED}
            return Opened(path, {name: file.get_tensor(name) for name in file.keys()}, facts)  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _array(path: Path) -> dict[str, Tensor]:
    array = np.load(path, mmap_mode="c", allow_pickle=False)  # "c": its pages are ours, as a tensor's must be
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise ValueError("it holds no plain array of numbers")
    return {"array": torch.from_numpy(array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("=")))}


def _pickled(path: Path) -> dict[str, Tensor]:
    try:
        held = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        raise BadMedia(
            "holds more than plain tensors, or is damaged; unpickling it could run code, so it is not read: save the "
            "tensors alone, best as safetensors"
        ) from error
    except (TypeError, AttributeError) as error:  # of a pickle that makes no sense
        raise ValueError(str(error)) from error
    return _tensors(held)


def _tensors(held: Any) -> dict[str, Tensor]:
    if isinstance(held, Tensor):
        return {"tensor": held}
    if isinstance(held, dict):
        return {str(name): value for name, value in held.items() if isinstance(value, Tensor)}
    raise BadMedia(f"holds a {type(held).__name__}; save a tensor, or a dict of tensors")


def _is_plain(tensor: Tensor) -> bool:
    """Tell whether all numbers lie in memory, each by itself: a small file may else stand for a large tensor."""
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return False
    return tensor.numel() * tensor.itemsize <= tensor.untyped_storage().nbytes()


def header(family: str) -> dict[str, str]:
    """Return what our own files say of themselves: whose latents and texts they hold, and that they are normalised."""
    return {"format": "transpixeler features 1", "family": family, "scale": "normalised"}


def row_of(**columns: str) -> str:
    """Return a manifest's line."""
    return json.dumps(columns, ensure_ascii=False) + "\n"
