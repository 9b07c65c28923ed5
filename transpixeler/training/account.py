"""What a run says of itself: an introduction before the first step, a record of each, and a manifest for later.

In: the parts that the trainer holds. Out: lines, `metrics.jsonl` records and `manifest.json`. Nothing here trains.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from dataclasses import dataclass
from typing import Any

from transpixeler.config import Config
from transpixeler.data.dataset import Datasets
from transpixeler.data.loader import Batch
from transpixeler.data.order import Order
from transpixeler.files import write_text
from transpixeler.models import costs
from transpixeler.models.backbone import model_class
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import pipeline
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import telemetry
from transpixeler.runs.folder import Run
from transpixeler.training.agreement import Facts

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Account:
    """Holds what does not change from one step to the next."""

    config: Config
    runtime: Runtime
    run: Run
    engine: Engine
    data: Datasets
    order: Order
    total: int

    def introduce(self, step: int) -> None:
        """What will be trained, on what and for how long. A collective call."""
        own = {name: (p.numel(), p.requires_grad) for name, p in self.engine.named_parameters()}
        everyone = {name: it for part in self.runtime.gather(own) for name, it in part.items()}
        if not self.runtime.is_main:
            return
        mesh, batch = self.engine.mesh, self.config.train.global_batch
        trained = sum(n for n, trains in everyone.values() if trains)
        kind = f"adapter of rank {self.config.lora.rank}" if self.config.lora.enabled else "the model's own weights"
        mean = sum(len(row.items) for row in self.order.rows) / batch
        lines = {
            "trains": f"{trained:,} parameters ({kind}) of {sum(n for n, _ in everyone.values()):,}",
            "streams": ", ".join(self.config.streams),
            "layout": f"{mesh.layout} on {mesh.device.type}, {str(self.engine.dtype).removeprefix('torch.')}",
            "batch": f"{batch} a step, {batch // mesh.layout.data} a data rank",
            "clips": ", ".join(f"{w}×{h}×{f}: {n}" for (f, h, w), n in self.data.train.buckets().items()),
            "steps": f"{self.total} in all, {mean:.4g} an epoch" + (f", {step} done" if step else ""),
            "run": str(self.run.folder),
        }
        logger.info("%s", "\n".join(f"{name:8} {text}" for name, text in lines.items()))

    def record(self, batch: Batch, facts: Facts, *, lr: float, seconds: float, micro_batch: int) -> dict[str, Any]:
        """One line of metrics.jsonl, without what the loader and the checkpointer measured."""
        samples, layout = self.config.train.global_batch, batch.layout
        return {
            "step": batch.step + 1,
            "epoch": batch.epoch + 1,
            "loss": facts.loss,
            **{f"loss_{name}": value for name, value in facts.by_stream.items()},
            "grad_norm": facts.grad_norm,
            "lr": lr,
            "loss_by_t": list(facts.by_time),
            "samples": list(batch.ids),
            "seconds": seconds,
            "samples_per_second": samples / seconds,
            "tokens_per_second": samples * layout.tokens / seconds,
            **self._flops(layout, seconds),
            "memory_gib": telemetry.peak_memory(self.engine.mesh.device),
            **self._bubble(micro_batch),
        }

    def _flops(self, layout: StreamLayout, seconds: float) -> dict[str, float]:
        """What the mathematics needs, a device: what is recomputed to save memory is not counted as work done."""
        sample = costs.step_flops(self.engine.dimensions, layout.lengths, full=not self.config.lora.enabled)
        tflops = sample * self.config.train.global_batch / seconds / self.runtime.world_size / 1e12
        peak = telemetry.peak_tflops(self.config.log, self.engine.mesh.device)
        return {"tflops": tflops} | ({"mfu": tflops / peak} if peak else {})

    def _bubble(self, micro_batch: int) -> dict[str, float]:
        """The part of a step that stages wait for each other, by the schedule's arithmetic."""
        layout = self.engine.mesh.layout
        if layout.pipeline == 1:
            return {}
        count = self.config.train.global_batch // layout.data // micro_batch
        return {"bubble": pipeline.bubble(self.config.parallel, count)}

    def write_manifest(self) -> None:
        path = self.config.model.path
        facts = {
            "layout": dataclasses.asdict(self.engine.mesh.layout),
            "steps": self.total,
            "clips": {"train": len(self.data.train.items), "eval": len(self.data.eval.items)},
            "skipped": [list(pair) for pair in (*self.data.train.skipped, *self.data.eval.skipped)],
            "model": {"path": path, "vae": model_class(self.config.model.family).vae_fingerprint(path)},
        }
        write_text(self.run.folder / "manifest.json", json.dumps(telemetry.manifest(**facts), indent=1))
