"""Prompts go in, their text embeddings come out: encoded now, or read from a data set's cache.

`sample` encodes what it is asked for; `eval` and training read what the cache holds. Both give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.data.dataset import Dataset
from transpixeler.data.loader import padded_fields
from transpixeler.data.prompts import negative_prompt
from transpixeler.flow.objective import Fields
from transpixeler.models.family import ModelFolder, caption_fields
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import release_memory

TEXT_DTYPE = torch.bfloat16  # the cache's, so that a prompt has the same embedding from either


@dataclass(frozen=True, eq=False)
class PromptTexts:
    """The fields of prompts, in fp32 and padded with zeros."""

    by_prompt: Mapping[str, Fields]
    negative: Fields | None  # what guidance leads away from; None: without guidance


def encode_prompts(
    config: Config,
    prompts: Sequence[str],
    model: ModelFolder,
    runtime: Runtime,
    known: dict[str, Mapping[str, Tensor]] | None = None,
) -> PromptTexts:
    """Encode prompts and the negative prompt on rank 0, for every rank. A collective call.

    known: texts that were encoded before, which are not again; those of this call join them.
    """
    negative, known = negative_prompt(config.sample, model.family), {} if known is None else known
    texts: list[str] = [*prompts, *([] if negative is None else [negative])]
    wanted = [text for text in dict.fromkeys(texts) if text not in known]
    encoded: list[dict[str, Tensor]] = []
    if wanted and runtime.is_main:
        dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
        encoder = model.load_text_encoder(device=runtime.device, dtype=dtype)
        encoded = [_as_cached(found) for found in encoder.encode(wanted)]
        del encoder
        release_memory(runtime.device)
    shared = runtime.broadcast(encoded)
    assert isinstance(shared, list)
    known.update(zip(wanted, shared, strict=True))
    return _padded({text: known[text] for text in texts}, negative, model)


def cached_prompts(config: Config, data: Dataset, model: ModelFolder) -> PromptTexts:
    """Return the embeddings of the prompts that a data set's cache holds, and of the negative prompt among them."""
    found: dict[str, dict[str, Tensor]] = {}
    for prompt, keys in data.prompts.items():
        values = [data.cache.get(key) for key in keys]
        assert all(value is not None for value in values), f"the cache was filled without the prompt {prompt!r}"
        found[prompt] = {
            field.name: value for field, value in zip(caption_fields(model.fields), values) if value is not None
        }
    return _padded(found, negative_prompt(config.sample, model.family), model)


def _as_cached(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", TEXT_DTYPE) for name, value in fields.items()}


def _padded(texts: Mapping[str, Mapping[str, Tensor]], negative: str | None, model: ModelFolder) -> PromptTexts:
    padded = {prompt: padded_fields(values, model.fields) for prompt, values in texts.items()}
    return PromptTexts(padded, None if negative is None else padded.get(negative))
