"""A Wan with ComfyUI's names and a patcher with its methods, spelled out, and our nodes as ComfyUI imports them."""

from __future__ import annotations

import importlib.util
import sys
import types
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.support.models import TINY, inputs, move, tiny
from transpixeler.adapters.files import write_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.families.wan.names import NAMES
from transpixeler.flow.tasks import Task
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout

FOLDER = Path(__file__).parents[2] / "tools/comfyui/transpixeler"
WIDTH, HEADS, INNER = 48, TINY["num_attention_heads"], TINY["ffn_dim"]
SHAPE = (4, 3, 8, 8)


@cache
def our_nodes() -> types.SimpleNamespace:
    """Import the folder as ComfyUI does; return the names of its modules side by side."""
    spec = importlib.util.spec_from_file_location("custom_nodes_transpixeler", FOLDER / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    parts = [getattr(module, name) for name in ("streams", "adapter", "patches", "pictures", "nodes")]
    return types.SimpleNamespace(**{name: value for part in parts for name, value in vars(part).items()})


# --- a model as ComfyUI names it, spelled out ------------------------------------------------------------------------


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.norm_q, self.norm_k = nn.RMSNorm(WIDTH, 1e-6), nn.RMSNorm(WIDTH, 1e-6)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        heads = (x.unflatten(2, (HEADS, -1)).transpose(1, 2) for x in (q, k, v))
        return self.o(F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))

    def forward(self, x: Tensor, freqs: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        def turn(y: Tensor) -> Tensor:
            pairs = y.unflatten(2, (HEADS, -1, 1, 2))  # [B, T, H, d/2, 1, 2] times [1, T, 1, d/2, 2, 2]
            return (freqs * pairs).sum(-1).flatten(2)

        return self.attend(turn(self.norm_q(self.q(x))), turn(self.norm_k(self.k(x))), self.v(x))


class CrossAttention(SelfAttention):
    def forward(self, x: Tensor, context: Tensor, transformer_options: dict = {}) -> Tensor:  # noqa: B006
        return self.attend(self.norm_q(self.q(x)), self.norm_k(self.k(context)), self.v(context))


def by_token(rows: Tensor, x: Tensor) -> Tensor:
    """[B, rows, D] → [B, 1 or tokens, D], each row for equally many tokens."""
    return rows if rows.shape[1] == 1 else rows.repeat_interleave(x.shape[1] // rows.shape[1], dim=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = SelfAttention(), CrossAttention()
        self.norm3 = nn.LayerNorm(WIDTH, 1e-6)
        self.ffn = nn.Sequential(nn.Linear(WIDTH, INNER), nn.GELU(approximate="tanh"), nn.Linear(INNER, WIDTH))
        self.modulation = nn.Parameter(torch.zeros(1, 6, WIDTH))

    def forward(self, x: Tensor, e: Tensor, freqs: Tensor, context: Tensor) -> Tensor:
        def normed(y: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
            return F.layer_norm(y, (WIDTH,), eps=1e-6) * (1 + scale) + shift

        parts = [by_token(part, x) for part in (self.modulation + e).unbind(2)]
        x = x + self.self_attn(normed(x, *parts[:2]), freqs, transformer_options={}) * parts[2]
        x = x + self.cross_attn(self.norm3(x), context, transformer_options={})
        return x + self.ffn(normed(x, *parts[3:5])) * parts[5]


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 16)
        self.modulation = nn.Parameter(torch.zeros(1, 2, WIDTH))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (by_token(part, x) for part in (self.modulation + e[:, :, None]).unbind(2))
        return self.head(F.layer_norm(x, (WIDTH,), eps=1e-6) * (1 + scale) + shift)


class ComfyWan(nn.Module):
    """One video [B, C, F, h, w] at one time t of 0 to 1000."""

    def __init__(self) -> None:
        super().__init__()
        self.patch_embedding = nn.Conv3d(4, WIDTH, (1, 2, 2), (1, 2, 2))
        self.text_embedding = nn.Sequential(nn.Linear(16, WIDTH), nn.GELU("tanh"), nn.Linear(WIDTH, WIDTH))
        self.time_embedding = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))
        self.blocks = nn.ModuleList([Block() for _ in range(TINY["num_layers"])])
        self.head = Head()
        self.img_emb = None

    def rope_encode(
        self, t: int, h: int, w: int, steps_h: int = 0, steps_w: int = 0, device: Any = None, dtype: Any = None
    ) -> Tensor:
        """[1, tokens, 1, d/2, 2, 2], a rotation for each pair of a head's 24 channels: 8 for each axis."""
        sides = [(t, t), (h // 2, steps_h or h // 2), (w // 2, steps_w or w // 2)]
        places = torch.cartesian_prod(*(torch.linspace(0, n - 1, steps, dtype=torch.float64) for n, steps in sides))
        rates = 10000.0 ** -(torch.arange(0, 8, 2, dtype=torch.float64) / 8)
        angles = (places[:, :, None] * rates).flatten(1)
        rows = [torch.stack([angles.cos(), -angles.sin()], -1), torch.stack([angles.sin(), angles.cos()], -1)]
        return torch.stack(rows, -2).float()[None, :, None]

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        frames, height, width = x.shape[2:]
        freqs = self.rope_encode(frames, height, width, device=x.device, dtype=x.dtype)
        tokens = self.patch_embedding(x.float()).to(x.dtype)
        grid = tokens.shape[2:]
        tokens = tokens.flatten(2).transpose(1, 2)
        phase = timestep.view(len(x), -1, 1) * 10000.0 ** -(torch.arange(16) / 16)
        e = self.time_embedding(torch.cat([phase.cos(), phase.sin()], dim=2))
        e0 = self.time_projection(e).unflatten(2, (6, -1))
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, e=e0, freqs=freqs, context=text)
        return self.unpatchify(self.head(tokens, e), grid)

    def unpatchify(self, x: Tensor, grid: Any) -> Tensor:
        patches = x.unflatten(2, (1, 2, 2, 4)).unflatten(1, tuple(grid))
        return patches.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class Base:
    """The methods of ComfyUI's model around a Wan that the nodes take the place of."""

    def __init__(self, wan: nn.Module) -> None:
        self.diffusion_model = wan

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return {}

    def process_timestep(self, timestep: Tensor, **kwargs: Any) -> Tensor:
        return timestep

    def scale_latent_inpaint(self, *, latent_image: Tensor, noise: Tensor, sigma: float) -> Tensor:
        return sigma * noise + (1 - sigma) * latent_image


class Patcher:
    """The methods of ComfyUI's ModelPatcher that the node calls; patches are on the model during a run alone."""

    def __init__(self, wan: nn.Module, patches: dict[str, Any] | None = None) -> None:
        self.model = Base(wan)
        self.patches = dict(patches or {})

    def clone(self) -> Patcher:
        return Patcher(self.model.diffusion_model, self.patches)

    def add_object_patch(self, name: str, value: Any) -> None:
        self.patches[name] = value

    def get_model_object(self, name: str) -> Any:
        return self.patches[name] if name in self.patches else self._owner(f"{name}.x")[0]

    def _owner(self, name: str) -> tuple[Any, str]:
        *path, last = name.split(".")
        owner: Any = self.model
        for part in path:
            owner = getattr(owner, part)
        return owner, last

    @torch.no_grad()
    def run(self, x: Tensor, times: Tensor, text: Tensor, mask: Tensor | None = None) -> Tensor:
        for name, value in self.patches.items():
            setattr(*self._owner(name), value)
        try:
            times = self.model.process_timestep(times, x=x, denoise_mask=mask)
            return self.model.diffusion_model(x, times, text)
        finally:
            for name in self.patches:
                delattr(*self._owner(name))


# --- the same weights in both ----------------------------------------------------------------------------------------


def trained(streams: int, *, attends: bool = True, seed: int = 1, **lora: Any) -> WanModel:
    model = tiny(streams, attends=attends)
    inject(model, LoraConfig(rank=4, alpha=2.0, **lora))
    move(model, seed=seed, names="lora_")
    move(model, seed=seed, names="stream_embedding")
    return model.eval()


def comfy(model: WanModel) -> Patcher:
    wan = ComfyWan()
    own = {name: value for name, value in model.state_dict().items() if "lora_" not in name and "stream_" not in name}
    wan.load_state_dict({NAMES.parameter(name, source="internal", to="original"): value for name, value in own.items()})
    return Patcher(wan)


def stored(model: WanModel, path: Path, format: str = "comfyui", **said: str) -> Path:
    metadata = {"streams": ",".join(model.streams), "rgb_attends_aux": str(model.rgb_attends_aux).lower()} | said
    return write_adapter(adapter_of(model, metadata), path, format=format)


@torch.no_grad()
def ours(
    model: WanModel, scales: tuple[int, ...] = (), whole: tuple[int, ...] = (), first: tuple[int, ...] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Our velocity as ComfyUI's latent, and what ComfyUI would give in: latent, time, text, and where noise is."""
    channels, frames, height, width = SHAPE
    scales = scales or (1,) * len(model.streams)
    shapes = tuple((channels, frames, height // scale, width // scale) for scale in scales)
    layout = StreamLayout(tuple(model.streams), shapes, (1, 2, 2), scales=scales)
    layout = Task("", given=frozenset(whole), first=frozenset(first)).cut(layout)
    x, times, text = inputs(layout)
    given = [group.stream in whole or (group.stream in first and not group.start) for group in layout.groups]
    time = times[:, :1].clone()
    times[:] = torch.where(torch.tensor(given), 0.0, time)
    masks = [torch.ones(2, 1, *shape[1:]) for shape in shapes]
    for stream in whole:
        masks[stream][:] = 0
    for stream in first:
        masks[stream][:, :, 0] = 0
    velocity, latent, mask = (
        canvas(parts) for parts in (layout.unpack(model(x, times, text, layout=layout)), layout.unpack(x), masks)
    )
    return velocity, (latent, 1000 * time[:, 0], text, mask)


def canvas(parts: Sequence[Tensor]) -> Tensor:
    """Streams one after another in the frames, the smaller ones in the upper left corner, beside zeros."""
    height, width = parts[0].shape[-2:]
    return torch.cat([F.pad(one, (0, width - one.shape[-1], 0, height - one.shape[-2])) for one in parts], dim=2)
