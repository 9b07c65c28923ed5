"""Score sampled videos by a trained scorer: latents and a caption in; cosines by name out."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.flow.objective import Fields
from transpixeler.models.family import ModelFolder
from transpixeler.models.streams import StreamLayout
from transpixeler.scoring.file import check_made_for, check_streams, read_scorer


class Scores:
    """A scorer on a device."""

    def __init__(self, path: str, config: Config, model: ModelFolder, device: torch.device) -> None:
        """config: of the videos that will come; the scorer must have been trained on just its streams, in any order."""
        file = Path(path).expanduser()
        self.scorer, self.facts = read_scorer(file)
        check_made_for(file, self.facts, config, model)
        check_streams(file, self.facts, config)
        self.places = [self.facts.sizes.streams.index(name) for name in config.streams]
        self.scorer.to(device).eval()
        self.device = device

    @torch.no_grad()
    def of_video(self, latents: Tensor, layout: StreamLayout, fields: Fields, *, caption: str) -> dict[str, float]:
        """Return the cosine of packed latents with their caption, if there is one, and of RGB with each companion."""
        videos = layout.videos(latents[None].to(self.device, torch.float32))
        sample, rgb, *others = self.scorer.embed_sample(videos, self.places)
        found = {f"score_{name}": rgb * other for name, other in zip(layout.names[1:], others, strict=True)}
        if caption:
            told = self.scorer.embed_caption(fields[self.facts.field][None].to(self.device))
            found["score_caption"] = sample * told
        return {name: float(products.sum()) for name, products in found.items()}
