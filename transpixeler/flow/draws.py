"""Draw noise and timesteps, as pure functions of a key or of (seed, step, place in the global batch).

In: an objective's density, its limits and a shift. Out: tensors on the CPU, the same for every kind of device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig

Time = TypeVar("Time", float, Tensor)


def generator(*key: object) -> torch.Generator:
    """Make a generator that is a pure function of its key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(elements: int, *key: object) -> Tensor:
    """[N] standard normal on the CPU, so that every kind of device trains on the same noise."""
    return torch.randn(elements, generator=generator("noise", *key))


def draw_times(
    config: ObjectiveConfig, *, seed: int, step: int, slots: Sequence[int], batch: int, shift: float
) -> Tensor:
    """[b] in [t_min, t_max]: the given places of a global batch, one from each of its equal strata."""
    strata = torch.randperm(batch, generator=generator("strata", seed, step))
    offsets = torch.rand(batch, generator=generator("times", seed, step), dtype=torch.float64)
    uniform = (strata + offsets) / batch if config.stratified else offsets
    return quantile(config, uniform[list(slots)], shift=shift).float()


def quantile(config: ObjectiveConfig, uniform: Tensor, *, shift: float) -> Tensor:
    """Invert the density's distribution, cut to [t_min, t_max] without piling up at its ends."""
    low, high = (distribution(config, t, shift=shift) for t in (config.t_min, config.t_max))
    u = low + uniform.double() * (high - low)
    t = (
        u
        if config.density == "uniform"
        else torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    )
    return shifted(t, shift).clamp(config.t_min, config.t_max)


def shifted(t: Time, shift: float) -> Time:
    """Move times towards noise: t → shift·t / (1 + (shift − 1)·t)."""
    return shift * t / (1 + (shift - 1) * t)


def distribution(config: ObjectiveConfig, t: float, *, shift: float) -> float:
    """Return the share of the density that lies below t."""
    t = t / (shift - (shift - 1) * t)
    if config.density == "uniform" or t in (0.0, 1.0):
        return t
    z = (math.log(t / (1 - t)) - config.logit_mean) / config.logit_std
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))
