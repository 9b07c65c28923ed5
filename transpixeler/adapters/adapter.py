"""The adapter as a value: trained weights by internal name, between files and models.

Files in any spelling are read into it and written from it; it goes onto a model and comes off one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.models.family import Family, find_family
from transpixeler.models.streams import Scope


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trained weights by internal name; a target is the name of the linear that they adapt."""

    tensors: Mapping[str, Tensor]  # "blocks.0.self_attn.q.lora_A" [r, in], "….lora_B" [out, r]
    alphas: Mapping[str, float]  # by target; scale = alpha / rank
    scopes: Mapping[str, Scope]  # by target
    stream_embeddings: Mapping[str, Tensor]  # by stream, [D]
    metadata: Mapping[str, str]  # family, base_model, expert, fuse, streams, fill, step, ema

    @property
    def targets(self) -> tuple[str, ...]:
        return tuple(self.alphas)

    @property
    def family(self) -> Family:
        return find_family(self.metadata["family"])

    @property
    def expert(self) -> str:
        """The name of the expert that it is for; none where its model is one, or nothing is said."""
        return self.metadata.get("expert", "")

    @property
    def fused(self) -> list[str]:
        """The adapters that were added to its base before it was trained."""
        return json.loads(self.metadata.get("fuse", "[]"))

    @property
    def is_plain(self) -> bool:
        """Tell whether any program may apply it to every token: a plain LoRA."""
        return not self.stream_embeddings and all(scope == "all" for scope in self.scopes.values())

    def down(self, target: str) -> Tensor:
        return self.tensors[f"{target}.lora_A"]

    def up(self, target: str) -> Tensor:
        return self.tensors[f"{target}.lora_B"]

    def rank(self, target: str) -> int:
        return self.down(target).shape[0]

    def scale(self, target: str) -> float:
        return self.alphas[target] / self.rank(target)

    def matches(self, other: Adapter) -> bool:
        """Equal but for the last bit that folding a scale may cost."""
        return (
            set(self.alphas) == set(other.alphas)
            and all(math.isclose(alpha, other.alphas[t], rel_tol=1e-6) for t, alpha in self.alphas.items())
            and dict(self.scopes) == dict(other.scopes)
            and dict(self.metadata) == dict(other.metadata)
            and _same_tensors(self.tensors, other.tensors)
            and _same_tensors(self.stream_embeddings, other.stream_embeddings)
        )


def _same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        tensor.shape == theirs[name].shape and torch.allclose(tensor, theirs[name], rtol=1e-6, atol=0, equal_nan=True)
        for name, tensor in ours.items()
    )
