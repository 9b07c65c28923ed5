"""The later stages of the GPU's bench: what large bases, host memory, the VAE and several GPUs cost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import harness
import torch
from gpu_blocks import LARGE, REAL, Bench, Line, command, forward, step, steps_of, timed
from torch import Tensor

from transpixeler.demo.write import write_demo
from transpixeler.models.quantize import quantize
from transpixeler.parallel.devices import forget_peak, peak_memory
from transpixeler.parallel.swap import Swap

WAITING = 6  # blocks, of which two are on the device at a time
LAYOUTS = {  # of two GPUs
    "replicas": ("parallel.replicate=2",),
    "shards": ("parallel.shard=2",),
    "stages": ("parallel.pipeline=2",),
    "shared sequences": ("parallel.context=2",),
}


def _large(bench: Bench) -> Bench:
    """Return the same bench of a 14B model's blocks, where it runs at real sizes."""
    return replace(bench, sizes=LARGE) if bench.sizes == REAL else bench


def large(bench: Bench) -> Iterator[Line]:
    """Time blocks as wide as a 14B model's, over a base in bf16, int8 and fp8; tell what quantizing takes."""
    bench = _large(bench)
    layout = bench.layout(bench.sizes.grids[0])
    for kind in ("", "int8", "fp8"):
        plain = bench.model(1, "attention")
        taken = {"quantizing_a_block": round(harness.seconds(partial(quantize, plain, kind)), 4)} if kind else {}
        del plain
        yield {"base": kind or str(bench.dtype), **taken, **timed(bench, layout, 2, "attention", quantized=kind)}


def waiting(bench: Bench) -> Iterator[Line]:
    """Time blocks whose weights wait in host memory; tell which share of the copies work hides."""
    bench = _large(bench)
    layout = bench.layout(bench.sizes.grids[0])
    model = bench.model(WAITING, "full")
    flow, count = bench.flow(model, layout), len(model.blocks)
    here = bench.seconds(partial(step, model, flow, layout))
    swap = Swap(model.block_list(), bench.device)
    model.run_block = swap.run
    forget_peak(bench.device)
    away = bench.seconds(partial(step, model, flow, layout))
    memory = {"peak_gib": round(peak_memory(bench.device), 3)} if bench.device.type == "cuda" else {}
    swap.clear()
    one = swap.waiting[0]

    def copy() -> None:
        one.come(swap._stream)
        one.leave()

    copies = 2 * count * bench.seconds(copy)  # each block comes forward and backward
    hidden = {"hidden": round(1 - max(0.0, away - here) / copies, 3)} if bench.device.type == "cuda" else {}
    yield {
        "blocks": count,
        "weights_gib": round(swap.bytes / 2**30, 3),
        "seconds": round(away, 4),
        "seconds_without": round(here, 4),
        "copies_alone": round(copies, 4),
        **hidden,
        **memory,
    }


@torch.no_grad()
def vae(bench: Bench) -> Iterator[Line]:
    """Time Wan's VAE, of random weights, on a clip as the cache encodes it and as sampling decodes it."""
    from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan

    small: dict[str, Any] = {} if bench.sizes.video == REAL.video else {"base_dim": 8, "num_res_blocks": 1}
    with torch.device(bench.device):
        network: Any = AutoencoderKLWan(**small)
    network.to(bench.dtype)
    frames, height, width = bench.sizes.video
    video = torch.rand(1, 3, frames, height, width, device=bench.device, dtype=bench.dtype) * 2 - 1
    latents: Tensor = network.encode(video).latent_dist.mode()
    ways: dict[str, Callable[[], object]] = {
        "encode": partial(network.encode, video),
        "decode": partial(network.decode, latents),
    }
    for name, way in ways.items():
        forget_peak(bench.device)
        taken = bench.seconds(way)
        memory = {"peak_gib": round(peak_memory(bench.device), 3)} if bench.device.type == "cuda" else {}
        yield {"way": name, "seconds": round(taken, 4), "frames_a_second": round(frames / taken, 2), **memory}


@torch.no_grad()
def sampling(bench: Bench) -> Iterator[Line]:
    """Time a forward pass of all blocks, compiled and not, and what compiling takes: when sampling would gain by it."""
    layout = bench.layout(bench.sizes.grids[1])
    seconds = {}
    for compiled in (False, True) if bench.device.type == "cuda" else (False,):
        model = bench.model(bench.sizes.blocks, "none", compiled=compiled)
        run = partial(forward, model, bench.flow(model, layout), layout)
        first = harness.seconds(run)
        seconds["compiled" if compiled else "eager"] = round(bench.seconds(run), 4)
        seconds["first_compiled" if compiled else "first"] = round(first, 4)
        del model
    yield seconds


def several(bench: Bench) -> Iterator[Line]:
    """Train the demo on two GPUs in each way to share work: the losses are the same, and what a step takes."""
    if bench.device.type == "cuda" and torch.cuda.device_count() < 2:
        yield {"left_out": "there is one GPU"}
        return
    ways = LAYOUTS if bench.device.type == "cuda" else {"replicas": LAYOUTS["replicas"]}
    with tempfile.TemporaryDirectory() as folder:
        write_demo(Path(folder, "demo"), train_clips=8, eval_clips=1)
        for name, keys in ways.items():
            output = Path(folder, name.replace(" ", "_"))
            few = ("train.max_steps=4", "eval.every_epochs=0", "eval.before_first_step=false", "log.tensorboard=false")
            words = ("train", f"{folder}/demo/config.yaml", f"output_dir={output}", *few, *keys)
            command(*words, ranks=2, limit=180)
            steps = steps_of(output)
            told = {key: [round(one[key], 6) for one in steps] for key in ("loss", "seconds")}
            yield {"layout": name, **told}
