"""Share what stages of the GPU's bench need: sizes, blocks under an adapter, and a timed step of them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch

from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.models.backbone import Flow, apply_dtypes
from transpixeler.models.costs import Costs, activation_bytes, step_flops
from transpixeler.models.lora import inject
from transpixeler.models.quantize import quantize
from transpixeler.models.streams import Grid, StreamLayout
from transpixeler.parallel.devices import forget_peak, peak_memory
from transpixeler.parallel.shard import set_recompute

ROOT = Path(__file__).parents[2]
Line = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """Sizes of everything that runs."""

    heads: int
    head: int
    ffn: int
    blocks: int
    grids: tuple[Grid, Grid]  # one stream's frames, rows and columns of tokens, in two buckets; the second is larger
    keys: tuple[int, ...]  # lengths at which kernels race
    matmul: int
    rank: int
    video: tuple[int, int, int]  # frames, height and width that a VAE encodes


REAL = Sizes(12, 128, 8960, 30, ((9, 30, 52), (21, 30, 52)), (28_080, 65_520, 65_600), 8192, 128, (81, 480, 832))
LARGE = Sizes(40, 128, 13_824, 6, REAL.grids, REAL.keys, REAL.matmul, REAL.rank, REAL.video)  # of the 14B models
TOY = Sizes(2, 24, 96, 2, ((1, 2, 2), (2, 4, 4)), (96, 192), 64, 4, (5, 32, 32))


@dataclass(frozen=True)
class Bench:
    """Hold what all stages share."""

    sizes: Sizes
    device: torch.device
    repeats: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def seconds(self, action: Callable[[], object]) -> float:
        """Return the fastest of some runs, after one that warms up."""
        action()
        return min(harness.seconds(action) for _ in range(self.repeats))

    def layout(self, grid: Grid) -> StreamLayout:
        frames, rows, columns = grid
        return StreamLayout.equal(("rgb", "seg"), (16, frames, 2 * rows, 2 * columns), (1, 2, 2))

    def costs(self, blocks: int, *, attends: bool = True) -> Costs:
        """Return what `plan` counts of the same model."""
        return Costs.of(self._made(blocks, torch.device("meta"), attends=attends))

    def _made(self, blocks: int, device: torch.device, *, attends: bool) -> WanModel:
        s = self.sizes
        config = WanConfig(num_attention_heads=s.heads, attention_head_dim=s.head, ffn_dim=s.ffn, num_layers=blocks)
        with torch.device(device):
            model = WanModel(config, streams=("rgb", "seg"), rgb_attends_aux=attends)
            inject(model, LoraConfig(rank=s.rank))
        apply_dtypes(model, self.dtype)
        return model

    def model(
        self, blocks: int, mode: str, *, compiled: bool = False, attends: bool = True, quantized: str = ""
    ) -> WanModel:
        """Return blocks under an adapter, as a stage holds them."""
        model = self._made(blocks, self.device, attends=attends)
        if quantized:
            quantize(model, quantized)
        set_recompute(model.block_list(), mode)
        for block in model.block_list() if compiled else ():
            block.compile(dynamic=False)
        return model

    def flow(self, model: WanModel, layout: StreamLayout) -> Flow:
        """Return what enters the first block; what blocks change wants a gradient."""
        metas = model.flow_meta(layout, 1, self.dtype)
        whole = tuple(torch.randn(x.shape, dtype=x.dtype, device=self.device) / 4 for x in metas)
        flow = model.divided(whole, layout)
        for tensor in flow[: model.differentiated]:
            tensor.requires_grad_()
        return flow


def forward(model: WanModel, flow: Flow, layout: StreamLayout) -> Flow:
    """Run the blocks, by way of what swaps their weights where something does."""
    tokens, run = model.tokens(layout, flow[0].device), model.run_block
    for block in model.block_list():
        flow = block(flow, tokens) if run is None else run(block, flow, tokens)
    return flow


def step(model: WanModel, flow: Flow, layout: StreamLayout) -> None:
    """Run the blocks forward and backward."""
    forward(model, flow, layout)[0].float().square().mean().backward()


def timed(
    bench: Bench,
    layout: StreamLayout,
    count: int,
    mode: str,
    *,
    compiled: bool = False,
    attends: bool = True,
    quantized: str = "",
) -> Line:
    """Time a step of some blocks; tell its FLOPs a second and its memory beside what `plan` says."""
    model = bench.model(count, mode, compiled=compiled, attends=attends, quantized=quantized)
    flow, costs = bench.flow(model, layout), bench.costs(count, attends=attends)
    step(model, flow, layout)  # compiles; gradients are there from here on
    held = torch.cuda.memory_allocated() if bench.device.type == "cuda" else 0
    forget_peak(bench.device)
    taken = bench.seconds(partial(step, model, flow, layout))
    flops = step_flops(costs, layout.lengths)
    size, lengths = bench.dtype.itemsize, layout.lengths
    planned = activation_bytes(costs, lengths, size=size, recompute=mode, compiled=compiled)
    memory = {"planned_gib": round(planned / 2**30, 3)}
    if bench.device.type == "cuda":
        memory["peak_gib"] = round(peak_memory(bench.device) - held / 2**30, 3)
    return {"seconds": round(taken, 4), "model_tflops": round(flops / taken / 1e12, 4), **memory}


# -- whole trainings


def command(*argv: str, ranks: int = 1, limit: float | None = None) -> None:
    """Run a command of transpixeler, on several ranks under torchrun. limit: seconds."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)) if ranks > 1 else ()
    words = [sys.executable, *launcher, "-m", "transpixeler", *argv]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=limit)
    if done.returncode:
        raise RuntimeError(f"{argv[0]}: {done.stderr.strip().splitlines()[-1]}")


def steps_of(output: Path) -> list[Line]:
    """Return the records of steps of a run; one that was cut off is left out."""
    lines = (output / "latest/metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines if line.endswith("}")]
    return [record for record in records if "checkpoint_stall" in record]
