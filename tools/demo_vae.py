"""Train the demo's tiny Wan VAE on rendered scenes; `train_demo_weights.py` is the command.

Training uses crops: stills first, then short clips, then longer ones; the last phases train the decoder alone. Every
residual branch starts at zero, so that a linear code is learned first. The attention in the middle stays at zero: it
would learn on crops and later see whole frames. Latents are noised while training, so that a transformer's small errors
change little in the picture.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

from transpixeler.demo.model import VAE
from transpixeler.demo.scenes import Format, Scene, render, scenes
from transpixeler.files import whole

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

log = logging.getLogger("transpixeler")

FORMATS = tuple(Format(*size, 17, Fraction(16)) for size in ((64, 64), (64, 64), (80, 48), (48, 80)))
SCENES = 600
POSTERIOR_STD = 0.1  # fixed
KL_WEIGHT = 1e-3
SHAPE_WEIGHT = 3.0  # added to the loss weight of the shape's pixels; most pixels are ground


@dataclass(frozen=True)
class Phase:
    """One stretch of training: the clips' length, the crops' side, the batch, and how long and fast it learns."""

    frames: int
    side: int
    batch: int
    steps: int
    lr: float
    decoder_alone: bool = False
    edges: float = 0.0  # added to the loss weight at an edge from black to white, where silhouettes are decided


PHASES = (
    Phase(frames=1, side=32, batch=16, steps=3000, lr=2e-3),
    Phase(frames=5, side=32, batch=8, steps=2200, lr=1.5e-3),
    Phase(frames=17, side=32, batch=6, steps=800, lr=1.2e-3),
    Phase(frames=17, side=32, batch=6, steps=2000, lr=1.5e-3, decoder_alone=True),
    Phase(frames=17, side=32, batch=6, steps=2000, lr=1.5e-3, decoder_alone=True, edges=6.0),
)


def fresh_vae(seed: int) -> AutoencoderKLWan:
    """Return an untrained VAE that starts as a linear code."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        settings: dict[str, Any] = VAE
        vae = AutoencoderKLWan(**settings)
        start_structured(vae)
    return vae


def train_vae(vae: AutoencoderKLWan, folder: Path, *, seed: int, phases: Sequence[Phase] = PHASES) -> None:
    """Train in place, phase by phase; a phase whose weights are in the folder is not run again.

    The same seed, library versions and number of threads give the same weights.
    """
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
    """Return the two videos of a scene that the VAE trains on: RGB, and alpha as grey; uint8 [F, H, W, 3]."""
    frames = np.stack(list(render(scene)))
    return frames[..., :3], np.repeat(frames[..., 3:], 3, axis=3)


def start_structured(vae: AutoencoderKLWan) -> None:
    """Set residual branches and attention to zero, and the posterior to one fixed width."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanAttentionBlock, WanResidualBlock

    for module in vae.modules():
        if isinstance(module, WanResidualBlock):
            _zero(module.conv2)
            if isinstance(module.conv_shortcut, nn.Conv3d):
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, WanAttentionBlock):
            _zero(module.proj)
    latent_dim, bias = vae.config["z_dim"], vae.quant_conv.bias
    assert bias is not None
    with torch.no_grad():
        vae.quant_conv.weight[latent_dim:] = 0
        bias[latent_dim:] = 2 * math.log(POSTERIOR_STD)


def _zero(layer: nn.Conv2d | nn.Conv3d) -> None:
    assert layer.bias is not None
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


@torch.no_grad()
def round_trip(vae: AutoencoderKLWan, videos: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Encode and decode each video; uint8 in and out."""
    decoded = (_decode(vae, _encode(vae, _pixels([video])))[0] for video in videos)
    return [(video.clamp(-1, 1) * 127.5 + 127.5).round().byte().permute(1, 2, 3, 0).numpy() for video in decoded]


def _encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Return the posterior's mean."""
    return vae.encode(pixels, return_dict=False)[0].mode()


def _decode(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    return vae.decode(latents, return_dict=False)[0]


def _train_phase(vae: AutoencoderKLWan, phase: Phase, videos: Sequence[np.ndarray], generator: torch.Generator) -> None:
    trained = _trained(vae, phase)
    optimizer = torch.optim.AdamW(trained, lr=phase.lr, betas=(0.9, 0.99), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate(step, phase.steps))
    error = 0.0
    progress = tqdm(_batches(phase, videos, generator), total=phase.steps, unit="step", mininterval=10)
    for step, pixels in enumerate(progress):
        latents = _encode(vae, pixels)
        noise = torch.randn(latents.shape, generator=generator)
        difference = _decode(vae, latents + POSTERIOR_STD * noise) - pixels
        squared = difference.square()
        bright = pixels.amax(1, keepdim=True)
        weights = 1 + SHAPE_WEIGHT * (bright > -1) + phase.edges * _contrast(bright)
        drawn = (weights * (squared + 0.05 * difference.abs())).mean()
        loss = drawn + KL_WEIGHT * 0.5 * latents.square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        error += (squared.mean().item() - error) / min(step + 1, 100)
        progress.set_postfix(frames=phase.frames, dB=f"{-10 * math.log10(error / 4):.1f}", refresh=False)


def _contrast(bright: Tensor) -> Tensor:
    """Return the contrast, 0 to 1, between the brightest and the darkest of a pixel and its neighbours in the frame."""
    around = {"kernel_size": (1, 3, 3), "stride": 1, "padding": (0, 1, 1)}
    return (nn.functional.max_pool3d(bright, **around) + nn.functional.max_pool3d(-bright, **around)) / 2


def _trained(vae: AutoencoderKLWan, phase: Phase) -> list[nn.Parameter]:
    """Return the parameters that a phase trains, and freeze the others."""
    vae.requires_grad_(True)
    fixed = [block.attentions for block in (vae.encoder.mid_block, vae.decoder.mid_block)]
    for module in (*fixed, *([vae.encoder, vae.quant_conv] if phase.decoder_alone else [])):
        module.requires_grad_(False)
    return [p for p in vae.parameters() if p.requires_grad]


def _batches(phase: Phase, videos: Sequence[np.ndarray], generator: torch.Generator) -> Iterator[Tensor]:
    """Yield batches of random crops in space and time."""

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
    """Stack videos, uint8 [F, H, W, 3] each, to [B, 3, F, H, W] from -1 to 1."""
    return torch.from_numpy(np.stack(videos)).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def _rate(step: int, steps: int) -> float:
    """Return the learning rate's factor: a short warmup, then a cosine down to a fiftieth."""
    return min(1.0, (step + 1) / 50) * (0.51 + 0.49 * math.cos(math.pi * step / steps))
