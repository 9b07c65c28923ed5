"""Load a plain adapter's file in diffusers and in musubi-tuner, and tell how far their velocity is from ours."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clients.tiny import Tiny, original_weights

if TYPE_CHECKING:
    from torch import Tensor

    from transpixeler.adapters.adapter import Adapter
    from transpixeler.models.backbone import Backbone

SAME_WEIGHTS = 1e-6
REFUSALS = (ValueError, KeyError, AssertionError, RuntimeError)


class NotApplied(Exception):
    """The program does not apply the file; the text is what the table says."""


def given_to(tiny: Tiny, model: Backbone) -> tuple[Tensor, ...]:
    """Return packed latents, a time, and fields that models of a family are given, with the lengths of masked texts."""
    import torch

    torch.manual_seed(1)
    layout = model.layout(tiny.shape)
    lengths = [torch.tensor(tiny.text[:1])] if model.fields[0].masked else []
    vectors = [torch.randn(1, field.width) for field in model.fields[1:]]
    x, times, text = torch.randn(1, layout.elements), torch.full((1, 1), 0.4), torch.randn(1, *tiny.text)
    return x, times, text, *lengths, *vectors


def difference(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference by the largest value."""
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


# -- diffusers


def diffusers_error(tiny: Tiny, base: Path, model: Backbone, adapter: Adapter, file: Path) -> float:
    """Load a file by the pipeline's `load_lora_weights`; compare the transformer's velocity with ours."""
    import inspect

    import diffusers
    import torch

    family, given = adapter.family, given_to(tiny, model)
    transformer = getattr(diffusers, family.transformer_class).from_pretrained(base / "transformer")
    kind = getattr(diffusers, family.pipeline_class)
    needed = [name for name, one in inspect.signature(kind).parameters.items() if one.default is one.empty]
    pipeline = kind(**{**dict.fromkeys(needed), "transformer": transformer})
    run = _RUNS[tiny.family]
    with torch.no_grad():
        before = run(transformer, tiny, *given)
        try:
            pipeline.load_lora_weights(file.parent, weight_name=file.name)
        except REFUSALS as refusal:
            raise NotApplied("refuses") from refusal
        after, wanted = run(transformer, tiny, *given), model(*given, layout=model.layout(tiny.shape))
    if torch.equal(before, after):
        raise NotApplied("applies nothing")
    return difference(after.flatten(1), wanted)


def _run_wan(model: Any, tiny: Tiny, x: Tensor, times: Tensor, text: Tensor) -> Tensor:
    return model(x.view(1, *tiny.shape), 1000 * times[:, 0], text, return_dict=False)[0]


def _run_ltx(model: Any, tiny: Tiny, x: Tensor, times: Tensor, text: Tensor, lengths: Tensor) -> Tensor:
    channels, frames, height, width = tiny.shape
    return model(
        hidden_states=x.view(1, channels, -1).mT,
        encoder_hidden_states=text,
        timestep=1000 * times[:, 0],
        encoder_attention_mask=_mask(text, lengths),
        num_frames=frames,
        height=height,
        width=width,
        rope_interpolation_scale=(8 / 24, 32, 32),
        return_dict=False,
    )[0].mT


def _run_hunyuan(
    model: Any, tiny: Tiny, x: Tensor, times: Tensor, text: Tensor, lengths: Tensor, pooled: Tensor
) -> Tensor:
    import torch

    return model(
        hidden_states=x.view(1, *tiny.shape),
        timestep=1000 * times[:, 0],
        encoder_hidden_states=text,
        encoder_attention_mask=_mask(text, lengths).float(),
        pooled_projections=pooled,
        guidance=torch.tensor([6000.0]),
        return_dict=False,
    )[0]


def _run_flux(model: Any, tiny: Tiny, x: Tensor, times: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    import torch

    channels, _, height, width = tiny.shape
    rows, columns = height // 2, width // 2
    tokens = x.view(1, channels, rows, 2, columns, 2).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    velocity = model(
        hidden_states=tokens,
        encoder_hidden_states=text,
        pooled_projections=pooled,
        timestep=times[:, 0],
        img_ids=torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)),
        txt_ids=torch.zeros(text.shape[1], 3),
        guidance=torch.tensor([3.5]),
        return_dict=False,
    )[0]
    return velocity.view(1, rows, columns, channels, 2, 2).permute(0, 3, 1, 4, 2, 5)


def _mask(text: Tensor, lengths: Tensor) -> Tensor:
    import torch

    return torch.arange(text.shape[1]) < lengths[:, None]


_RUNS: dict[str, Callable[..., Tensor]] = {
    "wan": _run_wan,
    "ltx": _run_ltx,
    "hunyuan": _run_hunyuan,
    "flux": _run_flux,
}


# -- musubi-tuner


def musubi_error(tiny: Tiny, base: Path, model: Backbone, adapter: Adapter, file: Path) -> float:
    """Merge a file as musubi-tuner does; compare its model's velocity with that of its model on weights that we merged.

    Its attention is in bf16 whatever the model is in, so that its velocity is not compared with ours itself, and
    rounds otherwise where a weight differs in its last bit.
    """
    import torch
    from safetensors.torch import load_file

    if tiny.family != "wan":
        raise NotApplied("not tried" if tiny.family == "hunyuan" else "no such model")
    from musubi_tuner.networks.lora_wan import (  # pyright: ignore[reportMissingImports]  in the folder that is given
        create_arch_network_from_weights,
    )

    state, stored = original_weights(base, adapter.family), load_file(file)
    theirs, ours = (_musubi_wan(tiny, state) for _ in range(2))
    network = create_arch_network_from_weights(1.0, stored, unet=theirs, for_inference=True)
    if not network.unet_loras:
        raise NotApplied("applies nothing")
    network.merge_to(None, theirs, stored)
    merged = dict(state)
    for target in adapter.targets:
        name = adapter.family.names.module(target, source="internal", to="original") + ".weight"
        merged[name] = state[name] + adapter.scale(target) * adapter.up(target) @ adapter.down(target)
    ours.load_state_dict(merged)
    there = theirs.state_dict()
    if (apart := max((there[name] - weight).abs().max().item() for name, weight in merged.items())) > SAME_WEIGHTS:
        raise NotApplied(f"merges other weights: {apart:.0e}")
    x, times, text = given_to(tiny, model)
    with torch.no_grad():
        found, wanted = (
            one([x.view(tiny.shape)], 1000 * times[:, 0], [text[0]], seq_len=model.layout(tiny.shape).tokens)[0]
            for one in (theirs, ours)
        )
    return difference(found, wanted)


def _musubi_wan(tiny: Tiny, state: dict[str, Tensor]) -> Any:
    import musubi_tuner  # pyright: ignore[reportMissingImports]  in the folder that is given

    package = types.ModuleType("musubi_tuner.wan.modules")  # its own imports all encoders, which ask for a GPU
    package.__path__ = [str(Path(part) / "wan/modules") for part in musubi_tuner.__path__]
    sys.modules.setdefault(package.__name__, package)
    from musubi_tuner.wan.modules.model import WanModel  # pyright: ignore[reportMissingImports]

    heads, config = tiny.config["num_attention_heads"], tiny.config
    sizes = {"dim": heads * config["attention_head_dim"], "ffn_dim": config["ffn_dim"], "num_heads": heads}
    model = WanModel(freq_dim=256, num_layers=config["num_layers"], attn_mode="torch", **sizes)
    model.load_state_dict(state)
    return model.eval()
