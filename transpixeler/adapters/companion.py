"""Take one companion out of an adapter of several: an adapter and a stream's name go in, an ordinary one comes out."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from transpixeler.adapters.adapter import TENSORS, Adapter, linear_of, stream_of
from transpixeler.config.sections import UserError
from transpixeler.models.streams import Scope


def only(adapter: Adapter, companion: str) -> Adapter:
    """Return the adapter of a model whose streams are the first one and this companion."""
    streams = adapter.metadata.get("streams", "").split(",")
    if companion not in streams[1:]:
        there = f"; there are {', '.join(streams[1:])}" if streams[1:] else ""
        raise UserError(f"--only: {companion!r} is no companion of this adapter{there}")
    kept = (streams[0], companion)
    targets = {t: target for t in adapter.targets if (target := _kept_target(adapter, t, kept))}
    names = {f"{old}.{kind}": f"{new}.{kind}" for old, new in targets.items() for kind in TENSORS}
    return replace(
        adapter,
        tensors={names[name]: tensor for name, tensor in adapter.tensors.items() if name in names},
        alphas={new: adapter.alphas[old] for old, new in targets.items()},
        scopes={new: _scope(adapter.scopes[old], new, kept) for old, new in targets.items()},
        stream_embeddings={name: tensor for name, tensor in adapter.stream_embeddings.items() if name == companion},
        metadata=_metadata(adapter, streams, kept),
    )


def _kept_target(adapter: Adapter, target: str, kept: tuple[str, str]) -> str:
    """Return a target's name beside the kept streams alone; nothing where it acts on none of them.

    Where one of them alone has matrices of its own, a name by stream is not needed any more.
    """
    scope = adapter.scopes[target]
    if scope not in ("all", "aux") and not set(scope) & set(kept):
        return ""
    linear = linear_of(target)
    own = Counter(linear_of(t) for t in adapter.targets if stream_of(t) in kept)
    return linear if stream_of(target) and own[linear] == 1 else target


def _scope(scope: Scope, target: str, kept: tuple[str, str]) -> Scope:
    """Return a scope in the words of a model that has the kept streams alone."""
    left = tuple(name for name in kept if name in scope)
    if scope in ("all", "aux") or stream_of(target):
        return scope
    return {kept: "all", kept[1:]: "aux"}.get(left, left)


def _metadata(adapter: Adapter, streams: list[str], kept: tuple[str, str]) -> dict[str, str]:
    found = {**adapter.metadata, "streams": ",".join(kept)}
    if "scales" in found:
        scales = dict(zip(streams, found.pop("scales").split(",")))
        if scales.get(kept[1]) != "1":
            found["scales"] = ",".join(scales[name] for name in kept)
    return found
