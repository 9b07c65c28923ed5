"""Define the tasks: ways to split a sample into what is given clean and what is generated.

In: the names of a config's tasks and its streams. Out: for each task the layout of a sample, in which what is given has
times of its own, and the time groups that are given.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transpixeler.config.sections import Config, ObjectiveConfig, UserError
from transpixeler.flow.draws import generator
from transpixeler.models.conditions import shows_frames, shows_stills
from transpixeler.models.family import Field, ModelFolder, caption_fields, sees_frames
from transpixeler.models.streams import LAST, Beside, FramesOf, StreamLayout

PLAIN = ObjectiveConfig()


@dataclass(frozen=True)
class Task:
    """A way to split a sample into what is given clean and what is generated."""

    name: str
    given: frozenset[int] = frozenset()  # streams
    first: frozenset[int] = frozenset()  # streams whose first latent frames are given
    begin: int = 1  # how many those are, in tokens
    last: frozenset[int] = frozenset()  # streams whose last frame is given beside the video, encoded alone
    between: frozenset[int] = frozenset()  # streams of which every k-th frame is given, likewise
    every: int = 0  # that k
    shown: frozenset[int] = frozenset()  # streams whose given frames are shown beside the latents, in no time group
    shown_last: frozenset[int] = frozenset()  # the same of last frames, where each end is shown by itself

    @property
    def gives(self) -> bool:
        return bool(self.given or self.first or self.last or self.between or self.shown or self.shown_last)

    def reveals(self, *, video: bool) -> bool:
        """Tell whether it gives stream 0's first frame, beside which captions may be read. video: of several."""
        return 0 in self.given or (video and (0 in self.first or 0 in self.shown))

    @property
    def several(self) -> bool:
        """Tell whether more is given than frames at the ends, and less than whole streams."""
        return bool(self.between) or (bool(self.first) and self.begin > 1)

    @property
    def beside(self) -> frozenset[FramesOf]:
        """Return the frames that are given beside their videos."""
        return frozenset({*((stream, LAST) for stream in self.last), *((s, self.every) for s in self.between)})

    def cut(self, layout: StreamLayout) -> StreamLayout:
        """Return the layout whose given frames have times of their own, where others are left to make."""
        return layout_for([self], layout)

    def beginnings(self, layout: StreamLayout) -> dict[int, int]:
        """Return how many latent frames each stream's video begins with that are given; of whole streams nothing.

        A stream as short as that is not given, since nothing would be left to make, nor one of fewer frames than k.
        """
        length = self.begin * layout.patch[0]
        there = {one.stream for one in layout.beside if one.every == self.every}
        streams = sorted(stream for stream in self.first if stream not in self.between or stream in there)
        return {stream: length for stream in streams if layout.shapes[stream][1] > length}

    def groups(self, layout: StreamLayout) -> list[int]:
        """Return the places of the time groups that are given; a stream of one frame is never given by its first."""
        whole = [place for stream in sorted(self.given) for place in layout.groups_of(stream)]
        beside = [place for place, group in enumerate(layout.groups) if group.alone and group.stream not in self.given]
        return whole + self.firsts(layout) + beside

    def firsts(self, layout: StreamLayout) -> list[int]:
        """Return the places of the time groups of given first frames."""
        ends = {stream: end for stream, end in self.beginnings(layout).items() if stream not in self.given}
        groups = enumerate(layout.groups)
        return [place for place, one in groups if not one.alone and one.end <= ends.get(one.stream, 0)]


def layout_for(wanted: Sequence[Task], layout: StreamLayout) -> StreamLayout:
    """Return the layout in which each of some tasks can be said; all of them give the same frames beside videos."""
    layout = _only_beside(layout, wanted[0].beside)
    ends: list[set[int]] = [set() for _ in layout.names]
    for task in wanted:
        for stream, end in task.beginnings(layout).items():
            ends[stream].add(end)
    return layout.cut([sorted(own) for own in ends])


def _only_beside(layout: StreamLayout, wanted: frozenset[FramesOf]) -> StreamLayout:
    """Return the layout with those frames beside its videos that are wanted, of those that are there, and last ones."""
    lasts = [stream for stream, every in wanted if every == LAST]
    found: set[Beside] = {one for one in layout.beside if (one.stream, one.every) in wanted and one.every != LAST}
    return replace(layout, beside=tuple(sorted(found.union(layout.with_lasts(lasts).beside))))


def tasks(
    streams: Sequence[str], settings: ObjectiveConfig = PLAIN, *, shows: bool = False, stills: bool = False
) -> dict[str, Task]:
    """Return every task of these streams by name.

    settings: how much some of them give. shows: the model is shown given frames beside the latents. stills: and each
    end by itself.
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
    known += _longer("", everyone, settings)
    if len(streams) > 1:
        known += _longer(f"_{streams[0]}", rgb, settings)
    if stills:
        known = [
            replace(task, first=frozenset(), last=frozenset(), shown=task.first, shown_last=task.last)
            for task in known
            if not task.several
        ]
    elif shows:  # such a model takes its last frame, if any, together with the first
        known = [
            replace(task, first=frozenset(), shown=task.first) for task in known if not task.last and not task.several
        ]
    return {task.name: task for task in known}


def _longer(ending: str, given: frozenset[int], settings: ObjectiveConfig) -> list[Task]:
    """Return the tasks that are given several frames of some streams."""
    return [
        Task(f"extend{ending}", first=given, begin=settings.extend_latents),
        Task(f"interpolate{ending}", first=given, between=given, every=intervals(settings)[0]),
    ]


def intervals(config: ObjectiveConfig) -> tuple[int, ...]:
    """Return the values of `interpolate_every`, one or several."""
    return (config.interpolate_every,) if isinstance(config.interpolate_every, int) else config.interpolate_every


def trained(config: ObjectiveConfig, streams: Sequence[str]) -> list[Task]:
    """Return the tasks with a weight."""
    return [task for name, task in tasks(streams, config).items() if config.tasks.get(name, 0) > 0]


def beside_by_step(
    config: ObjectiveConfig, streams: Sequence[str], fields: Sequence[Field] = ()
) -> set[frozenset[FramesOf]]:
    """Return the frames that stand beside the videos in a step, for each kind of step. fields: of the model."""
    if shows_frames(fields):
        return {frozenset()}
    settings = [replace(config, interpolate_every=every) for every in intervals(config)]
    return {task.beside for one in settings for task in trained(one, streams)}


def all_beside(config: ObjectiveConfig, streams: Sequence[str], fields: Sequence[Field] = ()) -> tuple[FramesOf, ...]:
    """Return the frames that some trained task gives beside the videos, in the order of their segments."""
    return tuple(sorted(frozenset().union(*beside_by_step(config, streams, fields))))


def views(config: ObjectiveConfig, streams: Sequence[str], *, video: bool) -> tuple[bool, bool]:
    """Tell whether some trained task gives a clip's first frame, and whether some does not. video: of several."""
    found = [task.reveals(video=video) for task in trained(config, streams)]
    return any(found), not all(found)


def tasks_of_step(
    config: ObjectiveConfig, streams: Sequence[str], *, seed: int, step: int, shows: bool = False
) -> dict[str, float]:
    """Return the tasks that a step's samples are drawn from, with their weights.

    All samples of a step have one layout, so those tasks alone that give the same frames beside the videos: which, is
    drawn by step, so that every task still comes up as often as its weight says. shows: given frames stand beside the
    latents, in the layout that all tasks share.
    """
    if shows:
        return {task.name: config.tasks[task.name] for task in trained(config, streams)}
    kinds: dict[str, dict[str, float]] = {}
    for task in trained(config, streams):
        kinds.setdefault(_kind(task), {})[task.name] = config.tasks[task.name]
    drawn = draw_task({kind: sum(weights.values()) for kind, weights in kinds.items()}, "lasts", seed, step)
    return kinds[drawn]


def _kind(task: Task) -> str:
    """Name what a task gives beside the videos. Steps were drawn by the streams of last frames once, and still are."""
    if task.between:
        return "every " + ",".join(map(str, sorted(task.between)))
    return ",".join(map(str, sorted(task.last)))


def with_every_drawn(config: ObjectiveConfig, *, seed: int, step: int) -> ObjectiveConfig:
    """Return the objective with the one `interpolate_every` that a step takes."""
    if len(intervals(config)) == 1:
        return config
    drawn = draw_task({str(every): 1.0 for every in intervals(config)}, "every", seed, step)
    return replace(config, interpolate_every=int(drawn))


def narrowed(latents: Tensor, layout: StreamLayout, to: StreamLayout) -> Tensor:
    """Return packed latents [B, N] without the frames beside videos that `to` leaves out."""
    if layout.beside == to.beside:
        return latents
    pairs = zip(layout.segments, layout.unpack(latents), strict=True)
    return to.pack([part for segment, part in pairs if segment.beside is None or segment.beside in to.beside])


def check_tasks(config: ObjectiveConfig, streams: Sequence[str]) -> None:
    for name in config.tasks:
        if name not in tasks(streams):
            raise UserError(
                f"objective.tasks.{name}: not a task of these streams; there are {', '.join(tasks(streams))}"
            )


def check_given(config: Config, model: ModelFolder) -> None:
    """Refuse tasks that give frames which this model cannot be given, and streams that it cannot lay side by side."""
    shows = shows_frames(model.fields)
    _check_ladder(config, model)
    for task in trained(config.objective, tuple(config.streams)):
        if reason := untakeable(task, model) or _too_short_for(task, config, model):
            raise UserError(f"objective.tasks.{task.name}: {reason}")
    droppable = [field.name for field in caption_fields(model.fields)]
    for name in config.objective.caption_dropout if isinstance(config.objective.caption_dropout, dict) else ():
        if name not in droppable:
            raise UserError(
                f"objective.caption_dropout.{name}: {model.family.title} makes no such field of a caption; there are "
                f"{', '.join(droppable)}"
            )
    if config.objective.focus_present and not model.joins:
        raise UserError(
            f"objective.focus_present: {model.family.title} has no attention over time by itself; leave it out"
        )
    for name, scale in zip(config.streams, config.scales, strict=True):
        if model.joins and scale > 1:
            raise UserError(
                f"streams.{name}.scale: {model.family.title} joins streams in channels, of one size; set it to 1"
            )
        if shows and scale > 1:
            raise UserError(
                f"streams.{name}.scale: this model takes given frames in channels, for streams of one size; set it to 1"
            )


def _check_ladder(config: Config, model: ModelFolder) -> None:
    """Refuse what does not go with a video that is made at several sizes, and what is for such models alone."""
    if (ladder := model.ladder(config.objective)) is None:
        alone = "data.sync_group" if config.data.sync_group > 1 else "objective.history"
        if config.data.sync_group > 1 or config.objective.history == "on":
            raise UserError(f"{alone}: {model.family.title} makes all frames at once, at one size; leave it out")
        return
    if fault := ladder.fault(config):
        raise UserError(fault)


def untakeable(task: Task, model: ModelFolder) -> str:
    """Return why a model cannot be given what a task gives, and the way out; or nothing."""
    title, geometry, shows = model.family.title, model.geometry, shows_frames(model.fields)
    if model.joins and task.gives:
        return f"{title} is told one time for all that it makes, so that nothing can be given; joint is its only task"
    if not task.first and not task.last:
        return ""
    if geometry.stills:
        return f"{title} makes images, which do not go on from a frame; leave it out"
    if not geometry.first_alone:
        return f"{title} encodes {geometry.stride[0]} frames at a time, so that none can be given alone; leave it out"
    if sees_frames(model.fields) and task.several:
        return f"{title} reads captions beside one given frame, and takes no more frames; leave it out"
    if shows and task.several:
        return "this model is shown given frames in channels, those at the ends alone; leave it out"
    if shows and task.last and not shows_stills(model.fields):
        return "this model takes given frames in channels; say image_to_video, which gives it all that it takes"
    return ""


def _too_short_for(task: Task, config: Config, model: ModelFolder) -> str:
    """Return why no clip is long enough to leave something of several given frames to make; or nothing."""
    data, geometry = config.data, model.geometry
    sizes = [size for one in (data, *data.train) for size in one.sizes or ()]
    lengths = [
        *data.frames,
        *(frames for one in data.train for frames in one.frames or ()),
        *(size[2] for size in sizes),
    ]
    needed = task.every + 1 if task.between else geometry.frames(task.begin * geometry.patch[0]) + 1
    if not task.several or not data.train or max(lengths, default=0) >= needed:
        return ""
    key = "objective.interpolate_every" if task.between else "objective.extend_latents"
    return f"takes clips of {needed} frames or more ({key}); make data.frames longer, or leave it out"


def draw_task(weights: Mapping[str, float], *key: object) -> str:
    names = sorted(name for name, weight in weights.items() if weight > 0)
    if len(names) == 1:
        return names[0]
    chances = torch.tensor([weights[name] for name in names], dtype=torch.float64)
    return names[int(torch.multinomial(chances, 1, generator=generator("task", *key)))]
