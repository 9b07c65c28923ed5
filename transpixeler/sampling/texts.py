"""Prompts go in, their text embeddings come out: encoded now, or read from a data set's cache.

`sample` encodes what it is asked for; `eval` and training read what the cache holds. Both give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from transpixeler.config.sections import Config
from transpixeler.data.dataset import Dataset
from transpixeler.data.given import digest_of
from transpixeler.data.loader import padded_fields
from transpixeler.data.prompts import negative_prompt
from transpixeler.flow.objective import Fields
from transpixeler.models.family import ModelFolder, SeeingTextEncoder, caption_fields
from transpixeler.models.text_parts import makes_seen, open_text_part
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import release_memory

TEXT_DTYPE = torch.bfloat16  # the cache's, so that a prompt has the same embedding from either


Told = str | tuple[str, str]  # a prompt, or one with the digest of the picture that it is read beside


@dataclass(frozen=True, eq=False)
class PromptTexts:
    """The fields of prompts, in fp32 and padded with zeros."""

    by_prompt: Mapping[str, Fields]
    negative: Fields | None  # what guidance leads away from; None: without guidance
    beside: Mapping[Told, Fields] = field(default_factory=dict)  # of prompts that are read beside a picture

    def of(self, prompt: str, picture: np.ndarray | None) -> Fields:
        """Return a prompt's fields, beside a picture [H, W, 3] where the model's text encoder sees one."""
        return self.by_prompt[prompt] if picture is None else self.beside[prompt, digest_of(picture)]


def encode_prompts(
    config: Config,
    prompts: Sequence[str],
    model: ModelFolder,
    runtime: Runtime,
    known: dict[Told, Mapping[str, Tensor]] | None = None,
    *,
    beside: Sequence[tuple[str, np.ndarray]] = (),
) -> PromptTexts:
    """Encode prompts and the negative prompt on rank 0, for every rank. A collective call.

    known: texts that were encoded before, which are not again; those of this call join them. beside: prompts with the
    picture, uint8 [H, W, 3], that each is read beside.
    """
    negative, known = negative_prompt(config.sample, model.family), {} if known is None else known
    texts: list[str] = [*prompts, *([] if negative is None else [negative])]
    pictures: dict[Told, np.ndarray | None] = dict.fromkeys(texts)
    pictures |= {(prompt, digest_of(picture)): picture for prompt, picture in beside}
    wanted = {told: picture for told, picture in pictures.items() if told not in known}
    encoded = _encode(config, wanted, model, runtime.device) if wanted and runtime.is_main else []
    shared = runtime.broadcast(encoded)
    assert isinstance(shared, list)
    known.update(zip(wanted, shared, strict=True))
    found = _padded({text: known[text] for text in texts}, negative, model)
    seen = {told: padded_fields(known[told], model.fields) for told in pictures if isinstance(told, tuple)}
    return replace(found, beside=seen)


def _encode(
    config: Config, wanted: Mapping[Told, np.ndarray | None], model: ModelFolder, device: torch.device
) -> list[dict[str, Tensor]]:
    """Encode texts by one network after the other."""
    texts = [told if isinstance(told, str) else told[0] for told in wanted]
    pictures = [None if picture is None else torch.from_numpy(picture) for picture in wanted.values()]
    found: list[dict[str, Tensor]] = [{} for _ in texts]
    for part in model.text_parts:
        encoder = open_text_part(model, part, device=device, quantize=config.model.quantize_encoders)
        if makes_seen(part, model.fields):
            values = cast(SeeingTextEncoder, encoder).encode_beside(texts, pictures)
        else:
            values = encoder.encode(texts)
        for one, more in zip(found, values, strict=True):
            one |= _as_cached(more)
        del encoder
        release_memory(device)
    return found


def cached_prompts(
    config: Config, data: Dataset, model: ModelFolder, *, beside: Sequence[tuple[str, np.ndarray]] = ()
) -> PromptTexts:
    """Return the embeddings of the prompts that a data set's cache holds, and of the negative prompt among them.

    beside: the prompts that are read beside pictures, with these, in the order of the config's prompts.
    """
    found = {prompt: _cached(prompt, keys, data, model) for prompt, keys in data.prompts.items()}
    texts = _padded(found, negative_prompt(config.sample, model.family), model)
    pairs = zip(beside, data.pictures.seen, strict=True)
    seen = {(one, digest_of(picture)): _cached(one, keys, data, model) for (one, picture), keys in pairs}
    return replace(texts, beside={told: padded_fields(values, model.fields) for told, values in seen.items()})


def _cached(prompt: str, keys: Sequence[bytes], data: Dataset, model: ModelFolder) -> dict[str, Tensor]:
    values = [data.cache.get(key) for key in keys]
    assert all(value is not None for value in values), f"the cache was filled without the prompt {prompt!r}"
    return {one.name: value for one, value in zip(caption_fields(model.fields), values) if value is not None}


def _as_cached(fields: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.to("cpu", TEXT_DTYPE) for name, value in fields.items()}


def _padded(texts: Mapping[str, Mapping[str, Tensor]], negative: str | None, model: ModelFolder) -> PromptTexts:
    padded = {prompt: padded_fields(values, model.fields) for prompt, values in texts.items()}
    return PromptTexts(padded, None if negative is None else padded.get(negative))
