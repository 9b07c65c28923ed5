"""Each sample is shown what its task gives: its own frames under a mask of ones, or grey under zeros."""

import dataclasses

import pytest
import torch

from transpixeler.config.sections import ObjectiveConfig
from transpixeler.flow import objective
from transpixeler.models.conditions import Shown, given_frames, kept_layout, shown_video, with_channels, with_stills
from transpixeler.models.family import Field
from transpixeler.models.streams import StreamLayout

CLIP = Field("shown", width=6, source="clip", mask=4)
IMAGE = Field("image", width=3, length=5, source="image")
LAYOUT = StreamLayout(("rgb", "seg"), ((2, 3, 4, 6), (2, 3, 2, 4)), (1, 2, 2))
IDS = ["a", "b", "c", "d", "e", "f", "g", "h"]


def shown(rows: int, layout: StreamLayout = LAYOUT) -> Shown:
    own = {"shown": torch.rand(rows, layout.elements) + 1, "image": torch.rand(rows, 5, 3) + 1}
    return Shown((CLIP, IMAGE), own, {name: -torch.ones(1, *value.shape[1:]) for name, value in own.items()})


def example(config: ObjectiveConfig, given: Shown, slots: list[int]) -> objective.Example:
    return objective.prepare(
        config,
        seed=1,
        step=3,
        layout=LAYOUT,
        latents=torch.zeros(len(slots), LAYOUT.elements),
        fields={"text": torch.ones(len(slots), 4, 5)},
        empty={"text": torch.zeros(4, 5)},
        ids=[IDS[slot] for slot in slots],
        slots=slots,
        batch=len(IDS),
        shift=1.0,
        shown=given,
    )


def test_a_mixture_of_tasks_shows_each_sample_its_own() -> None:
    given = shown(8)
    tasks = {"joint": 1.0, "image_to_video": 1.0, "images_to_videos": 1.0}
    config = ObjectiveConfig(tasks=tasks, caption_dropout=0.5)
    made = example(config, given, list(range(8)))
    assert list(made.fields) == ["text", "shown", "image"]
    assert not made.layout.cuts and (made.timesteps > 0).all() and (made.weights > 0).all(), "all frames are learned"
    streams = with_channels(LAYOUT, 6).unpack(made.fields["shown"])
    own = LAYOUT.unpack(given.own["shown"])
    seen = set()
    for row in range(8):
        masks = tuple(bool(stream[row, 0, 0].all()) for stream in streams)
        seen.add(masks)
        for number, stream in enumerate(streams):
            assert torch.equal(stream[row, :4, 0].unique(), torch.tensor([float(masks[number])]))
            assert not stream[row, :4, 1:].any()
            expected = own[number][row] if masks[number] else -torch.ones_like(own[number][row])
            assert torch.equal(stream[row, 4:], expected)
        assert torch.equal(made.fields["image"][row], given.own["image"][row] if masks[0] else -torch.ones(5, 3))
    assert seen == {(False, False), (True, False), (True, True)}
    dropped = ~made.fields["text"].flatten(1).any(1)
    assert 0 < dropped.sum() < 8 and (made.fields["image"][dropped] != 0).all(), "captions alone are dropped"


@pytest.mark.parametrize("parts", [[[0, 1, 2], [3, 4, 5, 6, 7]]])
def test_any_division_of_a_batch_shows_the_same(parts: list[list[int]]) -> None:
    config, whole = ObjectiveConfig(tasks={"joint": 1, "image_to_video": 1}), shown(8)
    once = example(config, whole, list(range(8)))
    for part in parts:
        rows = {name: value[part] for name, value in whole.own.items()}
        again = example(config, dataclasses.replace(whole, own=rows), part)
        assert all(torch.equal(again.fields[name], once.fields[name][part]) for name in ("shown", "image"))


def test_a_last_frame_fills_the_last_channel_of_the_last_mask() -> None:
    mask = given_frames(dataclasses.replace(CLIP, last=True), (3, 1, 1)).flatten(2)[0]
    assert mask.tolist() == [[1, 0, 0], [1, 0, 0], [1, 0, 0], [1, 0, 1]]
    assert given_frames(CLIP, (3, 1, 1)).flatten(2)[0].tolist() == [[1, 0, 0]] * 4


def test_an_image_is_not_shown_to_itself() -> None:
    still = StreamLayout.equal(("rgb", "seg"), (2, 1, 4, 6), (1, 2, 2))
    values = shown(1, still).values(still, [{0, 1}])
    assert (values["image"] == -1).all() and not with_channels(still, 6).unpack(values["shown"])[0][:, :4].any()


@pytest.mark.parametrize("last", [False, True])
def test_between_the_given_frames_all_is_grey(last: bool) -> None:
    pictures = torch.stack([torch.zeros(4, 6, 3), torch.full((4, 6, 3), 255)]).to(torch.uint8)
    video = shown_video(pictures, 5, last=last)
    assert video.shape == (1, 3, 5, 4, 6)
    assert video[0, 0, :, 0, 0].tolist() == [-1, 0, 0, 0, 1 if last else 0]


def test_stills_stand_in_their_places_among_zeros() -> None:
    field = Field("shown", width=3, source="clip", mask=1, stills=True)
    inside = kept_layout(field, LAYOUT)
    assert [shape[:2] for shape in inside.shapes] == [(2, 2), (2, 2)]
    own = torch.rand(4, inside.elements) + 1
    given = Shown((field,), {"shown": own}, {"shown": torch.zeros(1, inside.elements)})
    firsts, lasts = [{0}, set(), {0, 1}, set()], [set(), {0}, {1}, set()]
    found = given.values(LAYOUT, firsts, lasts)["shown"]
    for number, (stream, stills) in enumerate(zip(with_channels(LAYOUT, 3).unpack(found), inside.unpack(own))):
        for row in range(4):
            for place, ends in ((0, firsts), (2, lasts)):
                there = number in ends[row]
                assert (stream[row, 0, place] == float(there)).all()
                assert torch.equal(stream[row, 1:, place], stills[row, :, -1 if place else 0] * there)
            assert not stream[row, :, 1].any()
    video = torch.zeros(LAYOUT.elements)
    put = LAYOUT.unpack(with_stills((field,), LAYOUT, video, {"shown": found[0]})[None])
    assert torch.equal(put[0][0, :, 0], inside.unpack(own)[0][0, :, 0]) and not put[0][0, :, 1:].any()
    assert not put[1].any()


def test_tasks_of_either_end_are_mixed_in_one_step() -> None:
    field = Field("shown", width=3, source="clip", mask=1, stills=True)
    given = Shown(
        (field,), {"shown": torch.rand(8, kept_layout(field, LAYOUT).elements) + 1}, {"shown": torch.zeros(1)}
    )
    tasks = {"joint": 1.0, "image_to_video": 1.0, "last_to_video": 1.0, "ends_to_videos": 1.0}
    made = example(ObjectiveConfig(tasks=tasks), given, list(range(8)))
    assert not made.layout.beside and not made.layout.cuts and (made.weights > 0).all(), "all frames are learned"
    masks = [part[:, 0].flatten(2)[:, :, 0] for part in with_channels(LAYOUT, 3).unpack(made.fields["shown"])]
    seen = {tuple(masks[0][row].tolist()) for row in range(8)}
    assert len(seen) >= 3 and all(mask[:, 1].eq(0).all() for mask in masks)
