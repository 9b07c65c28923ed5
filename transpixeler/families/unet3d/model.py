"""The 3D U-Net of Ho et al. 2022: convolutions over frames, attention over time, and a way down and up again.

In: packed noisy latents `[B, N]`, times `[B, G]`, captions' vectors `[B, D]`. Out: the packed noise `[B, N]`. Streams
lie side by side in the channels of one network, which is told one time. Its levels read each other's results, so that
it is one block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.families.unet3d.config import UnetConfig
from transpixeler.families.unet3d.layers import (
    BUCKETS,
    Conv,
    FrameAttention,
    LinearAttention,
    ResBlock,
    TimeAttention,
    Wider,
    distances,
)
from transpixeler.models.backbone import QKV, Backbone, Block, Flow, Head
from transpixeler.models.family import Field
from transpixeler.models.modulation import sinusoid
from transpixeler.models.streams import StreamLayout
from transpixeler.models.tokens import Tokens


def fields(config: UnetConfig) -> tuple[Field, ...]:
    """Return the one vector that stands for a caption; zeros where there is none."""
    return (Field("text", config.cond_dim),)


class Embed(nn.Module):
    """The first convolution, and what all levels are told: time and caption.

    A companion has a convolution of its own beside RGB's, and a row for each of its channels in the last one. They are
    zero in the beginning, so that RGB is the base's.
    """

    def __init__(self, config: UnetConfig, streams: Sequence[str]) -> None:
        super().__init__()
        self.config = config
        self.conv = Conv(config.channels, config.dim, config.first_kernel, padding=config.first_kernel // 2)
        self.time1, self.time2 = nn.Linear(config.dim, 4 * config.dim), nn.Linear(4 * config.dim, 4 * config.dim)
        self.null = nn.Parameter(torch.empty(1, config.cond_dim))
        rows = config.first_kernel**2 + 1
        shape = (config.channels, rows, config.dim)
        self.stream_embedding = nn.ParameterDict({name: torch.zeros(shape) for name in streams[1:]})

    def forward(
        self,
        x: Tensor,
        times: Tensor,
        text: Tensor,
        focus: Tensor | None = None,
        *,
        layout: StreamLayout,
        dtype: torch.dtype,
    ) -> Flow:
        """focus: [B], 1 for samples whose frames see themselves alone."""
        first, *others = (part.to(dtype) for part in layout.unpack(x))
        hidden, last = self.conv(first), []
        for name, part in zip(layout.names[1:], others, strict=True):
            own = self.stream_embedding[name]
            hidden = hidden + self._companion(part, own[:, :-1])
            last.append(own[:, -1])
        rows = torch.stack(last) if last else x.new_zeros(0, self.config.channels, self.config.dim)
        wave = sinusoid(times[:, 0], self.config.dim)
        time = self.time2(F.gelu(self.time1(wave)))
        told = torch.where((text == 0).all(1, keepdim=True), self.null, text.float())
        return hidden, torch.cat([time, told], dim=1), rows, x.new_zeros(0) if focus is None else focus

    def _companion(self, x: Tensor, kernel: Tensor) -> Tensor:
        """Convolve a companion's latents by its kernel [C, k·k, dim]."""
        side = self.config.first_kernel
        weight = kernel.permute(2, 0, 1).unflatten(2, (side, side)).to(x.dtype)
        frames = F.conv2d(x.transpose(1, 2).flatten(0, 1), weight, padding=side // 2)
        return frames.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class Level(nn.Module):
    """One size of the frames, on the way down or up."""

    def __init__(self, inputs: int, outputs: int, config: UnetConfig, resample: nn.Module | None) -> None:
        super().__init__()
        self.res1, self.res2 = ResBlock(inputs, outputs, config), ResBlock(outputs, outputs, config)
        self.spatial, self.temporal = LinearAttention(outputs, config), TimeAttention(outputs, config)
        self.resample = resample

    def forward(self, x: Tensor, vector: Tensor, bias: Tensor, focus: Tensor, *below: Tensor) -> Flow:
        """Return what the other way reads of this level, and what the next level takes. below: what it reads itself."""
        x = self.res2(self.res1(torch.cat([x, *below], dim=1), vector), vector)
        x = self.temporal(self.spatial(x), bias, focus)
        return x, (x if self.resample is None else self.resample(x))


class Middle(nn.Module):
    """The smallest frames, whose cells see each other."""

    def __init__(self, width: int, config: UnetConfig) -> None:
        super().__init__()
        self.res1, self.res2 = ResBlock(width, width, config), ResBlock(width, width, config)
        self.spatial, self.temporal = FrameAttention(width, config), TimeAttention(width, config)

    def forward(self, x: Tensor, vector: Tensor, bias: Tensor, focus: Tensor) -> Flow:
        x = self.temporal(self.spatial(self.res1(x, vector)), bias, focus)
        return (self.res2(x, vector),)


class Unet(Block):
    """All levels: down, the middle, and up, where each reads its like of the way down."""

    attends = ()  # no attention over the whole sequence

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.config = config
        self.start = TimeAttention(config.dim, config)
        self.relative = nn.Parameter(torch.empty(BUCKETS, config.heads))
        pairs = list(zip((config.dim, *widths), widths))
        smaller = [Conv(width, width, 4, stride=2, padding=1) for width in widths[:last]]
        down = [Level(a, b, config, resample) for (a, b), resample in zip(pairs, (*smaller, None), strict=True)]
        up = [Level(2 * b, a, config, Wider(a) if n else None) for n, (a, b) in enumerate(pairs)]
        self.down, self.middle = nn.ModuleList(down), Middle(widths[-1], config)
        self.up = nn.ModuleList(reversed(up))
        self.last = ResBlock(2 * config.dim, config.dim, config)

    def forward(self, flow: Flow, tokens: Tokens) -> Flow:
        """Return the flow with its first tensor changed; a level at a time is recomputed."""
        recompute = self._recompute(flow, tokens)

        def run(part: nn.Module, *inputs: Tensor) -> Flow:
            if recompute is None:
                return part(*inputs)
            return recompute(lambda given, _: part(*given), inputs, tokens)

        hidden, vector, rows, focus = flow
        pairs = distances(hidden.shape[2], hidden.device)
        told = vector, self.relative[pairs].permute(2, 0, 1), focus
        first = x = self.start(hidden, *told[1:])
        seen = []
        for level in self.down:
            skip, x = run(level, x, *told)
            seen.append(skip)
        (x,) = run(self.middle, x, *told)
        for level in self.up:
            _, x = run(level, x, *told, seen.pop())
        return self.last(torch.cat([x, first], dim=1), vector), vector, rows, focus

    def parts(self) -> Sequence[nn.Module]:
        return (*self.down, self.middle, *self.up)

    def reads(self, linear: str) -> str:
        return "joined"

    def repeats(self, module: str) -> int:
        """Return how many cells of its level one token covers."""
        way, _, rest = module.partition(".")
        count, number = len(self.config.dim_mults), rest.partition(".")[0]
        level = count - 1 if way == "middle" else 0
        if way in ("down", "up"):
            level = int(number) if way == "down" else count - 1 - int(number)
        level += way == "down" and rest.endswith("resample")  # it makes the smaller frames
        return (self.config.side // 2**level) ** 2

    def qkv(self, flow: Flow, tokens: Tokens) -> QKV:
        raise AssertionError("its levels attend by themselves")

    def finish(self, flow: Flow, seen: Tensor, others: Flow, tokens: Tokens) -> Flow:
        raise AssertionError("its levels attend by themselves")


class UnetHead(Head):
    """The last convolution, over one cell: RGB's channels, then each companion's."""

    def __init__(self, config: UnetConfig) -> None:
        super().__init__()
        self.conv = nn.Linear(config.dim, config.channels)

    def values_by_token(self, flow: Flow, tokens: Tokens, facts: Any) -> Tensor:
        """Return what `values` does; frames are held whole, whatever `chunk` says."""
        return self.values(*flow, groups=tokens.groups)

    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        """Return [B, F, H, W, S·C]."""
        cells, rows = flow[0].permute(0, 2, 3, 4, 1).float(), flow[2]
        return torch.cat([self.conv(cells), F.linear(cells, rows.flatten(0, 1).float())], dim=-1)

    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        return layout.pack(values.permute(0, 4, 1, 2, 3).chunk(len(layout.names), dim=1))


class UnetModel(Backbone):
    """The network, for any number of streams."""

    family = "unet3d"
    lora_targets = ("*.qkv", "*.out")
    undivided = "the levels of a U-Net read each other's results and all of a frame"
    heads = 1

    def __init__(self, config: UnetConfig, *, streams: Sequence[str]) -> None:
        super().__init__()
        self.config, self.streams, self.fields, self.patch = config, tuple(streams), fields(config), config.patch
        self.width = config.dim * config.side**2  # of what one token covers
        self.embed, self.head = Embed(config, streams), UnetHead(config)
        self.blocks = nn.ModuleDict({"0": Unet(config)})

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        """Return lengths alone: levels know their places."""
        rope = torch.empty(layout.tokens, 0, device=device)
        return Tokens.of(layout, rope, kernel="auto", rgb_attends_aux=True)

    def flow_meta(self, layout: StreamLayout, batch: int, dtype: torch.dtype) -> Flow:
        config, (_, *extent) = self.config, layout.shapes[0]
        return (
            torch.empty(batch, config.dim, *extent, dtype=dtype, device="meta"),
            torch.empty(batch, config.vector, device="meta"),
            torch.empty(len(self.streams) - 1, config.channels, config.dim, device="meta"),
            torch.empty(0, device="meta"),
        )

    def dtype_of(self, name: str, dtype: torch.dtype) -> torch.dtype:
        """Keep the ends, norms, and what makes or tells vectors in fp32."""
        *places, leaf = name.split(".")
        exact = places[0] != "blocks" or places[-1] in ("norm", "norm1", "norm2", "vector") or leaf == "relative"
        return torch.float32 if exact else dtype

    def end_reads(self, name: str) -> str:
        return "joined" if name in ("embed.conv", "head.conv") else "vectors"

    def end_repeats(self, name: str) -> int:
        return self.config.side**2 * len(self.streams)  # each stream has channels of its own

    def rebuild_buffers(self) -> None:
        """Nothing is remembered of another device."""
