"""LTX-Video as a family: what a folder of it holds, and how its model and encoders are opened.

Read are a diffusers pipeline, its transformer folder, or a single file as Lightricks publishes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from transpixeler.families.ltx import encoders, schedule
from transpixeler.families.ltx.config import PATCH, LtxConfig, diffusers_config
from transpixeler.families.ltx.model import FPS, LtxModel, text_field
from transpixeler.families.ltx.names import NAMES, config_from_shapes
from transpixeler.families.ltx.original import header_config
from transpixeler.flow.draws import shifted
from transpixeler.models.family import (
    Family,
    Field,
    License,
    SamplingDefaults,
)
from transpixeler.models.geometry import Geometry
from transpixeler.models.pipeline_folder import CONFIGS, PipelineFolder, config_by_shapes, names_class, read_published
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

NEGATIVE_PROMPT = "worst quality, inconsistent motion, blurry, jittery, distorted"
CLASS = "LTXVideoTransformer3DModel"
_CAUSAL = "causal_temporal_positioning"
_LAYERS_13B = 48


class LtxFolder(PipelineFolder):
    """One LTX-Video model on disk."""

    library = encoders

    def __init__(self, path: str, encoders: str = "") -> None:
        self.family, self.path, self.encoders = FAMILY, path, encoders or path

    @cached_property
    def config(self) -> Mapping[str, Any]:
        place = resolve(self.path, only=(*CONFIGS, encoders.VAE_CONFIG))
        config = _config_of_file(place) if place.is_file() else read_published(place, self.path)
        return config if _CAUSAL in config else {**config, _CAUSAL: self._is_causal(config)}

    def _is_causal(self, config: Mapping[str, Any]) -> bool:
        """Tell a version from 0.9.5 on: no config of diffusers says it, but its VAE is another."""
        place = resolve(self.encoders, only=(encoders.VAE_CONFIG,))
        if place.is_dir() and not (place / encoders.VAE_CONFIG).is_file():
            return config.get("num_layers") == _LAYERS_13B
        return "LTXVideo095DownBlock3D" in encoders.vae_config(self.encoders).get("down_block_types", ())

    @cached_property
    def _checked(self) -> LtxConfig:
        return LtxConfig.read(self.config)

    @cached_property
    def geometry(self) -> Geometry:
        stride, channels = encoders.vae_geometry(self.encoders)
        return Geometry(stride, channels, PATCH)

    @cached_property
    def fields(self) -> tuple[Field, ...]:
        return (text_field(self._checked),)

    def diffusers_config(self) -> dict[str, Any]:
        return diffusers_config(self.config)

    def clean_caption(self, text: str) -> str:
        return encoders.LtxTextEncoder.clean(text)

    def shift(self, tokens: int) -> float:
        return schedule.shift(tokens)

    def sampling_shift(self, tokens: int) -> float:
        return schedule.shift(tokens)

    def noise_levels(self, steps: int, tokens: int) -> list[float]:
        """Return the levels at which this version is sampled: shifted by tokens, or linear and then quadratic."""
        config = self.scheduler
        if not config.get("use_dynamic_shifting", not self._checked.causal_temporal_positioning):
            return schedule.linear_quadratic(steps)
        levels = [shifted(1 - step / steps, schedule.shift(tokens)) for step in range(steps)]
        last = config.get("shift_terminal", schedule.LAST)
        return schedule.stretched(levels, last) if last else levels

    def build(
        self,
        *,
        streams: Sequence[str],
        rgb_attends_aux: bool = True,
        attention: str = "auto",
        fps: float | None = None,
    ) -> LtxModel:
        """fps: frames in a second of the clips, because positions are in seconds."""
        return LtxModel(
            self._checked,
            streams=streams,
            rgb_attends_aux=rgb_attends_aux,
            kernel=attention,
            fps=FPS if fps is None else fps,
        )


def _config_of_file(path: Path) -> dict[str, Any]:
    said = header_config(path, "transformer")
    return said or config_by_shapes(path, NAMES, config_from_shapes, title="LTX-Video")


def _is_ltx(path: Path) -> bool:
    """Tell LTX-Video by the class that a config names, or by the names of a single file's weights.

    LTX-2, which has an audio half beside the same names, is another architecture.
    """
    if path.is_file():
        names = WeightSource(path, NAMES.internal_names).names()
        return "embed.patchify_proj.weight" in names and not any("audio" in name for name in names)
    return names_class(path, CLASS)


FAMILY = Family(
    name="ltx",
    title="LTX-Video",
    names=NAMES,
    open=LtxFolder,
    recognises=_is_ltx,
    sampling=SamplingDefaults(negative_prompt=NEGATIVE_PROMPT, shift=schedule.shift(4096)),
    lora_targets=LtxModel.lora_targets,
    transformer_class=CLASS,
    pipeline_class="LTXPipeline",
    example="Lightricks/LTX-Video-0.9.5",
    license=License("other", "ltxv-open-weights", "https://huggingface.co/Lightricks/LTX-Video"),
    shapes={
        "2b": {"num_layers": 28},
        "13b": {"num_layers": _LAYERS_13B, "attention_head_dim": 128, "cross_attention_dim": 4096},
    },
)
