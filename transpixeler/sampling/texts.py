"""Prompts go in, their text embeddings come out: encoded now, or read from a data set's cache.

`sample` encodes what it is asked for; `eval` and training read what the cache holds. Both give the same values.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config import Config
from transpixeler.data.dataset import Dataset
from transpixeler.data.prompts import negative_prompt
from transpixeler.models.backbone import VideoModel
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.frames import release_memory

TEXT_DTYPE = torch.bfloat16  # the cache's, so that a prompt has the same embedding from either


@dataclass(frozen=True, eq=False)
class PromptTexts:
    """Embeddings [text_len, text_dim] in fp32, padded with zeros."""

    by_prompt: Mapping[str, Tensor]
    negative: Tensor | None  # what guidance leads away from; None: without guidance


def encode_prompts(
    config: Config, prompts: Sequence[str], model_cls: type[VideoModel], runtime: Runtime
) -> PromptTexts:
    """Encode prompts and the negative prompt on rank 0, for every rank. A collective call."""
    negative = negative_prompt(config.sample, model_cls)
    texts: list[str] = [*prompts, *([] if negative is None else [negative])]
    wanted = list(dict.fromkeys(texts))
    encoded: list[Tensor] = []
    if wanted and runtime.is_main:
        dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
        encoder = model_cls.load_text_encoder(config.model.path, device=runtime.device, dtype=dtype)
        encoded = [value.to("cpu", TEXT_DTYPE) for value in encoder.encode(wanted)]
        del encoder
        release_memory(runtime.device)
    shared = runtime.broadcast(encoded)
    assert isinstance(shared, list)
    return _padded(dict(zip(wanted, shared, strict=True)), negative, model_cls.text_len)


def cached_prompts(config: Config, data: Dataset, model_cls: type[VideoModel]) -> PromptTexts:
    """Return the embeddings of the prompts that a data set's cache holds, and of the negative prompt among them."""
    found: dict[str, Tensor] = {}
    for prompt, key in data.prompts.items():
        text = data.cache.get(key)
        assert text is not None, f"the cache was filled without the prompt {prompt!r}"
        found[prompt] = text
    return _padded(found, negative_prompt(config.sample, model_cls), model_cls.text_len)


def _padded(texts: Mapping[str, Tensor], negative: str | None, length: int) -> PromptTexts:
    """Pad each text [len, dim] to fp32 [length, dim]."""
    pad = torch.nn.functional.pad
    padded = {prompt: pad(text.float(), (0, 0, 0, length - len(text))) for prompt, text in texts.items()}
    return PromptTexts(padded, None if negative is None else padded.get(negative))
