"""Latents go in, frames come out, and back: the VAE as `sample` and `eval` use it."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from transpixeler.data.media.scale import enlarge, shrink
from transpixeler.models.family import ModelFolder, Vae
from transpixeler.models.streams import StreamLayout


class Frames:
    """Convert latents to frames and back. The VAE is loaded when first used, and on the device only while it works."""

    def __init__(self, model: ModelFolder, device: torch.device, *, upsample: str = "guided") -> None:
        """upsample: as `sample.upsample`, for companions at another scale."""
        self.model, self.device, self.upsample = model, device, upsample
        self._vae: Vae | None = None

    def decode(
        self, latents: Tensor, layout: StreamLayout, known: Mapping[int, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """Return uint8 [F, H, W, 3] by stream, all at RGB's size, from packed latents [N].

        known: frames of streams that need not be decoded.
        """
        found, known = {}, known or {}
        with self._vae_on_device() as vae:
            for stream, (name, part) in enumerate(zip(layout.names, layout.videos(latents[None]), strict=True)):
                found[name] = known[stream] if stream in known else to_pixels(vae.decode(part)[0])
        rgb = found[layout.names[0]]
        return {name: enlarge(video, rgb, guided=self.upsample == "guided") for name, video in found.items()}

    def encode(self, frames: np.ndarray | Tensor, *, scale: int = 1) -> Tensor:
        """Return latents [C, f, h, w] of frames uint8 [F, H, W, 3], or of a video [1, 3, F, H, W] in [-1, 1].

        Frames are encoded at 1/scale of their height and width.
        """
        video = frames if isinstance(frames, Tensor) else torch.from_numpy(shrink(frames, scale))[None]
        with self._vae_on_device() as vae:
            return vae.encode(video)[0].cpu()

    def encode_alone(self, frames: np.ndarray, *, scale: int = 1) -> Tensor:
        """Return latents [C, F, h, w] of frames uint8 [F, H, W, 3], each encoded by itself."""
        video = torch.from_numpy(shrink(frames, scale))[None]
        with self._vae_on_device() as vae:
            return torch.cat([vae.encode(frame)[0].cpu() for frame in video.split(1, dim=1)], dim=1)

    @contextmanager
    def _vae_on_device(self) -> Iterator[Vae]:
        if self._vae is None:
            self._vae = self.model.load_vae(device=self.device, dtype=torch.float32)
        try:
            yield self._vae.to(self.device)
        finally:
            if self.device.type != "cpu":  # a CPU's VAE stays, and collecting after each video takes half a second
                self._vae.to(torch.device("cpu"))
                release_memory(self.device)


def to_pixels(video: Tensor) -> np.ndarray:
    """Return uint8 [F, H, W, 3] of a video [3, F, H, W] in [-1, 1]."""
    return video.add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(1, 2, 3, 0).cpu().numpy()


def release_memory(device: torch.device) -> None:
    """Give the memory of what is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
