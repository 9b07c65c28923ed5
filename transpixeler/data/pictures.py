"""Name the pictures that captions are read beside: clips in; the first frames of their first streams out."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from transpixeler.data.media.clip import Clip
from transpixeler.data.media.fill import Fill
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.data.sources.samples import Sample


@dataclass(frozen=True)
class Picture:
    """The first frame of a clip's first stream, which its caption is read beside."""

    sample: Sample
    clip: Clip  # as little of a clip as its first frame depends on
    fill: Fill
    key: bytes  # of its pixels

    def read(self, threads: int = 0) -> np.ndarray:
        """Return it, uint8 [H, W, 3]."""
        sample = self.sample if self.sample.rgba else replace(self.sample, paths=self.sample.paths[:1])
        return next(iter(decode_pair(sample, self.clip, fill=self.fill, threads=threads).values()))[0]


def least_clip(sample: Sample, clip: Clip, fill: Fill) -> Clip:
    """Return as little of a clip as its first frame depends on: extended colours are those of all the frames."""
    return clip if sample.rgba and fill.policy == "extend" else replace(clip, frames=1)
