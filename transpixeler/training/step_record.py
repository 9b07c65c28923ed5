"""Make the record of a step: one line of metrics.jsonl, with losses, speed, FLOPs and memory.

In: what the ranks agreed on and how long the step took. Out: plain numbers by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transpixeler.config.sections import Config
from transpixeler.data.loader import Batch
from transpixeler.models import costs
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import devices, pipeline
from transpixeler.parallel.experts import AnyEngine
from transpixeler.training.agreement import Facts


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one step."""

    whole: float
    data_wait: float
    checkpoint_stall: float


@dataclass(frozen=True)
class Recorder:
    """Makes records; holds what does not change from one step to the next."""

    config: Config
    engine: AnyEngine
    ranks: int

    def record(
        self,
        batch: Batch,
        shares: Sequence[tuple[StreamLayout, int]],
        facts: Facts,
        times: StepTimes,
        *,
        lr: float,
        micro_batch: int,
        expert: str = "",
    ) -> dict[str, Any]:
        """Return the line of metrics.jsonl for a step that ended. shares: layouts that a rank ran, and samples."""
        samples = len(batch.ids)
        ranks = samples / sum(count for _, count in shares)  # that share the step, alike
        return {
            "step": batch.step + 1,
            "epoch": batch.epoch + 1,
            **({"expert": expert} if expert else {}),
            "loss": facts.loss,
            **{f"loss_{name}": value for name, value in facts.by_stream.items()},
            "grad_norm": facts.grad_norm,
            "lr": lr,
            "loss_by_t": list(facts.by_time),
            "samples": list(batch.ids),
            "seconds": times.whole,
            "samples_per_second": samples / times.whole,
            "tokens_per_second": ranks * sum(one.tokens * n for one, n in shares) / times.whole,
            **self._flops(shares, ranks, times.whole),
            "memory_gib": devices.peak_memory(self.engine.mesh.device),
            **devices.memory_facts(self.engine.mesh.device),
            **self._bubble(samples, micro_batch),
            "data_wait": times.data_wait,
            "checkpoint_stall": times.checkpoint_stall,
        }

    def _flops(self, shares: Sequence[tuple[StreamLayout, int]], ranks: float, seconds: float) -> dict[str, float]:
        """Return each device's share of the FLOPs that the mathematics needs; recomputation does not count.

        ranks: that ran as much.
        """
        sums, full = self.engine.costs, not self.config.lora.enabled
        flops = sum(costs.step_flops(sums, layout.lengths, full=full) * count for layout, count in shares)
        tflops = flops * ranks / seconds / self.ranks / 1e12
        peak = self.config.log.peak_tflops or devices.peak_tflops(self.engine.mesh.device)
        return {"tflops": tflops} | ({"mfu": tflops / peak} if peak else {})

    def _bubble(self, samples: int, micro_batch: int) -> dict[str, float]:
        """Return the share of a step that pipeline stages wait for each other, by the schedule's arithmetic."""
        layout = self.engine.mesh.layout
        if layout.pipeline == 1:
            return {}
        count = samples // layout.data // micro_batch
        return {"bubble": pipeline.bubble(self.config.parallel, count)}
