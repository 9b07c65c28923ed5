"""Make torch's stage of a pipeline, which before torch 2.13 fails where an input of a stage has no gradient.

In: what `PipelineStage` takes. Out: such a stage. From torch 2.13 on it is torch's own but for what 2.15 does where a
schedule is new, and sends back what gradients there are. Torch 2.11 takes gradients of all inputs, of integers too, and
waits for one of each, so zeros go back where there is none; 2.12 waits for those that there are, and wants to send
each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SENDS_WHAT_THERE_IS = "2.13"
WAITS_FOR_ALL = "2.11"


def pipeline_stage(*args: Any, **options: Any) -> Any:
    """Return a stage whose inputs need not all have gradients."""
    from torch.distributed.pipelining import PipelineStage

    if torch.__version__ >= SENDS_WHAT_THERE_IS:

        class Told(PipelineStage):
            def _post_metadata_inference_cleanup(self) -> None:
                """Keep weights and gradients: torch 2.15 drops them at each new schedule, as if that had run to learn.

                Ranks that meet other buckets would gather weights at other times, and wait for each other without end.
                """

        return Told(*args, **options)

    class Stage(PipelineStage):
        def _prepare_forward_infra(self, *args: Any, **options: Any) -> Any:
            trains, self.has_backward = self.has_backward, self.has_backward and not _waits_for_all()
            made = super()._prepare_forward_infra(*args, **options)
            self.has_backward = trains
            if trains and _waits_for_all():
                _take_gradients(self)
            return made

        def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[Any]:
            if self.has_backward and not self.is_first:
                _settle(self, bwd_chunk_id)
            return super().get_bwd_send_ops(bwd_chunk_id)

    return Stage(*args, **options)


def _waits_for_all() -> bool:
    return torch.__version__.startswith(WAITS_FOR_ALL)


def _take_gradients(stage: Any) -> None:
    """Take gradients of the inputs that are said to want one."""
    for infos in stage.args_recv_info.values() if not stage.is_first else ():
        for info, meta in zip(infos, stage.inputs_meta, strict=True):
            info.buffer.requires_grad_(meta.requires_grad)


def _settle(stage: Any, chunk: int) -> None:
    """Put zeros in place of the gradients that a microbatch has not, or have none sent there."""
    received = stage.args_recv_info[chunk]
    gradients = stage.bwd_cache[chunk]
    if len(gradients) < len(received):  # a split backward pass leaves out the inputs that want none
        found = iter(gradients)
        gradients = [next(found) if info.buffer.requires_grad else None for info in received]
    gradients = gradients[: len(received)]  # those of keyword arguments follow
    if _waits_for_all():
        stage.bwd_cache[chunk] = tuple(_or_zeros(x, info) for x, info in zip(gradients, received, strict=True))
    elif stage.grad_send_info is None:
        sources = stage._create_grad_send_info(received)
        stage.grad_send_info = [None if x is None else to for x, to in zip(gradients, sources, strict=True)]


def _or_zeros(gradient: Tensor | None, info: Any) -> Tensor:
    return torch.zeros_like(info.buffer) if gradient is None else gradient
