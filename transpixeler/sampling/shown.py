"""Pictures go in, the fields of an image-to-video model come out: what `sample` and prompts of `eval` are shown.

Data sets read theirs from the cache, and so do prompts of `eval` what the image encoder makes; all are made by the same
functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.cache.records import DTYPE
from transpixeler.data.dataset import Dataset
from transpixeler.data.given import digest_of
from transpixeler.data.prompt_pictures import NO_PICTURE
from transpixeler.models.conditions import GREY, Shown, grey_frames, kept_layout, shown_fields, shown_video
from transpixeler.models.family import Field, ModelFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.frames import Frames, release_memory


class ImageTokens:
    """Give what the image encoder makes of pictures, bf16 as in a cache; it is loaded only for what is not known."""

    def __init__(
        self,
        model: ModelFolder,
        device: torch.device,
        known: Mapping[tuple[str, str], Tensor] | None = None,
        *,
        dtype: torch.dtype = DTYPE,
    ) -> None:
        """known: those that a cache holds, by field and the digests of the pictures."""
        self._model, self._device, self._dtype = model, device, dtype
        self._known = dict(known or {})

    def of(self, field: Field, height: int, width: int, pictures: np.ndarray | None) -> tuple[Tensor, Tensor]:
        """Return fp32 [1, tokens, width] of pictures uint8 [n, H, W, 3], or of grey ones for None; and of grey ones."""
        told = field.name, NO_PICTURE if pictures is None else "".join(map(digest_of, pictures))
        blank = field.name, NO_PICTURE
        found = {name: self._known[name] for name in (told, blank) if name in self._known}
        if lacking := {told: pictures, blank: None}.keys() - found:
            grey = np.full((1 + field.last, height, width, 3), GREY, np.uint8)
            encoder = self._model.load_image_encoder(device=self._device, dtype=torch.float32)
            for name in lacking:
                shown = grey if name == blank or pictures is None else pictures
                found[name] = encoder.encode(torch.from_numpy(shown)).cpu().to(self._dtype)
            del encoder
            release_memory(self._device)
        self._known[blank] = found[blank]  # those of a video's own pictures would add up
        return found[told].float()[None], found[blank].float()[None]


def cached_tokens(data: Dataset) -> dict[tuple[str, str], Tensor]:
    """Return what a data set's cache holds of the image encoder's, for `ImageTokens`."""
    found = {told: data.cache.get(key) for told, key in data.pictures.tokens.items()}
    return {told: value for told, value in found.items() if value is not None}


def show(
    model: ModelFolder,
    frames: Frames,
    layout: StreamLayout,
    pictures: Mapping[int, np.ndarray],
    lasts: Mapping[int, np.ndarray] | None = None,
    *,
    tokens: ImageTokens | None = None,
) -> dict[str, Tensor]:
    """Return the fields, without a batch, that show a video's streams their given frames; {} where none is taken.

    pictures: uint8 [n, H, W, 3] by stream, the first frame and, where the model takes both at once, the last. lasts:
    last frames, of a model that is shown each end by itself. tokens: of the image encoder; without, they are
    made, in fp32.
    """
    tokens = tokens or ImageTokens(model, frames.device, dtype=torch.float32)
    fields = shown_fields(model.fields)
    own: dict[str, Tensor] = {}
    blank: dict[str, Tensor] = {}
    for field in fields:
        if field.stills:
            own[field.name] = _stills(model, frames, layout, field, (pictures, lasts or {}))
            blank[field.name] = torch.zeros_like(own[field.name])
            continue
        if field.source == "image":
            _, height, width = model.geometry.pixels(layout.shapes[0])
            given = pictures[0][[0, -1][: 1 + field.last]] if 0 in pictures else None
            own[field.name], blank[field.name] = tokens.of(field, height, width, given)
        else:
            own[field.name], blank[field.name] = _clip_latents(model, frames, layout, field, pictures)
    values = Shown(fields, own, blank).values(layout, [pictures.keys()], [(lasts or {}).keys()])
    return {name: value[0] for name, value in values.items()}


def _stills(
    model: ModelFolder, frames: Frames, layout: StreamLayout, field: Field, ends: tuple[Mapping[int, np.ndarray], ...]
) -> Tensor:
    """Return [1, N] latents of both ends of all streams, each encoded by itself, zeros where none is given."""
    inside = kept_layout(field, layout)
    made = torch.zeros(1, inside.elements)
    for number, latents in enumerate(inside.unpack(made)):
        for place, pictures in zip((0, -1), ends, strict=True):
            if number in pictures:
                latents[0, :, place] = frames.encode(pictures[number][:1])[:, 0]
    return made


def _clip_latents(
    model: ModelFolder, frames: Frames, layout: StreamLayout, field: Field, pictures: Mapping[int, np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Return [1, N] latents of all streams, those without pictures grey; and of grey alone."""
    grey = grey_frames(*model.geometry.pixels(layout.shapes[0]))
    nothing, streams = frames.encode(grey).flatten(), range(len(layout.names))
    given = {stream: torch.from_numpy(pictures[stream]) for stream in streams if stream in pictures}
    made = {
        stream: frames.encode(shown_video(picture, grey.shape[2], last=field.last)).flatten()
        for stream, picture in given.items()
    }
    return torch.cat([made.get(stream, nothing) for stream in streams])[None], nothing.repeat(len(streams))[None]
