"""The image encoder of Wan 2.1's image-to-video models: CLIP's ViT-H, from a diffusers folder or Wan's own file.

Wan publishes it as pickled tensors of a whole CLIP, whose text half is left out. Sizes are read off the tensors.
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.models.damage import naming_damage
from transpixeler.models.encoders import (
    ClipImageEncoder,
    Network,
    fingerprint,
    image_processor_class,
    load_image_processor,
    load_network,
)
from transpixeler.models.family import Digest, file_digest
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import load_pickled

CLIP_FILE = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
_CONFIG = "image_encoder/config.json"
_FILES = ("image_encoder/*", "image_processor/*", CLIP_FILE)
_HEAD_WIDTH = 80  # of ViT-H, which no tensor's shape tells
_TOP = {
    "patch_embedding": "embeddings.patch_embedding",
    "pre_norm": "pre_layrnorm",
    "post_norm": "post_layernorm",
}
_LAYER = {
    "norm1": "layer_norm1",
    "norm2": "layer_norm2",
    "attn.proj": "self_attn.out_proj",
    "mlp.0": "mlp.fc1",
    "mlp.2": "mlp.fc2",
}
_PREFIX = "visual."


def load_image_encoder(path: str | Path, *, device: torch.device, dtype: torch.dtype) -> ClipImageEncoder:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    network: Network
    folder = _folder(path)
    if (folder / _CONFIG).exists():
        network = load_network(CLIPVisionModel, folder / "image_encoder", dtype=dtype)
        processor = load_image_processor(folder / "image_processor")
    else:
        state = load_pickled(folder / CLIP_FILE)
        with naming_damage(folder / CLIP_FILE):
            config = CLIPVisionConfig(**original_clip_config(state))
            network = CLIPVisionModel(config)
            inner = getattr(network, "vision_model", network)  # transformers before 5 wraps it
            inner.load_state_dict(original_clip_state(state))
        network.to(dtype)
        # Wan's own code squeezes a picture into the square, where diffusers' processor crops it
        square = {"height": config.image_size, "width": config.image_size}
        processor = image_processor_class()(size=square, do_center_crop=False)
    return ClipImageEncoder(network, processor, partial(image_fingerprint, folder), device=device)


def image_fingerprint(path: str | Path, digest: Digest = file_digest) -> str:
    """Hash what cached image tokens depend on, without loading a weight."""
    return fingerprint(_folder(path), _FILES, digest)


def original_clip_config(state: dict[str, Tensor]) -> dict[str, Any]:
    """Arguments of transformers' `CLIPVisionConfig`."""
    width, _, patch, _ = state["visual.patch_embedding.weight"].shape
    layers = {int(match[1]) for match in (re.match(r"visual\.transformer\.(\d+)\.", key) for key in state) if match}
    return {
        "hidden_size": width,
        "intermediate_size": state["visual.transformer.0.mlp.0.weight"].shape[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // _HEAD_WIDTH,
        "patch_size": patch,
        "image_size": patch * math.isqrt(state["visual.pos_embedding"].shape[1] - 1),
        "hidden_act": "gelu",
    }


def original_clip_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the vision half under the names of transformers' `CLIPVisionModel`."""
    found: dict[str, Tensor] = {
        "embeddings.class_embedding": state["visual.cls_embedding"].flatten(),
        "embeddings.position_embedding.weight": state["visual.pos_embedding"][0],
    }
    for key, tensor in state.items():
        module, _, leaf = key.removeprefix(_PREFIX).rpartition(".")
        if not key.startswith(_PREFIX) or not module or module == "head":
            continue
        layer = re.fullmatch(r"transformer\.(\d+)\.(.+)", module)
        if layer is None:
            found[f"{_TOP[module]}.{leaf}"] = tensor
        elif layer[2] == "attn.to_qkv":
            place = f"encoder.layers.{layer[1]}.self_attn"
            found |= {f"{place}.{part}_proj.{leaf}": piece for part, piece in zip("qkv", tensor.chunk(3))}
        else:
            found[f"encoder.layers.{layer[1]}.{_LAYER[layer[2]]}.{leaf}"] = tensor
    return found


def _folder(path: str | Path) -> Path:
    folder = resolve(path, only=_FILES)
    if not any((folder / name).exists() for name in (_CONFIG, CLIP_FILE)):
        raise UserError(f"model.path: {folder} holds no image encoder: neither {_CONFIG} nor {CLIP_FILE} is there")
    return folder
