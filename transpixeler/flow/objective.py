"""Define what the model learns: noise, timesteps, tasks and the weights of the loss, as pure functions.

In: packed latents, fields and who they are (seed, step, sample ids, places in the global batch). Out: an `Example`.
Nothing depends on the layout, the number of workers or earlier calls, so every layout and every resume sees the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transpixeler.config.sections import Config, ObjectiveConfig, UserError
from transpixeler.flow.draws import draw_noise, draw_times, generator
from transpixeler.models.conditions import Shown, shows_frames, shows_stills
from transpixeler.models.family import Field, ModelFolder, caption_fields, length_of
from transpixeler.models.streams import StreamLayout

Fields = Mapping[str, Tensor]  # by name, in the order in which the model takes them
Keys = Sequence[tuple[object, ...]]  # what each sample's draws are a function of
FIRST_FRAME_NOISE = (-3.5, 0.5)  # mean and deviation of the amount's logarithm


@dataclass(frozen=True)
class Example:
    """One rank's share of a step, ready for forward and backward."""

    layout: StreamLayout
    latents: Tensor  # [b, N]
    noise: Tensor  # [b, N]
    timesteps: Tensor  # [b, G] in [0, 1]; 0 for a time group that is given
    fields: Fields  # what the model is conditioned on, [b, …] each
    weights: Tensor  # [b, G]: what each time group's mean squared error adds to the loss of the global batch
    expert: str = ""  # that the step trains

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
    if layout.whole:
        return errors, free
    sizes = free * torch.tensor(layout.group_sizes, dtype=errors.dtype, device=errors.device)
    places = [layout.groups_of(stream) for stream in range(len(layout.names))]
    counts = torch.stack([sizes[:, place.start : place.stop].sum(1) for place in places], dim=1)
    sums = torch.stack([(sizes * errors)[:, place.start : place.stop].sum(1) for place in places], dim=1)
    return sums / counts.clamp(min=1), (counts > 0).to(free.dtype)


# --- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """A way to split a sample into what is given clean and what is generated."""

    name: str
    given: frozenset[int] = frozenset()  # streams
    first: frozenset[int] = frozenset()  # streams whose first latent frame is given
    last: frozenset[int] = frozenset()  # streams whose last frame is given beside the video, encoded alone
    shown: frozenset[int] = frozenset()  # streams whose given frames are shown beside the latents, in no time group
    shown_last: frozenset[int] = frozenset()  # the same of last frames, where each end is shown by itself

    @property
    def gives(self) -> bool:
        return bool(self.given or self.first or self.last or self.shown or self.shown_last)

    def reveals(self, *, video: bool) -> bool:
        """Tell whether it gives stream 0's first frame, beside which captions may be read. video: of several."""
        return 0 in self.given or (video and (0 in self.first or 0 in self.shown))

    def cut(self, layout: StreamLayout) -> StreamLayout:
        """Return the layout whose given frames have times of their own, where others are left to make."""
        return with_lasts(cut_first(layout, self.first), self.last)

    def groups(self, layout: StreamLayout) -> list[int]:
        """Return the places of the time groups that are given; a stream of one frame is never given by its first."""
        whole = [place for stream in sorted(self.given) for place in layout.groups_of(stream)]
        lasts = [place for place, group in enumerate(layout.groups) if group.alone and group.stream not in self.given]
        return whole + self.firsts(layout) + lasts

    def firsts(self, layout: StreamLayout) -> list[int]:
        """Return the places of the time groups of given first frames."""
        cut = [stream for stream in sorted(self.first - self.given) if layout.cuts and layout.cuts[stream]]
        return [layout.groups_of(stream)[0] for stream in cut]


def cut_first(layout: StreamLayout, streams: Collection[int]) -> StreamLayout:
    """Return the layout with a time group of its own for the first latent frame of these streams."""
    patch = layout.patch[0]
    if not streams:
        return layout
    return layout.cut(
        [(patch,) if stream in streams and shape[1] > patch else () for stream, shape in enumerate(layout.shapes)]
    )


def with_lasts(layout: StreamLayout, streams: Collection[int]) -> StreamLayout:
    """Return the layout with the last frame of these streams beside their videos, where these have more than one."""
    return layout.with_lasts(stream for stream in streams if layout.shapes[stream][1] > 1)


def tasks(streams: Sequence[str], *, shows: bool = False, stills: bool = False) -> dict[str, Task]:
    """Return every task of these streams by name.

    shows: the model is shown given frames beside the latents. stills: and each end by itself.
    """
    everyone, rgb = frozenset(range(len(streams))), frozenset({0})
    known = [Task("joint")]
    if len(streams) > 1:
        known += [Task(f"{streams[0]}_to_aux", frozenset({0})), Task(f"aux_to_{streams[0]}", everyone - {0})]
    if len(streams) > 2:
        known += [Task(f"{name}_to_rest", frozenset({i})) for i, name in enumerate(streams)]
    known += [
        Task("image_to_video", first=rgb),
        Task("last_to_video", last=rgb),
        Task("ends_to_video", first=rgb, last=rgb),
    ]
    if len(streams) > 1:
        known += [
            Task("images_to_videos", first=everyone),
            Task("ends_to_videos", first=everyone, last=everyone),
        ]
    if stills:
        known = [
            replace(task, first=frozenset(), last=frozenset(), shown=task.first, shown_last=task.last) for task in known
        ]
    elif shows:  # such a model takes its last frame, if any, together with the first
        known = [replace(task, first=frozenset(), shown=task.first) for task in known if not task.last]
    return {task.name: task for task in known}


def trained(config: ObjectiveConfig, streams: Sequence[str]) -> list[Task]:
    """Return the tasks with a weight."""
    return [task for name, task in tasks(streams).items() if config.tasks.get(name, 0) > 0]


def all_lasts(config: ObjectiveConfig, streams: Sequence[str], fields: Sequence[Field] = ()) -> tuple[int, ...]:
    """Return the streams whose last frame some trained task gives beside the video. fields: of the model."""
    if shows_frames(fields):
        return ()
    return tuple(sorted(frozenset().union(*(task.last for task in trained(config, streams)))))


def views(config: ObjectiveConfig, streams: Sequence[str], *, video: bool) -> tuple[bool, bool]:
    """Tell whether some trained task gives a clip's first frame, and whether some does not. video: of several."""
    found = [task.reveals(video=video) for task in trained(config, streams)]
    return any(found), not all(found)


def tasks_of_step(
    config: ObjectiveConfig, streams: Sequence[str], *, seed: int, step: int, shows: bool = False
) -> dict[str, float]:
    """Return the tasks that a step's samples are drawn from, with their weights.

    All samples of a step have one layout, so those tasks alone that give the last frames of the same streams: which, is
    drawn by step, so that every task still comes up as often as its weight says. shows: given frames stand beside the
    latents, in the layout that all tasks share.
    """
    if shows:
        return {task.name: config.tasks[task.name] for task in trained(config, streams)}
    kinds: dict[frozenset[int], dict[str, float]] = {}
    for task in trained(config, streams):
        kinds.setdefault(task.last, {})[task.name] = config.tasks[task.name]
    shares = {",".join(map(str, sorted(last))): sum(weights.values()) for last, weights in kinds.items()}
    drawn = draw_task(shares, "lasts", seed, step)
    return next(weights for last, weights in kinds.items() if ",".join(map(str, sorted(last))) == drawn)


def layout_for(wanted: Sequence[Task], layout: StreamLayout) -> StreamLayout:
    """Return the layout in which each of some tasks can be said; all of them give the same last frames."""
    firsts = frozenset().union(*(task.first for task in wanted))
    return replace(wanted[0], first=firsts).cut(layout)


def narrowed(latents: Tensor, layout: StreamLayout, to: StreamLayout) -> Tensor:
    """Return packed latents [B, N] without the last frames that `to` leaves out."""
    if layout.lasts == to.lasts:
        return latents
    pairs = zip(layout.segments, layout.unpack(latents), strict=True)
    return to.pack([part for segment, part in pairs if not segment.alone or segment.stream in to.lasts])


def check_tasks(config: ObjectiveConfig, streams: Sequence[str]) -> None:
    for name in config.tasks:
        if name not in tasks(streams):
            raise UserError(
                f"objective.tasks.{name}: not a task of these streams; there are {', '.join(tasks(streams))}"
            )


def check_given(config: Config, model: ModelFolder) -> None:
    """Refuse tasks that give frames which this model cannot be given, and streams that it cannot lay side by side."""
    shows = shows_frames(model.fields)
    for task in trained(config.objective, tuple(config.streams)):
        if (task.first or task.last) and model.geometry.stills:
            raise UserError(
                f"objective.tasks.{task.name}: {model.family.title} makes images, which do not go on from a frame; "
                "leave it out"
            )
        if (task.first or task.last) and not model.geometry.first_alone:
            frames = model.geometry.stride[0]
            raise UserError(
                f"objective.tasks.{task.name}: {model.family.title} encodes {frames} frames at a time, so that none "
                "can be given alone; leave it out"
            )
        if shows and task.last and not shows_stills(model.fields):
            raise UserError(
                f"objective.tasks.{task.name}: this model takes given frames in channels; say image_to_video, which "
                "gives it all that it takes"
            )
    droppable = [field.name for field in caption_fields(model.fields)]
    for name in config.objective.caption_dropout if isinstance(config.objective.caption_dropout, dict) else ():
        if name not in droppable:
            raise UserError(
                f"objective.caption_dropout.{name}: {model.family.title} makes no such field of a caption; there are "
                f"{', '.join(droppable)}"
            )
    for name, scale in zip(config.streams, config.scales, strict=True):
        if shows and scale > 1:
            raise UserError(
                f"streams.{name}.scale: this model takes given frames in channels, for streams of one size; set it to 1"
            )


def draw_task(weights: Mapping[str, float], *key: object) -> str:
    names = sorted(name for name, weight in weights.items() if weight > 0)
    if len(names) == 1:
        return names[0]
    chances = torch.tensor([weights[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(chances, 1, generator=generator("task", *key)))]


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
) -> Example:
    """Draw for the samples `ids` at `slots` of a global batch of `batch`; `empty`: an empty caption's fields.

    unseen: the fields of captions that are read beside no picture, where others are read beside the first frame.

    shown: what the samples can be shown of given frames, where a model takes that in channels. expert: that the step
    trains; the config's limits are its own.
    """
    keys = [(seed, step, sample, slot) for sample, slot in zip(ids, slots, strict=True)]
    known = tasks(layout.names, shows=shown is not None, stills=shown is not None and shows_stills(shown.fields))
    weights = tasks_of_step(config, layout.names, seed=seed, step=step, shows=shown is not None)
    read, layout = layout, layout_for([known[name] for name in weights], layout)
    latents = narrowed(latents, read, layout)
    drawn = [known[draw_task(weights, *key)] for key in keys]
    noise = torch.stack([draw_noise(layout.elements, *key) for key in keys])
    latents = with_noisy_firsts(config, latents, noise, layout, drawn, keys)
    drawn_times = draw_times(config, seed=seed, step=step, slots=slots, batch=batch, shift=shift)
    times = drawn_times[:, None].repeat(1, len(layout.groups))
    free = torch.ones_like(times)
    for row, task in enumerate(drawn):
        places = task.groups(layout)
        times[row, places] = free[row, places] = 0
    fields = with_dropped_captions(config, told(fields, unseen, drawn, layout), empty, keys)
    if shown is not None:
        ends = [task.shown for task in drawn], [task.shown_last for task in drawn]
        fields = {**fields, **shown.values(layout, *ends)}
    return Example(layout, latents, noise, times, fields, loss_weights(config, layout, free, batch), expert)


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


def _dropped(share: float, keys: Keys, *field: str) -> Tensor:
    """[b]: the samples whose caption, or one field of it, is dropped."""
    return torch.tensor([float(torch.rand((), generator=generator("caption", *field, *key))) < share for key in keys])


def _replaced(value: Tensor, rows: Tensor | None, by: Tensor | None) -> Tensor:
    if rows is None or by is None or not rows.any():
        return value
    value = value.clone()
    value[rows] = by.to(value.dtype)
    return value
