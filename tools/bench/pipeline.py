"""Measure the share of a step that pipeline ranks wait, for every schedule, against the formula that a run reports.

Four processes run our engine over a tiny model whose blocks only sleep: in forward, and in backward where it comes to
the input's gradient and to the weights'. So all stages cost the same, and four of them fit on two cores. The bubble is
the part of a step in which a rank's stages do not compute; a rank that talks or schedules waits as well. Theory is
(p − 1) / (m·v + p − 1) for p ranks, m microbatches and v stages a rank, which is what telemetry writes as `bubble`.

`--weights` is the part of the backward pass that is for weights: near 0 for an adapter on a frozen base, which leaves a
zero-bubble schedule nothing to fill its gaps with, and half for full fine-tuning.
"""

from __future__ import annotations

import multiprocessing
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import torch
import torch.distributed as dist
from harness import finish, parser
from rounds import Times
from torch import Tensor, nn

from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.flow import objective
from transpixeler.models.backbone import Flow
from transpixeler.models.costs import Costs
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import pipeline, runtime, shard

WAN = {
    "num_attention_heads": 1,
    "attention_head_dim": 24,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 24,
}
STREAMS = ("rgb", "seg")
BACKWARD_OVER_FORWARD = 2.0


class Clock:
    """Seconds in which this rank's stages computed."""

    busy = 0.0

    def sleep(self, seconds: float) -> None:
        start = time.perf_counter()
        time.sleep(seconds)
        self.busy += time.perf_counter() - start


class InputCost(torch.autograd.Function):
    """Take the time of a forward pass, and of the part of a backward pass that the stage before waits for."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, clock: Clock, forward: float, backward: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, backward
        clock.sleep(forward)
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.clock.sleep(ctx.seconds)
        return *gradients, None, None, None


class WeightCost(torch.autograd.Function):
    """Take the time of the part of a backward pass that nobody waits for."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, clock: Clock, seconds: float) -> Tensor:
        ctx.clock, ctx.seconds = clock, seconds
        return weight.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        ctx.clock.sleep(ctx.seconds)
        return *gradients, None, None


def slow(block: Any, clock: Clock, *, seconds: float, weights: float) -> None:
    """Make a block cost time, and nothing else."""
    block.cost = nn.Parameter(torch.zeros(()))
    inputs, others = seconds * BACKWARD_OVER_FORWARD * (1 - weights), seconds * BACKWARD_OVER_FORWARD * weights

    def compute(_: Any, flow: Flow, tokens: Any) -> Flow:
        out = InputCost.apply(flow[0], clock, seconds, inputs)
        return (out + WeightCost.apply(block.cost, clock, others) if others else out + block.cost,)

    block.recompute = compute


def build(config: Config, mesh: meshes.Mesh, clock: Clock, options: Any) -> pipeline.Engine:
    """Return our engine over this rank's stages; only costs and the stream embedding are trained."""
    torch.manual_seed(0)
    stages = []
    with torch.device("meta"):
        costs = Costs.of(WanModel(WanConfig.read(WAN | {"num_layers": options.blocks}), streams=STREAMS))
    ranges = pipeline.split_blocks(config.parallel, costs)
    for index in pipeline.local_stages(config.parallel, mesh):
        model = WanModel(WanConfig.read(WAN | {"num_layers": options.blocks}), streams=STREAMS)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("stream_embedding" in name)
        model.keep(embed=index == 0, blocks=ranges[index], head=index == len(ranges) - 1)
        for block in model.blocks.values():
            slow(block, clock, seconds=options.seconds, weights=options.weights)
        stages.append(pipeline.Stage(model))
    return pipeline.Engine(stages, config.parallel, mesh, torch.float32, costs)


def example(samples: int) -> objective.Example:
    layout = StreamLayout.equal(STREAMS, (4, 1, 4, 4), (1, 2, 2))
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    shape = samples, layout.elements
    weights = torch.full((samples, len(STREAMS)), 1 / samples)
    return objective.Example(
        layout=layout,
        latents=draw(shape),
        noise=draw(shape),
        timesteps=draw(samples, len(STREAMS)).sigmoid(),
        fields={"text": draw(samples, 512, 8)},
        weights=weights,
    )


def work(rank: int, options: Any, store: str, results: Any) -> None:
    """Run every schedule by turns, on one rank."""
    torch.set_num_threads(1)
    count = options.ranks
    files = dist.FileStore(store, count)  # pyright: ignore[reportPrivateImportUsage] - public, but not in torch's __all__
    dist.init_process_group("gloo", store=files, rank=rank, world_size=count)
    here = runtime.Runtime(rank, count, rank, torch.device("cpu"))
    engines = {}
    for name in options.schedules:
        config = loading.from_overrides(
            [f"parallel.pipeline={count}", f"parallel.schedule={name}", "parallel.recompute=none"]
        )
        mesh = meshes.build(meshes.resolve(config.parallel, count), here)
        clock = Clock()
        engines[name] = clock, build(config, mesh, clock, options)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
    batch = example(options.microbatches)
    for _ in range(options.repeats + 1):
        for name, (clock, engine) in engines.items():
            dist.barrier()
            clock.busy, start = 0.0, time.perf_counter()
            engine.forward_backward(batch, 1)
            taken[name].append((time.perf_counter() - start, clock.busy))
    results.put((rank, {name: times[1:] for name, times in taken.items()}))  # the first built its buffers
    dist.barrier()


def run(options: Any) -> list[dict[str, list[tuple[float, float]]]]:
    """Return for each rank, schedule and step the seconds of the step and of its stages' computing."""
    here = multiprocessing.get_context("fork")
    results = here.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        store = str(Path(folder) / "store")
        ranks = [here.Process(target=work, args=(rank, options, store, results)) for rank in range(options.ranks)]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise SystemExit("a rank failed")
    return [found for _, found in sorted(results.get() for _ in ranks)]


def bubbles(found: list[dict[str, list[tuple[float, float]]]], name: str) -> Times:
    """Return the bubble of each step, the mean over the ranks."""
    steps = zip(*(rank[name] for rank in found))
    return Times(tuple(mean(1 - busy / seconds for seconds, busy in step) for step in steps))


def runnable() -> list[str]:
    """List the schedules that this torch can run."""
    splits = torch.__version__ >= shard.SPLITS_BACKWARD
    return [name for name in pipeline.SCHEDULES if splits or name != "interleaved-zero-bubble"]


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--ranks", type=int, default=4)
    given.add_argument("--microbatches", type=int, default=8)
    given.add_argument("--blocks", type=int, default=8)
    given.add_argument("--seconds", type=float, default=0.05, help="of a block's forward; backward takes twice that")
    given.add_argument("--weights", type=float, default=0.0, help="part of the backward pass that is for weights")
    given.add_argument("--schedules", nargs="+", default=runnable())
    options = given.parse_args()
    found = run(options)
    figures: dict[str, Any] = {"ranks": options.ranks, "microbatches": options.microbatches, "weights": options.weights}
    for name in options.schedules:
        config = loading.from_overrides([f"parallel.pipeline={options.ranks}", f"parallel.schedule={name}"])
        theory, measured = pipeline.bubble(config.parallel, options.microbatches), bubbles(found, name)
        step = Times(tuple(seconds for seconds, _ in found[-1][name]))
        print(f"{name:24} bubble {measured.median:.4f} ± {measured.spread:.0%}, theory {theory:.4f}; a step {step}")
        key = name.replace("-", "_")
        figures |= {f"{key}_bubble": round(measured.median, 4), f"{key}_theory": round(theory, 4)}
        figures |= {f"{key}_over_theory": round(measured.median / theory, 3), f"{key}_seconds": round(step.median, 3)}
    finish("pipeline", figures, record=not options.no_record)


if __name__ == "__main__":
    main()
