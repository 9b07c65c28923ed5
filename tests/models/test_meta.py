"""What is built on meta has the shapes that it has elsewhere, and nothing is drawn for it."""

from __future__ import annotations

import torch
from torch import nn

from tests.support.families.cases import CASES, STREAMS
from transpixeler.models.meta import on_meta


def test_nothing_is_drawn() -> None:
    with on_meta():
        there = torch.zeros(3, device="cpu")
        assert nn.init.uniform_(there) is there
        assert nn.init.kaiming_uniform_(tensor=there.view(1, 3)).shape == (1, 3)
        assert nn.Linear(2, 3).weight.is_meta
    assert not there.any()
    assert nn.init.uniform_(there).any()


def test_every_familys_model_has_the_same_parameters() -> None:
    for case in CASES.values():
        with on_meta():
            there = case.make(streams=STREAMS[:2])
        here = case.make(streams=STREAMS[:2])
        assert all(parameter.is_meta for parameter in there.parameters())
        shapes = [{name: p.shape for name, p in model.named_parameters()} for model in (here, there)]
        assert shapes[0] == shapes[1] and shapes[0]
