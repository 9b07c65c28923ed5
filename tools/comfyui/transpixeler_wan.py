"""ComfyUI nodes that load a joint adapter of transpixeler on Wan and give RGB and its alpha from one sampling.

To install, copy this one file into ComfyUI's `custom_nodes`.

    Load Diffusion Model → Joint Adapter (Wan) → KSampler → Joint Decode (Wan) → image, mask
    Joint Latent (Wan) → KSampler

The latent holds the streams' frames one after another. The adapter node gives all streams the same positions, adds the
stream embeddings, and applies the low-rank weights to the tokens of their own streams only, as in training. A second
adapter of the same streams may follow. Ordinary LoRAs, samplers, shift and guidance work as usual.

Limits:
- Only text-to-video models of ComfyUI's own `WanModel`: no image-to-video, VACE, camera or other variants, and no nodes
  that split the video into windows or replace the model's forward.
- All streams are generated together. Giving one of them (matting) is not possible here.
- All streams are of one size: adapters whose companions have a scale are refused.
- Time and memory are those of a video with the frames of all streams. ComfyUI does not count the adapter's own weights.
- Previews show the streams one after another.
- Adapters of other programs, or under their names, must first go through `transpixeler export --format comfyui`.
- It is tested against transpixeler's own forward on a model with ComfyUI's names, not inside ComfyUI.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor

HEADER = "transpixeler."
EMBEDDING = "transpixeler.stream_embedding."
PREFIX = "diffusion_model."
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
NEEDED = ("patch_embedding", "rope_encode", "blocks")
REFUSED = ("vace_blocks", "ref_conv", "img_emb", "control_adapter", "face_adapter")
CATEGORY = "transpixeler"
Span = tuple[int, int]  # first stream, and one past the last


# --- the adapter's file ----------------------------------------------------------------------------------------------


@dataclass
class Joint:
    """The streams of one adapter, shared by all its patches."""

    streams: tuple[str, ...]
    attends: bool  # whether RGB tokens see the other streams
    alone: bool = False  # the input holds only the first stream's tokens

    def slice(self, span: Span, tokens: int) -> slice:
        """Return the tokens of a span of streams in an input of so many tokens; all streams are equally long."""
        if span == (0, len(self.streams)):
            return slice(0, tokens)
        if self.alone:
            return slice(0, tokens if span[0] == 0 else 0)
        each = self.share(tokens, "tokens")
        return slice(span[0] * each, span[1] * each)

    def share(self, total: int, what: str) -> int:
        count = len(self.streams)
        if total % count:
            raise ValueError(f"{total} {what} are not {count} streams; make the latent with Joint Latent (Wan)")
        return total // count


@dataclass
class Target:
    """The low-rank weights of one linear."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r], times alpha / r
    span: Span


@dataclass
class AdapterFile:
    joint: Joint
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # by stream, [D]
    targets: dict[str, Target] = field(default_factory=dict)  # "blocks.0.self_attn.q"


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter that `transpixeler` wrote."""
    with safe_open(path, framework="pt", device="cpu") as file:
        header = file.metadata() or {}
        stored = {_unmarked(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if f"{HEADER}scope" not in header:
        raise ValueError(f"{path}: not an adapter of transpixeler; `transpixeler export --format comfyui` makes one")
    if own := header.get(f"{HEADER}per_stream"):
        raise ValueError(
            f"{path}: {own} have matrices of their own, which these nodes do not know; `transpixeler export --only "
            f"{own.split(',')[-1]}` writes a file of one that they read"
        )
    if other := [key for key in stored if not _is_own(key)]:
        raise ValueError(f"{path}: {other[0]} is no name of ours; `transpixeler export --format comfyui` gives those")
    if any(scale != "1" for scale in header.get(f"{HEADER}scales", "1").split(",")):
        raise ValueError(
            f"{path}: its companions are smaller than RGB, which a latent here cannot hold; sample it with "
            "`transpixeler sample`"
        )
    embeddings = {key.removeprefix(EMBEDDING): value for key, value in stored.items() if key.startswith(EMBEDDING)}
    streams = tuple(name.strip() for name in header.get(f"{HEADER}streams", "").split(",") if name.strip())
    joint = Joint(streams or ("rgb", *embeddings), header.get(f"{HEADER}rgb_attends_aux", "true") != "false")
    scopes = json.loads(header.get(f"{HEADER}scopes", "{}"))
    names = [key.removesuffix(DOWN).removeprefix(PREFIX) for key in stored if key.endswith(DOWN)]
    targets = {
        name: _target(stored, name, _span(scopes.get(name, header[f"{HEADER}scope"]), joint.streams)) for name in names
    }
    return AdapterFile(joint, embeddings, targets)


def _unmarked(key: str) -> str:
    """Return a key without the mark that keeps a joint adapter from programs that know no streams."""
    return key.removeprefix(HEADER) if key.startswith(HEADER + PREFIX) else key


def _is_own(key: str) -> bool:
    return key.startswith(EMBEDDING) or (key.startswith(PREFIX) and key.endswith((DOWN, UP, ALPHA)))


def _target(stored: Mapping[str, Tensor], name: str, span: Span) -> Target:
    down, up = stored[PREFIX + name + DOWN].float(), stored[PREFIX + name + UP].float()
    alpha = stored.get(PREFIX + name + ALPHA)
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return Target(down, up * scale, span)


def _span(scope: str, streams: tuple[str, ...]) -> Span:
    if scope in ("all", "aux"):
        return (int(scope == "aux"), len(streams))
    places = sorted(streams.index(name) for name in json.loads(scope))
    return places[0], places[-1] + 1


# --- what takes the place of the model's own functions ---------------------------------------------------------------


class LowRank:
    """Run a linear's own forward, then add the adapter's update to the tokens of its streams.

    This is not a module, so that the model's parameters keep the names that ComfyUI knows.
    """

    def __init__(self, original: Callable[..., Tensor], target: Target, joint: Joint, strength: float) -> None:
        self.original, self.target, self.joint, self.strength = original, target, joint, strength
        self.ready: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y = self.original(x, *args, **kwargs)
        scope = self.joint.slice(self.target.span, x.shape[1])
        if scope.start < scope.stop:
            down, up = self._weights(x)
            y[:, scope] += F.linear(F.linear(x[:, scope], down), up).to(y.dtype)
        return y

    def _weights(self, x: Tensor) -> tuple[Tensor, Tensor]:
        key = (x.device, x.dtype)
        if key not in self.ready:
            self.ready.clear()
            up = self.target.up * self.strength
            self.ready[key] = (self.target.down.to(*key), up.to(*key))
        return self.ready[key]


class Embedded:
    """Run the patch embedding [B, D, frames, h, w], then add each stream's embedding to its frames."""

    def __init__(self, original: Callable[[Tensor], Tensor], embeddings: Mapping[str, Tensor], joint: Joint) -> None:
        self.original, self.embeddings, self.joint = original, embeddings, joint

    def __call__(self, x: Tensor) -> Tensor:
        y = self.original(x)
        frames = self.joint.share(y.shape[2], "latent frames")
        for number, name in enumerate(self.joint.streams):
            if name in self.embeddings:
                vector = self.embeddings[name].to(y.device, y.dtype)
                y[:, :, number * frames : (number + 1) * frames] += vector.view(1, -1, 1, 1, 1)
        return y


class SharedPositions:
    """Compute the positions of one stream's frames, [1, tokens, …], and repeat them for each stream."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, t: int, h: int, w: int, *args: Any, **kwargs: Any) -> Tensor:
        one = self.original(self.joint.share(t, "latent frames"), h, w, *args, **kwargs)
        return torch.cat([one] * len(self.joint.streams), dim=1)


class OwnAttention:
    """Run self-attention in which the first stream attends to itself only, and the others to all."""

    def __init__(self, original: Callable[..., Tensor], joint: Joint) -> None:
        self.original, self.joint = original, joint

    def __call__(self, x: Tensor, freqs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        count = self.joint.share(x.shape[1], "tokens")
        self.joint.alone = True
        try:
            own = self.original(x[:, :count], freqs[:, :count], *args, **kwargs)
        finally:
            self.joint.alone = False
        return torch.cat([own, self.original(x, freqs, *args, **kwargs)[:, count:]], dim=1)


def patched(model: Any, adapter: AdapterFile, strength: float) -> Any:
    """Return a clone of ComfyUI's model that generates all streams; the model itself does not change."""
    wan = model.get_model_object("diffusion_model")
    _check(wan, adapter)
    clone = model.clone()

    def replace(name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
        clone.add_object_patch(PREFIX + name, make(clone.get_model_object(PREFIX + name)))

    before = clone.get_model_object(PREFIX + "rope_encode")
    joint = _shared(before.joint, adapter.joint) if isinstance(before, SharedPositions) else adapter.joint
    for name, target in adapter.targets.items():
        replace(f"{name}.forward", lambda old, target=target: LowRank(old, target, joint, strength))
    if len(joint.streams) > 1:
        replace("patch_embedding.forward", lambda old: Embedded(old, adapter.embeddings, joint))
    if len(joint.streams) > 1 and not isinstance(before, SharedPositions):
        replace("rope_encode", lambda old: SharedPositions(old, joint))
        for number in range(0 if joint.attends else len(wan.blocks)):
            replace(f"blocks.{number}.self_attn.forward", lambda old: OwnAttention(old, joint))
    return clone


def _shared(first: Joint, second: Joint) -> Joint:
    """Return the streams that an earlier adapter on this model has; refuse an adapter with others."""
    if (first.streams, first.attends) != (second.streams, second.attends):
        raise ValueError(f"two adapters on one model need the same streams: {first.streams} and {second.streams}")
    return first


def _check(wan: Any, adapter: AdapterFile) -> None:
    """Refuse a model that the adapter does not fit: it would run, and give noise."""
    absent = [name for name in NEEDED if not hasattr(wan, name)]
    other = [name for name in REFUSED if getattr(wan, name, None) is not None]
    if absent or other:
        why = f"it has no {absent[0]}" if absent else f"it has {other[0]}"
        raise ValueError(f"not a text-to-video model of ComfyUI's WanModel ({why}); update ComfyUI or load another")
    modules = dict(wan.named_modules())
    for name, target in adapter.targets.items():
        weight = getattr(modules.get(name), "weight", None)
        wanted = (target.up.shape[0], target.down.shape[1])
        if weight is None or tuple(weight.shape) != wanted:
            found = "nothing" if weight is None else list(weight.shape)
            raise ValueError(f"the adapter is for another size of Wan: {name} is {found} here, {list(wanted)} there")


# --- nodes -----------------------------------------------------------------------------------------------------------


class JointAdapter:
    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "load", ("MODEL",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        import folder_paths  # pyright: ignore[reportMissingImports] - ComfyUI's own

        strength = ("FLOAT", {"default": 1.0, "min": 0.0, "max": 2.0, "step": 0.05})
        names = (folder_paths.get_filename_list("loras"),)
        return {"required": {"model": ("MODEL",), "adapter": names, "strength": strength}}

    def load(self, model: Any, adapter: str, strength: float) -> tuple[Any]:
        import folder_paths  # pyright: ignore[reportMissingImports] - ComfyUI's own

        return (patched(model, read_adapter(folder_paths.get_full_path_or_raise("loras", adapter)), strength),)


class JointLatent:
    CATEGORY, FUNCTION, RETURN_TYPES = CATEGORY, "make", ("LATENT",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        side = {"min": 16, "max": 8192, "step": 16}
        return {
            "required": {
                "width": ("INT", {"default": 832, **side}),
                "height": ("INT", {"default": 480, **side}),
                "length": ("INT", {"default": 33, "min": 1, "max": 4096, "step": 4}),
                "streams": ("INT", {"default": 2, "min": 1, "max": 8}),
                "batch_size": ("INT", {"default": 1, "min": 1, "max": 64}),
            }
        }

    def make(self, width: int, height: int, length: int, streams: int, batch_size: int) -> tuple[dict[str, Tensor]]:
        frames = streams * ((length - 1) // 4 + 1)
        return ({"samples": torch.zeros(batch_size, 16, frames, height // 8, width // 8)},)


class JointSplit:
    """Split off the latents of the first stream and of one companion."""

    CATEGORY, FUNCTION = CATEGORY, "split"
    RETURN_TYPES, RETURN_NAMES = ("LATENT", "LATENT"), ("rgb", "companion")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = ("INT", {"default": 2, "min": 2, "max": 8})
        number = ("INT", {"default": 1, "min": 1, "max": 7})
        return {"required": {"samples": ("LATENT",), "streams": count, "companion": number}}

    def split(self, samples: Mapping[str, Any], streams: int, companion: int) -> tuple[dict[str, Any], dict[str, Any]]:
        parts = split_latent(samples["samples"], streams)
        if companion >= streams:
            raise ValueError(f"companion {companion} of {streams} streams; the last is {streams - 1}")
        rest = {key: value for key, value in samples.items() if key not in ("samples", "noise_mask")}
        return rest | {"samples": parts[0]}, rest | {"samples": parts[companion]}


class JointDecode:
    """Decode the pictures, and the companion as a mask where white is visible (inverted for Join Image with Alpha)."""

    CATEGORY, FUNCTION = CATEGORY, "decode"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "MASK", "IMAGE"), ("rgb", "mask", "companion")

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        count = ("INT", {"default": 2, "min": 2, "max": 8})
        turned = ("BOOLEAN", {"default": False, "label_on": "for Join Image with Alpha", "label_off": "white: visible"})
        return {"required": {"samples": ("LATENT",), "vae": ("VAE",), "streams": count, "inverted": turned}}

    def decode(
        self, samples: Mapping[str, Any], vae: Any, streams: int, inverted: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        rgb, companion = (_pictures(vae, part) for part in split_latent(samples["samples"], streams)[:2])
        mask = companion.mean(-1)
        return rgb, 1.0 - mask if inverted else mask, companion


def split_latent(latent: Tensor, streams: int) -> tuple[Tensor, ...]:
    """Cut a latent [B, C, frames of all streams, h, w] into one for each stream."""
    if latent.ndim != 5 or latent.shape[2] % streams:
        raise ValueError(f"a latent of {list(latent.shape)} does not hold {streams} streams")
    return latent.chunk(streams, dim=2)


def _pictures(vae: Any, latent: Tensor) -> Tensor:
    """Decode to [frames of the whole batch, H, W, 3]. Each stream goes alone, since the VAE looks back in time."""
    return vae.decode(latent).flatten(0, -4)


NODE_CLASS_MAPPINGS = {
    "TranspixelerJointAdapter": JointAdapter,
    "TranspixelerJointLatent": JointLatent,
    "TranspixelerJointSplit": JointSplit,
    "TranspixelerJointDecode": JointDecode,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "TranspixelerJointAdapter": "Joint Adapter (Wan)",
    "TranspixelerJointLatent": "Joint Latent (Wan)",
    "TranspixelerJointSplit": "Joint Split (Wan)",
    "TranspixelerJointDecode": "Joint Decode (Wan)",
}
