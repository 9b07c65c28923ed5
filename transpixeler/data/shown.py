"""Encode what image-to-video models are shown of given frames: a clip's pictures in, records beside its latents out.

A clip's own records hold its given frames; one blank record for each bucket stands for "no frame is given". What an
image encoder makes of a prompt's pictures is a record too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.buckets import Bucket
from transpixeler.data.given import GivenPicture
from transpixeler.models.conditions import GREY, grey_frames, shown_video
from transpixeler.models.family import Field, ImageEncoder, ModelFolder, Vae


@dataclass(frozen=True)
class FieldJob:
    """One field that is no clip's own: of no given frame, in one bucket, or of pictures that a prompt gives."""

    field: Field
    bucket: Bucket
    key: bytes
    folder: Path
    pictures: tuple[GivenPicture, ...] = ()  # for the image encoder

    @property
    def cost(self) -> int:
        frames, height, width = self.bucket
        return frames * height * width


class Encoders:
    """A model's VAE and image encoder, each loaded when it is first used."""

    def __init__(self, model: ModelFolder, device: torch.device) -> None:
        self.model, self.device = model, device

    @cached_property
    def vae(self) -> Vae:
        return self.model.load_vae(device=self.device, dtype=torch.float32)

    @cached_property
    def images(self) -> ImageEncoder:
        return self.model.load_image_encoder(device=self.device, dtype=torch.float32)


def encode_shown(field: Field, frames: np.ndarray, encoders: Encoders) -> Tensor:
    """Return the record of a stream's given frames, of its frames uint8 [F, H, W, 3]."""
    pictures = torch.from_numpy(frames[[0, -1]])
    if field.stills:
        return _stills(pictures, len(frames), encoders)
    if field.source == "image":
        return encoders.images.encode(pictures if field.last else pictures[:1])
    return encoders.vae.encode(shown_video(pictures, len(frames), last=field.last))[0]


def _stills(pictures: Tensor, frames: int, encoders: Encoders) -> Tensor:
    """Return the latents [C, 2, h, w] of both ends, each encoded by itself; an image is never shown to itself."""
    if frames == 1:
        return torch.zeros(encoders.model.geometry.latent(1, *pictures.shape[1:3]))
    return torch.cat([encoders.vae.encode(picture[None, None])[0] for picture in pictures], dim=1)


def encode_field(job: FieldJob, encoders: Encoders) -> Tensor:
    """Return the record of a clip of which no frame is given, or of a prompt's pictures."""
    if job.pictures:
        return encoders.images.encode(torch.from_numpy(np.stack([picture.read() for picture in job.pictures])))
    if job.field.source == "clip":
        return encoders.vae.encode(grey_frames(*job.bucket))[0]
    _, height, width = job.bucket
    picture = torch.full((2 if job.field.last else 1, height, width, 3), GREY, dtype=torch.uint8)
    return encoders.images.encode(picture)


def encode_all_shown(
    wanted: Mapping[tuple[str, int], bytes],
    fields: Sequence[Field],
    streams: Sequence[np.ndarray],
    encoders: Encoders,
) -> list[tuple[str, bytes, Tensor]]:
    """Return kind, key and value of the records that are wanted, by field and stream, of a clip's streams."""
    by_name = {field.name: field for field in fields}
    found = [(by_name[name], streams[stream], key) for (name, stream), key in wanted.items()]
    return [(field.source, key, encode_shown(field, frames, encoders)) for field, frames, key in found]
