"""The noise levels at which LTX-Video is sampled: a count of tokens goes in, their shift comes out."""

from __future__ import annotations

import math
from collections.abc import Sequence

TOKENS = (1024, 4096)  # between and beyond these the exponent is linear in the tokens of one stream
EXPONENTS = (0.95, 2.05)
SLOW = 0.025  # how far the noise falls in the first half of the steps of later versions
LAST = 0.1  # the noise level of the last step, from which it goes to 0


def shift(tokens: int) -> float:
    """Return s of t' = s·t / (1 + (s − 1)·t) for a video of so many tokens, those of companions not counted."""
    slope = (EXPONENTS[1] - EXPONENTS[0]) / (TOKENS[1] - TOKENS[0])
    return math.exp(EXPONENTS[0] + slope * (tokens - TOKENS[0]))


def linear_quadratic(steps: int) -> list[float]:
    """Return noise levels from 1 down for versions from 0.9.5 on: slow along a line at first, then ever faster."""
    if steps < 2:
        return [1.0]
    linear = steps // 2
    rest = steps - linear
    steep = linear - SLOW * steps
    square, slope = steep / (linear * rest**2), SLOW / linear - 2 * steep / rest**2
    start = square * linear**2
    done = [step * SLOW / linear for step in range(linear)]
    done += [square * step**2 + slope * step + start for step in range(linear, steps)]
    return [1 - share for share in done]


def stretched(levels: Sequence[float], last: float = LAST) -> list[float]:
    """Return noise levels from 1 down, spread so that the final one, at which the last step starts, is `last`."""
    factor = (1 - levels[-1]) / (1 - last)
    return [1 - (1 - level) / factor for level in levels]
