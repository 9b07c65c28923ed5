"""Where a sample goes is a pure function, and where it does not go has a reason."""

import itertools
import math
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transpixeler.config.sections import BucketRule, DataConfig, SourceConfig, TrainConfig, UserError
from transpixeler.data.buckets import (
    Assignment,
    Bucket,
    aspect_ratios,
    assign,
    bucket_groups,
    draw,
    first_bucket,
    micro_batch_for,
    rate,
)
from transpixeler.data.draws import Draws
from transpixeler.data.media.clip import Media
from transpixeler.data.sources.samples import Sample
from transpixeler.models.geometry import Geometry

SOURCE = SourceConfig("s")
STRIDE, PATCH = (4, 8, 8), (1, 2, 2)


def sample(
    frames: int, width: int, height: int, *, fps: Fraction = Fraction(16), name: str = "a", source: int = 0
) -> Sample:
    still = frames == 1
    media = Media(frames, height, width, Fraction(0) if still else fps, Fraction(0) if still else frames / fps, False)
    return Sample(name, (("rgb", Path("a.mp4")),), "caption", source, False, media)


def assigned(*samples: Sample, source: SourceConfig = SOURCE, seed: int = 0, **data: object) -> Assignment:
    return assign(samples, [source], DataConfig(**data), geometry=Geometry(STRIDE, 16, PATCH), seed=seed)


def buckets(result: Assignment) -> list[str]:
    return [str(bucket) for _, _, bucket in result.clips]


samples = st.lists(
    st.builds(
        sample,
        st.one_of(st.just(1), st.integers(2, 400)),
        st.integers(16, 4000),
        st.integers(16, 4000),
        fps=st.sampled_from([Fraction(8), Fraction(16), Fraction(24), Fraction(30000, 1001), Fraction(60)]),
        name=st.text("abc", min_size=1, max_size=6),
    ),
    max_size=8,
    unique_by=lambda sample: sample.id,
)
options = st.fixed_dictionaries(
    {
        "resolutions": st.lists(
            st.one_of(st.integers(64, 1024), st.tuples(st.integers(64, 1024), st.integers(64, 1024))),
            min_size=1,
            max_size=3,
        ).map(tuple),
        "frames": st.sets(st.sampled_from([1, 5, 17, 33, 49, 81]), min_size=1).map(tuple),
        "aspect_count": st.integers(1, 9),
        "upscale": st.booleans(),
        "clip_mode": st.sampled_from(["single_beginning", "single_middle", "multiple_overlapping"]),
        "buckets": st.lists(
            st.builds(
                BucketRule,
                size=st.tuples(st.just(0), st.just(0), st.sampled_from([0, 1, 17, 33])),
                keep=st.floats(0, 1),
            ),
            max_size=2,
        ).map(tuple),
    }
)


@settings(max_examples=100, deadline=None)
@given(samples, options, st.integers(0, 3))
def test_whatever_the_samples_and_options(found: list[Sample], options: dict[str, object], seed: int) -> None:
    data = DataConfig(**options)
    result = assigned(*found, seed=seed, **options)
    assert result == assigned(*found, seed=seed, **options)
    by_id = {one.id: one for one in found}
    for _, clip, bucket in result.clips:
        media = by_id[clip.sample_id].media
        assert bucket.height % 16 == bucket.width % 16 == 0 and bucket.frames % 4 == 1
        assert bucket.frames in data.frames and (bucket.frames == 1) == media.image
        assert data.upscale or (media.width >= bucket.width and media.height >= bucket.height)
        assert clip.start >= 0
        assert clip.start * clip.fps + bucket.frames <= media.frames_at(Fraction(16))
        assert (clip.frames, clip.height, clip.width) == bucket
    assert len({clip.id for _, clip, _ in result.clips}) == len(set(result.clips))
    placed = {(clip.sample_id, bucket) for _, clip, bucket in result.clips}
    for one in found:
        told = sum(name == one.id for name, _ in result.dropped)
        shapes = {bucket for name, bucket in placed if name == one.id}
        assert len(shapes) + told <= len(data.resolutions)
        assert shapes or told == len(data.resolutions), "neither placed nor dropped with a reason"
    assert all(reason for _, reason in result.dropped)


def test_each_sample_alone_gets_what_it_gets_in_company() -> None:
    many = [sample(60, 900 + 10 * i, 500, name=f"{i}") for i in range(20)]
    together = assigned(*many, frames=(1, 17, 33), buckets=(BucketRule((0, 0, 33), keep=0.5),))
    alone = [assigned(one, frames=(1, 17, 33), buckets=(BucketRule((0, 0, 33), keep=0.5),)) for one in many]
    assert together.clips == tuple(clip for result in alone for clip in result.clips)


def test_the_longest_bucket_that_fits_and_the_nearest_shape() -> None:
    frames = (1, 17, 33, 81)
    assert buckets(assigned(sample(80, 1920, 1080), frames=frames)) == ["832×480×33"]
    assert buckets(assigned(sample(81, 1920, 1080), frames=frames)) == ["832×480×81"]
    assert buckets(assigned(sample(81, 1080, 1920), frames=frames)) == ["480×832×81"]
    assert buckets(assigned(sample(1, 1000, 1000), frames=frames)) == ["624×624×1"]


def test_frames_are_counted_at_the_target_rate() -> None:
    at_60 = sample(121, 1920, 1080, fps=Fraction(60))
    assert buckets(assigned(at_60, frames=(1, 17, 33))) == ["832×480×33"]
    assert assigned(at_60, frames=(1, 49)).dropped == (("a", "33 frames at 16 fps, the shortest bucket holds 49"),)


def test_an_image_is_the_only_thing_of_one_frame() -> None:
    assert assigned(sample(1, 999, 999), frames=(17, 33)).dropped == (("a", "an image, and no bucket holds 1 frame"),)
    assert assigned(sample(9, 999, 999), frames=(1,)).dropped == (("a", "a video, and all buckets hold 1 frame"),)


def test_nothing_is_scaled_up_unless_allowed() -> None:
    small = sample(40, 320, 180)
    assert "320×180 is smaller than 832×480; data.upscale=true" in assigned(small).dropped[0][1]
    assert buckets(assigned(small, upscale=True)) == ["832×480×33"]


def test_each_resolution_gives_its_own_clip() -> None:
    result = assigned(sample(40, 1280, 720), resolutions=(240, (832, 480), 2000))
    assert buckets(result) == ["336×176×33", "832×480×33"] and len(result.dropped) == 1


def test_explicit_sizes_replace_the_grid() -> None:
    sizes = ((832, 480, 33), (480, 832, 33), (416, 240, 81), (832, 480, 1))
    assert buckets(assigned(sample(100, 1920, 1080), sizes=sizes)) == ["416×240×81"]
    assert buckets(assigned(sample(40, 1920, 1080), sizes=sizes)) == ["832×480×33"]
    assert buckets(assigned(sample(40, 1080, 1920), sizes=sizes)) == ["480×832×33"]
    assert buckets(assigned(sample(1, 1920, 1080), sizes=sizes)) == ["832×480×1"]


@pytest.mark.parametrize("size", [(830, 480, 33), (832, 488, 33), (832, 480, 34), (832, 480, 0), (0, 16, 1)], ids=str)
def test_a_size_the_model_cannot_take_is_refused(size: tuple[int, int, int]) -> None:
    with pytest.raises(UserError, match=r"data\.sizes"):
        assigned(sample(40, 1920, 1080), sizes=(size,))


def test_a_source_has_options_of_its_own() -> None:
    one = sample(90, 1920, 1080)
    assert buckets(assigned(one, source=SourceConfig("s", frames=(17,)), sizes=((832, 480, 33),))) == ["832×480×17"]
    assert buckets(assigned(one, source=SourceConfig("s", resolutions=(256,)))) == ["320×208×33"]
    assert buckets(assigned(one, source=SourceConfig("s", sizes=((64, 32, 5),)))) == ["64×32×5"]
    middle = SourceConfig("s", clip_mode="single_middle")
    assert assigned(one, source=middle).clips[0].clip.start == Fraction(28, 16)


@given(st.integers(17, 700))
def test_overlapping_clips_cover_the_whole_length_evenly(frames: int) -> None:
    result = assigned(sample(frames, 999, 999), frames=(17,), clip_mode="multiple_overlapping")
    firsts = [int(clip.start * 16) for _, clip, _ in result.clips]
    assert firsts[0] == 0 and firsts[-1] + 17 == frames and len(firsts) == math.ceil(frames / 17)
    gaps = [b - a for a, b in itertools.pairwise(firsts)]
    assert all(gap <= 17 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1)


def test_a_failed_draw_falls_to_the_next_smaller_bucket() -> None:
    many = [sample(90, 1920, 1080, name=f"{i}") for i in range(1000)]
    rules = (BucketRule((0, 0, 81), keep=0.3), BucketRule((0, 0, 33), keep=0.5))
    result = assigned(*many, frames=(1, 33, 81), buckets=rules)
    share = {frames: sum(bucket.frames == frames for _, _, bucket in result.clips) / 1000 for frames in (81, 33)}
    assert abs(share[81] - 0.3) < 0.04 and abs(share[33] - 0.35) < 0.04
    assert len(result.dropped) + len(result.clips) == 1000 and "not drawn" in result.dropped[0][1]
    assert result != assigned(*many, frames=(1, 33, 81), buckets=rules, seed=1)


def test_long_videos_can_be_kept_from_a_resolution() -> None:
    """A bucket where none stays sends its videos to smaller ones, not to shorter ones of its own."""
    rules = (BucketRule(size=(64, 64, 33), keep_resolution=0.0),)
    grid = {"resolutions": (64, 32), "frames": (17, 33), "aspect_ratios": (1.0,), "buckets": rules, "draw": "epoch"}
    long, short = sample(40, 64, 64), sample(20, 64, 64)
    assert chances(assigned(long, **grid), rules) == {"32×32×33": 1.0}
    assert chances(assigned(short, **grid), rules) == {"64×64×17": 1.0}
    sizes = {"sizes": ((64, 64, 17), (64, 64, 33), (32, 32, 17)), "buckets": rules, "draw": "epoch"}
    assert chances(assigned(long, **sizes), rules) == {"32×32×17": 1.0}
    passed_over = (BucketRule(size=(64, 64, 33), keep=0.0),)  # the broken twin: these are shortened
    assert "64×64×17" in chances(assigned(long, **{**grid, "buckets": passed_over}), passed_over)
    half = (BucketRule(size=(64, 64, 33), keep=0.5, keep_resolution=0.0),)
    assert chances(assigned(long, **{**grid, "buckets": half}), half) == {"64×64×17": 0.5, "32×32×33": 0.5}
    nowhere = (BucketRule(size=(0, 0, 0), keep_resolution=0.0),)
    assert "not drawn for 64×64×33" in assigned(long, **{**grid, "buckets": nowhere}).dropped[0][1]


def chances(found: Assignment, rules: tuple[BucketRule, ...]) -> dict[str, float]:
    """Return the buckets that some epoch takes a sample in, with the share of epochs."""
    own = [bucket for _, _, bucket in found.clips]
    drawn = Draws.of(["a"] * len(own), own, rules=rules, seed=0).chances()
    return {str(bucket): float(chance) for bucket, chance in zip(own, drawn, strict=True) if chance}


def test_rates_are_exact() -> None:
    rates = {5.0: 5, 16.0: 16, 12.5: Fraction(25, 2), 23.976: Fraction(24000, 1001), 29.97: Fraction(30000, 1001)}
    assert {fps: rate(DataConfig(fps=fps)) for fps in rates} == rates


def test_a_draw_is_the_same_everywhere() -> None:
    assert draw(0, "set/a", Bucket(33, 480, 832)) == 0.7141785266710468
    assert 0 <= draw(1, "set/a", Bucket(33, 480, 832)) < 1


def test_aspect_ratios_are_spread_evenly_or_given() -> None:
    ratios = aspect_ratios(DataConfig(aspect_min=0.5, aspect_max=2, aspect_count=5))
    assert [round(ratio, 3) for ratio in ratios] == [0.5, 0.707, 1.0, 1.414, 2.0]
    assert aspect_ratios(DataConfig(aspect_ratios=(1.0, 1.5))) == (1.0, 1.5)


@given(st.integers(16, 2048), st.integers(16, 2048))
def test_bucket_shapes_keep_about_the_area(width: int, height: int) -> None:
    (group,) = bucket_groups(
        SourceConfig("s"), DataConfig(resolutions=((width, height),)), geometry=Geometry(STRIDE, 16, PATCH)
    )
    for bucket in group:
        tall, wide = bucket.height / 16, bucket.width / 16
        assert (tall - 0.5) * (wide - 0.5) * 256 <= width * height * 1.01 or min(tall, wide) == 1
        assert (tall + 0.5) * (wide + 0.5) * 256 >= width * height * 0.99


@given(
    st.integers(1, 64),
    st.integers(1, 64),
    st.integers(0, 200_000),
    st.integers(1, 70_000),
    st.one_of(st.none(), st.integers(1, 64)),
)
def test_a_microbatch_divides_the_batch_and_keeps_its_limit(
    batch: int, micro: int, budget: int, tokens: int, rule: int | None
) -> None:
    train = TrainConfig(micro_batch=micro, micro_tokens=budget)
    rules = (BucketRule((832, 480, 0), micro_batch=rule),)
    size = micro_batch_for(Bucket(33, 480, 832), per_rank_batch=batch, train=train, rules=rules, tokens=tokens)
    limit = rule if rule is not None else budget // tokens if budget else micro
    assert batch % size == 0 and (size <= limit or size == 1)
    assert not [other for other in range(size + 1, batch + 1) if batch % other == 0 and other <= limit]


@pytest.mark.parametrize(
    ("data", "patch", "expected"),
    [
        ({"resolutions": ((1920, 1080),)}, 2, "1920×1088×81"),
        ({"resolutions": ((960, 536), 512)}, 2, "960×544×81"),
        ({"resolutions": ((480, 832),)}, 2, "480×832×81"),
        ({"resolutions": (500,)}, 2, "496×496×81"),
        ({"resolutions": ((1280, 720),)}, 4, "1280×704×81"),
        ({"sizes": ((64, 48, 5), (64, 64, 9))}, 2, "64×48×5"),
    ],
)
def test_a_video_has_by_default_a_size_that_clips_are_trained_at(data: dict, patch: int, expected: str) -> None:
    geometry = {"geometry": Geometry(STRIDE, 16, (1, patch, patch))}
    config = DataConfig(**{"frames": (1, 81, 33)} | data)
    found = first_bucket(config, **geometry)
    assert str(found) == expected and found in bucket_groups(SOURCE, config, **geometry)[0]
