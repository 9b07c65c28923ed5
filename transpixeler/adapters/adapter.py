"""The adapter as a value: trained weights by internal name, between files and models.

Files in any spelling are read into it and written from it; it goes onto a model and comes off one.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from transpixeler.config.sections import FuseConfig, UserError
from transpixeler.models.family import Family, find_family
from transpixeler.models.streams import Scope

MAGNITUDE = "lora_magnitude"
TENSORS = ("lora_A", "lora_B", MAGNITUDE)  # of a target
_OWN = "@"  # between a linear's name and that of the stream whose own matrices these are


def target_of(linear: str, stream: str) -> str:
    """`blocks.0.ffn.0`, `seg` → `blocks.0.ffn.0@seg`: the target of what a stream has for itself."""
    return linear + _OWN + stream if stream else linear


def linear_of(target: str) -> str:
    return target.partition(_OWN)[0]


def stream_of(target: str) -> str:
    """Return the stream whose own matrices a target's are; nothing of those that several streams share."""
    return target.partition(_OWN)[2]


@dataclass(frozen=True, eq=False)
class Adapter:
    """Trained weights by internal name.

    A target is the name of the linear that they adapt, `blocks.0.ffn.0`; where streams have matrices of their own, with
    the stream's, `blocks.0.ffn.0@seg`.
    """

    # "blocks.0.self_attn.q.lora_A" [r, in], "….lora_B" [out, r]; of a DoRA also "….lora_magnitude", [out] of the rows'
    # norms, or [1, in] of the columns' in other programs' older files
    tensors: Mapping[str, Tensor]
    alphas: Mapping[str, float]  # by target; scale = alpha / rank
    scopes: Mapping[str, Scope]  # by target
    stream_embeddings: Mapping[str, Tensor]  # by stream, [D]
    metadata: Mapping[str, str]  # family, base_model, expert, fuse, streams, fill, step, ema
    # what other programs' files add to whole parameters, by their names: "blocks.0.self_attn.q.bias", "blocks.0.norm3…"
    changes: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 1.0  # how much of its change of a base `model.fuse` asks for

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
    def fused(self) -> tuple[FuseConfig, ...]:
        """The adapters that were added to its base before it was trained."""
        try:
            listed = json.loads(self.metadata.get("fuse", "[]"))
            return tuple(FuseConfig(one) if isinstance(one, str) else FuseConfig(**one) for one in listed)
        except (ValueError, TypeError, RecursionError) as fault:
            raise UserError(f"an adapter's header does not say what was fused into its base: {fault}") from None

    @property
    def is_plain(self) -> bool:
        """Tell whether any program may apply it to every token: a plain LoRA."""
        return not self.stream_embeddings and all(scope == "all" for scope in self.scopes.values())

    @property
    def own_streams(self) -> tuple[str, ...]:
        """Return the streams that have matrices of their own, in the order that they were trained in."""
        named = dict.fromkeys(stream for target in self.targets if (stream := stream_of(target)))
        order = self.metadata.get("streams", "").split(",")
        return tuple(sorted(named, key=lambda name: order.index(name) if name in order else len(order)))

    @property
    def is_dora(self) -> bool:
        return any(self.magnitude(target) is not None for target in self.targets)

    @property
    def norms_of_base(self) -> bool:
        """Tell whether the magnitudes are over the norms of the base's rows, as ComfyUI reads them."""
        return self.metadata.get("norms") == "base"

    @property
    def must_fuse(self) -> str:
        """Name something that no adapter beside a frozen base can hold, only a changed base; empty where all can be."""
        odd = [f"{t}.dora_scale" for t in self.targets if (m := self.magnitude(t)) is not None and m.ndim > 1]
        if self.norms_of_base:
            odd += [f"{t}.dora_scale" for t in self.targets]
        return next(iter([*self.changes, *odd]), "")

    def magnitude(self, target: str) -> Tensor | None:
        """Return the trained norms of a DoRA's rows, [out], or columns, [1, in]; None of a LoRA."""
        return self.tensors.get(f"{target}.{MAGNITUDE}")

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
            and _same_tensors(self.changes, other.changes)
        )


def _same_tensors(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> bool:
    return set(ours) == set(theirs) and all(
        tensor.shape == theirs[name].shape and torch.allclose(tensor, theirs[name], rtol=1e-6, atol=0, equal_nan=True)
        for name, tensor in ours.items()
    )
