"""Encoders as families share them: a VAE whose latents are scaled, a text encoder of T5's kind, and their fingerprints.

In: a network of diffusers or transformers and the files it came from. Out: what encoding and sampling ask for. Each
video and caption is encoded by itself and to the same bits every time, so that no record depends on its neighbours.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from transpixeler.config.sections import UserError
from transpixeler.models.damage import naming_damage
from transpixeler.models.family import Digest
from transpixeler.models.resolve import resolve

T = TypeVar("T", bound="Encoder")
P = TypeVar("P", bound="TextAndClipEncoder")
Network = Any  # the libraries' stubs know neither their `config` nor their `to`
_READ = (".safetensors", ".bin", ".pth", ".json", ".model")


def fingerprint(folder: Path, patterns: Sequence[str], digest: Digest) -> str:
    """Hash the names and contents of the files that match, without loading a weight."""
    files = sorted(path for pattern in patterns for path in folder.glob(pattern) if path.suffix in _READ)
    lines = [f"{path.relative_to(folder)} {digest(path)}\n" for path in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def load_network(kind: Any, folder: Path, *, dtype: torch.dtype) -> Network:
    """Load a network of diffusers' or transformers' from its folder, and from nowhere else."""
    with naming_damage(folder):
        return kind.from_pretrained(folder, torch_dtype=dtype, local_files_only=True)


def load_tokenizer(folder: Path) -> Any:
    """Load a tokenizer from its folder; by default transformers offers to run code that lies there."""
    from transformers import AutoTokenizer

    if not folder.is_dir():
        raise UserError(f"model.path: {folder} is not there, which the text encoder beside it reads with; download it")
    with naming_damage(folder):
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def load_image_processor(folder: Path) -> Any:
    """Load the processor of CLIP's pictures from its folder."""
    with naming_damage(folder):
        return image_processor_class().from_pretrained(folder, local_files_only=True)


def image_processor_class() -> Any:
    """Return the processor that works with Pillow: later versions' default takes torchvision where that is installed.

    Its pixels differ a little, and a record must not depend on what else is installed.
    """
    import transformers

    return getattr(transformers, "CLIPImageProcessorPil", None) or transformers.CLIPImageProcessor


def picture_pixels(processor: Any, picture: Tensor) -> Tensor:
    """Return what CLIP takes [1, 3, H', W'] of a picture uint8 [H, W, 3]."""
    from PIL import Image

    return processor(images=Image.fromarray(picture.cpu().numpy()), return_tensors="pt")["pixel_values"]


@contextmanager
def same_bits_every_time() -> Iterator[None]:
    """Keep convolution kernels from being picked by timing, else two runs would cache different latents."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=True):
        yield


def folder_with(
    path: str | Path, either: Sequence[Sequence[str]], what: str, *, only: Sequence[str], example: str
) -> Path:
    """Return the folder, or that of a file, that holds all of one of some lists of files; else say where they are.

    only: the files to download, where the path is a Hub id.
    """
    place = resolve(path, only=only)
    folder = place.parent if place.is_file() else place
    absent = [[name for name in names if not (folder / name).is_file()] for names in either]
    if all(absent):
        listed = [" and ".join(names) for names in absent]
        said = f"neither {' nor '.join(listed)} is there" if len(listed) > 1 else f"{listed[0]} is not there"
        way = f"set model.encoders to {example} or a folder of it"
        raise UserError(f"model.path: {folder} holds no {what}: {said}; {way}")
    return folder


class Encoder:
    """A frozen network on a device; `hashed` gives the fingerprint of what it was made from."""

    def __init__(self, network: Network, hashed: Callable[[], str], *, device: torch.device) -> None:
        self.network, self._hashed = network.eval().requires_grad_(False), hashed
        self.to(device)

    @property
    def networks(self) -> tuple[Network, ...]:
        """Return what it holds on the device."""
        return (self.network,)

    @property
    def fingerprint(self) -> str:
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return self._hashed()

    def to(self: T, device: torch.device) -> T:
        self.device = device
        self.network.to(device)
        return self


class LatentVae(Encoder):
    """A video autoencoder whose latents are scaled, by channel, to what the transformer was trained on."""

    tiled_latents: int  # of one frame, beyond which decoding goes tile by tile, blended at the seams
    tiled_pixels: int | None = None  # of one frame, beyond which encoding does so too; None: never

    def __init__(
        self, network: Network, scale: tuple[Tensor, Tensor], hashed: Callable[[], str], *, device: torch.device
    ) -> None:
        """scale: mean and deviation of each channel."""
        self._scale = torch.stack(scale).float()[:, :, None, None, None]
        super().__init__(network, hashed, device=device)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """uint8 [B,F,H,W,3] or float in [-1,1] [B,3,F,H,W] → fp32 [B,C,f,h,w], the posterior's mean."""
        mean, deviation = self._scale.to(self.device)
        rows, columns = video.shape[2:4] if video.dtype == torch.uint8 else video.shape[3:5]
        self._tile(self.tiled_pixels is not None and rows * columns > self.tiled_pixels)
        with same_bits_every_time():
            latents = [self.network.encode(self._pixels(one)).latent_dist.mode().float() for one in video.split(1)]
        return (torch.cat(latents) - mean) / deviation

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """[B,C,f,h,w] → fp32 [B,3,F,H,W] in [-1,1]."""
        self._tile(latents.shape[-1] * latents.shape[-2] > self.tiled_latents)
        with same_bits_every_time():
            videos = [self._decode(one) for one in latents.to(self.device).float().split(1)]
        return torch.cat(videos).clamp(-1, 1)

    def _tile(self, tiled: bool) -> None:
        self.network.enable_tiling() if tiled else self.network.disable_tiling()

    def _decode(self, latents: Tensor) -> Tensor:
        """Decode one video."""
        return self.network.decode(self._unscaled(latents), return_dict=False)[0].float()

    def _unscaled(self, latents: Tensor) -> Tensor:
        mean, deviation = self._scale.to(self.device)
        return (latents * deviation + mean).to(self.network.dtype)

    def _pixels(self, video: Tensor) -> Tensor:
        video = video.to(self.device, non_blocking=True)
        if video.dtype == torch.uint8:
            video = video.permute(0, 4, 1, 2, 3).float() / 127.5 - 1
        return video.to(self.network.dtype)


class ClipImageEncoder(Encoder):
    """CLIP's vision transformer; the tokens are those before its last layer."""

    def __init__(self, network: Network, processor: Any, hashed: Callable[[], str], *, device: torch.device) -> None:
        super().__init__(network, hashed, device=device)
        self.processor = processor

    @torch.no_grad()
    def encode(self, frames: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] → fp32 [n · tokens, width], each picture by itself."""
        return torch.cat([self._encode(frame) for frame in frames])

    def _encode(self, frame: Tensor) -> Tensor:
        pixels = picture_pixels(self.processor, frame).to(self.device, self.network.dtype)
        with same_bits_every_time():
            return self.network(pixels, output_hidden_states=True).hidden_states[-2][0].float()


class T5TextEncoder(Encoder):
    """A T5 or UMT5 encoder; embeddings keep their true length, so that no mask is needed and short texts are quick."""

    length: int  # of the longest text, in tokens

    def __init__(self, network: Network, tokenizer: Any, hashed: Callable[[], str], *, device: torch.device) -> None:
        super().__init__(network, hashed, device=device)
        self.tokenizer = tokenizer

    @staticmethod
    def clean(text: str) -> str:
        """Return what is encoded of a caption."""
        return text.strip()

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's embedding [true length, width]."""
        return [{"text": self._encode(self.clean(text))} for text in texts]

    def _encode(self, text: str) -> Tensor:
        tokens = self.tokenizer(
            text, truncation=True, max_length=self.length, add_special_tokens=True, return_tensors="pt"
        )
        return self.network(input_ids=tokens.input_ids.to(self.device)).last_hidden_state[0]


class ClipTextEncoder(Encoder):
    """CLIP's one vector of a text."""

    length = 77

    def __init__(self, network: Network, tokenizer: Any, hashed: Callable[[], str], *, device: torch.device) -> None:
        super().__init__(network, hashed, device=device)
        self.tokenizer = tokenizer

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's vector [width]."""
        rows = (padded_tokens(self.tokenizer, text, self.length).to(self.device) for text in texts)
        return [{"pooled": self.network(input_ids=ids).pooler_output[0]} for ids in rows]


class TextAndClipEncoder(Encoder, ABC):
    """Rows of a text, by one network, and CLIP's one vector of it; without `clip` the rows alone."""

    def __init__(
        self, network: Network, tokenizer: Any, clip: ClipTextEncoder | None, length: int,
        hashed: Callable[[], str], *, device: torch.device,
    ) -> None:  # fmt: skip
        """tokenizer: of the network. length: tokens of its text, at most."""
        self.tokenizer, self.clip, self.length = tokenizer, clip, length
        super().__init__(network, hashed, device=device)

    @property
    def networks(self) -> tuple[Network, ...]:
        return self.network, *(self.clip.networks if self.clip else ())

    def to(self: P, device: torch.device) -> P:
        if self.clip is not None:
            self.clip.to(device)
        return super().to(device)

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> list[dict[str, Tensor]]:
        """Return each text's rows [length, width] and its vector [width]."""
        return [self.fields_of(text, self.rows) for text in texts]

    def fields_of(self, text: str, rows: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return a text's fields, its rows by a function like `rows`."""
        (vector,) = self.clip.encode([text]) if self.clip else ({},)
        return {"text": rows(text), **vector}

    @abstractmethod
    def rows(self, text: str) -> Tensor:
        """Return the network's rows of a text, [length, width]."""


def padded_tokens(tokenize: Any, text: str, length: int) -> Tensor:
    """Return a text's tokens, [1, length]."""
    return tokenize(text, return_tensors="pt", padding="max_length", truncation=True, max_length=length).input_ids


class T5AndClipTextEncoder(TextAndClipEncoder):
    """T5's rows of a text padded to its whole length, padding attended as any token, and CLIP's one vector."""

    def rows(self, text: str) -> Tensor:
        ids = padded_tokens(self.tokenizer, text, self.length).to(self.device)
        return self.network(input_ids=ids).last_hidden_state[0]


PARTS = ROWS, VECTOR = "text", "pooled"  # fields of a text encoder and of CLIP beside it, each a part by itself


def load_clip_text(
    network: Path, tokenizer: Path, hashed: Callable[[], str], *, device: torch.device, dtype: torch.dtype
) -> ClipTextEncoder:
    """Load CLIP's text encoder from its folder."""
    from transformers import CLIPTextModel

    return ClipTextEncoder(
        load_network(CLIPTextModel, network, dtype=dtype), load_tokenizer(tokenizer), hashed, device=device
    )


def load_t5_and_clip(
    *, t5: tuple[Path, Path], clip: tuple[Path, Path], length: int, hashed: Callable[[], str], device: torch.device,
    dtype: torch.dtype, part: str = "",
) -> T5AndClipTextEncoder | ClipTextEncoder:  # fmt: skip
    """Load both encoders, or one. t5, clip: the folders of a network and of its tokenizer, which may be the same."""
    from transformers import T5EncoderModel
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # it would break the caller's own
    how: dict[str, Any] = {"device": device, "dtype": dtype}
    if part == VECTOR:
        return load_clip_text(*clip, hashed, **how)
    second = None if part == ROWS else load_clip_text(*clip, hashed, **how)
    network, tokenizer = load_network(T5EncoderModel, t5[0], dtype=dtype), load_tokenizer(t5[1])
    return T5AndClipTextEncoder(network, tokenizer, second, length, hashed, device=device)
