"""A case for each family: a tiny model, the latents it takes, and another program's opinion of what it computes.

The conformance suite runs over these; a family without a case fails it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import tests.support.families  # noqa: F401 - the toy is found from here on
from tests.support.families.references import (
    LTX,
    WAN,
    Reference,
    flux_reference,
    hunyuan_reference,
    ltx_reference,
    opensora_reference,
    pyramid_reference,
    toy_reference,
    unet3d_reference,
    wan_reference,
)
from tests.support.models import move
from transpixeler.config.sections import Config
from transpixeler.families.unet3d.diffusion import CosineDiffusion
from transpixeler.flow import draws, objective
from transpixeler.models.backbone import Backbone
from transpixeler.models.family import Family, Field, find_family
from transpixeler.models.meta import on_meta
from transpixeler.models.noising import RECTIFIED, Noising
from transpixeler.models.streams import LAST, Shape, StreamLayout

STREAMS = ("rgb", "seg", "depth")


@dataclass(frozen=True)
class Case:
    """One family, tiny."""

    name: str
    make: Callable[..., Backbone]  # (streams, rgb_attends_aux) → a tiny model of four blocks on the current device
    shapes: tuple[Shape, Shape]  # latents of two buckets
    large: Shape  # latents of 256 tokens, beside which vectors cost nothing
    reference: Callable[[Backbone], Reference]
    reads_text: str  # a linear of a block that reads the text alone
    write: Callable[[Path], None]  # a model folder whose weights are random, with encoders
    frames: tuple[int, int]  # lengths of clips of 64×64 that it can take
    in_comfyui: Callable[[str], str] = str  # ComfyUI's own name of a module, by its original one
    own_format: str = "comfyui"  # a format of adapters in names that no other family has
    more: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)  # settings of configs, by section
    noising: Noising = RECTIFIED
    joins: bool = False  # as in `ModelFolder`

    @property
    def family(self) -> Family:
        return find_family(self.name)

    def model(self, streams: int = 1, *, attends: bool = True, seed: int = 0) -> Backbone:
        """Build the tiny model with every parameter moved."""
        model = self.make(streams=STREAMS[:streams], rgb_attends_aux=attends)
        move(model, seed=seed)
        return model

    def text_flows(self) -> bool:
        with on_meta():  # asked at each import of a test's module, also in every rank
            return self.make(streams=STREAMS[:1]).carried > 1


# -- inputs


def inputs(
    model: Backbone, layout: StreamLayout, *, batch: int = 2, seed: int = 0, full: bool = False
) -> tuple[Tensor, ...]:
    """Packed latents, a time for each group and fields; masked text goes on as noise beyond its length.

    full: texts of the whole length.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, layout.elements, generator=generator)
    times = torch.rand(batch, len(layout.groups), generator=generator)
    fields = _fields(model.fields, batch, generator, full=full)
    if model.undivided and batch > 1:
        fields[0][-1] = 0  # no caption, for which such a model has a vector
        times = times[:, :1].expand_as(times)
    return x, times, *fields


def _fields(fields: Sequence[Field], batch: int, generator: torch.Generator, *, full: bool = False) -> list[Tensor]:
    found = []
    for field in fields:
        value = torch.randn(batch, *([field.length] if field.length else []), field.width, generator=generator)
        if field.length:
            lengths = torch.tensor([field.length if full or row % 3 == 1 else 5 + row for row in range(batch)])
            if not field.masked:
                value[torch.arange(field.length) >= lengths[:, None]] = 0
            found += [value, lengths] if field.masked else [value]
        else:
            found.append(value)
    return found


def alike(layout: StreamLayout, given: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Give every stream of `layout` the latents and times of the one stream in `given`."""
    x, times, *fields = given
    streams = len(layout.names)
    return x.repeat(1, streams), times.repeat(1, streams), *fields


def base_of(case: Case, joint: nn.Module) -> Backbone:
    """Return the one-stream model with the joint model's base weights."""
    single, state = case.model(), joint.state_dict()
    single.load_state_dict({name: state[name] for name in single.state_dict()})
    return single


def zero(model: nn.Module, part: str) -> None:
    """Zero every parameter whose name holds `part`."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if part in name:
                parameter.zero_()


# -- training


def example(case: Case, model: Backbone, config: Config, step: int, slots: range) -> objective.Example:
    """Draw the share at `slots` of a step's global batch; buckets alternate.

    One has a companion at half the size, and what a step gives of it has times of its own: first and last frames,
    or every second one.
    """
    names, shape = tuple(config.streams), case.shapes[step % 2]
    layout = StreamLayout.equal(names, shape, model.patch)
    if step % 2 and not case.joins:
        channels, frames, height, width = shape
        small = (channels, frames, height // 2, width // 2)
        shapes, count = (shape, small, shape), len(names)
        layout = replace(layout, shapes=shapes[:count], scales=(1, 2, 1)[:count])
        wanted = [(0, LAST), *((stream, 2) for stream in range(count))]
        layout = layout.with_beside(wanted, 4 * (frames - 1) + 1)
    ids = [f"sample{step}-{slot}" for slot in slots]
    rows = [_fields(model.fields, 1, draws.generator("fields", name)) for name in ids]
    return objective.prepare(
        config.objective,
        seed=config.seed,
        step=step,
        layout=layout,
        latents=torch.stack([draws.draw_noise(layout.elements, "latents", name) for name in ids]),
        fields={str(place): torch.cat(values) for place, values in enumerate(zip(*rows, strict=True))},
        empty={},
        ids=ids,
        slots=slots,
        batch=config.train.global_batch,
        shift=1.0,
        noising=case.noising,
    )


# -- the families


def _wan(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from transpixeler.families.wan.config import WanConfig
    from transpixeler.families.wan.model import WanModel

    return WanModel(WanConfig.read(WAN), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _ltx(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from transpixeler.families.ltx.config import LtxConfig
    from transpixeler.families.ltx.model import LtxModel

    return LtxModel(LtxConfig.read(LTX), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _flux(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from tests.families.flux.pipeline import TINY
    from transpixeler.families.flux.config import FluxConfig
    from transpixeler.families.flux.model import FluxModel

    return FluxModel(FluxConfig.read(TINY), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _hunyuan(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from tests.families.hunyuan.pipeline import TINY
    from transpixeler.families.hunyuan.config import HunyuanConfig
    from transpixeler.families.hunyuan.model import HunyuanModel

    return HunyuanModel(HunyuanConfig.read(TINY), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _opensora(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from tests.families.opensora.folder import TINY
    from transpixeler.families.opensora.config import OpenSoraConfig
    from transpixeler.families.opensora.model import OpenSoraModel

    return OpenSoraModel(OpenSoraConfig.read(TINY), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _pyramid(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from tests.families.pyramid.folder import TINY
    from transpixeler.families.pyramid.config import PyramidConfig
    from transpixeler.families.pyramid.model import PyramidModel

    return PyramidModel(PyramidConfig.read(TINY), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _toy(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from transpixeler.families.toy.config import ToyConfig
    from transpixeler.families.toy.model import ToyModel

    return ToyModel(ToyConfig(), streams=streams, rgb_attends_aux=rgb_attends_aux)


def _unet3d(streams: Sequence[str], rgb_attends_aux: bool = True) -> Backbone:
    from tests.families.unet3d.folder import TINY
    from transpixeler.families.unet3d.config import UnetConfig
    from transpixeler.families.unet3d.model import UnetModel

    return UnetModel(UnetConfig.read(TINY), streams=streams)


def _write_wan(folder: Path) -> None:
    from transpixeler.demo.model import write_model

    write_model(folder, seed=0)


def _write_ltx(folder: Path) -> None:
    from tests.families.ltx.pipeline import write_pipeline

    write_pipeline(folder)


def _write_flux(folder: Path) -> None:
    from tests.families.flux.pipeline import write_pipeline

    write_pipeline(folder)


def _write_hunyuan(folder: Path) -> None:
    from tests.families.hunyuan.pipeline import write_pipeline

    write_pipeline(folder)


def _write_opensora(folder: Path) -> None:
    from tests.families.opensora.folder import write_folder

    write_folder(folder)


def _write_unet3d(folder: Path) -> None:
    from tests.families.unet3d.folder import write_folder

    write_folder(folder)


def _write_pyramid(folder: Path) -> None:
    from tests.families.pyramid.folder import write_folder

    write_folder(folder)


def _write_toy(folder: Path) -> None:
    from tests.support.families.toy.write import write_toy

    write_toy(folder)


SMALL = ((4, 1, 4, 4), (4, 2, 4, 8))
UNCUT = ((4, 1, 3, 4), (4, 3, 4, 6))  # of a model that takes each cell as a token
CASES = {
    case.name: case
    for case in (
        Case("wan", _wan, SMALL, (4, 4, 16, 16), wan_reference, "cross_attn.k", _write_wan, (1, 9)),
        Case("ltx", _ltx, UNCUT, (4, 4, 8, 8), ltx_reference, "attn2.to_k", _write_ltx, (1, 9)),
        Case("flux", _flux, SMALL, (4, 4, 16, 16), flux_reference, "txt.qkv", _write_flux, (1, 1)),
        Case(
            "hunyuan",
            _hunyuan,
            SMALL,
            (4, 4, 16, 16),
            hunyuan_reference,
            "txt.qkv",
            _write_hunyuan,
            (1, 9),
            in_comfyui=lambda module: (
                module.replace("fc1", "0").replace("fc2", "2").replace("modulation.linear", "lin")
            ),
        ),
        Case(
            "opensora",
            _opensora,
            SMALL,
            (4, 4, 16, 16),
            opensora_reference,
            "txt.qkv",
            _write_opensora,
            (1, 9),
            own_format="diffusers",  # the other's names, of projections together, are FLUX.1's
        ),
        Case(
            "pyramid",
            _pyramid,
            SMALL,
            (4, 1, 32, 32),  # of one frame: attention that sees no later ones is counted as if it saw all
            pyramid_reference,
            "txt.qkv",
            _write_pyramid,
            (1, 9),
            more={"train": {"global_batch": 4, "micro_batch": 1}, "sample": {"scheduler": "euler", "shift": "auto"}},
        ),
        Case("toy", _toy, SMALL, (4, 4, 16, 16), toy_reference, "txt.qkv", _write_toy, (2, 8)),
    )
}

# Streams in the channels of one network, which is told one time: no scope but all, no task but joint, one piece.
PLAIN = {
    "lora": {"scope": "all"},
    "objective": {"tasks": {"joint": 1, "rgb_to_aux": 0, "ends_to_video": 0, "interpolate": 0}, "density": "uniform"},
    "sample": {"scheduler": "ddpm", "shift": "auto"},
}
JOINED = {
    case.name: case
    for case in (
        Case(
            "unet3d",
            _unet3d,
            ((3, 2, 2, 4), (3, 3, 4, 4)),
            (3, 4, 16, 16),
            unet3d_reference,
            "",
            _write_unet3d,
            (1, 4),
            more=PLAIN,
            noising=CosineDiffusion(),
            joins=True,
        ),
    )
}
EVERY = CASES | JOINED
