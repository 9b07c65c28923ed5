"""Compare actions that ran by turns: drop disturbed rounds, and give each ratio with its interval or not at all.

In: the readings of every round, in which each action ran once. Out: seconds of each action and ratios of two. A ratio
is taken within a round, so that whatever slows the machine for longer than a round cancels out. Its interval is that
of the median, from the ratios' order alone: it holds for noise of any shape.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from readings import Reading

CONFIDENCE = 0.95
PRECISION = 0.03  # half of an interval's width, as a share of the ratio, up to which the ratio is told
COARSE = 0.2  # the same where the sides differ by whole factors
OTHERS_MAX = 0.1  # by the wall clock: share of the machine that others may take beside any action of a round
OTHERS_DIFFERENCE_MAX = 0.25  # by CPU time: how much more others may take beside one action than beside another
Clock = Literal["wall", "cpu"]


@dataclass(frozen=True)
class Times:
    """Seconds of every repeat of one action."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the median of the seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Return half of the middle half's width, as a share of the median."""
        low, _, high = statistics.quantiles(self.seconds, n=4) if len(self.seconds) > 1 else (self.median,) * 3
        return (high - low) / 2 / self.median

    def __str__(self) -> str:
        return f"{self.median:.4g} s ± {self.spread:.0%}"


@dataclass(frozen=True)
class Ratio:
    """The median of the rounds' ratios with its interval, which is empty where the rounds are too few for one."""

    value: float
    interval: tuple[float, float] | None
    rounds: int  # that count
    of: int  # that ran
    precision: float = PRECISION

    @property
    def tells(self) -> bool:
        """Tell whether the interval is narrow enough for the ratio to mean something."""
        if self.interval is None:
            return False
        low, high = self.interval
        return (high - low) / 2 <= self.precision * self.value

    @property
    def figure(self) -> float | str:
        """Return the ratio to three decimals, or why none can be given."""
        return round(self.value, 3) if self.tells else str(self)

    def __str__(self) -> str:
        counted = f"{self.rounds} of {self.of} rounds count"
        if self.interval is None:
            return f"too noisy to tell: {counted}, {rounds_needed()} are needed"
        low, high = self.interval
        if not self.tells:
            return f"too noisy to tell: {low:.3f} to {high:.3f}; {counted}"
        return f"{self.value:.3f}, {CONFIDENCE:.0%} sure of {low:.3f} to {high:.3f}; {counted}"

    def times(self, factor: float) -> Ratio:
        """Return the ratio of `factor` times as much work."""
        interval = self.interval and (factor * self.interval[0], factor * self.interval[1])
        return replace(self, value=factor * self.value, interval=interval)


@dataclass(frozen=True)
class Rounds(Mapping[str, Times]):
    """Every round's readings by action; as a mapping, the seconds of each action in the rounds that count."""

    readings: tuple[Mapping[str, Reading], ...]
    clock: Clock = "wall"

    @cached_property
    def kept(self) -> tuple[Mapping[str, Reading], ...]:
        """Return the rounds that nothing disturbed."""
        return tuple(found for found in self.readings if not self._disturbed(found))

    @property
    def rule(self) -> str:
        """Say which rounds are dropped, and how many were."""
        dropped = f"{len(self.readings) - len(self.kept)} of {len(self.readings)} rounds dropped: "
        if self.clock == "wall":
            return f"{dropped}other programs took more than {OTHERS_MAX:.0%} of the machine's cores"
        return f"{dropped}others' share of the cores differed by over {OTHERS_DIFFERENCE_MAX:.0%} from side to side"

    def ratio(self, above: str, below: str, *, precision: float = PRECISION) -> Ratio:
        """Return seconds of one action over another's, round by round."""
        taken = ([each[name].seconds(self.clock) for each in self.kept] for name in (above, below))
        return ratio(*taken, rounds=len(self.readings), precision=precision)

    def __getitem__(self, name: str) -> Times:
        return Times(tuple(found[name].seconds(self.clock) for found in self.kept or self.readings))

    def __iter__(self) -> Iterator[str]:
        return iter(self.readings[0])

    def __len__(self) -> int:
        return len(self.readings[0])

    def _disturbed(self, found: Mapping[str, Reading]) -> bool:
        others = [reading.others for reading in found.values()]
        if self.clock == "wall":
            return max(others) > OTHERS_MAX
        return max(others) - min(others) > OTHERS_DIFFERENCE_MAX


def ratio(above: Sequence[float], below: Sequence[float], *, rounds: int, precision: float = PRECISION) -> Ratio:
    """Return one series of seconds over another, pair by pair; `rounds` ran, of which these count."""
    found = [one / other for one, other in zip(above, below, strict=True)]
    value = statistics.median(found) if found else math.nan
    return Ratio(value, median_interval(found), len(found), rounds, precision)


def median_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> tuple[float, float] | None:
    """Return the two values between which the median lies with this confidence; none where there are too few."""
    ordered, count, outside = sorted(values), len(values), 0.0
    found = None
    for rank in range(count // 2):
        outside += 2 * math.comb(count, rank) / 2**count  # the median is beyond the rank-th value from either end
        if outside > 1 - confidence:
            break
        found = ordered[rank], ordered[count - 1 - rank]
    return found


def rounds_needed(confidence: float = CONFIDENCE) -> int:
    """Return how many rounds give an interval at all."""
    return next(count for count in range(2, 1000) if median_interval(range(count), confidence))
