"""Share what the encoders of all families do alike: hash the files that a result depends on, and give the same bits.

In: a model's folder. Out: the fingerprint under which latents or texts are cached.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from transpixeler.models.family import Digest

_READ = (".safetensors", ".bin", ".pth", ".json", ".model")


def fingerprint(folder: Path, patterns: Sequence[str], digest: Digest) -> str:
    """Hash the names and contents of the files that match, without loading a weight."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.suffix in _READ)
    lines = [f"{path.relative_to(folder)} {digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@contextmanager
def same_bits_every_time() -> Iterator[None]:
    """Keep convolution kernels from being picked by timing, else two runs would cache different latents."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield
