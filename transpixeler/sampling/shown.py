"""Pictures go in, the fields of an image-to-video model come out: what `sample` and prompts of `eval` are shown.

Data sets read theirs from the cache; both are made by the same functions.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from transpixeler.models.conditions import GREY, Shown, grey_frames, kept_layout, shown_fields, shown_video
from transpixeler.models.family import Field, ModelFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.sampling.frames import Frames, release_memory


def show(
    model: ModelFolder,
    frames: Frames,
    layout: StreamLayout,
    pictures: Mapping[int, np.ndarray],
    lasts: Mapping[int, np.ndarray] | None = None,
) -> dict[str, Tensor]:
    """Return the fields, without a batch, that show a video's streams their given frames; {} where none is taken.

    pictures: uint8 [n, H, W, 3] by stream, the first frame and, where the model takes both at once, the last. lasts:
    last frames, of a model that is shown each end by itself.
    """
    fields = shown_fields(model.fields)
    own: dict[str, Tensor] = {}
    blank: dict[str, Tensor] = {}
    for field in fields:
        if field.stills:
            own[field.name] = _stills(model, frames, layout, field, (pictures, lasts or {}))
            blank[field.name] = torch.zeros_like(own[field.name])
            continue
        make = _image_tokens if field.source == "image" else _clip_latents
        own[field.name], blank[field.name] = make(model, frames, layout, field, pictures)
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


def _image_tokens(
    model: ModelFolder, frames: Frames, layout: StreamLayout, field: Field, pictures: Mapping[int, np.ndarray]
) -> tuple[Tensor, Tensor]:
    """Return [1, tokens, width] of stream 0's pictures, grey ones where there are none; and of grey ones."""
    _, height, width = model.geometry.pixels(layout.shapes[0])
    count = 2 if field.last else 1
    encoder = model.load_image_encoder(device=frames.device, dtype=torch.float32)
    blank = encoder.encode(torch.full((count, height, width, 3), GREY, dtype=torch.uint8)).cpu()[None]
    own = encoder.encode(torch.from_numpy(pictures[0][[0, -1][:count]])).cpu()[None] if 0 in pictures else blank
    del encoder
    release_memory(frames.device)
    return own, blank
