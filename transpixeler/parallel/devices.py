"""Look up a GPU's peak speed and memory by its name, and measure how much memory this process used.

In: a device or its name. Out: TFLOP/s and GiB, for plans and for the records of steps.
"""

from __future__ import annotations

import os
import sys
from collections.abc import MutableMapping
from pathlib import Path
from typing import NamedTuple

import torch

FREE_SHARE = 0.5  # of free memory that may be taken by what computing again can replace; activations need the rest


class Device(NamedTuple):
    """A GPU that many have."""

    name: str  # a part of the name that its driver gives
    tflops: float  # dense bf16 peak
    memory: int  # GiB


# A name that holds another stands before it, since the first that fits is taken.
KNOWN = (
    Device("B200", 2250.0, 180),
    Device("H200", 989.0, 141),
    Device("H100 PCIe", 756.0, 80),
    Device("H100", 989.0, 80),
    Device("H800", 989.0, 80),
    Device("A100", 312.0, 80),
    Device("A800", 312.0, 80),
    Device("L40S", 362.0, 48),
    Device("RTX PRO 6000", 504.0, 96),
    Device("5090", 209.0, 32),
    Device("4090", 165.0, 24),
    Device("3090", 71.0, 24),
    Device("A6000", 155.0, 48),
)


def find(name: str) -> Device | None:
    """Return the known device whose name is a part of the given one."""
    return next((device for device in KNOWN if device.name.lower() in name.lower()), None)


def peak_tflops(device: torch.device) -> float:
    """Return the dense bf16 peak of the device, or 0 where it is not known."""
    known = find(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.tflops if known else 0.0


def peak_memory(device: torch.device) -> float:
    """Return the most GiB held since `forget_peak`; on a CPU, by the process since it began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    import resource  # not there on Windows

    scale = 2**10 if sys.platform == "darwin" else 1
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale / 2**20


def memory_facts(device: torch.device) -> dict[str, float]:
    """Return GiB that the allocator holds, used or not, and how often it had to give all back and ask again."""
    if device.type != "cuda":
        return {}
    statistics = torch.cuda.memory_stats(device)
    reserved = statistics.get("reserved_bytes.all.peak", 0) / 2**30
    return {"memory_reserved_gib": reserved, "allocation_retries": statistics.get("num_alloc_retries", 0)}


def memory(device: torch.device) -> int:
    """Return the bytes that a device has, used or not; of a CPU its rank's share of the machine's."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()


def host_memory() -> int:
    """Return the bytes that the machine has, used or not, for each of its ranks."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def free_host_memory() -> int:
    """Return the bytes that the system has free or can free, for each rank of this machine."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines())
    free = next(int(size) * 1024 for name, size, *_ in lines if name == "MemAvailable:")
    return free // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def place(where: str, size: int, device: torch.device) -> str:
    """Resolve `auto` for so many bytes that computing again can replace: "device", "host" or "off", by what is free."""
    if where != "auto" or device.type != "cuda":
        return "device" if where == "auto" else where
    if size <= FREE_SHARE * torch.cuda.mem_get_info(device)[0]:
        return "device"
    return "host" if size <= FREE_SHARE * free_host_memory() else "off"


def prepare_allocator(environment: MutableMapping[str, str]) -> None:
    """Have CUDA's allocator grow its segments, before it starts: buckets of changing size fragment fixed ones.

    What a user has set stays as it is.
    """
    if "PYTORCH_ALLOC_CONF" not in environment and sys.platform == "linux":
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def be_deterministic() -> None:
    """Have torch give the same bits each time, or an error; cuBLAS reads its setting when it first starts."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # pyright: ignore[reportAttributeAccessIssue]


def forget_peak(device: torch.device) -> None:
    """Start measuring anew, so that the memory of encoders and evaluations does not count as a step's."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
