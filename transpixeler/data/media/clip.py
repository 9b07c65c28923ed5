"""Values that all readers of media share: `Media`, what a file shows, and `Clip`, the part that is cut from it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

SLACK = Fraction(1, 1000)  # Matroska rounds timestamps to milliseconds: a frame counts as shown 1 ms early


@dataclass(frozen=True, slots=True)
class Media:
    """Describe a file as a player shows it: rotated upright and with square pixels."""

    frames: int
    height: int
    width: int
    fps: Fraction  # 0: has no rate of its own (a folder of images), so it is taken at the rate that is asked for
    duration: Fraction  # seconds, 0 where there is no rate
    alpha: bool

    @property
    def image(self) -> bool:
        return self.frames == 1

    def frames_at(self, fps: Fraction) -> int:
        """Return how many frames a resampling to `fps` yields."""
        if self.image or not self.fps:
            return self.frames
        return max(1, math.ceil((self.duration - SLACK) * fps))


@dataclass(frozen=True, slots=True)
class Clip:
    """Say what to cut from all streams of a sample: this many frames at this rate and size, from `start` on."""

    sample_id: str
    start: Fraction  # seconds after the first frame
    frames: int
    fps: Fraction
    height: int
    width: int

    @property
    def id(self) -> str:
        return f"{self.sample_id}@{round(self.start * self.fps)}+{self.frames}:{self.width}x{self.height}"
