"""The text encoder of HunyuanVideo's image-to-video models: LLaVA, which reads a caption and sees the picture.

In: captions and pictures. Out: some of the picture's tokens with the caption's behind them, as the language model holds
them, and CLIP's one vector of the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.families.hunyuan.config import IMAGE_TOKENS, TEXT_LEN
from transpixeler.families.hunyuan.encoders import LAYER, load_clip, text_folder
from transpixeler.models.damage import read_config
from transpixeler.models.encoders import (
    ROWS,
    VECTOR,
    ClipTextEncoder,
    Network,
    TextAndClipEncoder,
    fingerprint,
    load_image_processor,
    load_network,
    load_tokenizer,
    picture_pixels,
    same_bits_every_time,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.resolve import resolve

EXAMPLE = "hunyuanvideo-community/HunyuanVideo-I2V"
_FILES = ("text_encoder/*", "text_encoder_2/*", "tokenizer/*", "tokenizer_2/*", "image_processor/*")
_CONFIG, _KIND = "text_encoder/config.json", "llava"

# The words that the models were trained with around a caption; their tokens before it, the picture's counted as one.
TEMPLATE = (
    "<|start_header_id|>system<|end_header_id|>\n\n<image>\nDescribe the video by detailing the following aspects "
    "according to the reference image: "
    "1. The main content and theme of the video."
    "2. The color, shape, size, texture, quantity, text, and spatial relationships of the objects."
    "3. Actions, events, behaviors temporal relationships, physical movement changes of the objects."
    "4. background environment, light, style and atmosphere."
    "5. camera angles, movements, and transitions used in the video:<|eot_id|>\n\n"
    "<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
)
TEMPLATE_LEN = 103
IMAGE, HEADER_END = "<image>", "<|end_header_id|>"
HEADERS = 3  # system, user, assistant: a text that is cut off has lost the last one
LEFT_OUT = 4  # tokens: the end of the user's part, and the assistant's header
BLACK = 64  # pixels of a black picture's side; the processor makes the same of any size


class LlavaTextEncoder(TextAndClipEncoder):
    """LLaVA's rows for a picture and a caption, and CLIP's one vector."""

    def __init__(
        self, network: Network, tokenizer: Any, processor: Any, every: int, clip: ClipTextEncoder | None,
        hashed: Callable[[], str], *, device: torch.device,
    ) -> None:  # fmt: skip
        """every: of the picture's tokens, each such one is kept."""
        self.processor, self.every = processor, every
        super().__init__(network, tokenizer, clip, TEMPLATE_LEN + TEXT_LEN, hashed, device=device)

    @torch.no_grad()
    def encode_beside(self, texts: Sequence[str], pictures: Sequence[Tensor | None]) -> list[dict[str, Tensor]]:
        """Return each text's rows beside a picture uint8 [H, W, 3], None for a black one, and its vector."""
        pairs = zip(texts, pictures, strict=True)
        return [self.fields_of(text, partial(self._rows_beside, picture=picture)) for text, picture in pairs]

    def rows(self, text: str) -> Tensor:
        return self._rows_beside(text, None)

    def _rows_beside(self, text: str, picture: Tensor | None) -> Tensor:
        text = TEMPLATE.format(text.replace(IMAGE, " "))  # a second mark would ask for a second picture
        ids = self.tokenizer(text, return_tensors="pt", truncation=True, max_length=self.length).input_ids[0]
        image, end = self.tokenizer.convert_tokens_to_ids([IMAGE, HEADER_END])
        place = int((ids == image).nonzero()[0])
        found = self._states(torch.cat([ids[:place], ids.new_full((IMAGE_TOKENS,), image), ids[place + 1 :]]), picture)
        words = torch.cat([found[:place], found[place + IMAGE_TOKENS - 1 :]])  # by the places of `ids`
        ends = (ids == end).nonzero().flatten().tolist()
        stop = ends[-1] + 1 if len(ends) >= HEADERS else len(ids)
        seen = found[place : place + IMAGE_TOKENS : self.every]
        return torch.cat([seen, words[TEMPLATE_LEN : stop - LEFT_OUT], words[stop:]])

    def _states(self, ids: Tensor, picture: Tensor | None) -> Tensor:
        """Return the language model's states [tokens, width], which the text is told by."""
        picture = torch.zeros(BLACK, BLACK, 3, dtype=torch.uint8) if picture is None else picture
        pixels = picture_pixels(self.processor, picture).to(self.device, self.network.dtype)
        with same_bits_every_time():
            out = self.network(input_ids=ids[None].to(self.device), pixel_values=pixels, output_hidden_states=True)
        return out.hidden_states[LAYER][0]


def load_text_encoder(
    path: str | Path, *, every: int, device: torch.device, dtype: torch.dtype, part: str = ""
) -> LlavaTextEncoder | ClipTextEncoder:
    """part: the field of one of the two networks, to load it alone."""
    from transformers import LlavaForConditionalGeneration
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    folder, hashed = text_folder(path, only=_FILES, example=EXAMPLE), partial(text_fingerprint, path)
    if part == VECTOR:
        return load_clip(folder, hashed, device=device, dtype=dtype)
    place = folder / "text_encoder"
    if (kind := read_config(folder / _CONFIG).get("model_type")) != _KIND:
        raise UserError(
            f"model.path: {place} is {kind}, which sees no picture, and this model goes on from one; set "
            f"model.encoders to {EXAMPLE} or a folder of it"
        )
    network: Network = load_network(LlavaForConditionalGeneration, place, dtype=dtype).model  # makes no words of it
    tokenizer, processor = load_tokenizer(folder / "tokenizer"), load_image_processor(folder / "image_processor")
    clip = None if part == ROWS else load_clip(folder, hashed, device=device, dtype=dtype)
    return LlavaTextEncoder(network, tokenizer, processor, every, clip, hashed, device=device)


def sees_pictures(path: str | Path) -> bool:
    """Tell whether the text encoder in a folder sees pictures: those of image-to-video models do."""
    place = resolve(path, only=(_CONFIG,))
    config = (place.parent if place.is_file() else place) / _CONFIG
    return config.is_file() and read_config(config).get("model_type") == _KIND


def text_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash all that cached texts depend on, without loading a weight."""
    return fingerprint(text_folder(path, only=_FILES, example=EXAMPLE), _FILES, digest)
