"""Write RUN/manifest.json: the versions, code, machine and facts that a run was made from, to be read years later."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from transpixeler.files import write_text
from transpixeler.runs.folder import MANIFEST


def write_manifest(run: Path, **facts: Any) -> None:
    """Write what made the run: versions, code, machine, and the given facts of data, model and layout."""
    packages = ["transpixeler", "torch", "diffusers", "transformers", "safetensors", "torchao", "av"]
    manifest = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "git": _commit(),
        "machine": {
            "host": platform.node(),
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        },
        "command": sys.argv,
        **facts,
    }
    write_text(run / MANIFEST, json.dumps(manifest, indent=1))


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Return the commit of this code where it is a git checkout; an installed package has none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None
