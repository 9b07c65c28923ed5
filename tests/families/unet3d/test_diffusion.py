"""Noise is added and taken away as the cosine schedule's formulas say, and as diffusers' schedulers do."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig, SampleConfig
from transpixeler.families.unet3d.diffusion import CosineDiffusion, thresholded
from transpixeler.flow.objective import prepare
from transpixeler.flow.solver import denoise, fresh_noise
from transpixeler.models.streams import StreamLayout

LAYOUT = StreamLayout.equal(("rgb", "seg"), (3, 2, 4, 4), (1, 2, 2))
UNIFORM = ObjectiveConfig(density="uniform")


def slow_kept(step: int, steps: int = 1000) -> float:
    """ᾱ after so many steps, each of whose β is cut at 0.9999."""
    wave = [math.cos((n / steps + 0.008) / 1.008 * math.pi / 2) ** 2 for n in range(steps + 1)]
    kept = 1.0
    for n in range(step):
        kept *= 1 - min(max(1 - wave[n + 1] / wave[n], 0), 0.9999)
    return kept


def test_the_schedule_is_the_cosine() -> None:
    noising = CosineDiffusion()
    for step in (0, 1, 10, 500, 999, 1000):
        assert float(noising.kept[step]) == pytest.approx(slow_kept(step), rel=1e-9)


@pytest.mark.parametrize("error", ["absolute", "squared"])
def test_what_is_shown_predicted_and_lost_is_what_the_formulas_say(error: str) -> None:
    noising = CosineDiffusion(error=error)  # type: ignore[arg-type]
    clean = torch.randn(4, LAYOUT.elements, generator=torch.Generator().manual_seed(0))
    shown = {"layout": LAYOUT, "latents": clean, "fields": {}, "empty": {}, "slots": range(4), "batch": 4}
    it = prepare(UNIFORM, seed=0, step=1, ids=["a", "b", "c", "d"], shift=1.0, noising=noising, **shown)
    steps = (it.timesteps[:, 0] * 1000).round()
    assert torch.allclose(it.timesteps * 1000, steps[:, None].expand(-1, 2), atol=1e-3) and steps.min() >= 1
    assert len(set((steps // 250).clamp(max=3).tolist())) == 4  # one of each quarter, as times are spread
    predicted = torch.randn_like(clean)
    for row, step in enumerate(steps.long().tolist()):
        kept = slow_kept(step)
        noisy = math.sqrt(kept) * clean[row] + math.sqrt(1 - kept) * it.noise[row]
        torch.testing.assert_close(it.noisy()[row], noisy, atol=1e-5, rtol=1e-5)
        assert torch.equal(it.target()[row], it.noise[row])
        for stream, found in enumerate(noising.errors(predicted, it.target(), LAYOUT)[row].tolist()):
            apart = (predicted - it.noise)[row, LAYOUT.element_slice(stream)].abs()
            expected = float((apart if error == "absolute" else apart**2).mean())
            assert found == pytest.approx(expected, rel=1e-5)


def test_samples_are_focused_as_often_as_asked_and_the_same_ones_on_any_layout() -> None:
    def focused(ids: list[str], step: int) -> Tensor:
        config = ObjectiveConfig(density="uniform", focus_present=0.3)
        latents = torch.zeros(len(ids), LAYOUT.elements)
        slots = [int(name) for name in ids]
        drawn = {"layout": LAYOUT, "latents": latents, "fields": {}, "empty": {}, "slots": slots, "batch": 100}
        return prepare(config, seed=0, step=step, ids=ids, shift=1.0, **drawn).inputs[-1]

    every = [str(n) for n in range(100)]
    whole = focused(every, 1)
    assert torch.equal(torch.cat([focused(every[:40], 1), focused(every[40:], 1)]), whole)
    assert set(whole.tolist()) == {0.0, 1.0} and 0.15 < whole.mean() < 0.45
    assert not torch.equal(whole, focused(every, 2))


# --- sampling --------------------------------------------------------------------------------------------------------


def predict(x: Tensor, times: Tensor) -> Tensor:
    return torch.tanh(0.9 * x + times[:, :1])


def theirs(name: str, noising: CosineDiffusion, x: Tensor, steps: int, fresh: Callable[[int], Tensor]) -> Tensor:
    """Sample by a scheduler of diffusers', which is handed our noise."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler

    kept = noising.kept
    how = {
        "trained_betas": (1 - kept[1:] / kept[:-1]).numpy(),
        "clip_sample": False,
        "timestep_spacing": "trailing",
    }
    scheduler = DDPMScheduler(**how) if name == "ddpm" else DDIMScheduler(**how, set_alpha_to_one=True)
    scheduler.alphas_cumprod = kept[1:].float()  # made in fp32 from betas, they lose the last steps' digits
    scheduler.set_timesteps(steps)
    for number, t in enumerate(scheduler.timesteps):
        times = torch.full((1, 2), float(t + 1) / 1000)
        made = scheduler.step(predict(x, times), t, x, generator=torch.Generator())
        if name == "ddpm" and number < steps - 1:
            variance = scheduler._get_variance(t)
            still = scheduler.step(predict(x, times), t, x, generator=torch.Generator().manual_seed(7))
            drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(7))
            x = still.prev_sample - variance.sqrt() * drawn + variance.sqrt() * fresh(number)
        else:
            x = made.prev_sample
    return x


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_sampler_is_diffusers(name: str) -> None:
    noising, steps = CosineDiffusion(), 8
    start = torch.randn(1, LAYOUT.elements, generator=torch.Generator().manual_seed(0))

    def fresh(number: int) -> Tensor:
        return fresh_noise(LAYOUT, 5, number)

    ours = denoise(predict, start, LAYOUT, noising.solver(name, steps=steps, fresh=fresh))
    expected = theirs(name, noising, start, steps, fresh)
    torch.testing.assert_close(ours, expected, atol=2e-4 * float(expected.abs().max()), rtol=1e-4)
    other = denoise(predict, start, LAYOUT, noising.solver("ddim" if name == "ddpm" else "ddpm", steps=8, fresh=fresh))
    assert (other - ours).abs().max() > 1e-2


def test_the_ancestral_step_is_the_posterior_of_the_formulas() -> None:
    solver = CosineDiffusion().solver("ddpm", steps=1000, fresh=lambda number: torch.ones(1, 4))
    x, noise = torch.randn(2, 1, 4, generator=torch.Generator().manual_seed(0)).double()
    for number, step in ((300, 700), (998, 2), (999, 1)):
        now, before = slow_kept(step), slow_kept(step - 1)
        beta = 1 - now / before
        clean = (x - math.sqrt(1 - now) * noise) / math.sqrt(now)
        mean = math.sqrt(before) * beta / (1 - now) * clean + math.sqrt(1 - beta) * (1 - before) / (1 - now) * x
        expected = mean + math.sqrt(beta * (1 - before) / (1 - now))
        torch.testing.assert_close(solver.step(noise, number, x), expected, atol=1e-5, rtol=1e-5)
        assert solver.times[number] == step / 1000


def test_the_threshold_moves_with_the_sample() -> None:
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    x = 3 * torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    x[1] /= 10  # within [-1, 1] but for a few
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=0.9, sample_max_value=100.0)
    expected = scheduler._threshold_sample(x).flatten(1)
    torch.testing.assert_close(thresholded(x.flatten(1)), expected, atol=1e-5, rtol=1e-5)
    solver = CosineDiffusion(clips=True).solver("ddim", steps=4)
    assert denoise(lambda x, _: 3 * x, torch.randn(1, LAYOUT.elements), LAYOUT, solver).abs().max() <= 1


@pytest.mark.parametrize(
    ("config", "told"),
    [
        (ObjectiveConfig(), "objective.density: logit_normal"),
        (ObjectiveConfig(density="uniform", shift=3.0), "objective.shift: 3"),
        (SampleConfig(), "sample.shift: 5"),
        (SampleConfig(shift="auto"), "sample.scheduler: unipc"),
        (SampleConfig(shift="auto", scheduler="ddpm", steps=1001), "sample.steps: 1001"),
    ],
)
def test_settings_of_flows_are_refused(config: ObjectiveConfig | SampleConfig, told: str) -> None:
    noising = CosineDiffusion()
    said = noising.fault(config) if isinstance(config, ObjectiveConfig) else noising.sampling_fault(config)
    assert said.startswith(told) and "; set" in said and "\n" not in said
    assert not noising.fault(UNIFORM) and not noising.sampling_fault(SampleConfig(shift="auto", scheduler="ddim"))
