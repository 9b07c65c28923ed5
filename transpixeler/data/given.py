"""Read what a video is made from: the files that a prompt or the command line gives go in, frames by stream come out.

Every file is checked before there is work to lose; its frames are read when the video's turn comes. What encoders make
of its first frame is cached: a `GivenPicture` says which that is, without holding it.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import numpy as np

from transpixeler.config.sections import Config, UserError
from transpixeler.data.media.clip import Clip, Media, exact_rate
from transpixeler.data.media.decode import frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.media.light import DATA, Light
from transpixeler.data.prompts import GivenFiles
from transpixeler.data.sampled import frame_rate
from transpixeler.flow.tasks import Task, trained
from transpixeler.models.conditions import shows_frames, shows_stills
from transpixeler.models.family import ModelFolder
from transpixeler.models.geometry import Geometry

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True, eq=False)
class GivenFrames:
    """Frames uint8 [F, H, W, 3] by stream: of whole clips, of first frames and of last ones."""

    clips: Mapping[int, np.ndarray] = field(default_factory=dict)
    first: Mapping[int, np.ndarray] = field(default_factory=dict)
    last: Mapping[int, np.ndarray] = field(default_factory=dict)

    @property
    def seen(self) -> np.ndarray | None:
        """Return the first frame of RGB, [H, W, 3], where it is given: some text encoders read prompts beside it."""
        found = self.clips.get(0, self.first.get(0))
        return None if found is None else found[0]

    @property
    def pictures(self) -> dict[int, np.ndarray]:
        """Return the first frames with their last ones, by stream."""
        return {n: np.concatenate([one, self.last.get(n, one[:0])]) for n, one in self.first.items()}


def digest_of(picture: np.ndarray) -> str:
    """Tell a picture from others."""
    return hashlib.sha256(repr(picture.shape).encode() + picture.tobytes()).hexdigest()


@dataclass(frozen=True)
class GivenPicture:
    """The first frame of RGB in a file that a prompt gives, at the size of its video."""

    label: str  # of the file, for an error
    path: Path
    height: int
    width: int
    filled: bool  # it is taken with its alpha, so that hidden colour is filled
    config: Config
    digest: str = ""  # of its pixels

    @classmethod
    def of(
        cls, given: GivenFiles, name: str, config: Config, model: ModelFolder, size: tuple[int, int, int]
    ) -> GivenPicture:
        """Return that of a file that is checked, with the digest that it has now."""
        end = name in ("image", "last")
        filled = end and _shows_alpha(given, name, config, shown=shows_frames(model.fields))
        found = cls(given.label(name), Path(getattr(given, name)), *size[1:], filled, config)
        return replace(found, digest=digest_of(found._pixels()))

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.digest)

    def read(self, threads: int = 0) -> np.ndarray:
        """Return it, uint8 [H, W, 3]; a file that was edited meanwhile is refused."""
        found = self._pixels(threads)
        if digest_of(found) != self.digest:
            raise UserError(f"{self.label}: {self.path} was changed while this started; start again")
        return found

    def _pixels(self, threads: int = 0) -> np.ndarray:
        try:
            if self.filled:
                how = {"height": self.height, "width": self.width, "fill": Fill.of(self.config.data)}
                return read_rgba(self.path, (0,), **how, threads=threads)[0][0]
            media = _probe(self.path, self.config)
            return _cut(self.path, media, self.config, (1, self.height, self.width), threads=threads)[0]
        except BadMedia as fault:
            raise UserError(f"{self.label}: {self.path} {fault}") from None


def check_given_files(given: GivenFiles, config: Config, model: ModelFolder, size: tuple[int, int, int]) -> GivenFiles:
    """Refuse files that cannot be given for a video of size (F, H, W); return them with their reference named."""
    given = _resolved(given, config, model)
    if given.named and model.joins:
        raise UserError(
            f"{given.label(next(iter(given.named)))}: {model.family.title} is told one time for all that it makes, so "
            "that nothing can be given; leave it out"
        )
    _check_clips(given, config)
    _check_ends(given, config, model, frames=size[0])
    for name, path in given.named.items():
        if name in ("image", "last"):
            _check_frame(given, name, model, config)
        length = 1 if name in ("image", "last") else size[0]
        _probe_long_enough(given.label(name), path, config, model.geometry, (length, *size[1:]))
    if given.last and shows_frames(model.fields) and not shows_stills(model.fields):
        both = [_shows_alpha(given, name, config, shown=True) for name in ("image", "last")]
        if both[0] != both[1]:
            raise UserError(
                f"{given.label('image')}, {given.label('last')}: one has an alpha channel and the other has not; "
                "give both one, or neither"
            )
    return given


def read_given(given: GivenFiles, config: Config, model: ModelFolder, size: tuple[int, int, int]) -> GivenFrames:
    """Read the frames of files that are checked, for a video of size (F, H, W)."""
    geometry = model.geometry
    clips = {0: ("rgb", given.rgb), 1: ("alpha", given.alpha)}
    return GivenFrames(
        {
            stream: read_clip(given.label(name), path, config, geometry, size, mask=name == "alpha")
            for stream, (name, path) in clips.items()
            if path
        },
        _read_frame(given, "image", config, model, size),
        _read_frame(given, "last", config, model, size),
    )


def read_clip(
    label: str, path: str, config: Config, geometry: Geometry, size: tuple[int, int, int], *, mask: bool = False
) -> np.ndarray:
    """Read a clip's beginning at the rate and size that are sampled, and log what that leaves out."""
    fps, (frames, height, width) = frame_rate(config), size
    media = _probe_long_enough(label, path, config, geometry, size)
    if (media.frames, media.width, media.height) != (frames, width, height):
        taken = f"the first {frames} of {media.frames_at(fps)} frames at {float(fps):g} fps"
        fitted = f"scaled and cropped from {media.width}×{media.height} to {width}×{height}"
        logger.info("%s: %s: %s, %s (--size)", label, path, taken, fitted)
    try:
        return _cut(Path(path), media, config, size, mask=mask)
    except BadMedia as fault:
        raise UserError(f"{label}: {path} {fault}") from None


def _cut(
    path: Path, media: Media, config: Config, size: tuple[int, int, int], *, mask: bool = False, threads: int = 0
) -> np.ndarray:
    frames, height, width = size
    clip = Clip(str(path), Fraction(0), frames, frame_rate(config), height, width)
    numbers = frame_numbers(path, clip, rate=media.fps)
    light = DATA if mask else Light(config.data.transfer)
    return read_frames(path, numbers, height=height, width=width, threads=threads, light=light)


def _probe_long_enough(label: str, path: str, config: Config, geometry: Geometry, size: tuple[int, int, int]) -> Media:
    fps, (frames, height, width) = frame_rate(config), size
    try:
        media = _probe(Path(path), config)
        there = media.frames_at(fps)
        if there < frames:
            fits = f"{width}x{height}x{geometry.longest(there)}"
            raise BadMedia(f"has {there} frames at {float(fps):g} fps, not {frames}; try --size {fits}")
    except BadMedia as fault:
        raise UserError(f"{label}: {path} {fault}") from None
    return media


def _probe(path: Path, config: Config) -> Media:
    return probe(path).at_rate(exact_rate(config.data.sequence_fps or 0))


def _resolved(given: GivenFiles, config: Config, model: ModelFolder) -> GivenFiles:
    """Put a reference in the place of the one kind of file that the trained tasks are given."""
    if not given.reference:
        return given
    kinds = {kind for task in trained(config.objective, tuple(config.streams)) for kind in _kinds(task)}
    if not kinds and shows_frames(model.fields):
        kinds = {"image"}
    if len(kinds) != 1:
        found = f"its tasks are given {', '.join(sorted(kinds))}" if kinds else "none of its tasks is given a file"
        raise UserError(f"{given.label('reference')}: {found}; name the file as rgb, alpha, image or last")
    return replace(given, reference="", **{kinds.pop(): given.reference})


def _kinds(task: Task) -> list[str]:
    found = {"rgb": 0 in task.given, "alpha": 1 in task.given, "image": 0 in task.first, "last": _last_alone(task)}
    return [name for name, there in found.items() if there]


def _last_alone(task: Task) -> bool:
    return 0 in task.last and 0 not in task.first


def _check_clips(given: GivenFiles, config: Config) -> None:
    paths = [name for name in ("rgb", "alpha") if getattr(given, name)]
    if paths and len(config.streams) < 2:
        raise UserError(f"{given.label(paths[-1])}: the model has one stream, and nothing to make from it")
    if len(paths) == len(config.streams):
        labels = ", ".join(map(given.label, paths))
        raise UserError(f"{labels}: every stream is given and none is left to make; leave one out")


def _check_ends(given: GivenFiles, config: Config, model: ModelFolder, *, frames: int) -> None:
    """Refuse ends that do not go together, or that the model cannot be given."""
    to_last = any(field.last for field in model.fields)
    image, last = given.label("image"), given.label("last")
    if given.image and frames == 1 and shows_frames(model.fields):
        raise UserError(f"{image}: a video of one frame leaves nothing to make; leave it out, or make --size longer")
    if given.image and to_last and not given.last:
        raise UserError(f"{image}: this model goes from a first frame to a last one; give {last} too")
    if not given.last:
        return
    alone = shows_stills(model.fields) or any(map(_last_alone, trained(config.objective, tuple(config.streams))))
    if not given.image and not alone:
        raise UserError(f"{last}: needs the first frame too; give it with {image}")
    if frames == 1:
        raise UserError(f"{last}: a video of one frame ends with its first; leave it out, or make --size longer")
    if shows_frames(model.fields) and not to_last and not shows_stills(model.fields):
        raise UserError(f"{last}: this model is shown a first frame alone; leave it out")


def _check_frame(given: GivenFiles, name: str, model: ModelFolder, config: Config) -> None:
    if given.rgb:
        rgb = given.label("rgb")
        raise UserError(f"{given.label(name)}, {rgb}: {rgb} gives every frame; leave {given.label(name)} out")
    if not model.geometry.first_alone:
        raise UserError(
            f"{given.label(name)}: this model's latents hold no single frame, so none can be given; leave it out"
        )
    if ladder := model.ladder(config.objective):
        if name == "last":
            raise UserError(f"{given.label(name)}: this model goes on from first frames alone; leave it out")
        if not ladder.goes_on:
            raise UserError(
                f"{given.label(name)}: with objective.history=off all frames are made at once, and none is given; "
                "leave it out"
            )


def _shows_alpha(given: GivenFiles, name: str, config: Config, *, shown: bool) -> bool:
    """Return whether the alpha of a given frame is taken too. shown: the model is shown both ends by one task."""
    if len(config.streams) == 1 or given.alpha or not probe(Path(getattr(given, name))).alpha:
        return False
    tasks = trained(config.objective, tuple(config.streams))
    return any(1 in (task.last if name == "last" and not shown else task.first) for task in tasks)


def _read_frame(
    given: GivenFiles, name: str, config: Config, model: ModelFolder, size: tuple[int, int, int]
) -> dict[int, np.ndarray]:
    """Return a first or last frame, uint8 [1, H, W, 3] by stream: RGB, and the alpha that the file may have."""
    path, label = getattr(given, name), given.label(name)
    if not path:
        return {}
    frames = read_clip(label, path, config, model.geometry, (1, *size[1:]))
    if not _shows_alpha(given, name, config, shown=shows_frames(model.fields)):
        if len(config.streams) > 1 and not given.alpha and probe(Path(path)).alpha:
            logger.info(
                "%s: the alpha of %s is left out: no trained task gives it (images_to_videos does)", label, path
            )
        return {0: frames}
    try:
        both = read_rgba(Path(path), (0,), height=size[1], width=size[2], fill=Fill.of(config.data))
    except BadMedia as fault:
        raise UserError(f"{label}: {path} {fault}") from None
    return dict(enumerate(both))
