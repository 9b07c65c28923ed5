"""Make the videos of requests with one model, which stays open between calls: requests go in, frames come out.

`sample` opens a session for one call; the Python face keeps one as long as its model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np
from torch import Tensor

from transpixeler.config.sections import SampleConfig
from transpixeler.data.prompts import NOTHING_GIVEN, GivenFiles, Prompt, texts_of
from transpixeler.flow.tasks import check_given
from transpixeler.models.family import ModelFolder, open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.files import Plate
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.guidance import check_sample
from transpixeler.sampling.light import given_light
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.requests import Maker, Request, Videos, list_requests, seen_pictures
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.saves import SavedModel
from transpixeler.sampling.texts import Told, encode_prompts
from transpixeler.sampling.video import Video, check_formats


@dataclass(frozen=True, eq=False)
class Made:
    """A video that was made."""

    number: int  # of its request
    video: Video
    streams: Mapping[str, np.ndarray]  # uint8 [F, H, W, 3] by name
    plate: Plate | None = None  # the light of a given first stream, which EXR files keep


class Session:
    """A saved model that makes videos. Its engine is built once, for the first of them."""

    def __init__(self, source: SavedModel, runtime: Runtime, *, asked_layout: bool = False) -> None:
        """asked_layout: whether the user set parallel.*."""
        config, self.layout = fit_layout(source.config, runtime, asked=asked_layout)
        self.source, self.runtime = replace(source, config=config), runtime
        self.model: ModelFolder = open_model(config.model)
        self._opened: tuple[meshes.Mesh, AnyEngine] | None = None
        self._texts: dict[Told, Mapping[str, Tensor]] = {}  # those that were encoded, by prompt
        check_given(config, self.model)

    def with_sample(self, sample: SampleConfig) -> SavedModel:
        """Return the source with other settings of `sample.*`, which need no other engine."""
        check_sample(sample, self.model)
        source = replace(self.source, config=replace(self.source.config, sample=sample))
        check_formats(source.config)
        return source

    def requests(
        self, source: SavedModel, prompts: Sequence[Prompt], *, given: GivenFiles = NOTHING_GIVEN, count: int = 1
    ) -> list[Request]:
        """List the videos to make of prompts with a source of this session."""
        return list_requests(source.config, prompts, self.model, given=given, count=count)

    def make(self, source: SavedModel, requests: Sequence[Request]) -> Iterator[Made]:
        """Yield this rank's share of the videos, on the first stage of its pipeline. A collective call."""
        if not requests:
            return
        config = source.config
        texts = texts_of(config.sample, [(one.prompt, one.negative) for one in requests])
        beside = seen_pictures(config, requests, self.model)
        found = encode_prompts(config, texts, self.model, self.runtime, self._texts, beside=beside)
        frames = Frames(self.model, self.runtime.device, upsample=config.sample.upsample)
        maker = Maker(config, self.model, frames, found)
        if requests[0].course is None:
            maker.known(requests[0])  # the VAE's work comes before the model takes its memory
        mesh, engine = self._open()
        ladder = self.model.ladder(config.objective)
        sampler = Sampler(engine, mesh, config.sample, found.negative, self.model, ladder)
        plain = [number for number, one in enumerate(requests) if one.course is None]
        videos = Videos(maker, [requests[number] for number in plain])
        for place, latents in sampler.each(videos):
            if mesh.speaks:
                video, request = videos[place], requests[plain[place]]
                streams = frames.decode(latents, video.layout, known=maker.known(request))
                size = self.model.geometry.pixels(video.layout.shapes[0])
                yield Made(plain[place], video, streams, given_light(request.given, config, size))
        for numbers in _side_by_side(requests, mesh.layout.data):
            if made := _make_longer(sampler, maker, [requests[number] for number in numbers]):
                yield replace(made, number=numbers[made.number])

    def _open(self) -> tuple[meshes.Mesh, AnyEngine]:
        if self._opened is None:
            mesh = meshes.build(self.layout, self.runtime)
            self._opened = mesh, open_engine(self.source, mesh)
        return self._opened


def _side_by_side(requests: Sequence[Request], ranks: int) -> Iterator[list[int]]:
    """Yield numbers of longer videos that data ranks make at a time, one each: those of as many windows."""
    longer = sorted((one.windows, number) for number, one in enumerate(requests) if one.course)
    for _, group in groupby(longer, key=lambda pair: pair[0]):
        numbers = [number for _, number in group]
        yield from (numbers[start : start + ranks] for start in range(0, len(numbers), ranks))


def _make_longer(sampler: Sampler, maker: Maker, requests: Sequence[Request]) -> Made | None:
    """Make this data rank's one of some videos, window by window: each may go on from the one before.

    All ranks of a pipeline decode, as each encodes what the next window is given.
    """
    place = sampler.mesh.data_rank % len(requests)
    request = requests[place]
    longer, first = maker.longer(request), None
    for window in range(request.windows):
        video = maker.video(request, longer, window)
        for _, latents in sampler.each([video] * len(requests)):  # of which a rank makes its own alone
            longer.take(window, maker.frames.decode(latents, video.layout))
            first = first or video
    return Made(place, first, longer.result()) if first and sampler.mesh.speaks else None
