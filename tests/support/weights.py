"""A tiny Wan's weights in every published layout of files, and a model of their names and shapes alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from transpixeler.families.wan.original import T5_FILE
from transpixeler.models.weights import PACKED_PREFIX

WIDTH, FFN, LAYERS = 24, 40, 3


def diffusers_wan(seed: int = 0) -> nn.Module:
    from diffusers import WanTransformer3DModel

    torch.manual_seed(seed)
    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=LAYERS, ffn_dim=FFN, text_dim=16, freq_dim=16
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


class Holder(nn.Module):
    """The names and shapes of a Wan in three parts, without its arithmetic."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.embed: nn.Module | None = nn.Module()
        self.blocks = nn.ModuleDict()
        self.head: nn.Module | None = nn.Module()
        for name, shape in shapes.items():
            *modules, leaf = name.split(".")
            owner: nn.Module = self
            for module in modules:
                if module not in owner._modules:
                    owner.add_module(module, nn.Module())
                owner = owner._modules[module]
            owner.register_parameter(leaf, nn.Parameter(torch.full(shape, torch.nan, dtype=dtype)))


def holder(internal: dict[str, Tensor], **options: Any) -> Holder:
    return Holder({name: tuple(tensor.shape) for name, tensor in internal.items()}, **options)


def write_diffusers(folder: Path) -> Path:
    diffusers_wan().save_pretrained(folder / "transformer", max_shard_size="40KB")
    assert (folder / "transformer" / "diffusion_pytorch_model.safetensors.index.json").exists()
    return folder


def write_original(folder: Path, original: dict[str, Tensor]) -> Path:
    folder.mkdir()
    names = sorted(original)
    for shard, half in enumerate((names[::2], names[1::2]), 1):
        save_file(
            {n: original[n].contiguous() for n in half},
            folder / f"diffusion_pytorch_model-0000{shard}-of-00002.safetensors",
        )
    torch.save({}, folder / T5_FILE)
    return folder


def write_pickled(folder: Path, original: dict[str, Tensor]) -> Path:
    folder.mkdir()
    torch.save(original, folder / "diffusion_pytorch_model.pth")
    return folder


def write_comfyui(file: Path, original: dict[str, Tensor], prefix: str = PACKED_PREFIX) -> Path:
    save_file({prefix + name: tensor.contiguous() for name, tensor in original.items()}, file)
    return file
