"""Take what a rented GPU can tell in ten minutes, cheapest first: a JSON line each, so that a cut-off run still tells.

In this order: what the machine is and its matmuls' peak → the tests marked cuda → attention kernels, forward and
backward, with the error of their gradients on sampled rows → a block under each recompute mode, eager and compiled, its
peak of memory beside what `plan` says → RGB forward only → a whole model's blocks → two buckets by turns: recompiles,
allocation retries, reserved memory → training on the demo, killed and resumed → a forward pass as sampling makes it,
eager and compiled → blocks of a 14B model over bf16, int8 and fp8 → weights that wait in host memory, and how much of
their copies is hidden → the VAE, both ways → training on two GPUs in each way to share work.

Without CUDA, or with --toy, the same runs at sizes that take no time. A stage that fails says so in its line and the
others go on; the exit code is then 1. A stage whose turn comes after --minutes is left out.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import gpu_large
import harness
import torch
from gpu_blocks import REAL, ROOT, TOY, Bench, Line, command, step, steps_of, timed
from torch import Tensor
from torch.nn.attention import restore_flash_attention_impl

from transpixeler.config.sections import UserError
from transpixeler.demo.write import write_demo
from transpixeler.models.attention import attention, available_kernels, pick_kernel
from transpixeler.parallel.devices import memory_facts, prepare_allocator
from transpixeler.parallel.runtime import quiet_libraries

MODES = ("none", "attention", "full", "offload")
SAMPLED = 256  # rows of queries whose gradient is held against fp32
FLASH = 4, 10  # FLOPs of attention forward and backward, times width and pairs

# -- the stages


def machine(bench: Bench) -> Iterator[Line]:
    n = bench.sizes.matmul
    a, b = (torch.randn(n, n, device=bench.device, dtype=bench.dtype) for _ in range(2))
    taken = bench.seconds(partial(torch.mm, a, b))
    yield {"machine": harness.machine(), "matmul_tflops": round(2 * n**3 / taken / 1e12, 4)}


def cuda_tests(bench: Bench) -> Iterator[Line]:
    """Run the tests that only a GPU can show; without one they are skipped, and the line says so."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/test_cuda.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    said = done.stdout.strip().splitlines()
    yield {"exit_code": done.returncode, "said": said[-8:] if done.returncode else said[-1:]}
    if done.returncode:
        raise RuntimeError("tests marked cuda fail")


def kernels(bench: Bench) -> Iterator[Line]:
    """Race attention's kernels; a kernel that does not run says why."""
    heads, head = bench.sizes.heads, bench.sizes.head
    for kernel in available_kernels(bench.device):  # those that take the place of flash come last
        if kernel == "math" and bench.device.type != "cpu":  # which would hold all scores
            continue
        for keys in bench.sizes.keys:
            shape = 1, keys, heads, head
            q, k, v, grad = (torch.randn(shape, device=bench.device, dtype=bench.dtype) for _ in range(4))
            for tensor in (q, k, v):
                tensor.requires_grad_()
            yield {"keys": keys, "kernel": kernel, **_raced(bench, kernel, (q, k, v), grad)}
    restore_flash_attention_impl(_raise_warn=False)


def _raced(bench: Bench, kernel: str, qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor) -> Line:
    q, k, v = qkv
    try:
        pick_kernel(kernel, bench.device, bench.dtype, q.shape[-1])
        out = attention(q, k, v, kernel)
        forward = bench.seconds(partial(attention, q, k, v, kernel))
        backward = bench.seconds(partial(torch.autograd.grad, out, qkv, grad, retain_graph=True))
        (found, *_) = torch.autograd.grad(out, qkv, grad)
    except (RuntimeError, UserError) as error:
        return {"does_not_run": str(error).splitlines()[0]}
    work = q.shape[1] * k.shape[1] * q.shape[2] * q.shape[3]
    rates = {"forward": FLASH[0] * work / forward / 1e12, "backward": FLASH[1] * work / backward / 1e12}
    return {f"{name}_tflops": round(rate, 4) for name, rate in rates.items()} | {"grad_error": _error(qkv, grad, found)}


def _error(qkv: tuple[Tensor, Tensor, Tensor], grad: Tensor, found: Tensor) -> float:
    """Return the relative error of the queries' gradient on sampled rows, against fp32; nan stays nan."""
    rows = torch.linspace(0, grad.shape[1] - 1, min(SAMPLED, grad.shape[1])).long().to(grad.device)
    q = qkv[0].detach()[:, rows].float().requires_grad_()
    k, v = (x.detach().float() for x in qkv[1:])
    out = attention(q, k, v, "math")
    (exact,) = torch.autograd.grad(out, q, grad[:, rows].float())
    return round(float((found[:, rows].float() - exact).norm() / exact.norm()), 6)


def blocks(bench: Bench) -> Iterator[Line]:
    """Time two blocks under each recompute mode: what they keep shows only between blocks."""
    layout = bench.layout(bench.sizes.grids[1])
    for mode in MODES:
        for compiled in (False, True) if bench.device.type == "cuda" and mode != "offload" else (False,):
            yield {"mode": mode, "compiled": compiled, **timed(bench, layout, 2, mode, compiled=compiled)}


def forward_only(bench: Bench) -> Iterator[Line]:
    """Time blocks whose RGB sees itself alone and has no backward pass."""
    layout = bench.layout(bench.sizes.grids[1])
    yield timed(bench, layout, 2, "attention", compiled=bench.device.type == "cuda", attends=False)


def whole(bench: Bench) -> Iterator[Line]:
    """Time all blocks of a model at the larger bucket."""
    layout = bench.layout(bench.sizes.grids[1])
    yield timed(bench, layout, bench.sizes.blocks, "attention", compiled=bench.device.type == "cuda")


def buckets(bench: Bench) -> Iterator[Line]:
    """Run two buckets by turns: none compiles anew at its second turn, and memory does not fragment."""
    compiled = bench.device.type == "cuda"
    model = bench.model(2, "attention", compiled=compiled)
    layouts = [bench.layout(grid) for grid in bench.sizes.grids]
    turns, graphs = [], []
    for layout in layouts * 4:
        turns.append(round(harness.seconds(partial(step, model, bench.flow(model, layout), layout)), 4))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    yield {"turns": turns, "compiled_anew": graphs[-1] - graphs[1], **memory_facts(bench.device)}


def trainer(bench: Bench) -> Iterator[Line]:
    """Train on the demo, kill it after a checkpoint, resume; tell what steps and checkpoints took."""
    del bench  # the demo has its own sizes
    with tempfile.TemporaryDirectory() as folder:
        config, output = f"{folder}/demo/config.yaml", Path(folder, "output")
        write_demo(Path(folder, "demo"), train_clips=8, eval_clips=2)
        few = ("checkpoint.every_steps=2", "eval.every_epochs=0", "eval.before_first_step=false", "save.every_epochs=0")
        settings = (f"output_dir={output}", "train.max_steps=6", "log.tensorboard=false", *few)
        started = [sys.executable, "-m", "transpixeler", "train", config, *settings, "train.max_steps=1000"]
        with subprocess.Popen(started, cwd=ROOT, stderr=subprocess.DEVNULL) as process:
            limit = time.monotonic() + 120
            while process.poll() is None and time.monotonic() < limit and not _saved(output):
                time.sleep(0.2)
            process.kill()
        killed_at = max(int(step["step"]) for step in steps_of(output))
        command("train", config, *settings, f"train.max_steps={killed_at + 4}", "--resume")
        steps = steps_of(output)
    told = {name: [round(step[name], 4) for step in steps] for name in ("seconds", "data_wait", "checkpoint_stall")}
    yield {"killed_at": killed_at, "steps": steps[-1]["step"], **told, "memory_gib": round(steps[-1]["memory_gib"], 3)}


def _saved(output: Path) -> list[Path]:
    return [*output.glob("latest/checkpoints/global_step*[0-9]")]


STAGES = (
    *(machine, cuda_tests, kernels, blocks, forward_only, whole, buckets, trainer),
    *(gpu_large.sampling, gpu_large.large, gpu_large.waiting, gpu_large.vae, gpu_large.several),
)


# -- the bench


def run(bench: Bench, deadline: float) -> Iterator[Line]:
    """Yield each stage's lines, as they come."""
    for stage in STAGES:
        start = time.monotonic()
        if start > deadline:
            yield {"stage": stage.__name__, "left_out": "no time"}
            continue
        try:
            for line in stage(bench):
                yield {"stage": stage.__name__, **line, "after": round(time.monotonic() - start, 1)}
        except Exception as error:  # the next stage may tell what this one cannot; the exit code says that it failed
            traceback.print_exc()
            yield {"stage": stage.__name__, "fault": f"{type(error).__name__}: {error}"}
        if bench.device.type == "cuda":
            torch.cuda.empty_cache()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--toy", action="store_true", help="sizes that take no time, as without CUDA")
    parser.add_argument("--repeats", type=int, default=3, help="how often each thing is timed")
    parser.add_argument("--minutes", type=float, default=9.0, help="no stage starts later")
    parser.add_argument("--no-record", action="store_true", help="change nothing: this bench never writes results.md")
    args = parser.parse_args(argv)
    prepare_allocator(os.environ)
    quiet_libraries()
    cuda, start = torch.cuda.is_available(), time.monotonic()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    bench = Bench(REAL if cuda and not args.toy else TOY, device, args.repeats)
    faults = []
    for line in run(bench, start + 60 * args.minutes):
        print(json.dumps(line), flush=True)
        faults += [line["stage"]] if "fault" in line else []
    print(json.dumps({"faults": faults, "seconds": round(time.monotonic() - start, 1)}), flush=True)
    return 1 if faults else 0


if __name__ == "__main__":
    raise SystemExit(main())
