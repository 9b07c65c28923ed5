"""Open the networks that read captions one at a time, quantized where that is asked.

In: a model's folder and one of its `text_parts`. Out: an encoder of that part's fields. It is quantized on the host,
layer by layer, so that a device never holds it whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from transpixeler.models.family import Field, ModelFolder, TextEncoder, caption_fields
from transpixeler.models.quantize_encoder import quantize_linears


def fields_of_part(part: str, fields: Sequence[Field]) -> tuple[str, ...]:
    """Return the names of the fields that one network makes."""
    return (part,) if part else tuple(field.name for field in caption_fields(fields))


def makes_seen(part: str, fields: Sequence[Field]) -> bool:
    """Tell whether a network reads captions beside pictures."""
    names = fields_of_part(part, fields)
    return any(field.name in names and field.source == "caption+image" for field in fields)


def open_text_part(model: ModelFolder, part: str, *, device: torch.device, quantize: str = "none") -> TextEncoder:
    """Load one network that reads captions, on to a device."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if quantize == "none":
        return model.load_text_part(part, device=device, dtype=dtype)
    encoder = model.load_text_part(part, device=torch.device("cpu"), dtype=dtype)
    for network in encoder.networks:
        quantize_linears(network, quantize)
    return encoder.to(device)
