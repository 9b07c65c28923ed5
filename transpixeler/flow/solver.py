"""Walk from noise to clean latents, a prediction at each step; each `sample.scheduler` is made in `models.noising`.

Nothing here knows a model: `denoise` asks the function what it predicts at (x, t). Noise is a pure function of (seed,
stream name), drawn on the CPU, so that the same seed gives the same video on any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from transpixeler.flow.draws import draw_noise
from transpixeler.models.noising import Solver
from transpixeler.models.streams import Group, StreamLayout

Predict = Callable[[Tensor, Tensor], Tensor]  # (x [B, N], timesteps [B, G] in [0, 1]) → [B, N]
Held = Mapping[tuple[int, bool], Tensor]  # clean latents [C, F, H, W] by stream and whether they are beside its video


def start_noise(layout: StreamLayout, seed: int) -> Tensor:
    """Return the noise [1, N] that a video starts from; a stream's part does not depend on the other streams."""
    parts = []
    for segment, size in zip(layout.segments, layout.segment_sizes, strict=True):
        name = layout.names[segment.stream]
        parts.append(draw_noise(size, "sample", seed, name) if not segment.alone else torch.zeros(size))
    return torch.cat(parts)[None]


def fresh_noise(layout: StreamLayout, seed: int, step: int) -> Tensor:
    """Return the noise [1, N] that a step of sampling adds; a stream's part does not depend on the other streams."""
    pairs = zip(layout.segments, layout.segment_sizes, strict=True)
    return torch.cat([draw_noise(size, "step", seed, layout.names[one.stream], step) for one, size in pairs])[None]


def with_trace(noise: Tensor, layout: StreamLayout, firsts: Mapping[int, Tensor], share: float) -> Tensor:
    """Return noise [1, N] with a share of given first frames in every frame; firsts: latents [C, 1, H, W] by stream."""
    parts = layout.unpack(noise)
    traced = [
        torch.lerp(part, firsts[one.stream].to(part)[None], share) if one.stream in firsts and not one.alone else part
        for one, part in zip(layout.segments, parts, strict=True)
    ]
    return layout.pack([part.expand(-1, *one.shape) for one, part in zip(layout.segments, traced, strict=True)])


@torch.no_grad()
def denoise(
    predict: Predict,
    noise: Tensor,
    layout: StreamLayout,
    solver: Solver,
    *,
    given: Mapping[int, Tensor] | None = None,
    beside: Mapping[int, Tensor] | None = None,
    after_step: Callable[[], object] = lambda: None,
) -> Tensor:
    """Return the latents [B, N] that noise [B, N] becomes.

    `given` holds clean latents [C, F, H, W] by stream, of all frames or of the first ones, which are a time group then:
    they stay as they are, at time 0 in every step. So do those of frames that stand `beside` their videos.
    """
    held = {(stream, False): latents.to(noise.device).float() for stream, latents in (given or {}).items()}
    held |= {(stream, True): latents.to(noise.device).float() for stream, latents in (beside or {}).items()}
    places = [p for p, group in enumerate(layout.groups) if _is_held(group, held)]
    x = _with_held(noise.float(), held, layout)
    for number, time in enumerate(solver.times):
        times = torch.full((len(x), len(layout.groups)), time, device=x.device)
        times[:, places] = 0
        x = _with_held(solver.step(predict(x, times), number, x), held, layout)
        after_step()
    return x


def _with_held(x: Tensor, held: Held, layout: StreamLayout) -> Tensor:
    x = x.clone() if held else x
    for segment, part in zip(layout.segments, layout.unpack(x), strict=True):
        if (segment.stream, segment.alone) in held:
            latents = held[segment.stream, segment.alone]
            part[:, :, : latents.shape[1]] = latents
    return x


def _is_held(group: Group, held: Held) -> bool:
    latents = held.get((group.stream, group.alone))
    return latents is not None and group.end <= latents.shape[1]
