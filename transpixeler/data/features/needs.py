"""Check features against a model: a row's files in; what they stand for, or the reason why they do not suit, out.

Shapes are checked when sources are scanned, from headers alone; values when the features are taken into the cache.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.data.cache.records import DTYPE
from transpixeler.data.features.files import MASKS, Opened, open_features
from transpixeler.data.media.clip import Media
from transpixeler.data.media.errors import BadMedia, check_size
from transpixeler.data.names import printable
from transpixeler.data.parts import Part, part_shape, parts_of
from transpixeler.data.sources.candidate import TEXT_COLUMN, Features, latent_column
from transpixeler.flow.tasks import all_beside
from transpixeler.models.conditions import fields_from_frames
from transpixeler.models.family import Field, ModelFolder, caption_fields
from transpixeler.models.geometry import USUAL, Geometry
from transpixeler.models.streams import FramesOf

LEAST, MOST = 0.1, 2.5  # of a latent's root mean square; normalised ones are about 1
MARGIN = 0.02  # by which a latent must look more like a raw one, in nats an element
TEXT_NAMES = (TEXT_COLUMN, "prompt_embeds")  # of a tensor that stands for a model's only field


@dataclass(frozen=True)
class Needs:
    """Say what features must be like to suit a config's model and streams."""

    geometry: Geometry
    scales: Mapping[str, int]  # by stream, the first one first
    beside: tuple[FramesOf, ...] = ()  # frames that some task gives, each encoded alone
    fields: tuple[Field, ...] | None = None  # None: no model is named yet
    family: str = ""
    statistics: tuple[Tensor, Tensor] | None = field(default=None, compare=False)  # of raw latents, by channel

    @classmethod
    def of(cls, config: Config, model: ModelFolder | None) -> Needs:
        """Return what a config's features must be like; where no model is named, of a usual one's geometry."""
        streams = tuple(config.streams)
        fields = () if model is None else model.fields
        beside = all_beside(config.objective, streams, fields)
        scales = dict(zip(streams, config.scales))
        if model is None:
            return cls(USUAL.over(config.scales), scales, beside)
        told = model.latent_statistics()
        return cls(model.geometry.over(config.scales), scales, beside, model.fields, model.family.name, told)

    # -- when sources are scanned

    def media(self, features: Features) -> Media:
        """Return what the latents of a row decode to; refuse those that no video of this model encodes to."""
        if shown := fields_from_frames(self.fields or ()):
            names = " and ".join(field.name for field in shown)
            raise BadMedia(
                f"{features.row} gives latents, but this model is also shown given frames ({names}), which are encoded "
                "from videos: leave out its latents"
            )
        size: tuple[int, int, int] | None = None
        for stream, path in features.latents:
            with blamed(features, latent_column(stream, self.first), path):
                opened = open_features(path)
                self._check_family(opened)
                latent = self.latent(features, opened, Part(stream))
                if size is None:
                    size = self._size(latent)
                self.check_shape(latent, size, Part(stream))
                for part in parts_of(tuple(self.scales), self.beside, size[0]):
                    if part.stream == stream and part.every is not None:
                        self.check_shape(self.latent(features, opened, part), size, part)
        assert size is not None, features
        return Media(*size, fps=Fraction(0), duration=Fraction(0), alpha=False)

    def check_text(self, features: Features) -> None:
        """Refuse features that stand for no caption of this model."""
        if features.text is not None:
            with blamed(features, TEXT_COLUMN, features.text):
                opened = open_features(features.text)
                self._check_family(opened)
                if self.fields is not None:
                    self.texts(opened, cut=False)  # to look for padding would be to read it all

    # -- values, read from disk when they are used

    @property
    def first(self) -> str:
        return next(iter(self.scales))

    def latent(self, features: Features, opened: Opened, part: Part) -> Tensor:
        """Return a part's latents [C, f, h, w]."""
        column = latent_column(part.stream, self.first)
        names = [column, f"{part.stream}_latent"]
        if part.every is None:
            if features.share_a_file(part.stream) and not any(name in opened.tensors for name in names):
                raise BadMedia(f"has no tensor {column}, and other streams are in this file, too: name each one's")
            found = opened.pick(names)
        elif (name := column + part.suffix) in opened.tensors:
            found = opened.numbers(name)
        else:
            given, whose = ("some frames", "each one") if part.every else ("a last frame", "that frame")
            raise BadMedia(
                f"has no tensor {name}, which a task that gives {given} needs: {whose}'s latent, encoded alone"
            )
        if found.ndim == 5 and len(found) == 1:
            found = found[0]
        if found.ndim != 4:
            raise BadMedia(f"has the shape {_shape(found)}, not [channels, frames, height, width]")
        if len(found) != self.geometry.channels:
            raise BadMedia(
                f"has the shape {_shape(found)}: {len(found)} channels, where this model's latents have "
                f"{self.geometry.channels}; it is another model's, or in another order than [channels, frames, height, "
                "width]"
            )
        return found

    def texts(self, opened: Opened, *, cut: bool = True) -> dict[str, Tensor]:
        """Return the fields of a caption by name, [true length, width] or [width]. cut=False: with their padding."""
        wanted = caption_fields(self.fields or ())
        if len(wanted) == 1:
            return {wanted[0].name: self._text(opened, wanted[0], [*TEXT_NAMES, wanted[0].name], cut=cut)}
        names = ", ".join(one.name for one in wanted)
        for one in wanted:
            if opened.tensors.keys().isdisjoint((one.name, *one.spelled)):
                raise BadMedia(
                    f"has no tensor {one.name}; this model's captions are {names}, each a tensor by its name"
                )
        return {one.name: self._text(opened, one, [one.name, *one.spelled], cut=cut) for one in wanted}

    def _text(self, opened: Opened, wanted: Field, names: Sequence[str], *, cut: bool) -> Tensor:
        found = opened.pick(names)
        dims = 2 if wanted.length else 1
        if found.ndim == dims + 1 and len(found) == 1:
            found = found[0]
        told = f"[tokens, {wanted.width}]" if wanted.length else f"[{wanted.width}]"
        if found.ndim != dims or found.shape[-1] != wanted.width or not len(found):
            raise BadMedia(f"has the shape {_shape(found)}, where this model's {wanted.name} is {told}")
        if wanted.length is None or not cut:
            return found
        found = _unpadded(found, opened, (f"{wanted.name}_mask", *MASKS))
        if len(found) > wanted.length:
            raise BadMedia(f"has {len(found)} tokens, this model's {wanted.name} at most {wanted.length}")
        return found

    def _size(self, latent: Tensor) -> tuple[int, int, int]:
        """Return the (frames, height, width) in pixels of the first stream."""
        if 0 in latent.shape:
            raise BadMedia(f"has the shape {_shape(latent)}, which holds nothing")
        frames, height, width = self.geometry.pixels(latent.shape)
        check_size(width, height)
        if fault := self.geometry.fault(width, height, frames):
            raise BadMedia(f"has the shape {_shape(latent)}, of a video of {width}×{height}×{frames}: {fault}")
        return frames, height, width

    def check_shape(self, latent: Tensor, size: tuple[int, int, int], part: Part) -> None:
        wanted = part_shape(self.geometry, size, part, self.scales)
        if tuple(latent.shape) != wanted:
            frames, height, width = size
            raise BadMedia(f"has the shape {_shape(latent)}, not {list(wanted)} as for {width}×{height}×{frames}")

    def _check_family(self, opened: Opened) -> None:
        family = opened.facts.get("family", self.family)
        if self.family and family != self.family:
            raise BadMedia(f"is of the family {printable(family)}, and the model's is {self.family}")

    def check_values(self, value: Tensor, opened: Opened, *, latent: bool) -> None:
        """Refuse values that are not finite, and latents of another scale than the cache's."""
        if not value.to(DTYPE).isfinite().all():
            raise BadMedia("holds values that are not finite")
        if latent and opened.facts.get("scale") != "normalised" and (reason := self._scale_fault(value.float())):
            raise BadMedia(
                f"{reason}; latents must be normalised, (latent - mean) / deviation of each channel, with the VAE's "
                "own statistics"
            )

    def _scale_fault(self, value: Tensor) -> str:
        size = float(value.square().mean().sqrt())
        if not LEAST <= size <= MOST:
            return f"has values of another scale: {size:.3g} in the root mean square, where normalised ones are about 1"
        if self.statistics is None:
            return ""
        mean, deviation = self.statistics
        own, spread = value.mean((1, 2, 3)), value.var((1, 2, 3), unbiased=False)
        raw = (spread + (own - mean).square()) / deviation.square() + 2 * deviation.log()
        if float((spread + own.square() - raw).mean()) / 2 > MARGIN:  # log-likelihoods of normal distributions
            return "looks like a raw latent: it fits the VAE's own means and deviations better than 0 and 1"
        return ""


def check_features(features: Features, needs: Needs) -> None:
    """Read all that a row gives and check its values; shapes were checked when it was scanned."""
    for stream, path in features.latents:
        with blamed(features, latent_column(stream, needs.first), path):
            opened = open_features(path)
            needs.check_values(needs.latent(features, opened, Part(stream)), opened, latent=True)
    if features.text is not None and needs.fields is not None:
        with blamed(features, TEXT_COLUMN, features.text):
            opened = open_features(features.text)
            for value in needs.texts(opened).values():
                needs.check_values(value, opened, latent=False)


@contextmanager
def blamed(features: Features, column: str, path: Path) -> Iterator[None]:
    """Begin the reason with the row, the column and the file."""
    try:
        yield
    except BadMedia as error:
        raise BadMedia(f"{features.row}: its {column} {printable(str(path))} {error}") from error


def _unpadded(text: Tensor, opened: Opened, masks: Sequence[str]) -> Tensor:
    """Cut a text to its true length: as a mask in the file says, or without the zeros at its end."""
    kept = opened.mask(masks)
    if kept is not None:
        if len(kept) != len(text) or not kept[: int(kept.sum())].all() or not kept.any():
            raise BadMedia(f"has a mask of {len(kept)} numbers that is no true length of {len(text)} tokens")
        return text[: int(kept.sum())]
    filled = text.ne(0).any(1).nonzero()
    return text[: int(filled[-1]) + 1] if len(filled) else text[:1]


def _shape(tensor: Tensor) -> str:
    return str(list(tensor.shape))
