"""Scenes in, a tiny Wan VAE out that learned to see and to draw them; `train_demo_weights.py` is its command.

It learns from crops: stills first, then short clips, then longer ones, and at last only to draw what it sees. Every
residual branch starts at zero, so that what is learned first is a linear code, and the attention in the middle stays
at zero, as it would see a crop where a whole frame comes later. Noise is put on the latents while it learns, so that
small errors of a transformer stay small.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from transpixeler.demo.model import VAE
from transpixeler.demo.scenes import Format, Scene, render, scenes
from transpixeler.files import whole

if TYPE_CHECKING:
    from diffusers import AutoencoderKLWan

log = logging.getLogger("transpixeler")

FORMATS = tuple(Format(*size, 17, Fraction(16)) for size in ((64, 64), (64, 64), (80, 48), (48, 80)))
SCENES = 600
NOISE = 0.1  # standard deviation of the posterior, fixed
KL = 1e-3
SHAPE = 3.0  # how much more a pixel of the shape counts than one of the ground, which is most of them


@dataclass(frozen=True)
class Phase:
    """Clips of so many frames, crops of so many pixels, so many at a time."""

    frames: int
    side: int
    batch: int
    steps: int
    lr: float
    decoder_alone: bool = False
    edges: float = 0.0  # how much more a pixel counts at an edge from black to white, where silhouettes are decided


PHASES = (
    Phase(frames=1, side=32, batch=16, steps=3000, lr=2e-3),
    Phase(frames=5, side=32, batch=8, steps=2200, lr=1.5e-3),
    Phase(frames=17, side=32, batch=6, steps=800, lr=1.2e-3),
    Phase(frames=17, side=32, batch=6, steps=2000, lr=1.5e-3, decoder_alone=True),
    Phase(frames=17, side=32, batch=6, steps=2000, lr=1.5e-3, decoder_alone=True, edges=6.0),
)


def fresh_vae(seed: int) -> AutoencoderKLWan:
    """Untrained, and already a linear code."""
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLWan(**VAE)
        start_structured(vae)
    return vae


def train_vae(vae: AutoencoderKLWan, folder: Path, *, seed: int, phases: Sequence[Phase] = PHASES) -> None:
    """In place. Each phase leaves its weights in the folder, and one that is there is not run again; the same seed,
    library versions and number of threads give the same weights."""
    videos = [view for scene in scenes(SCENES, formats=FORMATS, held_out=False, seed=seed) for view in views(scene)]
    for number, phase in enumerate(phases, 1):
        done = folder / f"vae-phase{number}.safetensors"
        if done.is_file():
            vae.load_state_dict(load_file(done))
            continue
        log.info("the VAE learns: phase %d of %d, %d frames", number, len(phases), phase.frames)
        _train_phase(vae, phase, videos, torch.Generator().manual_seed(seed + number))
        with whole(done) as unfinished:
            save_file(vae.state_dict(), unfinished)
    vae.requires_grad_(False)


def views(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """What a training meets of a scene: its RGB, and its alpha as grey; uint8 [F, H, W, 3]."""
    frames = np.stack(list(render(scene)))
    return frames[..., :3], np.repeat(frames[..., 3:], 3, axis=3)


def start_structured(vae: AutoencoderKLWan) -> None:
    """Residual branches and attention from zero, and a posterior of one fixed width."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock

    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if isinstance(module.conv_shortcut, nn.Conv3d):
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, WanAttentionBlock):
            nn.init.zeros_(module.proj.weight)
            nn.init.zeros_(module.proj.bias)
    latent_dim = vae.config.z_dim
    with torch.no_grad():
        vae.quant_conv.weight[latent_dim:] = 0
        vae.quant_conv.bias[latent_dim:] = 2 * math.log(NOISE)


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Each video encoded and decoded, uint8 like it."""
    decoded = (vae.decode(vae.encode(_pixels([video])).latent_dist.mode()).sample[0] for video in videos)
    return [(video.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy() for video in decoded]


def _train_phase(vae: AutoencoderKLWan, phase: Phase, videos: Sequence[np.ndarray], generator: torch.Generator) -> None:
    trained = _trained(vae, phase)
    optimizer = torch.optim.AdamW(trained, lr=phase.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, phase.steps))
    error = 0.0
    progress = tqdm(_batches(phase, videos, generator), total=phase.steps, unit="step", mininterval=10)
    for step, pixels in enumerate(progress):
        latents = vae.encode(pixels).latent_dist.mean
        noise = torch.randn(latents.shape, generator=generator)
        difference = vae.decode(latents + NOISE * noise).sample - pixels
        squared = difference.square()
        bright = pixels.amax(1, keepdim=True)
        weights = 1 + SHAPE * (bright > -1) + phase.edges * _contrast(bright)
        drawn = (weights * (squared + 0.05 * difference.abs())).mean()
        loss = drawn + KL * 0.5 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        error += (squared.mean().item() - error) / min(step + 1, 100)
        progress.set_postfix(frames=phase.frames, dB=f"{-10 * math.log10(error / 4):.1f}", refresh=False)


def _contrast(bright: Tensor) -> Tensor:
    """0 to 1: between the brightest and the darkest of a pixel and its neighbours in the frame."""
    around = {"kernel_size": (1, 3, 3), "stride": 1, "padding": (0, 1, 1)}
    return (nn.functional.max_pool3d(bright, **around) + nn.functional.max_pool3d(-bright, **around)) / 2


def _trained(vae: AutoencoderKLWan, phase: Phase) -> list[nn.Parameter]:
    """Of the others no gradients are made."""
    vae.requires_grad_(True)
    fixed = [block.attentions for block in (vae.encoder.mid_block, vae.decoder.mid_block)]
    for module in (*fixed, *([vae.encoder, vae.quant_conv] if phase.decoder_alone else [])):
        module.requires_grad_(False)
    return [p for p in vae.parameters() if p.requires_grad]


def _batches(phase: Phase, videos: Sequence[np.ndarray], generator: torch.Generator) -> Iterator[Tensor]:
    """Random crops in space and time."""

    def at(room: int) -> int:
        return int(torch.randint(room + 1, (1,), generator=generator))

    for _ in range(phase.steps):
        crops = []
        for _ in range(phase.batch):
            video = videos[at(len(videos) - 1)]
            frame, top, left = (
                at(size - length) for size, length in zip(video.shape, (phase.frames, phase.side, phase.side))
            )
            crops.append(video[frame : frame + phase.frames, top : top + phase.side, left : left + phase.side])
        yield _pixels(crops)


def _pixels(videos: Sequence[np.ndarray]) -> Tensor:
    """uint8 [F, H, W, 3] each → [B, 3, F, H, W] from -1 to 1."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _rate(step: int, steps: int) -> float:
    """A short warmup, then down a cosine to a fiftieth."""
    return min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
