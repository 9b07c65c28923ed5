"""Tell which sizes and lengths a model takes: pixels go in, latent cells and tokens come out, or the one error text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from transpixeler.models.streams import Grid, Shape, StreamLayout


@dataclass(frozen=True)
class Geometry:
    """The VAE's stride and channels, the patch, and the rules that follow from them."""

    stride: Grid  # frames, rows and columns of pixels in one latent cell
    channels: int  # of a latent
    patch: Grid  # latent cells in one token
    first_alone: bool = True  # the first frame is a latent frame of its own, and the others go by strides
    coarsest: int = 1  # scale that sides must also suit, that of a companion
    stills: bool = False  # the model makes images: one frame, and no more
    smallest: int = 1  # a video is also laid out at 1/smallest of its sides

    @property
    def unit(self) -> tuple[int, int]:
        """(height, width) that sides must be multiples of."""
        cells = self.coarsest * self.smallest
        return self.stride[1] * self.patch[1] * cells, self.stride[2] * self.patch[2] * cells

    def over(self, scales: Sequence[int]) -> Geometry:
        """Return the geometry of sizes at which streams of these scales can all be encoded."""
        return replace(self, coarsest=math.lcm(*scales))

    def latent(self, frames: int, height: int, width: int, *, scale: int = 1) -> Shape:
        """Return the shape (C, f, h, w) of the latents of a video, encoded at 1/scale of its height and width."""
        assert not self.fault(width, height, frames), self.fault(width, height, frames)
        f = (frames - 1) // self.stride[0] + 1 if self.first_alone else frames // self.stride[0]
        return self.channels, f, height // scale // self.stride[1], width // scale // self.stride[2]

    def layout(self, names: Sequence[str], scales: Sequence[int], bucket: tuple[int, int, int]) -> StreamLayout:
        """Lay out streams of a bucket (frames, height, width), each at its scale."""
        shapes = tuple(self.latent(*bucket, scale=scale) for scale in scales)
        return StreamLayout(tuple(names), shapes, self.patch, scales=tuple(scales))

    def frames(self, latent_frames: int) -> int:
        """Return how many frames decode from so many latent ones."""
        return (latent_frames - 1) * self.stride[0] + 1 if self.first_alone else latent_frames * self.stride[0]

    def pixels(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return the (frames, height, width) of a video with latents of shape (C, f, h, w)."""
        _, f, h, w = shape
        return self.frames(f), h * self.stride[1], w * self.stride[2]

    def longest(self, frames: int) -> int:
        """Return the greatest number of frames up to this one that the model can take; at least its shortest."""
        step, least = self.stride[0] * self.patch[0], self.frames(1 if self.first_alone else self.patch[0])
        return least if self.stills else least + max(0, frames - least) // step * step

    def shortest(self, frames: int) -> int:
        """Return the least number of frames from this one on that the model can take."""
        longest = self.longest(frames)
        return longest if longest >= frames else longest + self.stride[0] * self.patch[0]

    def nearest(self, width: int, height: int, frames: int) -> tuple[int, int, int]:
        """Return the nearest (width, height, frames) that the model can take."""
        tall, wide = self.unit
        step, least = self.stride[0] * self.patch[0], self.frames(1 if self.first_alone else self.patch[0])
        length = least if self.stills else least + max(0, round((frames - least) / step)) * step
        return max(1, round(width / wide)) * wide, max(1, round(height / tall)) * tall, length

    def length_fault(self, frames: int) -> str:
        """Return why a number of frames cannot be encoded without losing some, and which near it can; or nothing."""
        if self.stills:
            return (
                "" if frames == 1 else f"{frames} frames are no image, and this model makes images alone; use 1 frame"
            )
        step = self.stride[0] * self.patch[0]
        least = self.frames(1 if self.first_alone else self.patch[0])
        extra = (frames - least) % step
        if frames >= least and not extra:
            return ""
        below = frames - extra
        choices = " or ".join(str(n) for n in (below, below + step) if n >= least) or str(least)
        rule = f"{step}k+{least % step}" if least % step else f"a multiple of {step}"
        return f"{frames} frames are not {rule}, which this model needs; {choices} would be"

    def fault(self, width: int, height: int, frames: int) -> str:
        """Return why a size cannot be taken, with the nearest that can; or nothing."""
        tall, wide = self.unit
        if width < 1 or height < 1 or width % wide or height % tall:
            w, h, _ = self.nearest(width, height, frames)
            return (
                f"{width}×{height} is not a multiple of {wide}×{tall} pixels, which this model needs"
                f"{f' with a companion at scale {self.coarsest}' * (self.coarsest > 1)}; {w}×{h} would be"
            )
        return self.length_fault(frames)


USUAL = Geometry((4, 8, 8), 16, (1, 2, 2))  # of most video models, for data that is looked at before a model is named
