"""Describe a run before its first step: lines for the log, and facts for the manifest.

In: the parts that were built. Out: what will be trained, on what and for how long.
"""

from __future__ import annotations

import dataclasses
import logging
from math import prod
from typing import Any

from transpixeler.config.sections import Config, UserError
from transpixeler.data.buckets import batch_sizes
from transpixeler.data.dataset import Datasets
from transpixeler.flow.experts import Split
from transpixeler.models.family import ModelFolder
from transpixeler.parallel import shard
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import Run
from transpixeler.training.schedule import Schedule

logger = logging.getLogger("transpixeler")


def introduce(
    config: Config,
    runtime: Runtime,
    run: Run,
    model: ModelFolder,
    engine: AnyEngine,
    data: Datasets,
    schedule: Schedule,
    step: int,
) -> None:
    """Log what will be trained, on what and for how long. A collective call."""
    own = {name: (p.numel(), p.requires_grad) for name, p in engine.named_parameters()}
    everyone = {name: it for part in engine.mesh.gather_stages(own) for name, it in part.items()}
    if not runtime.is_main:
        return
    mesh, batches = engine.mesh, batch_sizes(config)
    trained = sum(n for n, trains in everyone.values() if trains)
    lines = _base_lines(config) | {
        "trains": f"{trained:,} parameters ({config.lora}) of {sum(n for n, _ in everyone.values()):,}",
        "streams": ", ".join(config.streams),
        "layout": f"{mesh.layout} on {mesh.device.type}, {str(engine.dtype).removeprefix('torch.')}",
        "batch": "; ".join(f"{batch} a step, {batch // mesh.layout.data} a data rank" for batch in batches),
        "clips": ", ".join(f"{w}×{h}×{f}: {n}" for (f, h, w), n in data.train.buckets().items()),
        "steps": f"{schedule.total} in all, {schedule.order.mean_steps:.4g} an epoch{_done(step, schedule.total)}",
        "run": str(run.folder),
    }
    lines |= memory_lines(config, engine)
    layouts = [model.geometry.layout(("rgb",), (1,), bucket) for bucket in data.train.buckets()]
    grid = max((layout.grids[0] for layout in layouts), key=prod)
    if said := Split.of(config, model, grid).lines(run=config.train.expert_steps):
        lines["experts"] = "; ".join(said)
    logger.info("%s", "\n".join(f"{name:8} {text}" for name, text in lines.items()))


def _done(step: int, total: int) -> str:
    """Return what is added where a run goes on, and how to train more where no step is left."""
    left = ": none is left; raise train.max_steps or train.epochs to train more" if step >= total else ""
    return f", {step} done{left}" if step else ""


def _base_lines(config: Config) -> dict[str, str]:
    """Return lines for a base of several parts: what training wrote, or with adapters fused into it."""
    model = config.model
    encoders = {"encoders": model.encoders} if model.encoders else {}
    fused = {"fused": ", ".join(model.fused_paths)} if model.fuse else {}
    return {"base": model.path} | encoders | fused if encoders or fused else {}


def memory_lines(config: Config, engine: AnyEngine) -> dict[str, str]:
    """Return lines for what waits in host memory, and for what is kept in place of recomputing."""
    parallel, blocks = config.parallel, len(engine.costs.blocks)
    lines = {}
    if parallel.offload:
        count = len(shard.waiting_places(parallel, blocks))
        lines["offload"] = f"the weights of {count} of {blocks} blocks wait in host memory"
        if held := sum(one.swap.bytes for one in engine.by_expert.values() if one.swap is not None):
            lines["offload"] += f", {held / 2**30:.3g} GiB on this rank"
    if parallel.host_gb:
        lines["inputs"] = f"those of blocks wait in host memory, up to {parallel.host_gb:g} GB of it on each rank"
    if parallel.keep_gb:
        lines["keeps"] = f"as many blocks as fit {parallel.keep_gb:g} GB recompute nothing, in each bucket"
    return lines


def manifest_facts(model: ModelFolder, engine: AnyEngine, data: Datasets, schedule: Schedule) -> dict[str, Any]:
    """Return what the manifest says of this training's layout, data and model."""
    return {
        "layout": dataclasses.asdict(engine.mesh.layout),
        "steps": schedule.total,
        "clips": {"train": len(data.train.items), "eval": len(data.eval.items)},
        "skipped": [list(pair) for pair in (*data.train.skipped, *data.eval.skipped)],
        "model": {"family": model.family.name, "path": model.path, "vae": _vae_fingerprint(model)},
    }


def _vae_fingerprint(model: ModelFolder) -> str | None:
    """Return None on a machine without the VAE, whose data are given as features."""
    try:
        return model.vae_fingerprint()
    except UserError:
        return None
