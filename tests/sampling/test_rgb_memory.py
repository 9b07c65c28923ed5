"""A given RGB video that does not see its companion is computed in the first step of sampling alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support import tiny
from tests.support.ranks import run_ranks
from transpixeler.config.sections import SampleConfig
from transpixeler.families.wan.family import WanFolder
from transpixeler.models.experts import Expert
from transpixeler.models.rgb_memory import RgbMemory
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import devices
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.experts import Experts
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.sampling.sampler import Sampler
from transpixeler.sampling.video import Video

SHAPE = (4, 2, 4, 6)
LAYOUT = StreamLayout.equal(("rgb", "seg"), SHAPE, (1, 2, 2))
BLIND = ("model.rgb_attends_aux=false",)


def _engine(overrides: tuple[str, ...], mesh: Mesh, *, moved: float = 0.05) -> Engine:
    config = tiny.config(*BLIND, *overrides)
    engine = build_engine(config, mesh, lambda: tiny.make(config), tiny.seeded(config))
    with torch.no_grad():
        for name, parameter in engine.named_parameters():
            if name.endswith("lora_B"):
                parameter.copy_(parameter + moved)
    return engine


def _matte(rank: int, world_size: int, overrides: tuple[str, ...], experts: bool) -> dict[str, Any]:
    """Matte a video in each way; count the microbatches whose RGB was remembered."""
    here = Runtime(rank, world_size, rank, torch.device("cpu"))
    mesh = meshes.build(meshes.resolve(tiny.config(*overrides).parallel, world_size), here)
    engine: Any = _engine(overrides, mesh)
    if experts:
        both = Experts()
        both.add(Expert("high", 0.9, 1.0), engine, lambda: None, "device")
        both.add(Expert("low", 0.0, 0.9), _engine(overrides, mesh, moved=0.1), lambda: None, "device")
        engine = both
    draw = torch.Generator().manual_seed(0)
    text, given = {"text": torch.randn(512, 16, generator=draw)}, {0: torch.randn(SHAPE, generator=draw)}
    negative = {"text": torch.zeros(512, 16)}
    found: dict[str, Any] = {}
    for where in ("off", "device", "host"):
        sample = SampleConfig(steps=4, guidance=4.0, rgb_memory=where)
        sampler = Sampler(engine, mesh, sample, negative, WanFolder("none"))
        with _Counted() as known:
            (_, found[where]), *_ = sampler.each([Video("0", "", text, 0, LAYOUT, given)] * world_size)
        found[f"{where}: known"] = sum(known)
        assert all(model.rgb_memory is None for model in engine.models())
    return found


class _Counted:
    """Note for each run of a stage whether RGB was known."""

    def __enter__(self) -> list[bool]:
        self.run, known = RgbMemory.run, []

        def noted(memory: RgbMemory, *args: Any) -> Any:
            flow, tokens = self.run(memory, *args)
            known.append(tokens.rgb_known)
            return flow, tokens

        RgbMemory.run = noted
        return known

    def __exit__(self, *_: object) -> None:
        RgbMemory.run = self.run


LAYOUTS = {
    "(1,1,1)": (1, ()),
    "(2,1,2)": (4, ("parallel.pipeline=2", "parallel.shard=2")),
    "(2,1,1) interleaved": (2, ("parallel.pipeline=2", "parallel.schedule=interleaved-1f1b")),
    "(1,1,1,2)": (2, ("parallel.context=2",)),
    "(2,1,1,2)": (4, ("parallel.pipeline=2", "parallel.context=2")),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_matte_is_the_same_to_the_bit(name: str) -> None:
    ranks, overrides = LAYOUTS[name]
    for found in run_ranks(_matte, ranks, overrides, False):
        assert torch.equal(found["device"], found["off"]) and torch.equal(found["host"], found["off"])
        assert found["off: known"] == 0 < found["device: known"]


def _scarce(rank: int, world_size: int) -> dict[str, Any]:
    """Matte a video where rank 1 alone has no memory left."""
    devices.place = lambda where, size, device: "off" if rank else where
    return _matte(rank, world_size, ("parallel.context=2",), False)


def test_ranks_that_share_a_video_remember_all_or_none() -> None:
    for found in run_ranks(_scarce, 2):
        assert found["device: known"] == 0 and torch.equal(found["device"], found["off"])


def test_another_expert_computes_it_anew() -> None:
    (found,) = run_ranks(_matte, 1, (), True)
    assert torch.equal(found["device"], found["off"])
    (alone,) = run_ranks(_matte, 1, (), False)
    assert alone["device: known"] == 3 and found["device: known"] == 2  # of four steps, of one and of two experts


def test_videos_whose_rgb_is_made_or_given_in_part_are_not_remembered() -> None:
    first = {0: torch.zeros(4, 1, 4, 6)}
    asked: list[str] = []

    class Asked:
        def remembering_rgb(self, layout: StreamLayout, *, rows: int, where: str) -> None:
            asked.append(where)

    for given in ({}, first, {1: torch.zeros(SHAPE)}, {0: torch.zeros(SHAPE)}):
        sampler = Sampler(Asked(), None, SampleConfig(), None, WanFolder("none"))  # type: ignore[arg-type]
        sampler._remembering(Video("0", "", {}, 0, LAYOUT, given))
    assert asked == ["off", "off", "off", "auto"]


def test_the_place_follows_from_what_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100, 200))
    monkeypatch.setattr(devices, "free_host_memory", lambda: 1000)
    assert [devices.place("auto", size, cuda) for size in (50, 51, 500, 501)] == ["device", "host", "host", "off"]
    assert devices.place("host", 10_000, cuda) == "host" and devices.place("auto", 10_000, cpu) == "device"
