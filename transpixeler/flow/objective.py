"""Define what the model learns: noise, timesteps, tasks and the weights of the loss, as pure functions.

In: packed latents, fields and who they are (seed, step, sample ids, places in the global batch). Out: an `Example`.
Nothing depends on the layout, the number of workers or earlier calls, so every layout and every resume sees the same.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config import ObjectiveConfig, UserError
from transpixeler.models.streams import StreamLayout

Fields = Mapping[str, Tensor]  # by name, in the order in which the model takes them


@dataclass(frozen=True)
class Example:
    """One rank's share of a step, ready for forward and backward."""

    layout: StreamLayout
    latents: Tensor  # [b, N]
    noise: Tensor  # [b, N]
    timesteps: Tensor  # [b, G] in [0, 1]; 0 for a time group that is given
    fields: Fields  # what the model is conditioned on, [b, …] each
    weights: Tensor  # [b, G]: what each time group's mean squared error adds to the loss of the global batch

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Return the same example of changed tensors."""
        return Example(
            layout=self.layout,
            latents=change(self.latents),
            noise=change(self.noise),
            timesteps=change(self.timesteps),
            fields={name: change(value) for name, value in self.fields.items()},
            weights=change(self.weights),
        )

    def to(self, device: torch.device) -> Example:
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Example:
        """Return it in host memory that a GPU reads beside its work."""
        return self.map(lambda tensor: tensor if tensor.is_pinned() else tensor.pin_memory())

    def rows(self, rows: slice) -> Example:
        """Return some of its samples."""
        return self.map(lambda tensor: tensor[rows])

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Return the model's inputs besides the noisy latents."""
        return (self.timesteps, *self.fields.values())

    def noisy(self) -> Tensor:
        """x_t = (1 − t)·x + t·ε, [b, N] in fp32."""
        return torch.lerp(self.latents.float(), self.noise.float(), self.layout.spread(self.timesteps))

    def velocity(self) -> Tensor:
        """Return the target ε − x, [b, N] in fp32."""
        return self.noise.float() - self.latents.float()


def mean_squared_errors(predicted: Tensor, velocity: Tensor, layout: StreamLayout) -> Tensor:
    """[b, N] twice → [b, G], each time group's mean over its elements, in fp32."""
    squares = (predicted.float() - velocity.float()).square()
    return torch.stack([part.mean(1) for part in layout.split_groups(squares)], dim=1)


def by_stream(errors: Tensor, free: Tensor, layout: StreamLayout) -> tuple[Tensor, Tensor]:
    """Return each stream's error over what is free (not given) of it, and whether anything is: [b, G] → [b, S]."""
    if not layout.cuts:
        return errors, free
    sizes = free * torch.tensor(layout.group_sizes, dtype=errors.dtype, device=errors.device)
    places = [layout.groups_of(stream) for stream in range(len(layout.names))]
    counts = torch.stack([sizes[:, place.start : place.stop].sum(1) for place in places], dim=1)
    sums = torch.stack([(sizes * errors)[:, place.start : place.stop].sum(1) for place in places], dim=1)
    return sums / counts.clamp(min=1), (counts > 0).to(free.dtype)


# --- draws -----------------------------------------------------------------------------------------------------------


def generator(*key: object) -> torch.Generator:
    """Make a generator that is a pure function of its key."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw_noise(elements: int, *key: object) -> Tensor:
    """[N] standard normal on the CPU, so that every kind of device trains on the same noise."""
    return torch.randn(elements, generator=generator("noise", *key))


def draw_times(config: ObjectiveConfig, *, seed: int, step: int, slots: Sequence[int], batch: int) -> Tensor:
    """[b] in [t_min, t_max]: the given places of a global batch, one from each of its equal strata."""
    strata = torch.randperm(batch, generator=generator("strata", seed, step))
    offsets = torch.rand(batch, generator=generator("times", seed, step), dtype=torch.float64)
    uniform = (strata + offsets) / batch if config.stratified else offsets
    return quantile(config, uniform[list(slots)]).float()


def quantile(config: ObjectiveConfig, uniform: Tensor) -> Tensor:
    """Invert the density's distribution, cut to [t_min, t_max] without piling up at its ends."""
    low, high = (_distribution(config, t) for t in (config.t_min, config.t_max))
    u = low + uniform.double() * (high - low)
    t = (
        u
        if config.density == "uniform"
        else torch.sigmoid(config.logit_mean + config.logit_std * torch.special.ndtri(u))
    )
    shifted = config.shift * t / (1 + (config.shift - 1) * t)
    return shifted.clamp(config.t_min, config.t_max)


def _distribution(config: ObjectiveConfig, t: float) -> float:
    """Return the share of the density that lies below t."""
    t = t / (config.shift - (config.shift - 1) * t)
    if config.density == "uniform" or t in (0.0, 1.0):
        return t
    z = (math.log(t / (1 - t)) - config.logit_mean) / config.logit_std
    return 0.5 * (1 + math.erf(z / math.sqrt(2)))


# --- tasks -----------------------------------------------------------------------------------------------------------


def tasks(streams: Sequence[str]) -> dict[str, frozenset[int]]:
    """Every task of these streams: its name and the streams that are given clean."""
    known = {"joint": frozenset()}
    if len(streams) > 1:
        known |= {f"{streams[0]}_to_aux": frozenset({0}), f"aux_to_{streams[0]}": frozenset(range(1, len(streams)))}
    if len(streams) > 2:
        known |= {f"{name}_to_rest": frozenset({i}) for i, name in enumerate(streams)}
    return known


def check_tasks(config: ObjectiveConfig, streams: Sequence[str]) -> None:
    for name in config.tasks:
        if name not in tasks(streams):
            raise UserError(
                f"objective.tasks.{name}: not a task of these streams; there are {', '.join(tasks(streams))}"
            )


def draw_task(weights: Mapping[str, float], *key: object) -> str:
    names = sorted(name for name, weight in weights.items() if weight > 0)
    if len(names) == 1:
        return names[0]
    chances = torch.tensor([weights[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(chances, 1, generator=generator("task", *key)))]


def loss_weights(
    config: ObjectiveConfig, streams: Sequence[str], given: Sequence[frozenset[int]], batch: int
) -> Tensor:
    """[b, S]: a given stream counts nothing; each sample counts 1/batch, shared by its streams' weights."""
    weights = torch.tensor([config.stream_weights.get(name, 1.0) for name in streams]).repeat(len(given), 1)
    for row, streams_given in enumerate(given):
        weights[row, sorted(streams_given)] = 0
    total = weights.sum(1, keepdim=True)
    return torch.where(total > 0, weights / total.clamp(min=1e-12), 0.0) / batch


def group_weights(weights: Tensor, layout: StreamLayout) -> Tensor:
    """[b, S] → [b, G]: a stream's weight, shared by its time groups as they share its elements."""
    if not layout.cuts:
        return weights
    shares = [size / layout.sizes[group.stream] for size, group in zip(layout.group_sizes, layout.groups)]
    return weights[:, [group.stream for group in layout.groups]] * torch.tensor(shares)


# --- together --------------------------------------------------------------------------------------------------------


def prepare(
    config: ObjectiveConfig,
    *,
    seed: int,
    step: int,
    layout: StreamLayout,
    latents: Tensor,
    fields: Fields,
    empty: Fields,
    ids: Sequence[str],
    slots: Sequence[int],
    batch: int,
) -> Example:
    """Draw for the samples `ids` at `slots` of a global batch of `batch`; `empty`: an empty caption's fields."""
    keys = [(seed, step, sample, slot) for sample, slot in zip(ids, slots, strict=True)]
    known = tasks(layout.names)
    given = [known[draw_task(config.tasks, *key)] for key in keys]
    noise = torch.stack([draw_noise(layout.elements, *key) for key in keys])
    times = draw_times(config, seed=seed, step=step, slots=slots, batch=batch)[:, None].repeat(1, len(layout.groups))
    for row, streams in enumerate(given):
        times[row, [place for stream in streams for place in layout.groups_of(stream)]] = 0
    dropped = [float(torch.rand((), generator=generator("caption", *key))) < config.caption_dropout for key in keys]
    if any(dropped):
        rows = torch.tensor(dropped)
        fields = {name: _replaced(value, rows, empty[name]) for name, value in fields.items()}
    weights = group_weights(loss_weights(config, layout.names, given, batch), layout)
    return Example(layout, latents, noise, times, fields, weights)


def _replaced(value: Tensor, rows: Tensor, by: Tensor) -> Tensor:
    value = value.clone()
    value[rows] = by.to(value.dtype)
    return value
