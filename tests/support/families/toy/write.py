"""Write a toy model of random weights to disk."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from safetensors.torch import save_file
from transpixeler.families.toy.codec import TEXT_FILE, VAE_FILE
from transpixeler.families.toy.config import CLASS, ToyConfig
from transpixeler.families.toy.model import ToyModel
from transpixeler.families.toy.names import NAMES

from tests.support.models import move

WEIGHTS = "diffusion_pytorch_model.safetensors"


def write_toy(folder: Path, *, spelling: str = "original", seed: int = 0) -> None:
    """spelling: of the weights' names, original or diffusers."""
    folder.mkdir(parents=True, exist_ok=True)
    config = ToyConfig()
    model = ToyModel(config, streams=("rgb",))
    move(model, seed=seed)
    state = {NAMES.parameter(name, source="internal", to=spelling): value for name, value in model.state_dict().items()}
    save_file(state, folder / WEIGHTS)
    (folder / "config.json").write_text(json.dumps({"_class_name": CLASS, **asdict(config)}))
    (folder / VAE_FILE).write_text(json.dumps({"scale": 2.0}))
    (folder / TEXT_FILE).write_text(json.dumps({"seed": 1}))
