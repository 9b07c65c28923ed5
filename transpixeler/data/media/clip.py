"""Values that all readers of media share: `Media`, what a file shows, and `Clip`, the part that is cut from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from fractions import Fraction

NTSC = Fraction(1000, 1001)
SLACK = Fraction(1, 1000)  # Matroska rounds timestamps to milliseconds: a frame counts as shown 1 ms early


def exact_rate(fps: float) -> Fraction:
    """Return a rate as an exact fraction: 29.97 means 30000/1001."""
    near = round(fps) * NTSC
    meant = fps % 1 != 0 and abs(fps - near) < near / 5000
    return near if meant else Fraction(str(fps))


@dataclass(frozen=True, slots=True)
class Media:
    """Describe a file as a player shows it: rotated upright and with square pixels."""

    frames: int
    height: int
    width: int
    fps: Fraction  # 0: has no rate of its own (an image sequence), so it is taken at the rate that is asked for
    duration: Fraction  # seconds, 0 where there is no rate
    alpha: bool

    @property
    def image(self) -> bool:
        return self.frames == 1

    def at_rate(self, fps: Fraction) -> Media:
        """Return the same with a rate, where it has none of its own and is no still."""
        if self.fps or self.image or not fps:
            return self
        return replace(self, fps=fps, duration=self.frames / fps)

    def frames_at(self, fps: Fraction) -> int:
        """Return how many frames a resampling to `fps` yields."""
        if self.image or not self.fps:
            return self.frames
        # ceil((duration - SLACK) * fps), in whole numbers, as fractions are slow and files are many
        parts = self.duration.denominator * SLACK.denominator * fps.denominator
        shown = self.duration.numerator * SLACK.denominator - self.duration.denominator * SLACK.numerator
        return max(1, -(-shown * fps.numerator // parts))


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
