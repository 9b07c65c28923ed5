"""Keep the inputs of blocks in host memory from the forward to the backward pass, as many as a budget allows.

In: blocks that recompute all but their inputs. Out: the same gradients. Inputs leave on a stream of their own; while
one block is recomputed, those of the block before it come back. Host memory is pinned once and used again.
"""

from __future__ import annotations

import logging
import math
import weakref
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from transpixeler.models.backbone import Compute, Flow
from transpixeler.models.tokens import Tokens

logger = logging.getLogger("transpixeler")


def flat(compute: Compute, tokens: Tokens) -> Callable[..., Flow]:
    """Take the flow's tensors one by one: a checkpoint sees no tensors inside of a tuple."""

    def run(*flow: Tensor) -> Flow:
        return compute(flow, tokens)

    return run


class HostInputs:
    """The host memory of a rank for inputs of its blocks; what does not fit stays on the device."""

    def __init__(self, budget: float = math.inf) -> None:
        self.budget = budget  # bytes
        self.pinned = 0  # bytes of all buffers
        self.moved = 0  # tensors, so far
        self.stayed = 0  # tensors that found no room, so far
        self._free: defaultdict[int, list[_Buffer]] = defaultdict(list)  # by the bytes that they take
        self._streams: tuple[torch.cuda.Stream, torch.cuda.Stream] | None = None  # to the host, and back
        self._last: weakref.ref[_Inputs] | None = None

    def run(self, compute: Compute, flow: Flow, tokens: Tokens, *, carried: int) -> Flow:
        """Run a block that recomputes all; its carried inputs leave the device until then."""
        inputs = _Inputs(self._last)
        self._last = weakref.ref(inputs)
        # the others are shared by all blocks: moving them would multiply them; not the tensors, which `pack` would hold
        leaving = {(x.data_ptr(), x.shape) for x in flow[: carried + tokens.rgb_forward_only]}

        def pack(saved: Tensor) -> Tensor | tuple[_Inputs, int]:
            if (saved.data_ptr(), saved.shape) not in leaving:
                return saved
            return self._pack(saved, inputs)

        with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
            return checkpoint(flat(compute, tokens), *flow, use_reentrant=False)

    def _pack(self, saved: Tensor, inputs: _Inputs) -> Tensor | tuple[_Inputs, int]:
        buffer = self._buffer(saved)
        if buffer is None:
            if not self.stayed:
                said = "parallel.host_gb: %.3g GB have no room for all inputs of blocks; some stay on the GPU"
                logger.warning(said, self.budget / 2**30)
            self.stayed += 1
            return saved
        self.moved += 1
        part = _Part(buffer, saved)
        weakref.finalize(part, self._free[len(buffer.memory)].append, buffer)
        if saved.is_cuda:
            out, _ = self._cuda_streams(saved.device)
            out.wait_stream(torch.cuda.current_stream(saved.device))
            if buffer.read is not None:  # by the copy back of what it held before
                out.wait_event(buffer.read)
            with torch.cuda.stream(out):
                part.host.copy_(saved, non_blocking=True)
                part.left = out.record_event()
            saved.record_stream(out)
        else:
            part.host.copy_(saved)
        inputs.parts.append(part)
        return inputs, len(inputs.parts) - 1

    def _unpack(self, packed: Tensor | tuple[_Inputs, int]) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        inputs, number = packed
        part = inputs.parts[number]
        self._bring(part)
        value, arrived = part.there, part.arrived
        part.there = part.arrived = None
        assert value is not None
        if arrived is not None:
            torch.cuda.current_stream(value.device).wait_event(arrived)
        before = inputs.before() if inputs.before is not None else None
        for other in before.parts if before is not None else ():
            self._bring(other)
        return value

    def _bring(self, part: _Part) -> None:
        """Begin to copy a part back, if that was not begun."""
        if part.there is not None:
            return
        part.there = torch.empty_like(part.host, device=part.device, pin_memory=False)
        if part.device.type != "cuda":
            part.there.copy_(part.host)
            return
        _, back = self._cuda_streams(part.device)
        back.wait_stream(torch.cuda.current_stream(part.device))  # which may still use what had this memory before
        assert part.left is not None
        back.wait_event(part.left)
        with torch.cuda.stream(back):
            part.there.copy_(part.host, non_blocking=True)
            part.arrived = part.buffer.read = back.record_event()

    def _buffer(self, saved: Tensor) -> _Buffer | None:
        """Return memory for a tensor: what is free of its size, or new within the budget, or None."""
        room = taken(saved.numel() * saved.element_size())
        if self._free[room]:
            return self._free[room].pop()
        free = sum(size * len(buffers) for size, buffers in self._free.items())  # of other lengths of clips
        if self.pinned - free + room > self.budget:
            return None
        if self.pinned + room > self.budget:
            self._let_go(room, pinned=saved.is_cuda)
        self.pinned += room
        return _Buffer(torch.empty(room, dtype=torch.uint8, pin_memory=saved.is_cuda))

    def _let_go(self, room: int, *, pinned: bool) -> None:
        """Give back free memory of other sizes until there is room."""
        for size, buffers in self._free.items():
            while self.pinned + room > self.budget and buffers:
                buffers.pop()
                self.pinned -= size
        if pinned:
            torch._C._host_emptyCache()  # torch keeps pinned memory otherwise, and does not cut it

    def _cuda_streams(self, device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream]:
        if self._streams is None:
            self._streams = torch.cuda.Stream(device), torch.cuda.Stream(device)
        return self._streams


class _Buffer:
    """Host memory that one tensor after another is kept in."""

    def __init__(self, memory: Tensor) -> None:
        self.memory = memory  # uint8
        self.read: torch.Event | None = None  # when what it held last was copied back


class _Part:
    """One tensor in host memory, and on the device again once its block's turn is near."""

    def __init__(self, buffer: _Buffer, saved: Tensor) -> None:
        self.buffer, self.device = buffer, saved.device
        bytes_ = buffer.memory[: saved.numel() * saved.element_size()]
        self.host = bytes_.view(saved.dtype).view(saved.shape)
        self.left: torch.Event | None = None  # when it was whole in host memory
        self.there: Tensor | None = None
        self.arrived: torch.Event | None = None


class _Inputs:
    """Hold what one block of a forward pass has in host memory, and whose turn comes after it in the backward pass."""

    def __init__(self, before: weakref.ref[_Inputs] | None) -> None:
        self.before = before
        self.parts: list[_Part] = []


def taken(size: int) -> int:
    """Return the bytes that host memory of a size takes: torch pins it in powers of two."""
    return 1 << (size - 1).bit_length() if size else 0
