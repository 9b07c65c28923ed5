"""The tiny Wan and a data set in memory, for tests of what trains: no files, no encoders, milliseconds a step."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any

import torch

from tests.support.models import wan_model
from tests.support.seeded import SeededSource
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.families.wan.model import WanModel
from transpixeler.flow import draws, objective
from transpixeler.models.streams import StreamLayout

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 4,
}
SHAPES = ((4, 1, 4, 4), (4, 2, 4, 6))  # of two buckets


def config(*overrides: str) -> Config:
    return loading.from_overrides(["lora.rank=4", "optim.name=sgd", "optim.lr=0.5", "optim.warmup_steps=0", *overrides])


def make(config: Config) -> WanModel:
    return wan_model(
        WAN,
        streams=tuple(config.streams),
        rgb_attends_aux=config.model.rgb_attends_aux,
        attention=config.model.attention,
    )


def seeded(config: Config) -> SeededSource:
    """Return base weights of the config's model."""
    return SeededSource(partial(make, config))


def example(config: Config, step: int, slots: range) -> objective.Example:
    """The share at `slots` of a step's global batch; buckets alternate."""
    layout = StreamLayout.equal(tuple(config.streams), SHAPES[step % 2], (1, 2, 2))
    ids = [f"sample{step}-{slot}" for slot in range(config.train.global_batch)]
    mine = [ids[slot] for slot in slots]
    latents = torch.stack([draws.draw_noise(layout.elements, "latents", name) for name in mine])
    text = torch.stack([torch.randn(512, 16, generator=draws.generator("text", name)) for name in mine])
    return objective.prepare(
        config.objective,
        seed=config.seed,
        step=step,
        layout=layout,
        latents=latents,
        fields={"text": text},
        empty={"text": torch.zeros(512, 16)},
        ids=mine,
        slots=slots,
        batch=config.train.global_batch,
        shift=1.0,
    )


def replace(config: Config, **sections: dict[str, Any]) -> Config:
    changed = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **changed)
