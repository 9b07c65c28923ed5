"""The contract of a family: all that generic code knows of an architecture, and how it finds one.

In: `model.family` and `model.path`. Out: a `ModelFolder`, which tells geometry, fields and weights without loading any,
builds the backbone and opens the encoders. A family is one folder `families/NAME/` whose `family.py` holds `FAMILY`.
"""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from transpixeler.config.sections import ModelConfig, ObjectiveConfig, UserError, family_names
from transpixeler.models.experts import ONLY, Expert
from transpixeler.models.geometry import Geometry
from transpixeler.models.ladder import Ladder
from transpixeler.models.names import Names
from transpixeler.models.noising import RECTIFIED, Noising
from transpixeler.models.resolve import resolve
from transpixeler.models.streams import Grid

MODEL_CONFIGS = ("model_index.json", "config.json", "*/config.json")  # of a model, which say its family
Digest = Callable[[Path], str]


def file_digest(path: Path) -> str:
    """Hash what a file holds."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


@dataclass(frozen=True)
class Field:
    """One tensor that a model is conditioned on.

    A field with a `length` is `[B, length, width]`, cached at its true length and padded with zeros; without, it is
    `[B, width]`. A `masked` one is followed by its true lengths `[B]`.

    Two sources tell a model of given frames. "clip": latents of each stream's first frame followed by grey ones, with
    `mask` channels before them that tell which frames are given, packed as the streams are: `width` channels in all.
    "image": an image encoder's tokens of stream 0's first frame. A model with a field of either is shown given frames
    so, and not by a time of their own. `last`: the last frame is given with the first. `stills`: either or both may be
    given, each encoded by itself, in its place among zeros.

    "caption+image": a text encoder's rows of the caption beside stream 0's first frame. A black picture stands for a
    frame that a task does not give, and beside an empty caption.
    """

    name: str  # also the kind of its cache records
    width: int
    length: int | None = None
    masked: bool = False
    source: Literal["caption", "caption+image", "clip", "image"] = "caption"
    mask: int = 0
    last: bool = False
    stills: bool = False
    least: int = 0  # rows that a record has before those of the caption: of a picture
    droppable: bool = True  # caption dropout replaces it by that of an empty caption
    spelled: tuple[str, ...] = ()  # names that files of other programs have for it

    @property
    def tensors(self) -> int:
        """Count the tensors that stand for it in the flow's inputs."""
        return 2 if self.masked else 1


@dataclass(frozen=True)
class SamplingDefaults:
    """Sampling settings that come with a family."""

    negative_prompt: str
    shift: float  # of noise levels, in t → shift·t / (1 + (shift − 1)·t)


class Vae(Protocol):
    """A video autoencoder, as encoding and sampling use it."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        ...

    def to(self, device: torch.device) -> Vae: ...


class TextEncoder(Protocol):
    """Captions to the fields that come from them."""

    @property
    def networks(self) -> Sequence[Any]:
        """Return the networks that it holds on the device."""
        ...

    @property
    def fingerprint(self) -> str: ...

    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return for each text its fields by name, [true length, width] or [width]."""
        ...

    def to(self, device: torch.device) -> TextEncoder: ...


class SeeingTextEncoder(TextEncoder, Protocol):
    """The same, of a model with a field of the source "caption+image"; `encode` gives captions beside black."""

    def encode_beside(self, texts: Sequence[str], pictures: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Return for each text its fields beside a picture, uint8 [H, W, 3]; None: a black one."""
        ...


class ImageEncoder(Protocol):
    """Pictures to tokens, for models that are shown given frames through one."""

    @property
    def fingerprint(self) -> str: ...

    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] → fp32 [n · tokens, width], each picture by itself."""
        ...

    def to(self, device: torch.device) -> ImageEncoder: ...


class ModelFolder(ABC):
    """One model on disk: what `model.path` resolves to, looked up once."""

    family: Family
    path: str  # as the user gave it: the transformer, and all else where `encoders` is not given
    encoders: str  # where VAE, text and image encoders lie
    text_parts: tuple[str, ...] = ("",)  # networks that read captions, each by its one field; "": one makes all fields
    text_places: tuple[str, ...] = ("text_encoder",)  # their folders beside the other encoders, in the same order
    # Streams lie in the channels of one network: of one size, and told one time for all. Its attention over time can be
    # kept to the present frame.
    joins: bool = False

    # -- without loading a weight

    @cached_property
    @abstractmethod
    def config(self) -> Mapping[str, Any]:
        """The published config of the transformer."""

    @cached_property
    @abstractmethod
    def geometry(self) -> Geometry: ...

    @cached_property
    @abstractmethod
    def fields(self) -> tuple[Field, ...]: ...

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        """The model's whole transformers, that for the most noise first; most models have one."""
        return (ONLY,)

    @property
    def noising(self) -> Noising:
        """Return what the model learns between latents and noise."""
        return RECTIFIED

    def ladder(self, objective: ObjectiveConfig) -> Ladder | None:
        """Return the sizes at which the model makes a video one after another; None: it makes it at once."""
        return None

    @property
    def pictures(self) -> tuple[str, ...]:
        """Return by which arguments diffusers' pipeline takes the pictures that the model is made to be shown."""
        return ()

    @abstractmethod
    def diffusers_config(self) -> dict[str, Any]:
        """Return the transformer's config.json as diffusers writes it."""

    def clean_caption(self, text: str) -> str:
        """Return what the text encoder reads of a caption: captions that differ in nothing else share one encoding."""
        return text

    @abstractmethod
    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        """Hash all that cached latents depend on."""

    @abstractmethod
    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        """Hash all that cached texts depend on."""

    def image_fingerprint(self, digest: Digest = file_digest) -> str:
        """Hash all that cached image tokens depend on; asked only where a field comes from images."""
        raise NotImplementedError(f"{self.family.title} has no image encoder")

    def latent_statistics(self) -> tuple[Tensor, Tensor] | None:
        """Return the mean and deviation of each channel of raw latents, where a config at hand tells them."""
        return None

    @property
    def image_trace(self) -> float:
        """Return the share of given first frames' latents in the noise that a video starts from."""
        return 0.0

    # -- noise levels of a video of so many tokens, those of companions not counted

    def shift_of(self, grid: Grid) -> float:
        """Return `shift` for tokens of a grid, which some models' depends on."""
        return self.shift(math.prod(grid))

    def sampling_shift_of(self, grid: Grid) -> float:
        """Return `sampling_shift` likewise."""
        return self.sampling_shift(math.prod(grid))

    def shift(self, tokens: int) -> float:
        """Return what `objective.shift: auto` stands for: how far training shifts its noise levels."""
        return 1.0

    def sampling_shift(self, tokens: int) -> float:
        """Return what `sample.shift: auto` stands for."""
        return self.family.sampling.shift

    def noise_levels(self, steps: int, tokens: int) -> list[float] | None:
        """Return the levels of `sample.shift: auto` with the euler scheduler, from 1 down, without the 0 at the end.

        None: even ones, shifted by `sampling_shift`.
        """
        return None

    # -- made when they are asked for

    @abstractmethod
    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> Any:
        """Build the backbone on the current default device, without weights. fps: for positions in seconds."""

    @abstractmethod
    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae: ...

    @abstractmethod
    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder: ...

    def load_text_part(self, part: str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        """Load one of these networks, whose encoder makes its own field alone."""
        assert not part, f"{self.family.title} has one network"
        return self.load_text_encoder(device=device, dtype=dtype)

    def load_image_encoder(self, *, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        """Load what makes the tokens of fields that come from images."""
        raise NotImplementedError(f"{self.family.title} has no image encoder")


@dataclass(frozen=True)
class License:
    """A licence as the Hub names it; one that is `other` there has a name of its own, and a place where it lies."""

    id: str
    name: str = ""
    link: str = ""

    @property
    def title(self) -> str:
        return self.name or self.id


APACHE, UNKNOWN = License("apache-2.0"), License("unknown")


@dataclass(frozen=True, eq=False)  # one object for each family
class Family:
    """One architecture: its facts, and how a folder of it is told and opened."""

    name: str
    title: str  # as people call it
    names: Names
    open: Callable[..., ModelFolder]  # (path, encoders="")
    recognises: Callable[[Path], bool]  # a local folder or file
    sampling: SamplingDefaults
    lora_targets: tuple[str, ...]
    transformer_class: str  # of diffusers
    pipeline_class: str
    example: str  # a Hub id that a message may name
    image_pipeline_class: str = ""  # for models that are shown pictures, where diffusers has another for these
    makes: Literal["video", "image"] = "video"
    license: License = UNKNOWN  # of its published weights, where their own folder does not say it
    licenses: Mapping[str, License] = field(default_factory=dict)  # by Hub id, of those that have another
    experts: tuple[str, ...] = ()  # names of those that its models may have, as diffusers' pipeline orders them
    shapes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # published configs, in diffusers' words

    def internal_names(self, stored: Iterable[str]) -> dict[str, str]:
        return self.names.internal_names(stored)


def length_of(name: str) -> str:
    """Return the name of the true lengths of a masked field."""
    return f"{name}_length"


def caption_fields(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Return the fields that come from captions, alone or beside a picture; they stand before the others."""
    return tuple(field for field in fields if field.source in ("caption", "caption+image"))


def sees_frames(fields: Sequence[Field]) -> bool:
    """Tell whether captions are read beside their clip's first frame."""
    return any(field.source == "caption+image" for field in fields)


def find_family(name: str) -> Family:
    """Return a family by its name, imported only when it is used."""
    return import_module(f"transpixeler.families.{name}.family").FAMILY


def families() -> list[Family]:
    return [find_family(name) for name in family_names()]


def recognised(path: Path) -> list[Family]:
    """Return the families that know a local folder or file as theirs."""
    return [family for family in families() if family.recognises(path)]


def examples() -> str:
    """Return Hub ids that a message may name."""
    return " or ".join(family.example for family in families() if family.example)


def open_model(config: ModelConfig) -> ModelFolder:
    """Open `model.path` as what `model.family` names, or as what the folder says that it is."""
    if not config.path:
        raise UserError(f"model.path: set it to a model's folder, file or Hub id, such as {examples()}")
    if config.family:
        return find_family(config.family).open(config.path, config.encoders)
    found = recognised(resolve(config.path, only=MODEL_CONFIGS))
    if len(found) != 1:
        known = ", ".join(family.title for family in families())
        raise UserError(
            f"model.path: {config.path} does not say which model it is; known are {known}: set model.family to one of "
            f"{', '.join(family_names())}, or model.path to a folder with the config.json of such a model"
        )
    return found[0].open(config.path, config.encoders)
