"""Block swap: keep the frozen weights of some blocks in host memory, and bring each block's in before it is used.

In: blocks whose weights were loaded on the CPU. Out: the same blocks under the same names, which `Swap.run` runs. The
weights of two of them are on the device at a time: of the one at work, and of the next, which is copied meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from transpixeler.models.backbone import Block, Flow
from transpixeler.models.lora import is_base
from transpixeler.models.tokens import Tokens

SLOTS = 2  # blocks whose weights are on the device at a time
ALIGNMENT = 256  # bytes, at a multiple of which each weight begins


class Waiting:
    """The frozen weights of one block: whole in host memory, and on the device between `come` and `leave`.

    Autograd may keep views of a weight for the backward pass. Their storage is emptied and filled again, but never
    replaced, so that they need no memory while the block waits, and are right when it is back.
    """

    def __init__(self, block: Block, device: torch.device) -> None:
        self.weights = [w for name, w in block.named_parameters() if is_base(name) and not w.requires_grad]
        self.device = device
        self.bytes = sum(_room(weight) for weight in self.weights)
        self._host = torch.empty(self.bytes, dtype=torch.uint8, pin_memory=device.type == "cuda")
        self._there = torch.empty(self.bytes, dtype=torch.uint8, device=device)
        self._on_host, self._on_device = self._cut(self._host), self._cut(self._there)
        self._copied: torch.Event | None = None
        for weight, place in zip(self.weights, self._on_host, strict=True):
            place.copy_(weight.data)
        self.leave()

    def _cut(self, flat: Tensor) -> list[Tensor]:
        """View bytes as the weights whose they are."""
        parts = flat.split([_room(weight) for weight in self.weights])
        return [
            part[: w.numel() * w.element_size()].view(w.dtype).view(w.shape)
            for part, w in zip(parts, self.weights, strict=True)
        ]

    @property
    def held(self) -> int:
        """Return the bytes that are on the device now."""
        return self._there.untyped_storage().nbytes()

    def come(self, stream: torch.cuda.Stream | None) -> None:
        """Begin to copy to the device, on a stream of its own where there is one."""
        self._there.untyped_storage().resize_(self.bytes)
        if stream is None:
            self._there.copy_(self._host)
        else:
            stream.wait_stream(
                torch.cuda.current_stream(self.device)
            )  # which may still use what had this memory before
            with torch.cuda.stream(stream):
                self._there.copy_(self._host, non_blocking=True)
                self._copied = stream.record_event()
        self._show(self._on_device)

    def wait(self) -> None:
        """Let the current stream wait until the weights are whole."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
            self._copied = None

    def leave(self) -> None:
        """Free the device's memory of them. The current stream is the one that used them and that uses it next."""
        self.wait()
        self._show(self._on_host)
        self._there.untyped_storage().resize_(0)

    def _show(self, places: Sequence[Tensor]) -> None:
        for weight, place in zip(self.weights, places, strict=True):
            weight.data = place


class Swap:
    """The blocks of a rank whose weights wait, in the order of a forward pass."""

    def __init__(self, blocks: Sequence[Block], device: torch.device) -> None:
        self.waiting = [Waiting(block, device) for block in blocks]
        self._places = {id(block): place for place, block in enumerate(blocks)}
        self._here: list[int] = []  # places of those on the device; the one that was needed last is last
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    @property
    def bytes(self) -> int:
        """Return the bytes of host memory that its blocks take."""
        return sum(waiting.bytes for waiting in self.waiting)

    def holds(self, weight: Tensor) -> bool:
        return any(weight is other for waiting in self.waiting for other in waiting.weights)

    def run(self, block: Block, flow: Flow, tokens: Tokens) -> Flow:
        """Run a block of the model, whose weights are there by then, and again in its backward pass."""
        place = self._places.get(id(block))
        if place is None:
            return block(flow, tokens)
        last = place + 1 == len(self.waiting)
        if torch.is_grad_enabled():  # the last one's backward pass comes next: nothing is to be brought
            self._use(place, then=None if last else place + 1)
        else:
            self._use(place, then=0 if last else place + 1)
        out = block(flow, tokens)
        changed = block.carried + tokens.rgb_forward_only
        for made, given in zip(out[:changed], flow[:changed], strict=True):
            if made.requires_grad and made is not given:
                made.register_hook(self._before_backward(place))
        return out

    def _before_backward(self, place: int) -> Callable[[Tensor], None]:
        """Return a hook of what a block gives out: it runs when all that came after has had its backward pass."""
        return lambda _: self._use(place, then=place - 1 if place else None)

    def _use(self, place: int, *, then: int | None) -> None:
        self._bring(place)
        self.waiting[place].wait()
        if then is not None:
            self._bring(then)

    def _bring(self, place: int) -> None:
        """Begin to copy a block's weights if they are not there, in place of those not needed for the longest time."""
        if place in self._here:
            self._here.remove(place)
        else:
            while len(self._here) >= SLOTS:
                self.waiting[self._here.pop(0)].leave()
            self.waiting[place].come(self._stream)
        self._here.append(place)

    def clear(self) -> None:
        """Free the device's memory of all of them."""
        while self._here:
            self.waiting[self._here.pop()].leave()


def _room(weight: Tensor) -> int:
    """Return the bytes that a weight takes, with those to the next multiple of the alignment."""
    return -(-weight.numel() * weight.element_size() // ALIGNMENT) * ALIGNMENT


def spread(count: int, chosen: int) -> list[int]:
    """Spread the chosen ones evenly over so many blocks: others compute while one is copied, on each stage alike."""
    return [place for place in range(count) if (place + 1) * chosen // count > place * chosen // count]
