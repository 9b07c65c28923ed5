"""Measure on clips how often a scorer finds the right caption, and the right companion, among all of them.

In: a data set in the cache. Out: shares, each with what chance would give.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.loader import Assembler, Batch
from transpixeler.parallel.runtime import Runtime
from transpixeler.scoring.towers import Scorer


@dataclass(frozen=True)
class Found:
    """The share of clips for which the nearest was the right one."""

    what: str  # "caption", or a companion's name
    clips: int
    choices: int
    right: float

    @property
    def chance(self) -> float:
        return 1 / self.choices

    def line(self) -> str:
        share = f"{self.right:.1%} of {self.clips} clips (chance {self.chance:.1%})"
        return f"the right {self.what} of {self.choices} for {share}"


def embed(scorer: Scorer, batch: Batch, text: str, device: torch.device) -> Tensor:
    """Return the vectors of a batch: [captions, samples, RGB, companion, …; b, D]."""
    captions = scorer.embed_caption(batch.fields[text].to(device))
    return torch.cat([captions[None], scorer.embed_sample(batch.layout.videos(batch.latents.to(device)))])


def retrieval(scorer: Scorer, assembler: Assembler, text: str, runtime: Runtime, *, clips: int = 0) -> list[Found]:
    """Embed clips (0: all), each rank its share, and look for each one's caption and companions. A collective call."""
    data = assembler.dataset
    items = np.arange(len(data.items))[: clips or None]
    vectors = torch.stack([v for _, v in _shared(scorer, assembler, text, runtime, items)], 1)
    captions = [data.items[i].text_keys for i in items]
    found = [_share("caption", vectors[1], vectors[0], captions)]
    for place, name in enumerate(data.streams[1:], start=1):
        videos = [data.video_keys(data.items[i])[place] for i in items]
        found.append(_share(name, vectors[2], vectors[place + 2], videos))
    return found


@torch.no_grad()
def _shared(
    scorer: Scorer, assembler: Assembler, text: str, runtime: Runtime, items: np.ndarray
) -> list[tuple[int, Tensor]]:
    """Return each item's vectors [kinds, D] in the order of the items."""
    device = next(scorer.parameters()).device
    mine = [
        (int(item), embed(scorer, assembler.batch(items[item : item + 1], slots=range(1)), text, device)[:, 0].cpu())
        for item in range(runtime.rank, len(items), runtime.world_size)
    ]
    return sorted((one for part in runtime.gather(mine) for one in part), key=lambda one: one[0])


def _share(what: str, videos: Tensor, others: Tensor, keys: Sequence[Hashable]) -> Found:
    """Choose among others with distinct keys; those of one key are one choice."""
    first: dict[Hashable, int] = {}
    for place, key in enumerate(keys):
        first.setdefault(key, place)
    places = list(first.values())
    nearest = (videos @ others[places].T).argmax(1)
    right = sum(keys[places[int(choice)]] == key for choice, key in zip(nearest, keys, strict=True))
    return Found(what, len(keys), len(places), right / len(keys))
