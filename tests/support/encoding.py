"""Small data sets to encode with the demo's encoders, and what the cache then holds."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.cache.records import Cache
from transpixeler.data.dataset import Datasets
from transpixeler.data.encode import encode_missing
from transpixeler.data.media.write import write_mp4, write_png
from transpixeler.families.wan import encoders
from transpixeler.families.wan.encoders import WanTextEncoder, WanVae
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime

ALONE = Runtime(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def picture(seed: int) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)


def write_pair(folder: Path, name: str, seed: int, *, frames: int = 1, caption: str | None = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for suffix, offset in (("", 0), ("_seg", 1000)):
        if frames == 1:
            write_png(folder / f"{name}{suffix}.png", picture(seed + offset))
        else:
            film = [picture(seed + offset + 100_000 * frame) for frame in range(frames)]
            write_mp4(folder / f"{name}{suffix}.mp4", film, fps=Fraction(16))
    (folder / f"{name}.txt").write_text(f"picture number {seed}" if caption is None else caption)


def write_pairs(folder: Path, count: int = 6) -> None:
    for number in range(count):
        write_pair(folder, f"{number:03d}", number, frames=5 if number % 3 == 2 else 1)


def config(model: Path, train: Path, *more: str) -> Config:
    return loading.from_overrides(
        [
            f"model.path={model}",
            f"data.train={train}",
            "data.resolutions=[32]",
            "data.aspect_ratios=[1.0]",
            "data.frames=[1,5]",
            "train.global_batch=2",
            *more,
        ]
    )


class Counted:
    """What the real encoders were asked for, and how often they were loaded."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.videos, self.texts, self.loads = 0, [], []
        encode_video, encode_text = WanVae.encode, WanTextEncoder.encode
        load_vae, load_text = encoders.load_vae, encoders.load_text_encoder

        def videos(vae: WanVae, video: torch.Tensor) -> torch.Tensor:
            self.videos += len(video)
            return encode_video(vae, video)

        def texts(encoder: WanTextEncoder, captions: Sequence[str]) -> list[torch.Tensor]:
            self.texts += captions
            return encode_text(encoder, captions)

        monkeypatch.setattr(WanVae, "encode", videos)
        monkeypatch.setattr(WanTextEncoder, "encode", texts)
        monkeypatch.setattr(encoders, "load_vae", lambda *a, **k: self.loads.append("vae") or load_vae(*a, **k))
        monkeypatch.setattr(
            encoders, "load_text_encoder", lambda *a, **k: self.loads.append("text") or load_text(*a, **k)
        )

    def reset(self) -> None:
        self.videos, self.texts, self.loads = 0, [], []


def run(config: Config) -> Datasets:
    return encode_missing(config, open_model(config.model), ALONE)


def records(cache: Cache) -> dict[bytes, bytes]:
    """Every record's bytes by its key; a key that is there twice fails."""
    found = {}
    for number, file in enumerate(cache.table.files):
        for row in np.flatnonzero(file.valid):
            cache.verify(number, int(row))
            key = file.rows[row]["key"].tobytes()
            assert key not in found, "encoded twice"
            found[key] = cache.view(number, int(row)).flatten().view(torch.uint8).numpy().tobytes()
    return found
