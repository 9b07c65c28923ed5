"""Put a companion in the channels of RGB's tokens, train it, and widen the demo's base: the parts of `demo_channels`.

In: the demo's trained transformer, or a config whose base is a Wan. Out: a transformer twice as wide that computes the
same, and a model of two streams whose sequence is as long as RGB's, which learns as the product's do.
"""

from __future__ import annotations

import json
import logging
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from transpixeler.config.sections import Config
from transpixeler.data.dataset import training_order
from transpixeler.data.encode import encode_missing
from transpixeler.demo.model import TRANSFORMER
from transpixeler.evaluation.clips import HeldOut
from transpixeler.evaluation.losses import HeldOutLosses
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import Embed, Head, WanModel
from transpixeler.files import whole
from transpixeler.models import lora
from transpixeler.models.backbone import Flow
from transpixeler.models.costs import Costs
from transpixeler.models.family import open_model
from transpixeler.models.modulation import modulate, sinusoid
from transpixeler.models.patches import patchify
from transpixeler.models.streams import StreamLayout
from transpixeler.models.tokens import Tokens
from transpixeler.models.weights import load_weights
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.parallel.stage import Stage
from transpixeler.sampling.model import base_weights
from transpixeler.training import optim
from transpixeler.training.batches import micro_batch, open_loader
from transpixeler.training.ema import Ema
from transpixeler.training.schedule import make_schedule

if TYPE_CHECKING:
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

log = logging.getLogger("transpixeler")

Reading = Literal["linear", "mlp", "gated"]  # how the companion is read off the tokens
Row = dict[str, float]
Curve = dict[int, Row]  # held-out losses by step


@dataclass(frozen=True)
class Kind:
    """One way to learn a companion in the channels."""

    title: str
    reading: Reading = "linear"
    whole_base: bool = False  # the base itself learns, in place of an adapter


# --- a wider base ----------------------------------------------------------------------------------------------------


def widened(narrow: WanTransformer3DModel, *, noise: float = 0.0, seed: int = 0) -> WanTransformer3DModel:
    """Return the demo's transformer at twice its width, with each feature and each head twice.

    noise: of each matrix, as a share of its deviation, so that the two of a pair do not stay alike. Without it the same
    is computed: norms over the width keep their values, and what reads features is halved.
    """
    from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

    sizes = {name: 2 * TRANSFORMER[name] for name in ("num_attention_heads", "ffn_dim")}
    wide, draws = WanTransformer3DModel(**TRANSFORMER | sizes), torch.Generator().manual_seed(seed)
    values = {}
    for name, like in wide.state_dict().items():
        value = _twice(narrow.state_dict()[name], like, parts=6 if ".time_proj." in name else 1)
        if noise and value.ndim in (2, 5):  # linears and the patches' convolution
            value = value + noise * value.std() * torch.randn(value.shape, generator=draws)
        values[name] = value
    wide.load_state_dict(values)
    return wide.eval()


def _twice(value: Tensor, like: Tensor, *, parts: int) -> Tensor:
    """Repeat features along each dimension that is twice as long in `like`, and halve what reads them.

    parts: vectors of features that stand one after the other in a linear's outputs.
    """
    for dim in range(value.ndim):
        if like.shape[dim] == 2 * value.shape[dim]:
            split = value.unflatten(dim, (parts if dim == 0 else 1, -1))
            value = torch.cat([split, split], dim=dim + 1).flatten(dim, dim + 1)
            if value.ndim == 2 and dim == 1:
                value = value / 2
    assert value.shape == like.shape, (value.shape, like.shape)
    return value


@torch.no_grad()
def apart(one: WanTransformer3DModel, other: WanTransformer3DModel) -> float:
    """Return the largest difference of what two transformers make of the same noise, in its deviations."""
    draws = torch.Generator().manual_seed(0)
    noisy, text = (torch.randn(shape, generator=draws) for shape in ((2, 16, 3, 8, 8), (2, 8, TRANSFORMER["text_dim"])))
    inputs = {"hidden_states": noisy, "timestep": torch.tensor([900, 300]), "encoder_hidden_states": text}
    made = [model(**inputs, return_dict=False)[0] for model in (one, other)]
    return float((made[0] - made[1]).abs().max() / made[0].std())


# --- a companion in the channels -------------------------------------------------------------------------------------


def first(layout: StreamLayout) -> StreamLayout:
    """Return the layout of RGB alone, whose tokens the companion shares."""
    assert len(layout.names) == 2 and layout.shapes[0] == layout.shapes[1], "one companion, of RGB's size"
    return layout.only(0, 1)


class JoinedEmbed(Embed):
    """Add a linear of the companion's patches to RGB's tokens; one timestep goes for both."""

    def __init__(self, config: WanConfig) -> None:
        super().__init__(config, ("rgb",))
        self.companion = _zero(nn.Linear(config.in_channels * math.prod(config.patch_size), config.width))

    def forward(
        self, x: Tensor, timesteps: Tensor, text: Tensor, *shown: Tensor, layout: StreamLayout, dtype: torch.dtype
    ) -> Flow:
        return super().forward(x, timesteps[:, :1], text, *shown, layout=layout, dtype=dtype)

    def embed(self, streams: Sequence[Tensor], layout: StreamLayout) -> Tensor:
        rgb, companion = streams
        return super().embed([rgb], first(layout)) + self.companion(patchify(companion, layout.patch))


class JoinedHead(Head):
    """Read the companion off the tokens that RGB is read off."""

    def __init__(self, config: WanConfig, reading: Reading) -> None:
        super().__init__(config)
        width, outputs = config.width, self.head.out_features
        self.companion = _zero(nn.Linear(width, outputs))
        if reading == "mlp":
            self.companion = nn.Sequential(
                nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), _zero(nn.Linear(2 * width, outputs))
            )

    def values(self, *flow: Tensor, groups: Sequence[int]) -> Tensor:
        hidden, _, _, temb, *_ = flow
        shift, scale = (self.modulation + temb[:, :, None]).unbind(2)  # [B, 1, D]
        seen = modulate(hidden, shift, scale, groups=groups, eps=self.eps)
        return torch.cat([self.head(seen), self.companion(seen)], dim=-1)

    def pack(self, values: Tensor, layout: StreamLayout) -> Tensor:
        return torch.cat([super(JoinedHead, self).pack(part, first(layout)) for part in values.chunk(2, dim=-1)], dim=1)


class JoinedWan(WanModel):
    """RGB and one companion on the same tokens. What the base does not have has `companion` in its name.

    reading "gated": beside the linear, the companion's own noisy latents go round the blocks, by channel times a number
    that is learned of the timestep, so that the blocks need not carry them to the head.
    """

    def __init__(self, config: WanConfig, reading: Reading = "linear") -> None:
        super().__init__(config, streams=("rgb",))
        self.embed, self.head = JoinedEmbed(config), JoinedHead(config, reading)
        self.companion_gate = _zero(nn.Linear(config.width, config.out_channels)) if reading == "gated" else None

    def positions(self, layout: StreamLayout, device: torch.device) -> Tokens:
        return super().positions(first(layout), device)

    def forward(self, *flow: Tensor, layout: StreamLayout) -> Any:
        made = super().forward(*flow, layout=layout)
        if self.companion_gate is None:
            return made
        x, timesteps, *_ = flow
        assert isinstance(self.embed, Embed) and isinstance(made, Tensor), "the whole model is here"
        temb = self.embed.time_embedding(sinusoid(timesteps[:, 0], self.embed.freq_dim))
        gate = self.companion_gate(F.silu(temb))[:, :, None, None, None]  # [B, C, 1, 1, 1]
        rgb, companion = layout.unpack(made)
        return layout.pack([rgb, companion + gate * layout.unpack(x)[1]])

    @classmethod
    def of(cls, base: WanModel, reading: Reading = "linear") -> JoinedWan:
        """Return a model with a base's weights, which makes the same of RGB, and nothing of the companion."""
        made = cls(base.config, reading)
        missing, unknown = made.load_state_dict(base.state_dict(), strict=False)
        assert not unknown and all("companion" in name for name in missing), (missing, unknown)
        return made


def _zero(linear: nn.Linear) -> nn.Linear:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)
    return linear


# --- its training ----------------------------------------------------------------------------------------------------


def losses_of(found: Mapping[str, Any], key: str = "") -> Row:
    """Return the mean over all times of each stream's error; found: of the one held-out set."""
    ((_, losses),) = found.items()
    streams = losses[key] if key else losses
    return {stream: statistics.fmean(by_time.values()) for stream, by_time in streams.items()}


class Joined:
    """Train a companion in the channels as `trainer` does, and go on from what is kept of it."""

    def __init__(self, config: Config, runtime: Runtime, kind: Kind, kept: Path, every: int) -> None:
        self.config, self.runtime, self.kept, self.every = config, runtime, kept, every
        self.model = open_model(config.model)
        self.data = encode_missing(config, self.model, runtime)
        self.mesh = meshes.build(meshes.resolve(config.parallel, runtime.world_size), runtime)
        self.engine = joined_engine(config, self.mesh, kind)
        self.parameters = {name: p for name, p in self.engine.named_parameters() if p.requires_grad}
        optimizer = optim.build(self.parameters, config.optim, self.mesh.data_group)
        assert optimizer is not None, "the new linears train"
        self.optimizer, self.ema = optimizer, Ema(self.parameters, config.optim.ema)
        self.schedule = make_schedule(config, training_order(config, self.data.train))
        self.step, self.seconds = 0, 0.0  # steps that are done; CPU seconds of a step, the median of the first ones
        self.curve: Curve = {}
        if kept.is_file():
            self._load()

    def until(self, steps: int) -> None:
        """Train until a step, and measure on the way."""
        if not self.curve:
            self._measure()
        taken: list[float] = []
        loader = open_loader(self.config, self.data.train, self.model, self.mesh, self.schedule, self.step)
        with loader:
            while self.step < steps:
                started = time.process_time()
                batch, examples = next(loader)
                size = micro_batch(self.config, self.model.geometry, 1, batch.layout)
                for example in examples:
                    self.engine.forward_backward(example, size)
                self._update(self.schedule.rate(batch.step))
                self.step += 1
                taken.append(time.process_time() - started)
                if self.step % self.every == 0 or self.step == steps:
                    self.seconds = self.seconds or statistics.median(taken)
                    self._measure()
                    self._keep()

    def _update(self, lr: float) -> None:
        parameters = self.parameters.values()
        norm = optim.gradient_norm(parameters, self.mesh.pipeline_group, self.mesh.device)
        optim.clip(parameters, self.config.optim.clip, norm)
        optim.set_rate(self.optimizer, self.config.optim, lr)
        self.optimizer.step()
        self.ema.update()
        self.optimizer.zero_grad()

    def _measure(self) -> None:
        """Measure the averaged weights on held-out clips."""
        held_out = HeldOut(self.config, self.data.eval, self.model)
        with self.ema.swapped():
            losses = HeldOutLosses(self.runtime, self.engine, held_out, lambda: None).measure()
        self.curve[self.step] = losses_of(losses)
        log.info("%s: step %d, held out: %s", self.kept.stem, self.step, self.curve[self.step])

    def _keep(self) -> None:
        state = {
            "parameters": {name: p.detach() for name, p in self.parameters.items()},
            "averages": self.ema.shadow,
            "optimizer": self.optimizer.state_dict(),
            "told": json.dumps({"step": self.step, "seconds": self.seconds, "curve": list(self.curve.items())}),
        }
        with whole(self.kept) as unfinished:
            torch.save(state, unfinished)

    @torch.no_grad()
    def _load(self) -> None:
        state = torch.load(self.kept, weights_only=True)
        for name, parameter in self.parameters.items():
            parameter.copy_(state["parameters"][name])
            self.ema.shadow[name].copy_(state["averages"][name])
        self.optimizer.load_state_dict(state["optimizer"])
        kept = json.loads(state["told"])
        self.step, self.seconds, self.curve = kept["step"], kept["seconds"], dict(kept["curve"])


def joined_engine(config: Config, mesh: meshes.Mesh, kind: Kind) -> Engine:
    """Return an engine of a base with a companion in its channels, and of what trains: an adapter, or all."""
    folder = open_model(config.model)
    base: Any = folder.build(streams=("rgb",), attention=config.model.attention)  # a Wan, as the demo's is
    load_weights(base, base_weights(config))
    model = JoinedWan.of(base, kind.reading)
    if kind.whole_base:
        model.requires_grad_(True)
    else:
        lora.inject(model, config.lora, seed=config.seed)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or "companion" in name)
    return Engine([Stage(model)], config.parallel, mesh, torch.float32, Costs.of(base, kept=False))
