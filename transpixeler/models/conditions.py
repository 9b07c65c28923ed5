"""Tell image-to-video models of given frames: masks and latents in channels beside the noisy ones, of each stream.

In: fields of the sources "clip" and "image", encoded, and which streams a task shows. Out: the tensors that a family's
`embed` takes. Streams that are not shown have a mask of zeros and the encoding of a grey video, or zeros where frames
are given one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from transpixeler.models.family import Field
from transpixeler.models.streams import StreamLayout

GREY = 128  # of a picture where none is given; an image encoder takes bytes


@dataclass(frozen=True)
class Shown:
    """Hold what samples can be shown, by field name, without masks: of their own frames, and where none is given."""

    fields: tuple[Field, ...]  # of the sources "clip" and "image", in the model's order
    own: Mapping[str, Tensor]  # [b, …]
    blank: Mapping[str, Tensor]  # [1, …]

    def values(
        self, layout: StreamLayout, rows: Sequence[Collection[int]], lasts: Sequence[Collection[int]] = ()
    ) -> dict[str, Tensor]:
        """Return the fields of samples, for each of which `rows` holds the streams whose given frames are shown.

        Of a field of stills those are the first frames, and `lasts` holds the streams whose last ones are. A stream of
        one frame is never shown it: nothing would be left to make.
        """
        longer = {stream for stream, shape in enumerate(layout.shapes) if shape[1] > layout.patch[0]}
        rows, found = [longer.intersection(streams) for streams in rows], {}
        lasts = [longer.intersection(streams) for streams in lasts] or [set() for _ in rows]
        for field in self.fields:
            own, blank = self.own[field.name], self.blank[field.name]
            if field.stills:
                found[field.name] = _with_stills(field, layout, own, (rows, lasts))
            elif field.source == "image":
                given = torch.tensor([0 in streams for streams in rows])
                found[field.name] = torch.where(given[:, None, None], own, blank)
            else:
                found[field.name] = _with_masks(field, layout, own, blank, rows)
        return found


def _with_masks(
    field: Field, layout: StreamLayout, own: Tensor, blank: Tensor, rows: Sequence[Collection[int]]
) -> Tensor:
    """Return [b, N'] of masks and latents: each stream's own where it is shown, else blank."""
    inside = with_channels(layout, field.width - field.mask)
    streams = []
    for number, pair in enumerate(zip(inside.unpack(own), inside.unpack(blank), strict=True)):
        given = torch.tensor([number in shown for shown in rows])[:, None, None, None, None]
        mask = given * given_frames(field, layout.shapes[number][1:])
        streams.append(torch.cat([mask.to(own.dtype), torch.where(given, *pair)], dim=1))
    return with_channels(layout, field.width).pack(streams)


def _with_stills(
    field: Field, layout: StreamLayout, own: Tensor, ends: tuple[Sequence[Collection[int]], ...]
) -> Tensor:
    """Return [b, N'] of masks and latents: zeros, but at the first and last latent frames that are shown."""
    streams, whole = [], with_channels(layout, field.width)
    for number, stills in enumerate(kept_layout(field, layout).unpack(own)):
        made = own.new_zeros(len(own), *whole.shapes[number])
        for place, rows in zip((0, -1), ends, strict=True):
            given = torch.tensor([number in shown for shown in rows], device=own.device)
            made[given, : field.mask, place] = 1
            made[given, field.mask :, place] = stills[given, :, place]
        streams.append(made)
    return whole.pack(streams)


def with_stills(fields: Sequence[Field], layout: StreamLayout, made: Tensor, values: Mapping[str, Tensor]) -> Tensor:
    """Return latents [N] with the stills that were shown in their places, which are not made anew."""
    for field in fields:
        if not field.stills:
            continue
        shown = with_channels(layout, field.width).unpack(values[field.name][None])
        pairs = zip(layout.unpack(made[None]), shown, strict=True)
        parts = [torch.where(one[:, :1] > 0, one[:, field.mask :], video) for video, one in pairs]
        made = layout.pack(parts)[0]
    return made


def shown_firsts(fields: Sequence[Field], layout: StreamLayout, values: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return by stream the first frames [C, 1, H, W] that are shown as stills."""
    found: dict[int, Tensor] = {}
    for field in fields:
        if field.stills:
            shown = with_channels(layout, field.width).unpack(values[field.name][None])
            pairs = zip(layout.segments, shown, strict=True)
            found |= {one.stream: part[0, field.mask :, :1] for one, part in pairs if bool(part[0, 0, 0].any())}
    return found


def kept_layout(field: Field, layout: StreamLayout) -> StreamLayout:
    """Return the layout of what is encoded of a field "clip": latents without masks; of stills, the two ends."""
    layout = with_channels(layout, field.width - field.mask)
    if not field.stills:
        return layout
    return replace(layout, shapes=tuple((c, min(2, frames), *sides) for c, frames, *sides in layout.shapes))


def given_frames(field: Field, cells: Sequence[int]) -> Tensor:
    """[1, mask, f, h, w]: 1 where a frame is given. Each channel is a frame of a latent one, which the first fills."""
    mask = torch.zeros(1, field.mask, *cells)
    mask[:, :, 0] = 1
    if field.last:
        mask[:, -1, -1] = 1
    return mask


def shown_fields(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Return the fields that come from frames alone."""
    return tuple(field for field in fields if field.source in ("clip", "image"))


def fields_from_frames(fields: Sequence[Field]) -> tuple[Field, ...]:
    """Return the fields that frames have a part in."""
    return tuple(field for field in fields if field.source != "caption")


def with_channels(layout: StreamLayout, channels: int) -> StreamLayout:
    """Return the layout of tensors that have other channels in the same cells."""
    return replace(layout, shapes=tuple((channels, *shape[1:]) for shape in layout.shapes), cuts=())


def shows_frames(fields: Sequence[Field]) -> bool:
    """Tell whether given frames are shown in channels beside the latents, and not by a time of their own."""
    return any(field.source == "clip" for field in fields)


def shows_stills(fields: Sequence[Field]) -> bool:
    """Tell whether first and last frames are shown one by one."""
    return any(field.stills for field in fields)


def grey_frames(frames: int, height: int, width: int) -> Tensor:
    """[1, 3, F, H, W] in [-1, 1] of mid-grey."""
    return torch.zeros(1, 3, frames, height, width)


def shown_video(pictures: Tensor, frames: int, *, last: bool) -> Tensor:
    """[n, H, W, 3] of bytes → [1, 3, F, H, W] in [-1, 1]: the first picture, grey frames, the last one if asked."""
    video = grey_frames(frames, *pictures.shape[1:3])
    pixels = pictures[[0, -1]].permute(0, 3, 1, 2).float() / 127.5 - 1
    video[0, :, 0] = pixels[0]
    if last:
        video[0, :, -1] = pixels[1]
    return video
