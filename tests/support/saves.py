"""A save as training leaves it, and what is told the Hub of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from tests.support.models import move, tiny
from transpixeler.adapters import files as adapter_files
from transpixeler.adapters.on_model import adapter_of
from transpixeler.config import loading
from transpixeler.config.sections import Config, LoraConfig, ModelConfig
from transpixeler.models.lora import inject
from transpixeler.publishing import hub

BASE = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
TERMS = hub.Terms("me/flames", base=BASE)


def save_adapter(
    folder: Path, *, streams: int = 2, seed: int = 1, base: str = "/secret/place/wan", fused: tuple[str, ...] = ()
) -> Path:
    """A save as training leaves it."""
    model = tiny(streams)
    inject(model, LoraConfig(rank=4, scope="aux" if streams > 1 else "all"))
    move(model, seed=seed, names="lora")
    names = ("rgb", "seg")[:streams]
    metadata = {"base_model": base, "streams": ",".join(names), "fill": "keep", "step": "30", "ema": "false"}
    metadata |= {"fuse": json.dumps(fused)} if fused else {}
    adapter_files.write_adapter(adapter_of(model, metadata), folder)
    config = dataclasses.replace(
        Config(),
        model=ModelConfig(path=base, fuse=fused),
        streams=dict(zip(names, ("", "_seg"))),
        lora=LoraConfig(rank=4, scope="aux" if streams > 1 else "all"),
        output_dir="/secret/place/out",
    )
    (folder / "config.yaml").write_text(loading.dump(config))
    return folder


def contents(parcel: hub.Parcel) -> dict[str, bytes]:
    return {path: what if isinstance(what, bytes) else what.read_bytes() for path, what in parcel.files.items()}
