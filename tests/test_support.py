"""The tests' own helpers do what the tests trust them to do."""

import sys

import torch

from tests.support.bytes_held import BytesHeld
from tests.support.ranks import run_ranks


def _is_preloaded(rank: int, world_size: int) -> bool:
    return "tests.support.preload" in sys.modules


def test_ranks_are_forked_from_a_process_with_the_libraries_loaded() -> None:
    assert run_ranks(_is_preloaded, 2) == [True, True]


def test_the_count_of_bytes_sees_what_is_alive_and_forgets_what_is_freed() -> None:
    kept = torch.zeros(1000)
    with BytesHeld() as held:
        twice = kept + 1
        for _ in range(3):
            torch.zeros(5000).add_(1)
    assert (held.peak, held.held) == (4 * 7000, 4 * 2000) and twice.shape == (1000,)
