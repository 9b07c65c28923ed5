"""Make ComfyUI's Wan generate several streams: a model and an adapter go in, a patched clone comes out.

Each class here takes the place of one of the model's own functions and calls it. None is a module, so that the model's
parameters keep the names that ComfyUI knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .adapter import PREFIX, AdapterFile, Target
from .streams import Streams

NEEDED = ("patch_embedding", "rope_encode", "unpatchify", "blocks")
REFUSED = ("vace_blocks", "ref_conv", "control_adapter", "face_adapter")


@dataclass
class Joint:
    """Hold what all patches of a model share: its streams, and where in a run it is."""

    streams: Streams
    attends: bool
    alone: bool = False  # the input holds only the first stream's tokens
    sides: tuple[int, int] = (0, 0)  # rows and columns in tokens of the first stream, of what was embedded last
    held: Tensor | None = None  # [B, 1, frames of all streams, 1, 1] in this sampling: frames that are given

    def slice(self, span: tuple[int, int], tokens: int) -> slice:
        """Return the tokens of a span of streams in an input of so many."""
        if self.alone:
            return slice(0, tokens if span[0] == 0 else 0)
        lengths = self.streams.lengths(tokens)
        start = sum(lengths[: span[0]])
        return slice(start, start + sum(lengths[slice(*span)]))

    def grids(self) -> list[tuple[int, int]]:
        """Return the rows and columns in tokens of each stream."""
        return [(self.sides[0] // scale, self.sides[1] // scale) for scale in self.streams.scales]


# --- on tokens -------------------------------------------------------------------------------------------------------


class LowRank:
    """Run a linear's own forward, then add the adapter's update to the tokens of its streams."""

    def __init__(
        self, original: Callable[..., Tensor], target: Target, joint: Joint, strength: float, by_stream: Sequence[float]
    ) -> None:
        self.original, self.target, self.joint = original, target, joint
        first, last = target.span
        strengths = [strength * own for own in by_stream[first:last]]
        if target.text:
            self.runs = [(target.span, strength)]
        elif len(set(strengths)) == 1:
            self.runs = [(target.span, strengths[0])]
        else:
            self.runs = [((stream, stream + 1), own) for stream, own in enumerate(strengths, first)]
        self.ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.original(x, *args, **kwargs)
        for span, strength in self.runs:
            scope = slice(0, x.shape[1]) if self.target.text else self.joint.slice(span, x.shape[1])
            if strength and scope.start < scope.stop:
                down, up = self._weights(x)
                y[:, scope] += F.linear(F.linear(x[:, scope], down) * strength, up).to(y.dtype)
        return y

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.device, x.dtype)
        if key not in self.ready:
            self.ready.clear()
            self.ready[key] = (self.target.down.to(*key), self.target.up.to(*key))
        return self.ready[key]


class Embedded:
    """Embed each stream's patches [B, C, frames, h, w] → [B, D, 1, 1, tokens of all], with the stream's embedding.

    added: embeddings by stream, and the strength, of each adapter. A stream is marked by their mean, so that two
    adapters at half their strength do not mark it twice, nor one at half its strength only half.
    """

    def __init__(
        self, original: Callable[[Tensor], Tensor], joint: Joint, added: Sequence[tuple[Mapping[str, Tensor], float]]
    ) -> None:
        self.original, self.joint, self.added = original, joint, added

    def __call__(self, x: Tensor) -> Tensor:
        parts = [self.original(part) for part in self.joint.streams.parts(x)]
        self.joint.sides = (parts[0].shape[-2], parts[0].shape[-1])
        for name, part in zip(self.joint.streams.names, parts, strict=True):
            if (vector := self._mark(name)) is not None:
                part += vector.to(part.device, part.dtype).view(1, -1, 1, 1, 1)
        return torch.cat([part.flatten(2) for part in parts], dim=2)[:, :, None, None]

    def _mark(self, name: str) -> Tensor | None:
        found = [(embeddings[name], strength) for embeddings, strength in self.added if name in embeddings]
        if not found:
            return None
        total = sum(strength for _, strength in found)
        weights = [strength / total if total else 1 / len(found) for _, strength in found]
        return sum((vector * weight for (vector, _), weight in zip(found, weights)), torch.zeros(()))


class Unpatched:
    """Turn tokens of all streams [B, tokens, ·] back into a latent."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, x: Tensor, grid_sizes: Sequence[int], *args: Any, **kwargs: Any) -> Tensor:
        parts = x.split(self.joint.streams.lengths(x.shape[1]), dim=1)
        found = [
            self.original(part, (part.shape[1] // (rows * columns), rows, columns), *args, **kwargs)
            for part, (rows, columns) in zip(parts, self.joint.grids(), strict=True)
        ]
        return self.joint.streams.joined(found)


class SharedPositions:
    """Give the tokens of all streams the positions [1, tokens, …] of what they show in the first one."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, t: int, h: int, w: int, *args: Any, **kwargs: Any) -> Tensor:
        frames = self.joint.streams.frames(t)
        self.joint.streams.check_sides(h, w, unit=2, what="the latent")
        one = self.original(frames, h, w, *args, **kwargs)
        made = {1: one}
        for scale in self.joint.streams.scales:
            if scale not in made:
                made[scale] = self._middles(frames, h, w, scale, *args, **kwargs)
        return torch.cat([made[scale] for scale in self.joint.streams.scales], dim=1)

    def _middles(self, frames: int, h: int, w: int, scale: int, *args: Any, **kwargs: Any) -> Tensor:
        """Return the positions of tokens that stand in the middle of scale² of the first stream's.

        Of positions a half apart, which the model's own function gives, those are every 2·scale-th.
        """
        rows, columns = h // 2, w // 2
        halves = {"steps_h": 2 * rows - 1, "steps_w": 2 * columns - 1}
        fine = self.original(frames, h, w, *args, **kwargs | halves).unflatten(1, (frames, *halves.values()))
        return fine[:, :, scale - 1 :: 2 * scale, scale - 1 :: 2 * scale].flatten(1, 3)


class OwnAttention:
    """Run self-attention in which the first stream attends to itself only, and the others to all."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, x: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        count = self.joint.streams.lengths(x.shape[1])[0]
        self.joint.alone = True
        try:
            own = self.original(x[:, :count], freqs[:, :count], *args, **kwargs)
        finally:
            self.joint.alone = False
        return torch.cat([own, self.original(x, freqs, *args, **kwargs)[:, count:]], dim=1)


# --- on what is given ------------------------------------------------------------------------------------------------


class MaskTold:
    """Tell the model of the noise mask, and note the frames that are given: those whose mask is zero everywhere."""

    def __init__(self, original: Callable[..., dict[str, Any]], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, **kwargs: Any) -> dict[str, Any]:
        out, mask = self.original(**kwargs), kwargs.get("denoise_mask")
        self.joint.held = None if mask is None else held_frames(mask, self.joint.streams)
        if mask is not None:
            import comfy.conds  # pyright: ignore[reportMissingImports] - ComfyUI's own

            out["denoise_mask"] = comfy.conds.CONDRegular(mask)
        return out


class GivenTimes:
    """Give frames that are given the time 0: [B] → [B, rows], each of equally many tokens of the sequence."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, timestep: Tensor, denoise_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        times, streams = self.original(timestep, **kwargs), self.joint.streams
        if denoise_mask is None or not (held := held_frames(denoise_mask, streams)).any():
            return times
        by_frame = times[:, None] * ~held[:, 0, :, 0, 0]  # [B, frames of all streams]
        shares = torch.tensor(streams.shares, device=times.device)
        return by_frame.repeat_interleave(shares.repeat_interleave(by_frame.shape[1] // len(shares)), dim=1)


class HeldClean:
    """Keep frames that are given free of noise, where ComfyUI would add as much as the others have."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, *, latent_image: Tensor, **kwargs: Any) -> Tensor:
        noisy, held = self.original(latent_image=latent_image, **kwargs), self.joint.held
        return noisy if held is None else torch.where(held.to(noisy.device), latent_image, noisy)


def held_frames(mask: Tensor, streams: Streams) -> Tensor:
    """[B, C, frames of all streams, h, w] → [B, 1, frames of all streams, 1, 1]: where nothing is left to make."""
    return torch.cat([part.amax((1, 3, 4), keepdim=True) == 0 for part in streams.parts(mask)], dim=2)


# --- onto a model ----------------------------------------------------------------------------------------------------


def patched(model: Any, adapter: AdapterFile, strength: float, by_stream: Sequence[float] = ()) -> Any:
    """Return a clone of ComfyUI's model that generates all streams; the model itself does not change."""
    wan = model.get_model_object("diffusion_model")
    _check(wan, adapter)
    clone, by_stream = model.clone(), by_stream or (1.0,) * len(adapter.streams.names)

    def replace(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        clone.add_object_patch(name, make(clone.get_model_object(name)))

    before = clone.get_model_object(PREFIX + "patch_embedding.forward")
    first = not isinstance(before, Embedded)
    joint = Joint(adapter.streams, adapter.attends) if first else _shared(before.joint, adapter)
    for name, target in adapter.targets.items():
        replace(f"{PREFIX}{name}.forward", lambda old, target=target: LowRank(old, target, joint, strength, by_stream))
    if len(adapter.streams.names) == 1:
        return clone
    added = [*([] if first else before.added), (adapter.embeddings, strength)]
    embed = before if first else before.original
    clone.add_object_patch(PREFIX + "patch_embedding.forward", Embedded(embed, joint, added))
    for name, make in _once(wan, joint).items() if first else ():
        replace(name, make)
    return clone


def _once(wan: Any, joint: Joint) -> dict[str, Callable[[Callable[..., Any]], Callable[..., Any]]]:
    """Return what a model needs once, however many adapters it has."""
    own = [] if joint.attends else [f"{PREFIX}blocks.{number}.self_attn.forward" for number in range(len(wan.blocks))]
    return {
        PREFIX + "rope_encode": lambda old: SharedPositions(old, joint),
        PREFIX + "unpatchify": lambda old: Unpatched(old, joint),
        "extra_conds": lambda old: MaskTold(old, joint),
        "process_timestep": lambda old: GivenTimes(old, joint),
        "scale_latent_inpaint": lambda old: HeldClean(old, joint),
        **dict.fromkeys(own, lambda old: OwnAttention(old, joint)),
    }


def _shared(joint: Joint, second: AdapterFile) -> Joint:
    """Return what the patches of an earlier adapter share; refuse an adapter with other streams."""
    if (joint.streams, joint.attends) != (second.streams, second.attends):
        raise ValueError(f"two adapters on one model need the same streams: {joint.streams} and {second.streams}")
    return joint


def _check(wan: Any, adapter: AdapterFile) -> None:
    """Refuse a model that the adapter does not fit: it would run, and give noise."""
    absent = [name for name in NEEDED if not hasattr(wan, name)]
    other = [name for name in REFUSED if getattr(wan, name, None) is not None]
    if absent or other:
        why = f"it has no {absent[0]}" if absent else f"it has {other[0]}"
        raise ValueError(f"not a text- or image-to-video model of ComfyUI's WanModel ({why}); load another")
    modules = dict(wan.named_modules())
    for name, target in adapter.targets.items():
        weight = getattr(modules.get(name), "weight", None)
        wanted = (target.up.shape[0], target.down.shape[1])
        if weight is None or tuple(weight.shape) != wanted:
            found = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"the adapter is for another size of Wan: {name} is {found} here, {list(wanted)} there")
