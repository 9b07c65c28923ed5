"""Define what one rank of a pipeline runs: a part of the model that knows the step's layout."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from transpixeler.models.backbone import Backbone, Flow
from transpixeler.models.noising import RECTIFIED, Noising
from transpixeler.models.streams import StreamLayout


class Stage(nn.Module):
    """A run of the model's parts; the last one turns what it predicts into errors when it is told the truth."""

    # of the step; no arguments, because schedules that split the backward pass take only tensors
    layout: StreamLayout
    noising: Noising = RECTIFIED

    def __init__(self, model: Backbone) -> None:
        super().__init__()
        self.model = model

    def forward(self, *flow: Tensor, truth: Tensor | None = None) -> Tensor | Flow:
        out = self.model(*flow, layout=self.layout)
        if isinstance(out, tuple):  # zero-bubble schedules detach a stage's outputs in place, which a view forbids
            # contiguous: torch 2.11 compares strides, also that of a batch of one
            plain = torch.contiguous_format
            changed = (x.clone(memory_format=plain) if x._is_view() else x for x in out[: self.model.changed])
            return *changed, *out[self.model.changed :]
        return out if truth is None else self.noising.errors(out, truth, self.layout)


class Streamed(nn.Module):
    """Keeps a stage's shards from the schedule, which gathers all of them until its last microbatch."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, *flow: Tensor, **extra: Tensor) -> Tensor | Flow:
        return self.stage(*flow, **extra)
