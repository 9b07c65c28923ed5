"""Buckets that are drawn anew each epoch: shares as asked, one bucket a sample, resumable at any step."""

import hashlib
import math
from itertools import pairwise, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.data.test_order import seen_in
from transpixeler.config.sections import BucketRule, UserError
from transpixeler.data.buckets import Bucket, rule_for
from transpixeler.data.draws import Draws, in_order, uniform
from transpixeler.data.items import Coded
from transpixeler.data.order import Order, make_order

LONG, SHORT, SMALL = Bucket(81, 64, 64), Bucket(33, 64, 64), Bucket(33, 32, 32)
RULES = (
    BucketRule((64, 64, 81), keep=0.4, keep_resolution=0.5, global_batch=2),
    BucketRule((64, 64, 33), keep=0.7, keep_resolution=0.9),
    BucketRule((32, 32, 0), keep=0.8),
)
EPOCHS = 10


def chances() -> dict[Bucket, float]:
    """Write out the chances of RULES by hand."""
    long = 0.4 * 0.5
    short = (1 - 0.4) * 0.7 * 0.9
    small = (0.4 * (1 - 0.5) + (1 - 0.4) * (0.7 * (1 - 0.9) + (1 - 0.7))) * 0.8
    return {LONG: long, SHORT: short, SMALL: small}


def drawn_order(samples: int, *, seed: int = 0, rules: tuple[BucketRule, ...] = RULES, batch: int = 4) -> Order:
    pairs = list(product(range(samples), (LONG, SHORT, SMALL)))
    owners, buckets = [f"clip{number}" for number, _ in pairs], [bucket for _, bucket in pairs]
    batches = [2 if bucket == LONG else batch for bucket in buckets]
    draws = Draws.of(owners, buckets, rules=rules, seed=seed)
    return make_order(buckets=buckets, repeats=[1] * len(pairs), batches=batches, seed=seed, draws=draws)


def test_a_sample_tries_long_before_short_and_large_before_small() -> None:
    assert in_order({SMALL, SHORT, LONG}) == [LONG, SHORT, SMALL]


def test_shares_are_what_is_asked_and_epochs_differ() -> None:
    samples, names = 600, [LONG, SHORT, SMALL]
    owners = [f"clip{number}" for number in range(samples) for _ in names]
    draws = Draws.of(owners, names * samples, rules=RULES, seed=3)
    taken = np.stack([draws.taken(epoch).reshape(samples, 3) for epoch in range(EPOCHS)])
    assert taken.sum(2).max() == 1, "a sample is in two buckets"
    counts, whole = taken.sum((0, 1)), EPOCHS * samples
    for count, chance in zip(counts, chances().values(), strict=True):
        assert abs(count - whole * chance) < 3 * math.sqrt(whole * chance * (1 - chance))
    assert draws.chances().reshape(samples, 3) == pytest.approx(np.tile([*chances().values()], (samples, 1)))
    for one, other in pairwise(taken):  # as far apart as independent draws are
        same = sum(chance**2 for chance in [*chances().values(), 1 - sum(chances().values())])
        moved = (one != other).any(1).sum()
        assert abs(moved - samples * (1 - same)) < 4 * math.sqrt(samples * same * (1 - same))
    again, other = (Draws.of(owners, names * samples, rules=RULES, seed=seed).taken(4) for seed in (3, 4))
    assert np.array_equal(taken[4].ravel(), again) and not np.array_equal(taken[4].ravel(), other)


def test_a_sample_is_drawn_the_same_whatever_else_is_there() -> None:
    few = Draws.of(["clip7"] * 3, [LONG, SHORT, SMALL], rules=RULES, seed=1)
    many = Draws.of([f"clip{n}" for n in range(9) for _ in range(3)], [LONG, SHORT, SMALL] * 9, rules=RULES, seed=1)
    for epoch in range(20):
        assert np.array_equal(few.taken(epoch), many.taken(epoch)[21:24])


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**40), samples=st.integers(8, 40), epochs=st.integers(1, 5))
def test_after_n_epochs_each_draw_was_seen(seed: int, samples: int, epochs: int) -> None:
    order = drawn_order(samples, seed=seed)
    assert order.draws is not None
    seen = seen_in(order, epochs)
    times = sum(order.draws.taken(epoch).astype(int) for epoch in range(epochs))
    for row in order.rows:
        drawn = int(sum(times[row.items]))
        assert sum(seen[int(item)] for item in row.items) == -(-drawn // row.batch) * row.batch
        assert all(seen[int(item)] >= times[item] for item in row.items)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**40), epoch=st.integers(0, 4), data=st.data())
def test_any_point_of_drawn_epochs_can_be_resumed(seed: int, epoch: int, data: st.DataObject) -> None:
    whole = list(drawn_order(20, seed=seed).batches(epoch))
    start, fresh = data.draw(st.integers(0, len(whole))), drawn_order(20, seed=seed)
    rest = list(fresh.batches(epoch, start))
    assert all(np.array_equal(one, two) for one, two in zip(rest, whole[start:], strict=True))
    for number in range(len(whole)):
        assert fresh.locate(fresh.first_step(epoch) + number) == (epoch, number)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**40), epochs=st.integers(1, 4))
def test_only_what_some_epoch_takes_is_used(seed: int, epochs: int) -> None:
    order = drawn_order(12, seed=seed)
    seen = seen_in(order, epochs)
    used = order.used(order.first_step(epochs), 36)
    assert set(np.flatnonzero(used)) == set(seen)


def test_a_bucket_that_is_drawn_too_rarely_is_named() -> None:
    rare = (BucketRule((64, 64, 81), keep=1e-6),)
    with pytest.raises(UserError, match=r"1\.2e-05 clips for 64×64×81.*raise its keep"):
        drawn_order(12, rules=rare)
    never = (BucketRule((64, 64, 81), keep=0.0),)
    assert len(drawn_order(12, rules=never).rows) == 1, "all stay at the next shorter length"


@settings(deadline=None, max_examples=30)
@given(st.data())
def test_columns_draw_what_a_slow_formula_draws(data: st.DataObject) -> None:
    """A sample at a time, by hashes of its name and of each bucket: resumed trainings must draw the same again."""
    offered = tuple(data.draw(st.permutations([LONG, SHORT, SMALL])))
    counts = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=12))
    owners = np.repeat(np.arange(len(counts)), counts)
    numbers = np.array([data.draw(st.integers(0, 2)) for _ in owners], np.int32)
    names = [f"set/clip ä{number}" for number in range(len(counts))]
    found = Draws(owners, names, Coded(offered, numbers), rules=RULES, seed=5).taken(2)
    for owner, name in enumerate(names):
        mine = in_order({offered[number] for number in numbers[owners == owner]})
        stayed: Bucket | None = None
        left: tuple[int, ...] = ()
        for bucket in mine:
            rule, key = rule_for(bucket, RULES), f"{name}\0{tuple(bucket)}".encode()
            keys = np.array([int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "big")], np.uint64)
            length, size = (float(uniform(keys, 5, 2, what)[0]) for what in ("length", "resolution"))
            if stayed is None and bucket[1:] != left and length < rule.keep:
                stayed, left = (bucket, left) if size < rule.keep_resolution else (None, bucket[1:])
        wanted = [offered[number] == stayed for number in numbers[owners == owner]]
        assert found[owners == owner].tolist() == wanted
