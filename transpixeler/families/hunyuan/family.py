"""HunyuanVideo 1.0 as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, or the transformer as one file in the original names, with
`model.encoders` for the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from transpixeler.families.hunyuan import encoders, llava
from transpixeler.families.hunyuan.config import (
    CLASS,
    EVERY,
    IMAGE_PIPELINE,
    IMAGE_TRACE,
    LATENT_CONCAT,
    PATCH,
    PIPELINE,
    SHIFT,
    TOKEN_REPLACE,
    USE,
    HunyuanConfig,
    diffusers_config,
)
from transpixeler.families.hunyuan.model import HunyuanModel, fields
from transpixeler.families.hunyuan.names import NAMES, config_from_shapes
from transpixeler.models.damage import naming_damage
from transpixeler.models.encoders import PARTS
from transpixeler.models.family import (
    Digest,
    Family,
    Field,
    License,
    SamplingDefaults,
    TextEncoder,
    file_digest,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import (
    CONFIGS,
    INDEX,
    SCHEDULER,
    PipelineFolder,
    check_pipeline,
    config_by_shapes,
    names_class,
    read_published,
)
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource


class HunyuanFolder(PipelineFolder):
    """One HunyuanVideo model on disk."""

    library, text_parts = encoders, PARTS
    text_places = ("text_encoder", "text_encoder_2")

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*CONFIGS, INDEX))
        if place.is_file():
            return self._config_of_file(place)
        config = read_published(place, self.path)
        made_for = IMAGE_PIPELINE if config.get("image_condition_type") else PIPELINE
        check_pipeline(place, self.path, made_for=made_for, use=USE)
        return config

    def _config_of_file(self, place: Path) -> dict[str, Any]:
        """Return the config of a file, which its encoders tell: replacing tokens changes the shape of no weight."""
        config = config_by_shapes(place, NAMES, config_from_shapes, title="HunyuanVideo")
        if config["image_condition_type"] is None and llava.sees_pictures(self.encoders):
            config["image_condition_type"] = TOKEN_REPLACE
        return config

    @cached_property
    def _checked(self) -> HunyuanConfig:
        return HunyuanConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        self.check_channels(channels, self._checked.out_channels)
        return Geometry(stride, channels, PATCH)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return fields(self._checked)

    @property
    def pictures(self) -> tuple[str, ...]:
        return ("image",) if self._image_type else ()

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def shift(self, tokens: int) -> float:
        """Return the shift that the model is sampled with: noise levels are learned where they are asked for."""
        return self.sampling_shift(tokens)

    def sampling_shift(self, tokens: int) -> float:
        with naming_damage(Path(self.encoders) / SCHEDULER):
            return float(self.scheduler.get("shift", SHIFT))

    @property
    def image_trace(self) -> float:
        return IMAGE_TRACE if self._image_type else 0.0

    @property
    def _image_type(self) -> str | None:
        return self._checked.image_condition_type

    def text_fingerprint(self, digest: Digest = file_digest) -> str:
        library = llava if self._image_type else encoders
        return library.text_fingerprint(self.encoders, digest)

    def load_text_encoder(self, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        return self.load_text_part("", device=device, dtype=dtype)

    def load_text_part(self, part: str, *, device: torch.device, dtype: torch.dtype) -> TextEncoder:
        how: dict[str, Any] = {"device": device, "dtype": dtype, "part": part}
        if kind := self._image_type:
            return llava.load_text_encoder(self.encoders, every=EVERY[kind], **how)
        return encoders.load_text_encoder(self.encoders, **how)

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> HunyuanModel:
        return HunyuanModel(self._checked, streams=streams, rgb_attends_aux=rgb_attends_aux, kernel=attention)


def _is_hunyuan(path: Path) -> bool:
    """Tell HunyuanVideo by the class that a config names, or by the names of a single file's weights."""
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        return "blocks.s0.linear1.weight" in names and "embed.txt_in.input.weight" in names
    return names_class(path, CLASS)


FAMILY = Family(
    name="hunyuan",
    title="HunyuanVideo",
    names=NAMES,
    open=HunyuanFolder,
    recognises=_is_hunyuan,
    sampling=SamplingDefaults(negative_prompt="", shift=SHIFT),
    lora_targets=HunyuanModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class=PIPELINE,
    image_pipeline_class=IMAGE_PIPELINE,
    example=encoders.EXAMPLE,
    license=License(
        "other", "tencent-hunyuan-community", "https://huggingface.co/tencent/HunyuanVideo/blob/main/LICENSE"
    ),
    shapes={
        "13b": {},
        "13b-i2v": {"image_condition_type": TOKEN_REPLACE},
        "13b-i2v-33ch": {"image_condition_type": LATENT_CONCAT, "in_channels": 33, "guidance_embeds": False},
    },
)
