"""Wan as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, an original folder, or a single file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.config.sections import UserError
from transpixeler.families.wan import encoders, images
from transpixeler.families.wan.config import MODEL_TYPES, WanConfig, diffusers_config, refuse_others
from transpixeler.families.wan.model import WanModel, fields_of
from transpixeler.families.wan.names import NAMES, config_from_shapes, image_settings
from transpixeler.models.damage import read_config
from transpixeler.models.experts import ONLY, Expert
from transpixeler.models.family import (
    APACHE,
    Digest,
    Family,
    Field,
    ImageEncoder,
    ModelFolder,
    SamplingDefaults,
    TextEncoder,
    Vae,
    file_digest,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
LAST_FRAME_SHIFT = 16.0  # of FLF2V, as published
EXPERTS_SHIFT = 12.0  # of Wan 2.2's text-to-video model of two experts, likewise
PIPELINE = "model_index.json"  # of a diffusers pipeline
CONFIG = "config.json"
EXPERTS = ("high", "low")
# where the high expert, which is for the most noise, and the low one lie in a diffusers pipeline and in Wan's folder
DIFFUSERS_EXPERTS = ("transformer", "transformer_2")
ORIGINAL_EXPERTS = ("high_noise_model", "low_noise_model")
BOUNDARY, IMAGE_BOUNDARY = 0.875, 0.9  # the lowest noise level of the high expert, as published


class WanFolder(ModelFolder):
    """One Wan model on disk."""

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        folder = self._folder
        if folder.is_file():
            source = WeightSource(folder, NAMES.internal_names)
            refuse_others(name.split(".")[0] for name in source.names())
            try:
                return config_from_shapes({name: source.shape(name) for name in source.names()})
            except KeyError as fault:
                raise UserError(f"model.path: {folder} holds no Wan model: {fault.args[0]} is not in it") from fault
        places = [self.experts[0].folder] if self.experts[0].folder else ["transformer", ""]
        found = [file for place in places if (file := folder / place / CONFIG).is_file()]
        if not found:
            raise UserError(f"model.path: {self.path} holds neither transformer/config.json nor config.json")
        config = read_config(found[0])
        if config.get("model_type") in ("i2v", "flf2v"):
            config |= self._image_settings()
        for other in self.experts[1:]:
            if WanConfig.read(config | read_config(folder / other.folder / CONFIG)) != WanConfig.read(config):
                raise UserError(
                    f"model.path: {self.path}: {other.folder} is of another shape than {self.experts[0].folder}; "
                    "take both from one model"
                )
        return config

    @cached_property
    def _folder(self) -> Path:
        """Return where its configs lie, or its one file."""
        places = (*DIFFUSERS_EXPERTS, *ORIGINAL_EXPERTS)
        return resolve(self.path, only=(CONFIG, *(f"{place}/{CONFIG}" for place in places), PIPELINE))

    @cached_property
    def experts(self) -> tuple[Expert, ...]:
        places = _places_of_experts(self._folder)
        if not places:
            return (ONLY,)
        for place in places:
            if not (self._folder / place / CONFIG).is_file():
                raise UserError(
                    f"model.path: {self.path} is a model of two experts and holds no {place}/{CONFIG}; copy or "
                    "download it again"
                )
        boundary = self._boundary(self._folder / places[0] / CONFIG)
        (high, low), (first, second) = EXPERTS, places
        return Expert(high, boundary, 1.0, first), Expert(low, 0.0, boundary, second)

    def _boundary(self, config: Path) -> float:
        """Return the noise level where the experts meet: the pipeline's own, or that of the published models."""
        index = self._folder / PIPELINE
        told = read_config(index).get("boundary_ratio") if index.is_file() else None
        if told is None:
            return IMAGE_BOUNDARY if WanConfig.read(read_config(config)).condition_channels else BOUNDARY
        if not isinstance(told, float) or not 0 < told < 1:
            raise UserError(f"model.path: {index}: boundary_ratio {told!r} is no share of the noise levels")
        return told

    def _image_settings(self) -> dict[str, Any]:
        """Return what Wan's own config.json leaves out: whether an image encoder is read, and how wide it is.

        2.1's and 2.2's image-to-video models name the same type, and only the first one's weights have such parts.
        """
        source = WeightSource(self.path, NAMES.internal_names, part=self.experts[0].folder)
        return image_settings({name: source.shape(name) for name in source.names()})

    @cached_property
    def _checked(self) -> WanConfig:
        return WanConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        channels = self._checked.out_channels
        stride = (4, 16, 16) if channels == 48 else (4, 8, 8)  # of Wan 2.2's and 2.1's VAE; a transformer may lie alone
        if encoders.has_vae(self.encoders):
            stride, channels = encoders.vae_geometry(self.encoders)
            if channels != self._checked.out_channels:
                raise UserError(
                    f"model.path: {self.path}: its VAE makes {channels} channels and its transformer takes "
                    f"{self._checked.out_channels}; they belong to different models"
                )
        return Geometry(stride, channels, self._checked.patch_size)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields_of(self._checked)

    @property
    def pictures(self) -> tuple[str, ...]:
        if not self._checked.condition_channels:
            return ()
        return ("image", "last_image") if self._checked.shows_last else ("image",)

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def clean_caption(self, text: str) -> str:
        return encoders.clean_caption(text)

    def vae_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.vae_fingerprint(self.encoders, digest)

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        return encoders.text_fingerprint(self.encoders, digest)

    def image_fingerprint(self, digest: Digest = file_digest) -> str:
        return images.image_fingerprint(self.encoders, digest)

    def latent_statistics(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        return encoders.latent_statistics(self.encoders)

    def shift(self, tokens: int) -> float:
        return self.sampling_shift(tokens) if len(self.experts) > 1 else 1.0

    def sampling_shift(self, tokens: int) -> float:
        if len(self.experts) > 1 and not self._checked.condition_channels:
            return EXPERTS_SHIFT
        return LAST_FRAME_SHIFT if self._checked.shows_last else self.family.sampling.shift

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> WanModel:
        return WanModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)

    def load_vae(self, *, device: torch.device, dtype: torch.dtype) -> Vae:
        return encoders.load_vae(self.encoders, device=device, dtype=dtype)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return encoders.load_text_encoder(self.encoders, device=device, dtype=dtype)

    def load_image_encoder(self, *, device: torch.device, dtype: torch.dtype) -> ImageEncoder:
        return images.load_image_encoder(self.encoders, device=device, dtype=dtype)


def _places_of_experts(folder: Path) -> tuple[str, str] | None:
    """Tell a folder of two experts: in diffusers' layout by the pipeline's own list, in Wan's by its folders."""
    index = read_config(folder / PIPELINE) if (folder / PIPELINE).is_file() else {}
    if any(index.get(DIFFUSERS_EXPERTS[1]) or ()):
        return DIFFUSERS_EXPERTS
    return ORIGINAL_EXPERTS if any((folder / place).is_dir() for place in ORIGINAL_EXPERTS) else None


def _is_wan(path: Path) -> bool:
    """Tell Wan by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        return "embed.patch_embedding.weight" in WeightSource(path, NAMES.internal_names).names()
    for name in ("transformer/config.json", "config.json"):
        if (path / name).is_file():
            config = read_config(path / name)
            return str(config.get("_class_name", "")).startswith("Wan") or config.get("model_type") in MODEL_TYPES
    return _places_of_experts(path) is not None


FAMILY = Family(
    name="wan",
    title="Wan",
    names=NAMES,
    open=WanFolder,
    recognises=_is_wan,
    sampling=SamplingDefaults(negative_prompt=NEGATIVE_PROMPT, shift=5.0),
    lora_targets=WanModel.lora_targets,
    transformer_class="WanTransformer3DModel",
    pipeline_class="WanPipeline",
    image_pipeline_class="WanImageToVideoPipeline",
    example="Wan-AI/Wan2.1-T2V-1.3B-Diffusers",
    license=APACHE,
    experts=EXPERTS,
    shapes={"1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30}, "14b": {"num_layers": 40}},
)
