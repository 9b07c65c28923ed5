"""Run the published model of each family, or slow formulas where there is none, on the weights of ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transpixeler.models.backbone import Backbone
from transpixeler.models.family import find_family
from transpixeler.models.names import pieces, split_rows
from transpixeler.models.streams import StreamLayout

WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 96,
    "num_layers": 4,
}
LTX = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,  # one pair of the width, 32 = 6·5 + 2, does not turn
    "in_channels": 4,
    "out_channels": 4,
    "cross_attention_dim": 32,
    "caption_channels": 24,
    "num_layers": 4,
}


class Reference(NamedTuple):
    """What a family is held against: `run` takes the model's inputs of one stream, and the weights are its own."""

    run: Callable[..., Tensor]  # (x [B, N], timesteps [B, 1], *fields, layout=…) → velocity [B, N]
    weights: Mapping[str, Any]  # by internal name; they have gradients after a backward pass
    module: Any = None  # diffusers' own class, where there is one


class Joined(NamedTuple):
    """Parameters of diffusers' class that are one of ours."""

    parameters: Mapping[str, nn.Parameter]
    name: str

    @property
    def grad(self) -> Tensor:
        """Return the gradient of ours."""
        parts = ((self.parameters[part.name].grad, part) for part in pieces(self.name))
        return torch.cat([grad[part.rows(len(grad))] for grad, part in parts if grad is not None])


def _diffusers(name: str, published: nn.Module, model: Backbone) -> Mapping[str, Any]:
    """Fill diffusers' class with a model's weights; return its parameters by internal name."""
    names, state = find_family(name).names, model.state_dict()
    spelled = {ours: names.parameter(ours, source="internal", to="diffusers") for ours in state}
    published.load_state_dict({k: v for ours in state for k, v in split_rows(state[ours], spelled[ours]).items()})
    parameters = dict(published.named_parameters())
    return {
        ours: parameters[theirs] if theirs in parameters else Joined(parameters, theirs)
        for ours, theirs in spelled.items()
    }


def wan_reference(model: Backbone) -> Reference:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    published = WanTransformer3DModel(**WAN)
    weights = _diffusers("wan", published, model)

    def run(x: Tensor, times: Tensor, text: Tensor, *, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        return published(latents, 1000 * times[:, 0], text, return_dict=False)[0].flatten(1)

    return Reference(run, weights, published)


def ltx_reference(model: Backbone) -> Reference:
    from diffusers.models.transformers.transformer_ltx import LTXVideoTransformer3DModel

    published = LTXVideoTransformer3DModel(**LTX)
    weights = _diffusers("ltx", published, model)

    def run(x: Tensor, times: Tensor, text: Tensor, lengths: Tensor, *, layout: StreamLayout) -> Tensor:
        ((channels, f, h, w),) = layout.shapes
        velocity = published(
            hidden_states=x.unflatten(1, (channels, -1)).mT,
            encoder_hidden_states=text,
            timestep=1000 * times[:, 0],
            encoder_attention_mask=torch.arange(text.shape[1]) < lengths[:, None],
            num_frames=f,
            height=h,
            width=w,
            rope_interpolation_scale=(8 / 24, 32, 32),
            return_dict=False,
        )[0]
        return velocity.mT.flatten(1)

    return Reference(run, weights, published)


def flux_reference(model: Backbone) -> Reference:
    from tests.families.flux.pipeline import published as make

    published = make()
    weights = _diffusers("flux", published, model)

    def run(x: Tensor, times: Tensor, text: Tensor, pooled: Tensor, *, layout: StreamLayout) -> Tensor:
        ((channels, f, h, w),) = layout.shapes  # of images that stand one after the other: positions have an index
        cut = (f, h // 2, w // 2)
        tokens = x.view(-1, channels, f, h // 2, 2, w // 2, 2).permute(0, 2, 3, 5, 1, 4, 6).flatten(4).flatten(1, 3)
        velocity = published(
            hidden_states=tokens,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=times[:, 0],
            img_ids=torch.cartesian_prod(*map(torch.arange, cut)),
            txt_ids=torch.zeros(text.shape[1], 3),
            guidance=torch.full((len(x),), 3.5),
            return_dict=False,
        )[0]
        return velocity.view(-1, *cut, channels, 2, 2).permute(0, 4, 1, 2, 5, 3, 6).flatten(1)

    return Reference(run, weights, published)


def hunyuan_reference(model: Backbone) -> Reference:
    from tests.families.hunyuan.pipeline import published as make

    published = make()
    weights = _diffusers("hunyuan", published, model)

    def run(x: Tensor, times: Tensor, text: Tensor, lengths: Tensor, pooled: Tensor, *, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        return published(
            hidden_states=latents,
            timestep=1000 * times[:, 0],
            encoder_hidden_states=text,
            encoder_attention_mask=(torch.arange(text.shape[1]) < lengths[:, None]).float(),
            pooled_projections=pooled,
            guidance=torch.full((len(x),), 6000.0),
            return_dict=False,
        )[0].flatten(1)

    return Reference(run, weights, published)


def opensora_reference(model: Backbone) -> Reference:
    from tests.families.opensora.folder import TINY
    from tests.families.opensora.reference import Formulas

    weights = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    formulas = Formulas(weights, TINY)

    def run(x: Tensor, times: Tensor, *fields: Tensor, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        return formulas(latents, times[:, 0], *fields).flatten(1)

    return Reference(run, weights)


def pyramid_reference(model: Backbone) -> Reference:
    from tests.families.pyramid.folder import TINY
    from tests.families.pyramid.reference import Formulas

    weights = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    formulas = Formulas(weights, TINY)

    def run(x: Tensor, times: Tensor, text: Tensor, lengths: Tensor, pooled: Tensor, *, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        rows = zip(latents, times[:, 0], text, lengths, pooled, strict=True)
        found = [formulas.sequence([one], t, words[:n], vector)[0] for one, t, words, n, vector in rows]
        return torch.stack(found).flatten(1)

    return Reference(run, weights)


def toy_reference(model: Backbone) -> Reference:
    from transpixeler.families.toy.config import ToyConfig
    from transpixeler.families.toy.reference import Reference as Formulas

    weights = {name: value.detach().clone().requires_grad_(True) for name, value in model.named_parameters()}
    formulas = Formulas(weights, ToyConfig())

    def run(x: Tensor, times: Tensor, *fields: Tensor, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        return formulas(latents, times[:, 0], *fields).flatten(1)

    return Reference(run, weights)


def unet3d_reference(model: Backbone) -> Reference:
    from tests.families.unet3d.folder import TINY
    from tests.families.unet3d.reference import Reference as Formulas

    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    formulas = Formulas(weights, TINY)

    def run(x: Tensor, times: Tensor, text: Tensor, *, layout: StreamLayout) -> Tensor:
        (latents,) = layout.unpack(x)
        return formulas(latents, times[:, 0], text).flatten(1)

    return Reference(run, weights)
