"""What a model learns between latents and noise is a value: the plain line, and a way that a model makes of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig
from transpixeler.flow.objective import Example, prepare
from transpixeler.flow.solver import denoise, fresh_noise, start_noise
from transpixeler.models.noising import RECTIFIED, Noising, RectifiedFlow
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.stage import Stage

LAYOUT = StreamLayout(("rgb", "seg"), ((2, 3, 4, 6), (2, 3, 2, 4)), (1, 2, 2))


@dataclass(frozen=True)
class Part(RectifiedFlow):
    """A part of the plain line, from 1/4 to 3/4 on odd steps, whose ends are mixtures; told are places on the whole."""

    low: float = 0.0
    high: float = 1.0
    error = "absolute"

    def of_step(self, seed: int, step: int) -> Noising:
        return Part(0.25, 0.75) if step % 2 else self

    def ends(self, clean: Tensor, noise: Tensor, layout: StreamLayout) -> tuple[Tensor, Tensor]:
        return torch.lerp(clean, noise, self.low), torch.lerp(clean, noise, self.high)

    def told(self, times: Tensor) -> Tensor:
        return self.low + (self.high - self.low) * times


def example(noising: Noising, step: int) -> Example:
    latents = torch.randn(2, LAYOUT.elements, generator=torch.Generator().manual_seed(0))
    return prepare(
        ObjectiveConfig(),
        seed=1,
        step=step,
        layout=LAYOUT,
        latents=latents,
        fields={},
        empty={},
        ids=["a", "b"],
        slots=range(2),
        batch=2,
        shift=1.0,
        noising=noising,
    )


def test_a_way_between_ends_of_its_own_tells_other_times_than_its_places() -> None:
    whole, part = example(RECTIFIED, 3), example(Part(), 3)
    (told,), places = part.inputs, part.timesteps
    assert torch.equal(places, whole.timesteps) and not torch.equal(told, places)
    clean, noise = whole.latents, whole.noise
    torch.testing.assert_close(part.noisy(), torch.lerp(clean, noise, LAYOUT.spread(told)))
    torch.testing.assert_close(part.target(), (noise - clean) / 2)
    assert torch.equal(example(Part(), 2).noisy(), example(RECTIFIED, 2).noisy())  # even steps learn all of it


def test_a_stage_measures_errors_as_the_step_says() -> None:
    class Predicts(torch.nn.Module):
        def forward(self, x: Tensor, *_: Tensor, layout: StreamLayout) -> Tensor:
            return 0.5 * x

    for one, power in ((example(RECTIFIED, 3), 2), (example(Part(), 3), 1)):
        stage = Stage(Predicts())  # type: ignore[arg-type]
        stage.layout, stage.noising = one.layout, one.noising
        found = stage(one.noisy(), *one.inputs, truth=one.target())
        apart = (0.5 * one.noisy() - one.target()).abs() ** power
        expected = [apart[:, LAYOUT.element_slice(stream)].mean(1) for stream in range(2)]
        torch.testing.assert_close(found, torch.stack(expected, 1))


class Adds:
    """A solver whose steps add noise."""

    def __init__(self, fresh: Callable[[int], Tensor]) -> None:
        self.fresh, self.times = fresh, [1.0, 0.5]

    def step(self, predicted: Tensor, number: int, x: Tensor) -> Tensor:
        return x + predicted + self.fresh(number)


def test_noise_that_steps_add_is_the_same_for_a_seed_and_a_stream_s_own() -> None:
    def fresh(layout: StreamLayout, seed: int) -> Callable[[int], Tensor]:
        return lambda step: fresh_noise(layout, seed, step)

    def made(layout: StreamLayout, seed: int) -> Sequence[Tensor]:
        start = torch.zeros(1, layout.elements)
        return layout.unpack(denoise(lambda x, times: 0 * x, start, layout, Adds(fresh(layout, seed))))

    both, again, other = made(LAYOUT, 1), made(LAYOUT, 1), made(LAYOUT, 2)
    alone = made(LAYOUT.only(0, 1), 1)
    assert torch.equal(both[0], again[0]) and torch.equal(both[0], alone[0])
    assert not torch.equal(both[0], other[0]) and not torch.equal(both[0], LAYOUT.unpack(start_noise(LAYOUT, 1))[0])
    assert (fresh_noise(LAYOUT, 1, 0) - fresh_noise(LAYOUT, 1, 1)).abs().max() > 1


def test_a_scheduler_that_does_not_suit_is_named_with_those_that_do() -> None:
    assert RECTIFIED.sampling_fault(SampleConfig()) == "" and RECTIFIED.fault(ObjectiveConfig()) == ""
    said = RECTIFIED.sampling_fault(SampleConfig(scheduler="ddim"))
    assert "sample.scheduler: ddim" in said and "unipc or euler or dpm++" in said
