"""The order is a pure function of (seed, epoch): whole epochs, one bucket a batch, resumable at any step."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transpixeler.config.sections import UserError
from transpixeler.data.order import Order, make_order, permutation


@st.composite
def orders(draw: st.DrawFn) -> Order:
    sizes = draw(st.lists(st.integers(1, 23), min_size=1, max_size=4))
    buckets = [(number, 8, 8) for number, size in enumerate(sizes) for _ in range(size)]
    repeats = draw(st.lists(st.integers(1, 3), min_size=len(buckets), max_size=len(buckets)))
    batch = draw(st.integers(1, min(16, sum(repeats))))
    batches = [max(1, batch - bucket[0]) for bucket in buckets]
    return make_order(buckets=buckets, repeats=repeats, batches=batches, seed=draw(st.integers(0, 2**40)))


def ordered(buckets: list[tuple[int, int, int]], batch: int = 4) -> Order:
    return make_order(buckets=buckets, repeats=[1] * len(buckets), batches=[batch] * len(buckets), seed=0)


def seen_in(order: Order, epochs: int) -> Counter[int]:
    return Counter(int(item) for epoch in range(epochs) for batch in order.batches(epoch) for item in batch)


def test_an_epoch_is_whole_in_every_bucket() -> None:
    """Twenty clips in three buckets, four a batch: each is seen once in the first epoch, not twelve of them."""
    order = ordered([(1, 8, n % 3) for n in range(20)])
    assert set(seen_in(order, 1)) == set(range(20))
    assert min(seen_in(order, 2).values()) == 2
    assert (order.first_step(1), order.first_step(2)) == (6, 11)


@settings(deadline=None)
@given(order=orders(), epochs=st.integers(1, 6))
def test_after_n_epochs_every_item_was_seen_n_times_and_no_batch_more(order: Order, epochs: int) -> None:
    seen = seen_in(order, epochs)
    for row in order.rows:
        batches = -(-epochs * len(row.items) // row.batch)
        assert sum(seen[int(item)] for item in np.unique(row.items)) == batches * row.batch
        for item, times in zip(*np.unique(row.items, return_counts=True)):
            assert seen[int(item)] >= epochs * times


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 5))
def test_a_batch_is_of_one_bucket_and_no_epoch_is_like_another(order: Order, epoch: int) -> None:
    batches = list(order.batches(epoch))
    assert len(batches) == order.steps(epoch)
    for batch in batches:
        (row,) = [row for row in order.rows if np.isin(batch, row.items).any()]
        assert len(batch) == row.batch
    assert all(np.array_equal(one, two) for one, two in zip(batches, order.batches(epoch)))


@settings(deadline=None)
@given(order=orders(), epoch=st.integers(0, 4), data=st.data())
def test_any_point_can_be_resumed(order: Order, epoch: int, data: st.DataObject) -> None:
    whole = list(order.batches(epoch))
    start = data.draw(st.integers(0, len(whole)))
    rest = list(order.batches(epoch, start))
    assert len(rest) == len(whole) - start
    assert all(np.array_equal(one, two) for one, two in zip(rest, whole[start:]))
    for number in range(len(whole)):
        assert order.locate(order.first_step(epoch) + number) == (epoch, number)


@settings(deadline=None)
@given(order=orders(), step=st.integers(1, 60))
def test_every_epoch_ends_at_one_step_and_a_step_may_end_several(order: Order, step: int) -> None:
    assert list(order.ended(step)) == [epoch for epoch in range(1, 100) if order.first_step(epoch) == step]


def test_epochs_that_other_ones_have_covered_end_with_them() -> None:
    order = ordered([(1, 8, n) for n in range(4)])
    assert order.steps(0) == 4 and order.steps(1) == order.steps(2) == order.steps(3) == 0
    assert list(order.ended(4)) == [1, 2, 3, 4] and not order.ended(3)


def test_epochs_and_seeds_differ_and_the_hash_is_the_same_for_ever() -> None:
    drawn = {tuple(permutation(50, seed, epoch, "a")) for seed in range(5) for epoch in range(20)}
    assert len(drawn) == 100
    assert permutation(8, 1, 2, "a").tolist() == [1, 0, 2, 6, 4, 7, 3, 5]


def test_permutations_are_even() -> None:
    """Every item lands in every place about equally often: chi-square with 81 degrees of freedom."""
    counts = np.zeros((10, 10))
    for epoch in range(4000):
        counts[np.arange(10), permutation(10, 3, epoch, "a")] += 1
    assert ((counts - 400) ** 2 / 400).sum() < 130


def test_too_few_clips_for_a_step_is_the_users_to_mend() -> None:
    with pytest.raises(UserError, match=r"3 clips.*train\.global_batch 4"):
        ordered([(1, 8, 8)] * 3)
    make_order(buckets=[(1, 8, 8)] * 3, repeats=[1, 2, 1], batches=[4] * 3, seed=0)
