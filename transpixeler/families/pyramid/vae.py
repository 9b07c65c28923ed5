"""A causal autoencoder of videos: 3D convolutions that look back in time alone, in the layout of the published files.

In: frames `[B, 3, F, H, W]` with F = 8k + 1. Out: latents of k + 1 frames, and frames again. A video goes through in
windows of frames: each convolution remembers the frames that the next window looks back at, so that windows change
nothing, and memory does not grow with the length.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


@dataclass(frozen=True)
class VaeConfig:
    """The published sizes; `down` and `up` tell after which levels rows and columns, and frames, are halved."""

    channels: int
    widths: tuple[int, ...]
    encoder_layers: tuple[int, ...]
    decoder_layers: tuple[int, ...]
    sides: tuple[bool, ...]
    times: tuple[bool, ...]
    groups: int

    @classmethod
    def read(cls, config: Mapping[str, Any]) -> VaeConfig:
        return cls(
            channels=int(config["encoder_out_channels"]),
            widths=tuple(config["encoder_block_out_channels"]),
            encoder_layers=tuple(config["encoder_layers_per_block"]),
            decoder_layers=tuple(config["decoder_layers_per_block"]),
            sides=tuple(config["encoder_spatial_down_sample"]),
            times=tuple(config["encoder_temporal_down_sample"]),
            groups=int(config.get("encoder_norm_num_groups", 32)),
        )

    @property
    def stride(self) -> tuple[int, int, int]:
        """Return how many frames, rows and columns one latent cell covers."""
        side = 2 ** sum(self.sides)
        return 2 ** sum(self.times), side, side


class Conv(nn.Module):
    """A convolution over space and the past; before a video's first frame there is nothing."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 3, stride: tuple[int, int, int] = (1, 1, 1)) -> None:
        super().__init__()
        side = kernel // 2
        self.conv = nn.Conv3d(inputs, outputs, kernel, stride, padding=(0, side, side))
        self.before = kernel - 1
        self.kept = kernel - stride[0]  # frames that the next window looks back at
        self._past: Tensor | None = None

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        """first: the window is the first one of its video."""
        if first or self._past is None:
            x = F.pad(x, (0, 0, 0, 0, self.before, 0))
        else:
            x = torch.cat([self._past, x], dim=2)
        self._past = x[:, :, x.shape[2] - self.kept :] if self.kept else x[:, :, :0]
        return self.conv(x)

    def forget(self) -> None:
        self._past = None


class Norm(nn.GroupNorm):
    """Norm each frame by itself."""

    def forward(self, input: Tensor) -> Tensor:
        frames = input.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).unflatten(0, frames.shape[:2]).transpose(1, 2)


class Residual(nn.Module):
    """Two convolutions beside a way straight on."""

    def __init__(self, inputs: int, outputs: int, groups: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = Norm(groups, inputs, EPS), Conv(inputs, outputs)
        self.norm2, self.conv2 = Norm(groups, outputs, EPS), Conv(outputs, outputs)
        self.conv_shortcut = Conv(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)), first=first)
        y = self.conv2(F.silu(self.norm2(y)), first=first)
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x, first=first))


class Attention(nn.Module):
    """The cells of each frame see each other."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, width, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def forward(self, x: Tensor) -> Tensor:
        frames = x.transpose(1, 2).flatten(0, 1)  # [B·F, D, H, W]
        cells = self.group_norm(frames).flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(*(to(cells)[:, None] for to in (self.to_q, self.to_k, self.to_v)))
        found = frames + self.to_out[0](seen[:, 0]).transpose(1, 2).view_as(frames)
        return found.unflatten(0, (len(x), -1)).transpose(1, 2)


class Middle(nn.Module):
    """The coarsest level."""

    def __init__(self, width: int, groups: int) -> None:
        super().__init__()
        self.attentions = nn.ModuleList([Attention(width, groups)])
        self.resnets = nn.ModuleList([Residual(width, width, groups) for _ in range(2)])

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        return self.resnets[1](self.attentions[0](self.resnets[0](x, first=first)), first=first)


class Resample(nn.Module):
    """Halve or double what a level gives."""

    def __init__(self, width: int, *, time: bool, up: bool) -> None:
        super().__init__()
        self.time, self.up = time, up
        if up:
            self.conv = Conv(width, width * (2 if time else 4))
        else:
            self.conv = Conv(width, width, stride=(2, 1, 1) if time else (1, 2, 2))

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        x = self.conv(x, first=first)
        if not self.up:
            return x
        if self.time:  # each frame becomes two, and a video's first one
            x = x.unflatten(1, (-1, 2)).permute(0, 1, 3, 2, 4, 5).flatten(2, 3)
            return x[:, :, 1:] if first else x
        return x.unflatten(1, (-1, 2, 2)).permute(0, 1, 4, 5, 2, 6, 3).flatten(5, 6).flatten(3, 4)


class Level(nn.Module):
    """Residual blocks of one width, then a change of size."""

    def __init__(self, inputs: int, width: int, layers: int, groups: int, *, side: bool, time: bool, up: bool) -> None:
        super().__init__()
        widths = [inputs, *[width] * layers]
        self.resnets = nn.ModuleList([Residual(a, b, groups) for a, b in itertools.pairwise(widths)])
        ending = "upsamplers" if up else "downsamplers"
        for name, wanted, of_time in ((ending, side, False), (f"temporal_{ending}", time, True)):
            setattr(self, name, nn.ModuleList([Resample(width, time=of_time, up=up)] if wanted else []))
        self._ends: Sequence[nn.Module] = [*getattr(self, ending), *getattr(self, f"temporal_{ending}")]

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        for part in (*self.resnets, *self._ends):
            x = part(x, first=first)
        return x


class Half(nn.Module):
    """The encoder or the decoder."""

    def __init__(self, config: VaeConfig, *, up: bool) -> None:
        super().__init__()
        widths = config.widths[::-1] if up else config.widths
        layers = config.decoder_layers if up else config.encoder_layers
        ins, outs = (config.channels, 3) if up else (3, 2 * config.channels)
        pairs = zip((widths[0], *widths), widths, layers, config.sides, config.times)
        levels = nn.ModuleList(
            Level(before, width, count, config.groups, side=side, time=time, up=up)
            for before, width, count, side, time in pairs
        )
        self.conv_in = Conv(ins, widths[0])
        self.mid_block = Middle(config.widths[-1], config.groups)
        setattr(self, "up_blocks" if up else "down_blocks", levels)
        self._parts: Sequence[nn.Module] = [self.mid_block, *levels] if up else [*levels, self.mid_block]
        self.conv_norm_out = Norm(config.groups, widths[-1], EPS)
        self.conv_out = Conv(widths[-1], outs)

    def forward(self, x: Tensor, *, first: bool) -> Tensor:
        x = self.conv_in(x, first=first)
        for part in self._parts:
            x = part(x, first=first)
        return self.conv_out(F.silu(self.conv_norm_out(x)), first=first)


class CausalVae(nn.Module):
    """Frames to latents and back."""

    def __init__(self, config: VaeConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Half(config, up=False), Half(config, up=True)
        self.quant_conv = Conv(2 * config.channels, 2 * config.channels, 1)
        self.post_quant_conv = Conv(config.channels, config.channels, 1)

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.conv_in.conv.weight.dtype

    def encode(self, video: Tensor, *, window: int = 1) -> Tensor:
        """[B, 3, F, H, W] → the means [B, C, f, h, w] of latents. window: latent frames at a time."""
        step = self.config.stride[0] * window
        parts = [video[:, :, :1], *video[:, :, 1:].split(step, dim=2)]
        return self._windows(parts, self._encode)

    def decode(self, latents: Tensor, *, window: int = 1) -> Tensor:
        """[B, C, f, h, w] → [B, 3, F, H, W]."""
        return self._windows(list(latents.split(window, dim=2)), self._decode)

    def _encode(self, part: Tensor, *, first: bool) -> Tensor:
        return self.quant_conv(self.encoder(part, first=first), first=first).chunk(2, dim=1)[0]

    def _decode(self, part: Tensor, *, first: bool) -> Tensor:
        return self.decoder(self.post_quant_conv(part, first=first), first=first)

    def _windows(self, parts: Sequence[Tensor], run: Any) -> Tensor:
        found = torch.cat([run(part, first=place == 0) for place, part in enumerate(parts) if part.shape[2]], dim=2)
        for module in self.modules():
            if isinstance(module, Conv):
                module.forget()
        return found
