"""Define what the model learns: noise, timesteps, tasks, dropped captions and weights of the loss, as pure functions.

In: packed latents, fields and who they are (seed, step, sample ids, places in the global batch). Out: an `Example`.
Nothing depends on the layout, the number of workers or earlier calls, so every layout and every resume sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig
from transpixeler.flow.draws import draw_noise, draw_times, generator
from transpixeler.flow.tasks import Task, draw_task, layout_for, narrowed, tasks, tasks_of_step, with_every_drawn
from transpixeler.models.conditions import Shown, shows_stills
from transpixeler.models.family import length_of
from transpixeler.models.noising import RECTIFIED, Noising
from transpixeler.models.streams import StreamLayout

Fields = Mapping[str, Tensor]  # by name, in the order in which the model takes them
Keys = Sequence[tuple[object, ...]]  # what each sample's draws are a function of
FIRST_FRAME_NOISE = (-3.5, 0.5)  # mean and deviation of the amount's logarithm


@dataclass(frozen=True)
class Example:
    """One rank's share of a step, ready for forward and backward."""

    layout: StreamLayout
    latents: Tensor  # [b, N], or the end of the way that the model makes of them
    noise: Tensor  # [b, N], likewise
    timesteps: Tensor  # [b, G] in [0, 1], places on the way; 0 for a time group that is given
    fields: Fields  # what the model is conditioned on, [b, …] each
    weights: Tensor  # [b, G]: what each time group's mean error adds to the loss of the global batch
    expert: str = ""  # that the step trains
    noising: Noising = RECTIFIED  # what is learned between latents and noise

    def map(self, change: Callable[[Tensor], Tensor]) -> Example:
        """Return the same example of changed tensors."""
        return replace(
            self,
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
        return (self.noising.told(self.timesteps), *self.fields.values())

    def noisy(self) -> Tensor:
        """Return what the model is shown, [b, N] in fp32."""
        return self.noising.noisy(self.latents, self.noise, self.timesteps, self.layout)

    def target(self) -> Tensor:
        """Return what it is to predict, [b, N] in fp32."""
        return self.noising.target(self.latents, self.noise, self.timesteps, self.layout)


def by_stream(errors: Tensor, free: Tensor, layout: StreamLayout) -> tuple[Tensor, Tensor]:
    """Return each stream's error over what is free (not given) of it, and whether anything is: [b, G] → [b, S]."""
    if layout.whole:
        return errors, free
    sizes = free * torch.tensor(layout.group_sizes, dtype=errors.dtype, device=errors.device)
    places = [layout.groups_of(stream) for stream in range(len(layout.names))]
    counts = torch.stack([sizes[:, place.start : place.stop].sum(1) for place in places], dim=1)
    sums = torch.stack([(sizes * errors)[:, place.start : place.stop].sum(1) for place in places], dim=1)
    return sums / counts.clamp(min=1), (counts > 0).to(free.dtype)


# --- losses and draws ------------------------------------------------------------------------------------------------


def loss_weights(config: ObjectiveConfig, layout: StreamLayout, free: Tensor, batch: int) -> Tensor:
    """Share 1/batch of the loss out over the time groups of each sample that are free, not given: [b, G] → [b, G].

    Streams share it by their weights, and the free groups of a stream as they share its elements.
    """
    stream_of = torch.tensor([group.stream for group in layout.groups])
    sizes = free * torch.tensor(layout.group_sizes)
    counts = torch.zeros(len(free), len(layout.names)).index_add_(1, stream_of, sizes)  # elements that are free
    weights = torch.tensor([config.stream_weights.get(name, 1.0) for name in layout.names]) * (counts > 0)
    total = weights.sum(1, keepdim=True)
    weights = torch.where(total > 0, weights / total.clamp(min=1e-12), 0.0) / batch
    return weights if layout.whole else weights[:, stream_of] * sizes / counts.clamp(min=1)[:, stream_of]


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
    shift: float,
    unseen: Fields | None = None,
    shown: Shown | None = None,
    expert: str = "",
    noising: Noising = RECTIFIED,
) -> Example:
    """Draw for the samples `ids` at `slots` of a global batch of `batch`; `empty`: an empty caption's fields.

    unseen: the fields of captions that are read beside no picture, where others are read beside the first frame.
    shown: what the samples can be shown of given frames, where a model takes that in channels. expert: that the step
    trains; the config's limits are its own. noising: of the model.
    """
    keys = [(seed, step, sample, slot) for sample, slot in zip(ids, slots, strict=True)]
    config = with_every_drawn(config, seed=seed, step=step)
    stills = shown is not None and shows_stills(shown.fields)
    noising = noising.of_step(seed, step)
    known = tasks(layout.names, config, shows=shown is not None, stills=stills)
    weights = tasks_of_step(config, layout.names, seed=seed, step=step, shows=shown is not None)
    read, layout = layout, layout_for([known[name] for name in weights], layout)
    latents = narrowed(latents, read, layout)
    drawn = [known[draw_task(weights, *key)] for key in keys]
    noise = torch.stack([draw_noise(layout.elements, *key) for key in keys])
    latents = with_noisy_firsts(config, latents, noise, layout, drawn, keys)
    times = noising.times(draw_times(config, seed=seed, step=step, slots=slots, batch=batch, shift=shift))
    times, free = given_at_zero(times, layout, drawn)
    fields = conditions(config, told(fields, unseen, drawn, layout), empty, keys, drawn, layout, shown)
    ends = noising.ends(latents, noise, layout)
    return Example(layout, *ends, times, fields, loss_weights(config, layout, free, batch), expert, noising)


def conditions(
    config: ObjectiveConfig,
    fields: Fields,
    empty: Fields,
    keys: Keys,
    drawn: Sequence[Task],
    layout: StreamLayout,
    shown: Shown | None,
) -> Fields:
    """Return what the model is conditioned on: captions, some dropped, what is shown of given frames, and the focus."""
    fields = with_dropped_captions(config, fields, empty, keys)
    if shown is not None:
        firsts, lasts = [task.shown for task in drawn], [task.shown_last for task in drawn]
        fields = {**fields, **shown.values(layout, firsts, lasts)}
    if config.focus_present:
        fields = {**fields, "focus": _dropped(config.focus_present, keys, kind="focus").float()}
    return fields


def given_at_zero(times: Tensor, layout: StreamLayout, drawn: Sequence[Task]) -> tuple[Tensor, Tensor]:
    """Return the times [b, G] of samples at times [b], where what is given is at 0, and 1 for what is free of them."""
    times = times[:, None].repeat(1, len(layout.groups))
    free = torch.ones_like(times)
    for row, task in enumerate(drawn):
        places = task.groups(layout)
        times[row, places] = free[row, places] = 0
    return times, free


def with_noisy_firsts(
    config: ObjectiveConfig, latents: Tensor, noise: Tensor, layout: StreamLayout, drawn: Sequence[Task], keys: Keys
) -> Tensor:
    """Return the latents [b, N] with a little noise on given first frames, in a share of the samples.

    The model is told that they are clean: it learns not to trust the last detail of an image that it is given.
    """
    if not config.first_frame_noise:
        return latents
    noisy = latents
    for row, (task, key) in enumerate(zip(drawn, keys, strict=True)):
        draws = generator("first frame", *key)
        if float(torch.rand((), generator=draws)) >= config.first_frame_noise:
            continue
        mean, deviation = FIRST_FRAME_NOISE
        amounts = torch.zeros(1, len(layout.groups))
        amounts[:, task.firsts(layout)] = (mean + deviation * torch.randn((), generator=draws)).exp().clamp(max=1)
        noisy = noisy.clone() if noisy is latents else noisy
        noisy[row] = torch.lerp(latents[row].float(), noise[row], layout.spread(amounts)[0]).to(latents.dtype)
    return noisy


def told(fields: Fields, unseen: Fields | None, drawn: Sequence[Task], layout: StreamLayout) -> Fields:
    """Return the captions' fields, those read beside no picture in samples whose first frame is not given."""
    if unseen is None:
        return fields
    video = layout.shapes[0][1] > layout.patch[0]
    rows = torch.tensor([not task.reveals(video=video) for task in drawn])
    return {
        name: torch.where(rows.view(-1, *[1] * (value.ndim - 1)), unseen[name], value) for name, value in fields.items()
    }


def with_dropped_captions(config: ObjectiveConfig, fields: Fields, empty: Fields, keys: Keys) -> Fields:
    """Return the fields with those of an empty caption in a share of the samples, for guidance.

    Where shares are given by field, each field is dropped by itself, a masked one with its lengths.
    """
    shares = config.caption_dropout
    if isinstance(shares, dict):
        rows = {name: _dropped(share, keys, name) for name, share in shares.items()}
        rows |= {length_of(name): dropped for name, dropped in rows.items() if length_of(name) in fields}
    else:
        rows = dict.fromkeys(fields, _dropped(shares, keys))
    return {name: _replaced(value, rows.get(name), empty.get(name)) for name, value in fields.items()}


def _dropped(share: float, keys: Keys, *field: str, kind: str = "caption") -> Tensor:
    """[b]: the samples whose caption, or one field of it, is dropped, or what else happens to a share of them."""
    return torch.tensor([float(torch.rand((), generator=generator(kind, *field, *key))) < share for key in keys])


def _replaced(value: Tensor, rows: Tensor | None, by: Tensor | None) -> Tensor:
    if rows is None or by is None or not rows.any():
        return value
    value = value.clone()
    value[rows] = by.to(value.dtype)
    return value
