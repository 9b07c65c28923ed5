"""Measure one sample video: its matte, how near the VAE lets its RGB come, how far it drifted from the base's.

In: a video's frames, and the clip that it was made for, if any. Out: numbers by name, where they can be measured.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np

from transpixeler.config.sections import Config
from transpixeler.data.media import decode
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.fill import Fill
from transpixeler.data.sources.pairs import decode_pair
from transpixeler.data.sources.samples import Sample
from transpixeler.evaluation import metrics
from transpixeler.evaluation.clips import HeldOut, Piece
from transpixeler.runs.folder import read_facts
from transpixeler.sampling.files import FACTS
from transpixeler.sampling.frames import Frames
from transpixeler.sampling.video import Video, settings

logger = logging.getLogger("transpixeler")


class Measures:
    """Measures videos; holds what does not change as the model learns."""

    def __init__(self, config: Config, held_out: HeldOut, frames: Frames) -> None:
        self.config, self.held_out, self.frames = config, held_out, frames
        self._vae_psnr: dict[int, dict[str, float]] = {}  # by clip

    def of_video(
        self, piece: Piece | None, streams: Mapping[str, np.ndarray], *, given: Collection[int] = ()
    ) -> dict[str, float]:
        """Return measures of the matte, and of the VAE alone on the same clip. given: streams with given frames."""
        if piece is None and 1 in given:
            return {}
        return self._alpha(piece, streams) | (self._vae_floor(piece) if piece else {})

    def _alpha(self, piece: Piece | None, streams: Mapping[str, np.ndarray]) -> dict[str, float]:
        """Compare with the clip's own matte where its RGB was given; a video made from a caption has no reference."""
        rgb, *aux = (frames / np.float32(255) for frames in streams.values())
        if not aux or (piece and 1 in piece.task.given):
            return {}
        reference = {}
        if piece and 0 in piece.task.given:
            _, matte, *_ = self._decoded(piece)
            reference = {"reference_alpha": matte.mean(-1)}
        return metrics.alpha_metrics(rgb, aux[0], fill=fill_color(self.config), **reference)

    def _vae_floor(self, piece: Piece) -> dict[str, float]:
        """Return how near the VAE alone brings the clip's RGB to itself: no model that uses it comes nearer."""
        origin = self.held_out.item(piece).origin
        if piece.task.gives or origin is None:
            return {}
        if piece.item not in self._vae_psnr:
            self._vae_psnr[piece.item] = self._measured_floor(piece, *origin)
        return self._vae_psnr[piece.item]

    def _measured_floor(self, piece: Piece, sample: Sample, clip: Clip) -> dict[str, float]:
        try:
            rgb = next(iter(decode_pair(sample, clip, fill=Fill.of(self.config.data)).values()))
        except (OSError, BadMedia) as fault:  # training needs the latents alone, so a lost file must not end it
            logger.warning("%s is measured without vae_psnr: %s", sample.id, fault)
            return {}
        return {"vae_psnr": metrics.psnr(rgb / np.float32(255), self._decoded(piece)[0])}

    def _decoded(self, piece: Piece) -> list[np.ndarray]:
        """Return the clip's streams as the VAE decodes them, in [0, 1]: the best that its latents can become."""
        batch = self.held_out.batch(piece)
        return [frames / np.float32(255) for frames in self.frames.decode(batch.latents[0], batch.layout).values()]

    def drift(self, request: Video, folder: Path, base: Path | None) -> dict[str, float]:
        """Compare a written video's RGB with the base's in `base`, so that the file's losses are in both.

        A resumed run may sample with other settings than the base did; then the two cannot be compared.
        """
        rgb = self.held_out.data.streams[0]
        if base is None or 0 in request.given:
            return {}
        ours, theirs = (place / request.name / f"{rgb}.mp4" for place in (folder, base))
        if not ours.is_file() or not theirs.is_file():
            return {}
        told = read_facts(base / request.name / FACTS)
        if not settings(request, self.config.sample).items() <= told.items():
            return {}
        one, other = (read_video(file) / np.float32(255) for file in (ours, theirs))
        return {"rgb_drift": metrics.rgb_drift(one, other)} if one.shape == other.shape else {}


def fill_color(config: Config) -> tuple[float, ...] | None:
    """Return the one colour, in [0, 1], that training clips show under zero alpha, or None."""
    if config.data.fill not in ("black", "color"):
        return None
    return tuple(c / 255 for c in config.data.fill_color) if config.data.fill == "color" else (0.0, 0.0, 0.0)


def read_video(file: Path) -> np.ndarray:
    """Return all frames, uint8 [F, H, W, 3]."""
    media = decode.probe(file)
    return decode.read_frames(file, range(media.frames), height=media.height, width=media.width)
