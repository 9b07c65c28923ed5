"""Define the backbone: three named parts, run over several streams, cut and wrapped by those names.

In: a model's config. Out: an `nn.Module` that takes packed noisy latents and their conditions and returns packed
velocity. The pipeline, FSDP, recompute, compile and LoRA know this class and no concrete model.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from transpixeler.config import UserError
from transpixeler.models.streams import Grid, StreamLayout, Tokens

Digest = Callable[[Path], str]
if TYPE_CHECKING:
    from transpixeler.models.dimensions import Dimensions

FAMILIES = {"wan": "transpixeler.families.wan.model:WanModel"}


def model_class(family: str) -> type[VideoModel]:
    """Import the class of `model.family`, only when it is used."""
    module, name = FAMILIES[family].split(":")
    return getattr(import_module(module), name)


def file_digest(path: Path) -> str:
    """Hash a file's content."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


class Conditions(NamedTuple):
    """Inputs that a model is conditioned on; another kind of conditioning is another field."""

    timesteps: Tensor  # [B, S] in [0, 1]
    text: Tensor  # [B, text_len, text_dim], zero padded


# What flows from stage to stage, flat, right for LoRA and for full fine-tuning:
# hidden [B, T, D], modulation [B, S, 6, D], context [B, text_len, D], temb [B, S, D]. A plain tuple:
# pipelining wants no other.
State = tuple[Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class SamplingDefaults:
    negative_prompt: str


class Vae(Protocol):
    """A video autoencoder, as `data.encode` and `sampling` use it."""

    fingerprint: str

    def encode(self, video: Tensor) -> Tensor: ...  # uint8 [B,F,H,W,3] or float [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w]
    def decode(self, latents: Tensor) -> Tensor: ...  # → [B,3,F,H,W] in [-1,1]
    def to(self, device: torch.device) -> Vae: ...


class TextEncoder(Protocol):
    """Captions to embeddings at their true length."""

    fingerprint: str

    def encode(self, texts: Sequence[str]) -> list[Tensor]: ...  # [len, dim] each
    def to(self, device: torch.device) -> TextEncoder: ...


class Block(nn.Module, ABC):
    """One block; `recompute`, when set, decides what of `compute` is kept for the backward pass."""

    recompute: Callable[..., Tensor] | None = None

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor, tokens: Tokens) -> Tensor:
        if self.recompute is None:
            return self.compute(hidden, modulation, context, tokens)
        tokens = tokens._replace(lean=False)  # nothing is kept: copying saves nothing
        compute = self.compute if torch.compiler.is_compiling() else _Twice(self.compute)  # compilers drop what is idle
        return self.recompute(compute, hidden, modulation, context, tokens)

    @abstractmethod
    def compute(self, hidden: Tensor, modulation: Tensor, context: Tensor, tokens: Tokens) -> Tensor: ...


class _Twice:
    """A block's `compute`, which is told from its second call on that its result is not wanted."""

    def __init__(self, compute: Callable[..., Tensor]) -> None:
        self.compute, self.again = compute, False

    def __call__(self, hidden: Tensor, modulation: Tensor, context: Tensor, tokens: Tokens) -> Tensor:
        tokens, self.again = tokens._replace(again=self.again), True
        return self.compute(hidden, modulation, context, tokens)


class VideoModel(nn.Module, ABC):
    """A video diffusion transformer in three named parts: `embed`, `blocks`, `head`.

    To add a model, subclass this in one module and name it in `FAMILIES`:
    1. `from_config` builds it (under `torch.device("meta")` too) with the published parameter names inside each part;
       blocks are an `nn.ModuleDict` keyed by the original index, linears that a LoRA may target are
       `models.linear.Linear`.
    2. `embed(x, *conditions, layout=…, dtype=…)` returns a `State` in the matmuls' dtype; each block is a `Block`;
       `head(hidden, temb, layout=…)` returns packed velocity. `positions` gives what blocks need of the layout.
    3. `read_config`, `dtype_of`, `dimensions`, the geometry properties, `sampling`, and the lazy encoders.
    Streams, LoRA, pipelines, sharding, recompute, compile, quantization, caches and sampling then work as they are.
    """

    embed: nn.Module | None
    blocks: nn.ModuleDict
    head: nn.Module | None
    streams: tuple[str, ...]
    matmul_dtype: torch.dtype = torch.float32

    text_len: ClassVar[int]
    sampling: ClassVar[SamplingDefaults]
    patch: Grid
    latent_channels: int
    text_dim: int
    vae_stride: Grid

    # -- to be given by each model

    @classmethod
    @abstractmethod
    def from_config(
        cls, config: dict[str, Any], *, streams: Sequence[str], rgb_attends_aux: bool = True, attention: str = "auto"
    ) -> VideoModel:
        """Build on the current default device."""

    @classmethod
    @abstractmethod
    def read_config(cls, path: str | Path) -> dict[str, Any]:
        """Read the published config in a model folder."""

    @classmethod
    @abstractmethod
    def stored_names(cls, stored: Iterable[str]) -> Mapping[str, str]:
        """Map the internal name of each weight of a file, in any published spelling, to the name it is stored under."""

    @abstractmethod
    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens: ...

    @abstractmethod
    def state_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> State:
        """Make meta tensors of what flows between stages."""

    @abstractmethod
    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype a base parameter keeps when matmuls run in `dtype`."""

    @abstractmethod
    def dimensions(self) -> Dimensions:
        """Return what `models.costs` needs to know; of the whole model, so ask before `keep`."""

    @abstractmethod
    def rebuild_buffers(self) -> None:
        """Forget what was computed on another device; called after `to_empty`."""

    # -- encoders, loaded only where they are used

    @classmethod
    @abstractmethod
    def load_vae(cls, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> Vae: ...

    @classmethod
    def clean_caption(cls, text: str) -> str:
        """Return what the text encoder reads of it: captions that differ in nothing else share one encoding."""
        return text

    @classmethod
    @abstractmethod
    def load_text_encoder(cls, path: str | Path, *, device: torch.device, dtype: torch.dtype) -> TextEncoder: ...

    @classmethod
    @abstractmethod
    def vae_fingerprint(cls, path: str | Path, digest: Digest = file_digest) -> str: ...

    @classmethod
    @abstractmethod
    def text_fingerprint(cls, path: str | Path, digest: Digest = file_digest) -> str: ...

    @classmethod
    @abstractmethod
    def vae_geometry(cls, path: str | Path) -> tuple[Grid, int]:
        """(stride, channels) without loading weights."""

    # -- the same for all models

    def forward(self, *state: Tensor, layout: StreamLayout) -> Tensor | State:
        """`(x [B, N], *conditions)` or a `State` in; velocity [B, N] or a `State` out, by the parts that are here."""
        if self.embed is not None:
            state = self.embed(*state, layout=layout, dtype=self.matmul_dtype)
        hidden, modulation, context, temb = state
        tokens = self.positions(layout, hidden.device)
        for block in self.blocks.values():
            hidden = block(hidden, modulation, context, tokens)
        if self.head is None:
            return hidden, modulation, context, temb
        return self.head(hidden, temb, layout=layout)

    def keep(self, *, embed: bool, blocks: Iterable[int], head: bool) -> None:
        """Delete the parts that live on other stages; what stays keeps its name."""
        wanted = {str(index) for index in blocks}
        assert wanted <= set(self.blocks), (wanted, list(self.blocks))
        for index in [index for index in self.blocks if index not in wanted]:
            del self.blocks[index]
        self.embed = self.embed if embed else None
        self.head = self.head if head else None

    def layout(self, shape: Sequence[int]) -> StreamLayout:
        """All streams of this model with the same latent shape (C, F, H, W)."""
        return StreamLayout.equal(self.streams, shape, self.patch)


def apply_dtypes(model: VideoModel, dtype: torch.dtype) -> None:
    """Matmuls in `dtype`, and base parameters but for the model's fp32 islands; adapters and embeddings stay fp32."""
    model.matmul_dtype = dtype
    for name, parameter in model.named_parameters():
        wanted = model.dtype_of(name, dtype)
        if parameter.dtype != wanted and parameter.itemsize > 1:  # what is quantized stays so
            parameter.data = parameter.data.to(wanted)


def set_trainable(model: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Train what matches one of the name patterns and freeze the rest; returns the trainable names."""
    names = [name for name, _ in model.named_parameters()]
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            kinds = sorted(
                {name.replace(name.split(".")[1], "*", 1) if name.startswith("blocks.") else name for name in names}
            )
            raise UserError(f"model.trainable: {pattern!r} matches no parameter; there are {', '.join(kinds)}")
    chosen = [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in set(chosen))
    return chosen
