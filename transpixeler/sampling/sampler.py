"""Noise and a text go in, latents of every stream come out, and frames of those: pure samplers over a velocity.

`denoise` knows no model: it asks a function for the velocity at (x, t). `Sampler` asks the live engine, so training,
`sample` and `eval` make videos the same way on any layout. Noise is a pure function of (seed, stream), drawn on the
CPU, so that the same seed gives the same video on any number of ranks.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from transpixeler.config import SampleConfig, UserError
from transpixeler.flow.objective import draw_noise
from transpixeler.models.backbone import Conditions, Vae, VideoModel
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x [B, N], timesteps [B, S] in [0, 1]) → [B, N]
TOGETHER = 16_384  # tokens up to which both halves of guidance run in one batch; beyond, one fills a device
TEXT_DTYPE = torch.bfloat16  # as the cache keeps texts, so that a prompt is the same from either


# --- the sampler -----------------------------------------------------------------------------------------------------


def make_solver(name: str, *, steps: int, shift: float) -> Any:
    """One of diffusers' schedulers, over the flow's noise levels from 1 to 0."""
    import diffusers

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": shift}
    if name == "euler":
        solver = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    elif name == "dpm++":
        solver = diffusers.DPMSolverMultistepScheduler(**flow)
    else:
        solver = diffusers.UniPCMultistepScheduler(**flow)
    if name == "euler":  # left to itself it shifts twice, and the last of few steps begins where nothing is left to do
        solver.set_timesteps(sigmas=np.linspace(1, 0, steps + 1)[:-1])
    else:
        solver.set_timesteps(steps)
    solver.set_begin_index(0)
    return solver


@torch.no_grad()
def denoise(
    velocity: Velocity,
    noise: Tensor,
    layout: StreamLayout,
    solver: Any,
    *,
    given: Mapping[int, Tensor] | None = None,
    tick: Callable[[], object] = lambda: None,
) -> Tensor:
    """[B, N] noise → [B, N] latents. A given stream [C, F, H, W] stays as it is, and its time is 0 all along."""
    fixed = {stream: latents.to(noise.device).float().flatten() for stream, latents in (given or {}).items()}
    x = _with(noise.float(), fixed, layout)
    for t in solver.timesteps:
        times = torch.full((len(x), len(layout.names)), float(t) / 1000, device=x.device)
        times[:, sorted(fixed)] = 0
        x = _with(solver.step(velocity(x, times), t, x, return_dict=False)[0], fixed, layout)
        tick()
    return x


def _with(x: Tensor, fixed: Mapping[int, Tensor], layout: StreamLayout) -> Tensor:
    x = x.clone() if fixed else x
    for stream, latents in fixed.items():
        x[:, layout.element_slice(stream)] = latents
    return x


def start_noise(layout: StreamLayout, seed: int) -> Tensor:
    """[1, N]: each stream's own, whatever streams stand beside it."""
    streams = zip(layout.names, layout.sizes, strict=True)
    return torch.cat([draw_noise(size, "sample", seed, name) for name, size in streams])[None]


def guided(engine: Engine, layout: StreamLayout, text: Tensor, negative: Tensor | None, *, guidance: float) -> Velocity:
    """Leads away from the negative text [text_len, dim]; without one, the model's own velocity at half the price."""
    device = engine.mesh.device
    texts = torch.stack([text] if negative is None else [text, negative]).to(device, torch.float32)
    rows = len(texts)
    # two microbatches fill a pipeline; on one stage a short sequence fills the device only when both run together
    size = rows if engine.config.pipeline == 1 and layout.tokens <= TOGETHER else 1

    def velocity(x: Tensor, times: Tensor) -> Tensor:
        found = engine.forward(x.repeat(rows, 1), Conditions(times.repeat(rows, 1), texts), layout, size)
        if negative is None:
            return found
        wanted, unwanted = found.chunk(2)
        return unwanted + guidance * (wanted - unwanted)

    return velocity


# --- on the engine ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Request:
    """One video to make."""

    name: str  # of its folder
    prompt: str
    text: Tensor  # [text_len, text_dim]
    seed: int
    layout: StreamLayout
    given: Mapping[int, Tensor] = field(default_factory=dict)  # clean latents [C, F, H, W] by stream


@dataclass(frozen=True)
class Sampler:
    """Makes videos with the engine as it is; every rank calls it with the same requests."""

    engine: Engine
    mesh: Mesh
    config: SampleConfig
    negative: Tensor | None  # [text_len, text_dim]; None: without guidance

    def each(
        self, requests: Sequence[Request], *, pause: Callable[[], object] = lambda: None
    ) -> Iterator[tuple[int, Tensor]]:
        """This data rank's share: (number of the request, its latents [N] on the host), on all of its pipeline.

        `pause` is called after each step, equally often on all ranks.
        """
        steps = self.config.steps * -(-len(requests) // self.mesh.layout.data)
        shown = self.mesh.data_rank == 0 and self.mesh.is_first_stage
        with _progress(steps, shown=shown) as tick, self.engine.evaluating():

            def stepped() -> None:
                tick()
                pause()

            for number, counts in turns(len(requests), self.mesh):
                latents = self._latents(requests[number], stepped)
                if counts:
                    yield number, latents

    def _latents(self, request: Request, tick: Callable[[], object]) -> Tensor:
        solver = make_solver(self.config.scheduler, steps=self.config.steps, shift=self.config.shift)
        noise = start_noise(request.layout, request.seed).to(self.mesh.device)
        velocity = guided(self.engine, request.layout, request.text, self.negative, guidance=self.config.guidance)
        return denoise(velocity, noise, request.layout, solver, given=request.given, tick=tick)[0].cpu()


def turns(count: int, mesh: Mesh) -> list[tuple[int, bool]]:
    """Which of `count` pieces of work this data rank does in turn, and whether the result counts.

    Sharded weights are gathered by all ranks together, so all take equally many turns and some work for nothing.
    """
    data = mesh.layout.data
    numbers = range(mesh.data_rank, math.ceil(count / data) * data, data)
    return [(number % count, number < count) for number in numbers]


@contextmanager
def _progress(steps: int, *, shown: bool) -> Iterator[Callable[[], object]]:
    from tqdm import tqdm

    quiet = None if shown else True  # None: where there is no terminal
    with tqdm(total=steps, desc="sampling", unit="step", leave=False, mininterval=2.0, disable=quiet) as bar:
        yield bar.update


# --- texts and frames ------------------------------------------------------------------------------------------------


def encode_texts(texts: Sequence[str], model_cls: type[VideoModel], path: str, runtime: Runtime) -> dict[str, Tensor]:
    """[text_len, text_dim] of each, zero padded; rank 0 loads the encoder, and only where there is something to do."""
    wanted = list(dict.fromkeys(texts))
    found: list[Tensor] = []
    if wanted and runtime.is_main:
        dtype = torch.bfloat16 if runtime.device.type == "cuda" else torch.float32
        encoder = model_cls.load_text_encoder(path, device=runtime.device, dtype=dtype)
        found = [value.to("cpu", TEXT_DTYPE) for value in encoder.encode(wanted)]
        del encoder
        free(runtime.device)
    values = runtime.broadcast(found) if wanted else []
    return {text: padded(value, model_cls.text_len) for text, value in zip(wanted, values, strict=True)}


def padded(text: Tensor, length: int) -> Tensor:
    """[len, dim] → fp32 [length, dim]."""
    return torch.nn.functional.pad(text.float(), (0, 0, 0, length - len(text)))


class Frames:
    """Latents to frames and back: a VAE that is loaded when first used, and on the device only while it works."""

    def __init__(self, model_cls: type[VideoModel], path: str, device: torch.device) -> None:
        self.model_cls, self.path, self.device = model_cls, path, device
        self._vae: Vae | None = None

    def decode(self, latents: Tensor, layout: StreamLayout) -> dict[str, np.ndarray]:
        """Packed [N] → uint8 [F, H, W, 3] by stream."""
        with self._working() as vae:
            streams = zip(layout.names, layout.unpack(latents[None]), strict=True)
            return {name: to_pixels(vae.decode(part)[0]) for name, part in streams}

    def encode(self, frames: np.ndarray) -> Tensor:
        """uint8 [F, H, W, 3] → [C, f, h, w]."""
        with self._working() as vae:
            return vae.encode(torch.from_numpy(frames)[None])[0].cpu()

    @contextmanager
    def _working(self) -> Iterator[Vae]:
        if self._vae is None:
            self._vae = self.model_cls.load_vae(self.path, device=self.device, dtype=torch.float32)
        try:
            yield self._vae.to(self.device)
        finally:
            self._vae.to(torch.device("cpu"))
            free(self.device)


def to_pixels(video: Tensor) -> np.ndarray:
    """[3, F, H, W] in [-1, 1] → uint8 [F, H, W, 3]."""
    return video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def free(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# --- sizes -----------------------------------------------------------------------------------------------------------


def layout_of(
    size: Sequence[int], streams: Sequence[str], *, geometry: tuple[Sequence[int], int], patch: Sequence[int]
) -> StreamLayout:
    """Of a video of [width, height, frames], whose latents must divide into patches."""
    (width, height, frames), ((tf, th, tw), channels) = size, geometry
    across, down = tw * patch[2], th * patch[1]
    if width % across or height % down or min(width, height) < 1:
        wide, tall = (max(1, round(n / unit)) * unit for n, unit in ((width, across), (height, down)))
        raise UserError(
            f"sample.size: {width}x{height} is not a multiple of {across}x{down} pixels; {wide}x{tall} would be"
        )
    if frames < 1 or (frames - 1) % tf:
        near = max(0, round((frames - 1) / tf)) * tf + 1
        raise UserError(f"sample.size: {frames} frames are not {tf}k+1; {near} would be")
    return StreamLayout.equal(streams, (channels, (frames - 1) // tf + 1, height // th, width // tw), patch)
