"""A bench tells a ratio that is there, whatever disturbs the machine, and says so when it cannot tell."""

from __future__ import annotations

import random

import against
import pytest
import readings
from readings import Reading
from rounds import Ratio, Rounds, median_interval, ratio, rounds_needed

TRUE = 1.05  # ours over the limit in all that is made up here


def series(rounds: int, *, noise: float, slow: float = 1.0, beside: str = "", seed: int = 0) -> Rounds:
    """Make rounds of which every third is slowed: both sides, or one alone by others beside it."""
    draw, found = random.Random(seed), []
    for turn in range(rounds):
        disturbed = turn % 3 == 0
        taken = {}
        for name, seconds in (("limit", 1.0), ("ours", TRUE)):
            hit = disturbed and beside in ("", name)
            cpu = seconds * draw.gauss(1.0, noise) * (slow if hit else 1.0)
            taken[name] = Reading(wall=2 * cpu, cpu=cpu, others=0.6 if hit else 0.05)
        found.append(taken)
    return Rounds(tuple(found), "cpu")


def told(found: Ratio) -> float:
    assert isinstance(found.figure, float), found
    return found.figure


def test_a_quiet_series_tells_the_ratio_and_its_interval() -> None:
    found = series(20, noise=0.01).ratio("ours", "limit")
    assert found.interval is not None and found.interval[0] < TRUE < found.interval[1]
    assert told(found) == pytest.approx(TRUE, abs=0.01) and "20 of 20 rounds count" in str(found)


def test_what_slows_both_sides_of_a_round_cancels_out() -> None:
    assert told(series(20, noise=0.01, slow=3.0).ratio("ours", "limit")) == pytest.approx(TRUE, abs=0.01)


@pytest.mark.parametrize("beside", ["ours", "limit"])
def test_rounds_that_are_disturbed_on_one_side_alone_are_dropped_and_counted(beside: str) -> None:
    rounds = series(21, noise=0.01, slow=2.9, beside=beside)
    assert told(rounds.ratio("ours", "limit")) == pytest.approx(TRUE, abs=0.01)
    assert len(rounds.kept) == 14 and rounds.rule.startswith("7 of 21 rounds dropped: ")
    assert rounds["ours"].median == pytest.approx(TRUE, abs=0.02)


def test_without_the_rule_the_same_rounds_would_mislead() -> None:
    blind = [{n: Reading(r.wall, r.cpu) for n, r in each.items()} for each in series(6, noise=0.0, slow=2.9).readings]
    blind = [{**each, "limit": Reading(1, 1)} for each in blind]
    assert Rounds(tuple(blind), "cpu").ratio("ours", "limit").interval == (TRUE, 2.9 * TRUE)


def test_by_the_wall_clock_no_other_program_may_run_beside() -> None:
    rounds = Rounds(series(9, noise=0.01, slow=1.0).readings, "wall")
    assert len(rounds.kept) == 6 and "more than 10% of the machine" in rounds.rule


def test_a_series_too_noisy_gives_words_and_no_number() -> None:
    found = series(20, noise=0.3).ratio("ours", "limit")
    assert str(found.figure).startswith("too noisy to tell: ") and not found.tells
    assert series(20, noise=0.3).ratio("ours", "limit", precision=1.0).tells


def test_too_few_rounds_give_no_interval() -> None:
    assert rounds_needed() == 6 and median_interval([1.0] * 5) is None
    found = series(5, noise=0.0).ratio("ours", "limit")
    assert found.figure == "too noisy to tell: 5 of 5 rounds count, 6 are needed"
    assert ratio([], [], rounds=3).figure == "too noisy to tell: 0 of 3 rounds count, 6 are needed"


@pytest.mark.parametrize("count", [6, 9, 25])
def test_the_interval_holds_the_median_as_often_as_it_promises(count: int) -> None:
    draw, held = random.Random(1), 0
    for _ in range(2000):
        low, high = median_interval([draw.lognormvariate(0, 1) for _ in range(count)]) or (2.0, 0.0)
        held += low <= 1.0 <= high  # the median of what is drawn
    assert 0.94 <= held / 2000 <= 0.99


def test_a_reading_knows_who_else_was_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = iter([(100.0, 400.0), (103.0, 404.0)])  # busy and all seconds of the cores, before and after
    monkeypatch.setattr(readings, "_machine_seconds", lambda: next(machine))
    found = readings.measure(lambda: sum(range(1_000_000)))
    assert found.others == pytest.approx((3 - found.cpu) / 4) and 0 < found.cpu <= found.wall + 0.02


@pytest.mark.skipif(not readings.PROC_STAT.exists(), reason="needs /proc/stat")
def test_the_machine_s_seconds_are_read() -> None:
    busy, total = readings._machine_seconds()
    assert 0 < busy < total


@pytest.mark.parametrize(
    ("values", "said"),
    [([1.0, 1.01, 0.99] * 4, "the same within 3%"), ([1.1] * 9, "slower: 1.100"), ([0.9] * 9, "faster: 0.900")],
)
def test_a_verdict_on_two_checkouts_is_in_words(values: list[float], said: str) -> None:
    assert against.verdict(ratio(values, [1.0] * len(values), rounds=9)).startswith(said)


def test_no_verdict_is_given_where_nothing_can_be_told() -> None:
    assert against.verdict(ratio([0.5, 2.0] * 5, [1.0] * 10, rounds=10)).startswith("too noisy to tell")
