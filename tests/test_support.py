"""The tests' own helpers do what the tests trust them to do."""

import sys

from tests.support.ranks import run_ranks


def _is_preloaded(rank: int, world_size: int) -> bool:
    return "tests.support.preload" in sys.modules


def test_ranks_are_forked_from_a_process_with_the_libraries_loaded() -> None:
    assert run_ranks(_is_preloaded, 2) == [True, True]
