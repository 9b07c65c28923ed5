"""Turn prompts into videos to make: prompts and a config go in, requests with names, seeds and sizes come out.

A `Maker` then makes the `Video` of a request: what it is given is read and encoded when its turn comes, so that a long
list of prompts takes no more memory than a short one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import overload

import numpy as np
from torch import Tensor

from transpixeler.config.sections import Config, Size
from transpixeler.data.given import check_given_files, read_given
from transpixeler.data.prompts import NOTHING_GIVEN, GivenFiles, Prompt
from transpixeler.data.sampled import size_of, video_layout
from transpixeler.flow.objective import Fields
from transpixeler.flow.tasks import Task
from transpixeler.models.conditions import shows_stills
from transpixeler.models.family import ModelFolder, sees_frames
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.longer import Course, Longer, plan_course, read_longer
from transpixeler.sampling.shown import ImageTokens, show
from transpixeler.sampling.texts import PromptTexts
from transpixeler.sampling.video import Video, name_part

SEEDS_APART = 1_000_003  # of a video's windows: no other video of a call has such a seed


@dataclass(frozen=True)
class Request:
    """One video that is asked for, before anything is read or encoded for it."""

    name: str  # of its folder
    prompt: str
    seed: int
    size: Size  # width, height, frames
    negative: str | None = None  # None: the config's
    given: GivenFiles = NOTHING_GIVEN
    course: Course | None = None  # of a clip that is to be longer

    @property
    def windows(self) -> int:
        """Return how many windows its video is made in."""
        return len(self.course.starts) if self.course else 1


def list_requests(
    config: Config,
    prompts: Sequence[Prompt],
    model: ModelFolder,
    *,
    given: GivenFiles = NOTHING_GIVEN,
    count: int = 1,
    first: int = 0,
) -> list[Request]:
    """List the videos to make, `count` of each prompt; a size or a file that cannot be used is named.

    Each has a seed of its own, so that it can be made again by itself. given: the files of prompts that name none.
    first: the number of the first video.
    """
    requests = []
    for prompt in prompts:
        frames, height, width = size_of(prompt, config, model)
        files = prompt.given if prompt.given.named else given
        course = plan_course(files, config, model, (frames, height, width))
        if course:
            frames = course.window
        else:
            files = check_given_files(files, config, model, (frames, height, width))
        for copy in range(count):
            number = first + len(requests)
            seed = config.sample.seed + number if prompt.seed is None else prompt.seed + copy
            name = f"{number:03}-{name_part(prompt.text)}-seed{seed}"
            requests.append(Request(name, prompt.text, seed, (width, height, frames), prompt.negative, files, course))
    return requests


@dataclass(frozen=True, eq=False)
class _Setting:
    """Hold what videos of one size and from the same files share."""

    layout: StreamLayout
    clips: Mapping[int, np.ndarray] = field(default_factory=dict)  # uint8 [F, H, W, 3] of streams that are given whole
    given: Mapping[int, Tensor] = field(default_factory=dict)
    beside: Mapping[int, Tensor] = field(default_factory=dict)
    fields: Fields = field(default_factory=dict)  # that show the given frames
    shown: frozenset[int] = frozenset()
    shown_last: frozenset[int] = frozenset()
    unshown: Fields = field(default_factory=dict)
    seen: np.ndarray | None = None  # the picture that prompts are read beside


def seen_pictures(config: Config, requests: Sequence[Request], model: ModelFolder) -> list[tuple[str, np.ndarray]]:
    """Return the prompts that a text encoder reads beside a given first frame, with that."""
    found, frames = [], dict[tuple[Size, GivenFiles], np.ndarray | None]()
    for one in requests if sees_frames(model.fields) else ():
        width, height, count = one.size
        if one.given.named and (one.size, one.given) not in frames:
            frames[one.size, one.given] = read_given(one.given, config, model, (count, height, width)).seen
        if (picture := frames.get((one.size, one.given))) is not None:
            found.append((one.prompt, picture))
    return found


class Maker:
    """Makes videos of requests; remembers what those of one size share, and the files of the last one."""

    def __init__(
        self,
        config: Config,
        model: ModelFolder,
        frames: Frames,
        texts: PromptTexts,
        tokens: ImageTokens | None = None,
    ) -> None:
        """tokens: what is known of the image encoder's."""
        self.config, self.model, self.frames, self.texts = config, model, frames, texts
        self.tokens = tokens or ImageTokens(model, frames.device)
        self._blank: dict[Size, _Setting] = {}  # where nothing is given
        self._last: tuple[tuple[Size, GivenFiles], _Setting] | None = None

    def video(self, request: Request, longer: Longer | None = None, window: int = 0) -> Video:
        """Return the video of a request, with all that it is made from; of a longer one, that of a window."""
        setting = self._setting(request) if longer is None else self._window(request, longer, window)
        negative = None if request.negative is None else self.texts.by_prompt.get(request.negative)
        return Video(
            request.name,
            request.prompt,
            {**self.texts.of(request.prompt, setting.seen), **setting.fields},
            request.seed + window * SEEDS_APART,
            setting.layout,
            setting.given,
            setting.beside,
            setting.shown,
            setting.shown_last,
            setting.unshown,
            request.negative,
            negative,
            request.course.fps if request.course else None,
        )

    def longer(self, request: Request) -> Longer:
        """Return the video that the windows of a request with a course are put into."""
        assert request.course is not None, request.name
        width, height, _ = request.size
        return read_longer(request.given, request.course, self.config, height=height, width=width)

    def _window(self, request: Request, longer: Longer, window: int) -> _Setting:
        task, given = longer.course.task, longer.given(window)
        shape = video_layout(self.config, self.model, request.size)
        layout = task.cut(shape.with_beside(task.beside, longer.course.window))
        first = self._encoded({stream: one for stream, (one, _) in given.items()})
        scales, alone = self.config.scales, {stream: one for stream, (_, one) in given.items() if len(one)}
        between = {stream: self.frames.encode_alone(one, scale=scales[stream]) for stream, one in alone.items()}
        # a window may be a little longer than what is left to make: its last frames have none after them
        there = tuple(one._replace(times=one.times[: len(alone[one.stream])]) for one in layout.beside)
        return _Setting(replace(layout, beside=there), given=first, beside=between)

    def known(self, request: Request) -> Mapping[int, np.ndarray]:
        """Return the frames that need not be decoded: those of clips that are given."""
        return self._setting(request).clips

    def _setting(self, request: Request) -> _Setting:
        if not request.given.named:
            if request.size not in self._blank:
                self._blank[request.size] = self._make(request)
            return self._blank[request.size]
        key = (request.size, request.given)
        if self._last is None or self._last[0] != key:
            self._last = (key, self._make(request))
        return self._last[1]

    def _make(self, request: Request) -> _Setting:
        shape = video_layout(self.config, self.model, request.size)
        found = read_given(request.given, self.config, self.model, self.model.geometry.pixels(shape.shapes[0]))
        shown = show(self.model, self.frames, shape, found.pictures, found.last, tokens=self.tokens)
        stills = shows_stills(self.model.fields)
        ends = frozenset(found.first if shown else ()), frozenset(found.last if stills else ())
        guided = self.config.sample.image_guidance != 1 and any(ends)
        unshown = show(self.model, self.frames, shape, {}, tokens=self.tokens) if guided else {}
        parts = (found.clips, {}, {}) if shown else (found.clips, found.first, found.last)
        whole, first, last = (self._encoded(part) for part in parts)
        layout = Task("", given=frozenset(whole), first=frozenset(first), last=frozenset(last)).cut(shape)
        seen = found.seen if sees_frames(self.model.fields) else None
        return _Setting(layout, found.clips, first | whole, last, shown, *ends, unshown, seen)

    def _encoded(self, part: Mapping[int, np.ndarray]) -> dict[int, Tensor]:
        return {stream: self.frames.encode(one, scale=self.config.scales[stream]) for stream, one in part.items()}


@dataclass(frozen=True)
class Videos(Sequence[Video]):
    """The videos of requests, each made when it is asked for."""

    maker: Maker
    requests: Sequence[Request]

    def __len__(self) -> int:
        return len(self.requests)

    @overload
    def __getitem__(self, number: int) -> Video: ...
    @overload
    def __getitem__(self, number: slice) -> Videos: ...
    def __getitem__(self, number: int | slice) -> Video | Videos:
        if isinstance(number, slice):
            return replace(self, requests=self.requests[number])
        return self.maker.video(self.requests[number])
