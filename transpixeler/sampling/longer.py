"""Make a clip longer: frames between its own, or frames after its last, in windows of a length that the model takes.

In: a clip and how much is asked for. Out: what each window is given, and the whole video, in which the clip's own
frames are kept as they are.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from transpixeler.config.sections import Config, UserError
from transpixeler.data.media.clip import Clip, Media, exact_rate
from transpixeler.data.media.decode import frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import Light
from transpixeler.data.prompts import LENGTHS, GivenFiles
from transpixeler.data.sampled import frame_rate
from transpixeler.flow.tasks import Task, intervals, tasks, trained, untakeable
from transpixeler.models.family import ModelFolder
from transpixeler.models.geometry import Geometry

logger = logging.getLogger("transpixeler")

Size = tuple[int, int, int]  # frames, height, width
Clips = Mapping[int, np.ndarray]  # uint8 [F, H, W, 3] by stream
TASKS = {"between": "interpolate", "extend": "extend"}  # of an option


@dataclass(frozen=True)
class Course:
    """The way from a clip to a longer video."""

    clip: int  # frames of the clip
    total: int  # of the video
    window: int  # frames that are made at a time
    fps: Fraction  # of the video
    numbers: tuple[int, ...]  # of the clip's frames in its file
    streams: tuple[int, ...]  # that the file gives
    every: int = 0  # each k-th frame of the video is the clip's; 0: the clip's come first
    begin: int = 0  # latent frames that each window begins with, where the clip's come first
    context: int = 1  # the same in frames

    @property
    def starts(self) -> list[int]:
        """Return the frame of the video at which each window begins; the last one ends with the video, or after it."""
        if not self.every:
            return list(range(self.clip - self.context, self.total - self.context, self.window - self.context))
        step = (self.window - 1) // self.every * self.every
        count = max(1, math.ceil((self.total - 1) / step))
        return [min(number * step, max(0, self.total - 1 - step)) for number in range(count)]

    @property
    def places(self) -> range:
        """Return the places of the clip's frames in the video."""
        return range(0, self.total, self.every) if self.every else range(self.clip)

    @property
    def task(self) -> Task:
        """Return what each window is given."""
        given = frozenset(self.streams)
        if not self.every:
            return Task("", first=given, begin=self.begin)
        return Task("", first=given, between=given, every=self.every)

    def given(self, video: np.ndarray, start: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the frames that a window from `start` on is given: the first ones, and those between."""
        if not self.every:
            return video[start : start + self.context], video[:0]
        return video[start : start + 1], video[start + self.every : start + self.window : self.every]


class Longer:
    """A video that grows by windows."""

    def __init__(self, course: Course, clips: Clips, names: tuple[str, ...]) -> None:
        self.course, self.names = course, names
        _, *sides = clips[0].shape
        self._videos = {name: np.zeros((course.total, *sides), np.uint8) for name in names}
        self._there = {name: np.zeros(course.total, bool) for name in names}
        for stream, frames in clips.items():
            self._videos[names[stream]][course.places] = frames
            self._there[names[stream]][course.places] = True

    def given(self, window: int) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Return the frames that a window is given by stream, as `Course.given` does."""
        start = self.course.starts[window]
        return {stream: self.course.given(self._videos[self.names[stream]], start) for stream in self.course.streams}

    def take(self, window: int, streams: Mapping[str, np.ndarray]) -> None:
        """Put in what a window made, where nothing is yet."""
        start = self.course.starts[window]
        for name, made in streams.items():
            here = slice(start, start + len(made))
            free = ~self._there[name][here]
            self._videos[name][here][free] = made[: len(free)][free]
            self._there[name][here] = True

    def result(self) -> dict[str, np.ndarray]:
        assert all(there.all() for there in self._there.values()), "a frame was made by no window"
        return self._videos


# --- what is asked for -----------------------------------------------------------------------------------------------


def plan_course(given: GivenFiles, config: Config, model: ModelFolder, size: Size) -> Course | None:
    """Return how the clip that is to be longer becomes so, by windows of a size; None where none is named."""
    name = "between" if given.between else "extend" if given.extend else ""
    _check_numbers(given)
    if not name:
        return None
    if len(given.named) > 1:
        others = ", ".join(given.label(other) for other in given.named)
        raise UserError(f"{others}: the clip of {given.label(name)} is all that can be given; leave the others out")
    label, path = given.label(name), str(given.named[name])
    if model.ladder(config.objective):
        raise UserError(f"{label}: this model goes on from a first frame alone; leave it out, or give --image")
    if reason := untakeable(tasks(tuple(config.streams), config.objective)[TASKS[name]], model):
        raise UserError(f"{label}: {reason}")
    try:
        media = probe(Path(path)).at_rate(exact_rate(config.data.sequence_fps or 0))
        make = _between if name == "between" else _extend
        course = make(given, config, model.geometry, size, media, _streams(name, media, config))
    except BadMedia as fault:
        raise UserError(f"{label}: {path} {fault}") from None
    _tell(label, name, course, config)
    return course


def _check_numbers(given: GivenFiles) -> None:
    for number, of in LENGTHS.items():
        if getattr(given, number) and not getattr(given, of):
            raise UserError(f"{given.label(number)}: goes with {given.label(of)} CLIP; give that, or leave it out")


def _between(
    given: GivenFiles, config: Config, geometry: Geometry, size: Size, media: Media, streams: tuple[int, ...]
) -> Course:
    every, window = given.factor or intervals(config.objective)[0], size[0]
    if media.frames < 2:
        raise BadMedia("has 1 frame, and nothing is between; give at least 2")
    if window <= every:
        least = geometry.shortest(every + 1)
        raise UserError(
            f"{given.label('factor')}: {every} frames apart, no two frames fit into the {window} that are made at a "
            f"time; set --size to {least} frames or more"
        )
    total = (media.frames - 1) * every + 1
    fps = media.fps or frame_rate(config) / every
    numbers = tuple(range(media.frames))
    return Course(
        media.frames, total, min(window, geometry.shortest(total)), fps * every, numbers, streams, every=every
    )


def _extend(
    given: GivenFiles, config: Config, geometry: Geometry, size: Size, media: Media, streams: tuple[int, ...]
) -> Course:
    begin, (window, height, width) = config.objective.extend_latents, size
    fps, context = frame_rate(config), geometry.frames(begin * geometry.patch[0])
    clip = media.frames_at(fps)
    if window <= context:
        raise UserError(
            f"{given.label('extend')}: the {window} frames that are made at a time begin with {context} given ones "
            f"(objective.extend_latents={begin}); set --size to {geometry.shortest(context + 1)} frames or more"
        )
    if clip < context:
        raise BadMedia(f"has {clip} frames at {float(fps):g} fps; going on from them takes {context}")
    total = given.frames or clip - context + window
    if total <= clip:
        raise UserError(
            f"{given.label('frames')}: {total} frames are no more than the clip's {clip}; they are counted with it"
        )
    if len(streams) < len(config.streams) and clip > context:
        first = next(name for n, name in enumerate(config.streams) if n not in streams)
        raise BadMedia(
            f"gives no {first}, which the {clip - context} frames before its last {context} would lack; give a file "
            f"with alpha, or cut it to {context} frames"
        )
    numbers = frame_numbers(Path(given.extend), Clip("", Fraction(0), clip, fps, height, width), rate=media.fps)
    return Course(clip, total, window, fps, numbers, streams, begin=begin, context=context)


def _streams(name: str, media: Media, config: Config) -> tuple[int, ...]:
    """Return the streams that a clip gives: RGB, and alpha where it has that and a trained task is given it."""
    alpha = len(config.streams) > 1 and media.alpha and any(1 in task.first for task in _trained(name, config))
    return (0, 1) if alpha else (0,)


def _trained(name: str, config: Config) -> list[Task]:
    names = tuple(config.streams)
    return [task for task in trained(config.objective, names) if task.several and task.name.startswith(TASKS[name])]


def _tell(label: str, name: str, course: Course, config: Config) -> None:
    """Log what a course comes to, and whether the model was trained for it."""
    taught = _trained(name, config)
    if not taught:
        logger.warning(
            "%s: the model was not trained for it: objective.tasks has no %s; what is made may not fit the clip",
            label, TASKS[name],
        )  # fmt: skip
    elif course.every and course.every not in intervals(config.objective):
        known = ", ".join(map(str, intervals(config.objective)))
        logger.warning("%s: the model was trained for a factor of %s, not of %d", label, known, course.every)
    if taught and not any(task.first == frozenset(course.streams) for task in taught):
        named = [[*config.streams][stream] for stream in sorted(taught[0].first)]
        names = ", ".join([*config.streams][: len(course.streams)]), ", ".join(named)
        logger.warning(
            "%s: the clip gives %s, and the model was trained to be given %s; what is made may not fit it. A file with "
            "alpha gives both; the task %s_rgb trains for rgb alone", label, *names, TASKS[name],
        )  # fmt: skip
    windows = len(course.starts)
    logger.info(
        "%s: %d frames become %d at %g fps, in %d %s of %d", label, course.clip, course.total, float(course.fps),
        windows, "window" if windows == 1 else "windows", course.window,
    )  # fmt: skip


def read_longer(given: GivenFiles, course: Course, config: Config, *, height: int, width: int) -> Longer:
    """Read a clip that is planned for."""
    path = Path(given.between or given.extend)
    try:
        if len(course.streams) > 1:
            both = read_rgba(path, course.numbers, height=height, width=width, fill=Fill.of(config.data))
            clips = dict(enumerate(both))
        else:
            light = Light(config.data.transfer)
            clips = {0: read_frames(path, course.numbers, height=height, width=width, light=light)}
    except BadMedia as fault:
        raise UserError(f"{given.label('between' if given.between else 'extend')}: {path} {fault}") from None
    return Longer(course, clips, tuple(config.streams))
