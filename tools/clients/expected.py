"""Make with our own sampler what a workflow of ComfyUI makes: its prompt and noise go in, the difference comes out."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from transpixeler.flow.solver import Predict
    from transpixeler.models.backbone import Backbone
    from transpixeler.models.streams import StreamLayout

WORDS = (512, 4096)
SEEN = (257, 1280)


@dataclass(frozen=True)
class Made:
    """Hold how a workflow's latents differ from ours."""

    error: float  # by the largest value
    given: dict[str, int]  # latent frames that were held, by stream


def text_of(text: str) -> Tensor:
    """Return random numbers in place of an encoded text, [1, words, width]."""
    import torch

    return torch.randn(1, *WORDS, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def vision() -> Tensor:
    """Return random numbers in place of an encoded picture, [1, tokens, width]."""
    import torch

    return torch.randn(1, *SEEN, generator=torch.Generator().manual_seed(1))


def expected(
    prompt: Mapping[str, Any],
    samplers: Sequence[str],
    start: Tensor,
    found: Tensor,
    models: Mapping[str, Backbone],
    shown: Mapping[int, Tensor],
    scales: Sequence[int],
) -> Made:
    """Sample as the workflow's nodes say, and compare.

    start, found: ComfyUI's latents before and after sampling, as its VAE has them. shown: first frames that an
    image-to-video model is shown, by stream, encoded as videos that are grey else; -1: a video of grey alone.
    """
    from transpixeler.flow.solver import denoise
    from transpixeler.flow.tasks import Task
    from transpixeler.models.noising import RECTIFIED

    asked = prompt[samplers[0]]["inputs"]
    experts = [models[name] for name in _adapters(prompt)]
    layout, (latents, held) = _layout(experts[0], found, scales), (_parts(x, scales) for x in (found, start))
    holder = _node(prompt, "TranspixelerJointLatent")["inputs"]
    whole, first = (
        {stream for stream, name in enumerate(names) if name in holder}
        for names in (("rgb", "alpha"), ("image", "image_alpha"))
    )
    layout = Task("", given=frozenset(whole), first=frozenset(first)).cut(layout)
    given = {stream: _normed(held[stream])[0] for stream in whole} | {
        stream: _normed(held[stream])[0, :, :1] for stream in first
    }
    fields = _shown_fields(experts[0], layout, shown)
    velocity = _velocity(experts, layout, _texts(prompt, asked), fields, asked["cfg"], prompt)
    shift = _node(prompt, "ModelSamplingSD3")["inputs"]["shift"]
    solver = RECTIFIED.solver("euler", steps=asked["steps"], shift=shift)
    made = denoise(velocity, _noise(asked, found, scales, layout), layout, solver, given=given)
    theirs = layout.pack([_normed(part) for part in latents])
    return Made(
        ((theirs - made).abs().max() / made.abs().max()).item(),
        {experts[0].streams[stream]: value.shape[1] for stream, value in given.items()},
    )


def _velocity(
    experts: Sequence[Backbone],
    layout: StreamLayout,
    texts: Sequence[Tensor],
    fields: Sequence[Tensor],
    guidance: float,
    prompt: Mapping[str, Any],
) -> Predict:
    import torch

    boundary = _node(prompt, "TranspixelerExpertStep")["inputs"]["boundary"] if len(experts) > 1 else 0.0

    @torch.no_grad()
    def velocity(x: Tensor, times: Tensor) -> Tensor:
        model = experts[0] if times.max() >= boundary else experts[1]
        wanted, unwanted = (model(x, times, text, *fields, layout=layout) for text in texts)
        return unwanted + guidance * (wanted - unwanted)

    return velocity


def _texts(prompt: Mapping[str, Any], asked: Mapping[str, Any]) -> list[Tensor]:
    """Return the positive and the negative text of a sampler, through the node that shows images beside them."""
    found = []
    for name in ("positive", "negative"):
        node = prompt[asked[name][0]]
        while node["class_type"] != "TinyText":
            node = prompt[node["inputs"][name][0]]
        found.append(text_of(node["inputs"]["text"]))
    return found


def _node(prompt: Mapping[str, Any], kind: str) -> Mapping[str, Any]:
    return next(node for node in prompt.values() if node["class_type"] == kind)


def _adapters(prompt: Mapping[str, Any]) -> list[str]:
    """Return the adapters' files, that of the high-noise expert first; those of one model as one name."""
    names = ("adapter", "adapter_high", "adapter_low")
    files = [[node["inputs"][name] for node in prompt.values() if name in node["inputs"]] for name in names]
    return [", ".join(sorted(chain)) for chain in files if chain]


# -- latents


def _layout(model: Backbone, latent: Tensor, scales: Sequence[int]) -> StreamLayout:
    from transpixeler.models.streams import StreamLayout

    shapes = []
    for part in _parts(latent, scales):
        _, channels, frames, height, width = part.shape
        shapes.append((channels, frames, height, width))
    return StreamLayout(tuple(model.streams), tuple(shapes), model.patch, scales=tuple(scales))


def _parts(latent: Tensor, scales: Sequence[int]) -> list[Tensor]:
    """Return each stream's latents of those that ComfyUI has, a smaller one's from the upper left corner."""
    height, width = latent.shape[-2:]
    parts = latent.chunk(len(scales), dim=2)
    return [part[..., : height // scale, : width // scale] for part, scale in zip(parts, scales, strict=True)]


def _normed(latent: Tensor) -> Tensor:
    """Return latents as models have them, of those that the VAE has."""
    import inspect

    import torch
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    from transpixeler.families.wan.original import LATENTS_MEAN_22, LATENTS_STD_22

    known = inspect.signature(AutoencoderKLWan.__init__).parameters
    found = (known["latents_mean"].default, known["latents_std"].default)
    if latent.shape[1] == len(LATENTS_MEAN_22):
        found = (LATENTS_MEAN_22, LATENTS_STD_22)
    mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in found)
    return (latent - mean) / std


def _noise(asked: Mapping[str, Any], latent: Tensor, scales: Sequence[int], layout: StreamLayout) -> Tensor:
    """Return the noise that ComfyUI draws for a seed."""
    import torch

    generator = torch.Generator().manual_seed(asked["seed"] if "seed" in asked else asked["noise_seed"])
    return layout.pack(_parts(torch.randn(latent.shape, generator=generator), scales))


def _shown_fields(model: Backbone, layout: StreamLayout, shown: Mapping[int, Tensor]) -> list[Tensor]:
    """Return what an image-to-video model is shown, [1, N'] of masks and latents, and of tokens; [] of others."""
    from transpixeler.models.conditions import Shown, shown_fields, with_channels

    fields = shown_fields(model.fields)
    if not fields:
        return []
    inside = with_channels(layout, fields[0].width - fields[0].mask)
    own = inside.pack([_normed(shown[stream]) for stream in range(len(layout.names))])
    grey = inside.pack([_normed(shown[-1])] * len(layout.names))
    encoded = {field.name: vision() for field in fields[1:]}
    values = Shown(fields, {fields[0].name: own, **encoded}, {fields[0].name: grey, **encoded}).values(layout, [{0}])
    return [values[field.name] for field in fields]
