import dataclasses

import pytest
import torch

from transpixeler.config.sections import ObjectiveConfig, UserError
from transpixeler.flow import draws, objective, tasks
from transpixeler.models.noising import RECTIFIED
from transpixeler.models.streams import StreamLayout

LAYOUT = StreamLayout(("rgb", "seg"), ((2, 3, 4, 6), (2, 3, 2, 4)), (1, 2, 2))
IDS = ["a", "b", "c", "d", "e", "f"]


def latents_of(slots: list[int], layout: StreamLayout) -> torch.Tensor:
    return torch.stack([draws.draw_noise(layout.elements, "latents", IDS[slot]) for slot in slots])


def example(
    config: ObjectiveConfig, slots: list[int], *, step: int = 3, layout: StreamLayout = LAYOUT
) -> objective.Example:
    text = torch.ones(len(slots), 4, 5)
    return objective.prepare(
        config,
        seed=1,
        step=step,
        layout=layout,
        latents=latents_of(slots, layout),
        fields={"text": text},
        empty={"text": torch.zeros(4, 5)},
        ids=[IDS[slot] for slot in slots],
        slots=slots,
        batch=len(IDS),
        shift=1.0,
    )


MIXED = ObjectiveConfig(tasks={"joint": 1, "rgb_to_aux": 1, "aux_to_rgb": 1}, caption_dropout=0.5)


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5]], [[0], [1], [2], [3, 4, 5]]])
def test_any_division_of_a_batch_draws_the_same(parts: list[list[int]]) -> None:
    whole = example(MIXED, list(range(6)))
    divided = [example(MIXED, part) for part in parts]
    for field in ("noise", "timesteps", "weights"):
        assert torch.equal(torch.cat([getattr(part, field) for part in divided]), getattr(whole, field))
    assert torch.equal(torch.cat([part.fields["text"] for part in divided]), whole.fields["text"])
    assert not torch.equal(whole.noise, example(MIXED, list(range(6)), step=4).noise)


def test_the_loss_is_the_mean_over_samples_whatever_the_tasks() -> None:
    weights = example(MIXED, list(range(6))).weights
    torch.testing.assert_close(weights.sum(1), torch.full((6,), 1 / 6))


def test_a_given_stream_is_clean_and_costs_nothing() -> None:
    config = ObjectiveConfig(tasks={"rgb_to_aux": 1.0})
    it = example(config, [0, 1])
    rgb = LAYOUT.element_slice(0)
    assert torch.equal(it.noisy()[:, rgb], it.latents[:, rgb])
    assert (it.weights[:, 0] == 0).all() and (it.timesteps[:, 1] > 0).all()
    assert not torch.equal(it.noisy()[:, LAYOUT.element_slice(1)], it.latents[:, LAYOUT.element_slice(1)])


ENDS = ObjectiveConfig(tasks={"ends_to_video": 1.0, "joint": 1.0, "rgb_to_aux": 2.0})


def test_a_step_trains_tasks_with_last_frames_or_without_as_often_as_their_weights_say() -> None:
    drawn = [tasks.tasks_of_step(ENDS, LAYOUT.names, seed=1, step=step) for step in range(400)]
    assert all(list(tasks) in (["ends_to_video"], ["joint", "rgb_to_aux"]) for tasks in drawn)
    assert 0.2 < sum("ends_to_video" in tasks for tasks in drawn) / len(drawn) < 0.3
    assert drawn[7] == tasks.tasks_of_step(ENDS, LAYOUT.names, seed=1, step=7)
    alone = ObjectiveConfig(tasks={"joint": 1.0, "rgb_to_aux": 2.0})
    assert tasks.tasks_of_step(alone, LAYOUT.names, seed=1, step=7) == alone.tasks


def test_a_given_last_frame_is_clean_costs_nothing_and_is_there_only_where_it_is_given() -> None:
    steps = [tasks.tasks_of_step(ENDS, LAYOUT.names, seed=1, step=step) for step in range(20)]
    ends = next(step for step, tasks in enumerate(steps) if "ends_to_video" in tasks)
    layout = LAYOUT.with_lasts([0])
    it = example(ENDS, [0, 1], step=ends, layout=layout)
    assert it.layout == layout.cut([[1], []])
    pairs = zip(it.layout.split_groups(it.latents), it.layout.split_groups(it.noisy()), strict=True)
    assert [torch.equal(clean, noisy) for clean, noisy in pairs] == [True, False, True, False]
    assert [bool(w) for w in it.weights[0]] == [False, True, False, True]
    torch.testing.assert_close(it.weights.sum(1), torch.full((2,), 1 / 6))
    errors = torch.arange(4.0).expand(2, 4)
    by_stream, counted = objective.by_stream(errors, (it.weights > 0).float(), it.layout)
    assert by_stream.tolist() == [[1.0, 3.0]] * 2 and counted.all()
    other = example(ENDS, [0, 1], step=next(s for s, tasks in enumerate(steps) if "joint" in tasks), layout=layout)
    assert other.layout == LAYOUT
    for read, kept in zip(layout.videos(latents_of([0, 1], layout)), LAYOUT.videos(other.latents), strict=True):
        assert torch.equal(read, kept)


def test_a_given_first_frame_is_clean_and_costs_nothing() -> None:
    config = ObjectiveConfig(tasks={"image_to_video": 1.0}, stream_weights={"seg": 3.0})
    it = example(config, [0, 1])
    assert it.layout.cuts == ((1,), ()) and it.timesteps.shape == (2, 3)
    clean, noisy = it.layout.unpack(it.latents)[0], it.layout.unpack(it.noisy())[0]
    assert torch.equal(noisy[:, :, :1], clean[:, :, :1]) and not torch.equal(noisy[:, :, 1:], clean[:, :, 1:])
    assert (it.timesteps[:, 0] == 0).all() and torch.equal(it.timesteps[:, 1], it.timesteps[:, 2])
    assert (it.weights[:, 0] == 0).all()
    torch.testing.assert_close(it.weights[:, 1], torch.full((2,), 1 / 4 / 6))  # what the first frame would have had too
    torch.testing.assert_close(it.weights.sum(1), torch.full((2,), 1 / 6))


def test_a_share_of_given_first_frames_has_a_little_noise_and_is_told_clean() -> None:
    config = ObjectiveConfig(tasks={"joint": 1, "images_to_videos": 2}, first_frame_noise=0.5)
    clean = [example(dataclasses.replace(config, first_frame_noise=0.0), list(range(6)), step=n) for n in range(20)]
    noisy = [example(config, list(range(6)), step=n) for n in range(20)]
    amounts = []
    for one, other in zip(clean, noisy):
        for name in ("noise", "timesteps", "weights"):
            assert torch.equal(getattr(one, name), getattr(other, name)), name
        before, after = (it.layout.split_groups(it.latents) for it in (one, other))
        noise = one.layout.split_groups(one.noise)
        for group in (1, 3):  # what follows the first frames
            assert torch.equal(before[group], after[group])
        given = one.timesteps[:, 0] == 0
        moved = ((after[0] - before[0]) / (noise[0] - before[0])).mean(1)
        assert not moved[~given].any()
        amounts += moved[given].tolist()
        torch.testing.assert_close(after[0], torch.lerp(before[0], noise[0], moved[:, None]))
        torch.testing.assert_close(after[2], torch.lerp(before[2], noise[2], moved[:, None]))
    logs = torch.tensor([amount for amount in amounts if amount > 0]).log()
    assert 0.35 < len(logs) / len(amounts) < 0.65
    assert abs(float(logs.mean()) + 3.5) < 0.25 and 0.3 < float(logs.std()) < 0.7
    assert torch.equal(example(config, [4, 5]).latents, example(config, list(range(6))).latents[4:])


def test_a_mixture_has_one_layout_and_the_loss_of_each_task() -> None:
    mixed = example(ObjectiveConfig(tasks={"joint": 1, "image_to_video": 1}), list(range(6)))
    alone = example(ObjectiveConfig(), list(range(6)))
    joint = mixed.timesteps[:, 0] > 0
    assert 0 < joint.sum() < 6
    torch.testing.assert_close(mixed.noisy()[joint], alone.noisy()[joint])
    predicted = torch.randn(6, LAYOUT.elements, generator=torch.Generator().manual_seed(0))
    losses = [(RECTIFIED.errors(predicted, it.target(), it.layout) * it.weights).sum(1) for it in (mixed, alone)]
    torch.testing.assert_close(losses[0][joint], losses[1][joint])
    assert (losses[0][~joint] - losses[1][~joint]).abs().min() > 1e-4


def test_an_image_is_not_given_to_itself() -> None:
    one = StreamLayout.equal(("rgb", "seg"), (2, 1, 4, 6), (1, 2, 2))
    known = tasks.tasks(("rgb", "seg"))
    for name in ("images_to_videos", "ends_to_videos"):
        assert known[name].cut(one) == one and known[name].groups(one) == []


def test_noisy_and_velocity_follow_the_straight_line() -> None:
    it = example(ObjectiveConfig(), [0, 1, 2])
    t = LAYOUT.spread(it.timesteps)
    torch.testing.assert_close(it.noisy() - t * it.target(), it.latents)


def test_errors_are_means_over_each_streams_elements() -> None:
    predicted, velocity = torch.randn(2, 3, LAYOUT.elements)
    errors = RECTIFIED.errors(predicted, velocity, LAYOUT)
    for s in range(2):
        part = LAYOUT.element_slice(s)
        expected = ((predicted[:, part] - velocity[:, part]) ** 2).mean(1)
        torch.testing.assert_close(errors[:, s], expected)


@pytest.mark.parametrize("density", ["uniform", "logit_normal"])
@pytest.mark.parametrize("shift", [1.0, 5.0])
def test_the_quantile_inverts_the_distribution(density: str, shift: float) -> None:
    config = ObjectiveConfig(density=density, logit_mean=0.3, logit_std=0.8)
    u = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    back = [draws.distribution(config, float(t), shift=shift) for t in draws.quantile(config, u, shift=shift)]
    torch.testing.assert_close(torch.tensor(back, dtype=torch.float64), u)


def test_a_cut_range_is_a_cut_density_not_a_pile_at_its_ends() -> None:
    config = ObjectiveConfig(t_min=0.875)
    u = torch.rand(4000, generator=torch.Generator().manual_seed(0))
    t = draws.quantile(config, u, shift=12.0)
    assert t.min() >= 0.875 and (t == 0.875).float().mean() < 0.001
    free = draws.quantile(dataclasses.replace(config, t_min=0.0), torch.linspace(0.0005, 0.9995, 20000), shift=12.0)
    torch.testing.assert_close(t.mean(), free[free >= 0.875].mean(), atol=3e-3, rtol=0)


def test_stratified_times_fill_every_stratum() -> None:
    config = ObjectiveConfig(density="uniform")
    times = draws.draw_times(config, seed=0, step=9, slots=range(8), batch=8, shift=1.0)
    assert sorted((times * 8).long().tolist()) == list(range(8))


def test_tasks_of_three_streams() -> None:
    known = tasks.tasks(("rgb", "seg", "depth"))
    assert known["aux_to_rgb"].given == {1, 2} and known["depth_to_rest"].given == {2} and not known["joint"].gives
    assert known["image_to_video"].first == {0} and known["images_to_videos"].first == {0, 1, 2}
    with pytest.raises(UserError, match=r"objective.tasks.rgb_to_alpha.*rgb_to_aux"):
        tasks.check_tasks(ObjectiveConfig(tasks={"rgb_to_alpha": 1.0}), ("rgb", "seg"))


def test_a_last_frame_is_given_without_a_first() -> None:
    it = example(ObjectiveConfig(tasks={"last_to_video": 1.0}), [0, 1], layout=LAYOUT.with_lasts([0]))
    assert [one.stream for one in it.layout.beside] == [0] and not it.layout.cuts
    alone = [group.alone for group in it.layout.groups]
    given = (it.timesteps == 0).all(0).tolist()
    assert given == alone == [False, True, False] and not it.weights[:, 1].any() and (it.weights[:, [0, 2]] > 0).all()


@pytest.mark.parametrize("shares", [{"text": 0.5, "pooled": 0.5}, {"text": 0.5}, 0.5])
def test_either_text_is_dropped_by_itself_where_shares_are_given_by_field(shares: dict[str, float] | float) -> None:
    keys = [(0, 0, f"sample{n}", n) for n in range(400)]
    fields = {"text": torch.ones(400, 4, 5), "text_length": torch.full((400,), 4), "pooled": torch.ones(400, 3)}
    empty = {"text": torch.zeros(4, 5), "text_length": torch.tensor(1), "pooled": torch.zeros(3)}
    made = objective.with_dropped_captions(ObjectiveConfig(caption_dropout=shares), fields, empty, keys)
    text, pooled = (~made[name].flatten(1).any(1) for name in ("text", "pooled"))
    assert torch.equal(text, made["text_length"] == 1) and 0.4 < float(text.float().mean()) < 0.6
    both = float((text & pooled).float().mean())
    if shares == 0.5:
        assert torch.equal(text, pooled), "a caption goes as a whole"
    elif "pooled" in shares:
        assert 0.18 < both < 0.32, "as often as chance has it"
    else:
        assert not pooled.any()
    again = objective.with_dropped_captions(
        ObjectiveConfig(caption_dropout=shares), {name: value[7:9] for name, value in fields.items()}, empty, keys[7:9]
    )
    assert all(torch.equal(again[name], made[name][7:9]) for name in fields)
