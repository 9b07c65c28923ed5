"""Cut a flow in two where RGB runs forward only: what RGB's blocks take of it, and what the companions' take.

Such a flow begins with the companions' tokens, then come RGB's and text that flows.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from transpixeler.models.tokens import Tokens

Parts = tuple[Tensor, ...]


class Flowing(Protocol):
    """Facts of a flow, which a model and its blocks share."""

    carried: int
    grouped: tuple[int, ...]


def rgb_part(flow: Parts, tokens: Tokens, facts: Flowing) -> Parts:
    """Return RGB's tokens, text that flows, and the rest of a divided flow for RGB's time groups."""
    return _for_groups(flow[1:], slice(0, tokens.rgb_groups), facts)


def companions_part(flow: Parts, tokens: Tokens, facts: Flowing) -> Parts:
    """Return the companions' tokens, of text that flows nothing, and the rest for their time groups."""
    texts = [text[:, :0] for text in flow[2 : facts.carried + 1]]
    return _for_groups((flow[0], *texts, *flow[facts.carried + 1 :]), slice(tokens.rgb_groups, None), facts)


def _for_groups(flow: Parts, groups: slice, facts: Flowing) -> Parts:
    return tuple(x[:, groups] if place in facts.grouped else x for place, x in enumerate(flow))
