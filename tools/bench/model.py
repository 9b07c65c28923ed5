"""One training step of joint blocks against the same blocks of diffusers with a peft LoRA and an output mask.

Both hold the same weights, start from the same hidden states, and must agree on the adapter's gradients before anything
is timed. Runs alternate in one process; memory is the peak of live tensor bytes within a step, counted operator by
operator. Last line: JSON with `x_rival_time` and `x_rival_memory`, the rival's figure over ours.
"""

from __future__ import annotations

import argparse
import json
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transpixeler.config import LoraConfig
from transpixeler.models.lora import inject, lora_linears
from transpixeler.models.streams import StreamLayout
from transpixeler.models.wan import WanModel
from transpixeler.models.wan_keys import from_diffusers, module_to_diffusers

NAMES = {"self_attn": "attn1", "cross_attn": "attn2"}


class LiveBytes(TorchDispatchMode):
    """The peak of bytes in storages that operators made and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self.known and key not in inputs:
                self.known.add(key)
                self.now += size
                weakref.finalize(storage, self._freed, key, size)
        self.peak = max(self.peak, self.now)
        return out


class Rival(nn.Module):
    """Diffusers' blocks under peft, its LoRA masked to the second half of the tokens."""

    def __init__(self, config: dict[str, Any], lora: LoraConfig, grid: tuple[int, int, int]) -> None:
        super().__init__()
        from diffusers import WanTransformer3DModel
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear as PeftLinear

        model = WanTransformer3DModel(**config)
        wanted = [module_to_diffusers(f"blocks.0.{target}").removeprefix("blocks.0.") for target in lora.targets]
        peft = PeftConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=wanted)
        self.blocks = inject_adapter_in_model(peft, model).blocks
        f, h, w = grid
        cos, sin = model.rope(torch.empty(1, 1, f, 2 * h, 2 * w))
        self.rope = torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)
        mask = torch.cat([torch.zeros(1, f * h * w, 1), torch.ones(1, f * h * w, 1)], 1)
        for module in self.blocks.modules():
            if isinstance(module, PeftLinear):
                module.lora_B["default"].register_forward_hook(lambda _, __, out: out * mask)

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = block(hidden, context, modulation[:, 0], self.rope)
        return hidden


class Ours(nn.Module):
    def __init__(self, config: dict[str, Any], lora: LoraConfig, layout: StreamLayout) -> None:
        super().__init__()
        model = WanModel.from_config(config, streams=layout.names)
        inject(model, lora)
        self.blocks, self.tokens = model.blocks, model.positions(layout, torch.device("cpu"))

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks.values():
            hidden = block(hidden, modulation, context, self.tokens)
        return hidden


def share_weights(ours: Ours, rival: Rival) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """The rival's weights and adapter into ours; returns the pairs of adapter parameters."""
    theirs = {name.replace(".base_layer", ""): p for name, p in rival.named_parameters()}
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.items():
            if ".lora_" not in name:
                mine[from_diffusers(name)].copy_(parameter)
        pairs = {}
        for name, module in lora_linears(ours):
            for kind in ("lora_A", "lora_B"):
                other = theirs[f"{module_to_diffusers(name)}.{kind}.default.weight"]
                nn.init.normal_(other, std=0.02)
                getattr(module, kind).copy_(other)
                pairs[f"{name}.{kind}"] = (getattr(module, kind), other)
    return pairs


def step(model: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    model.zero_grad(set_to_none=True)
    model(*inputs).square().mean().backward()


def seconds(action: Callable[[], None]) -> float:
    start = time.perf_counter()
    action()
    return time.perf_counter() - start


def peak_bytes(model: nn.Module, inputs: tuple[Tensor, ...]) -> int:
    with LiveBytes() as live:
        step(model, inputs)
    return live.peak


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--grid", type=int, nargs=3, default=(4, 16, 16), help="one stream's frames, rows, columns")
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args()


def both(args: argparse.Namespace) -> tuple[Ours, Rival, tuple[Tensor, ...]]:
    """The two with the same weights, what they start from, and the proof that they compute the same."""
    torch.manual_seed(0)
    config = {
        "num_attention_heads": args.width // 128,
        "attention_head_dim": 128,
        "ffn_dim": args.width * 9 // 2,
        "num_layers": args.blocks,
        "text_dim": 64,
    }
    f, h, w = args.grid
    layout = StreamLayout.equal(("rgb", "seg"), (16, f, 2 * h, 2 * w), (1, 2, 2))
    lora = LoraConfig(rank=args.rank)
    rival, ours = Rival(config, lora, (f, h, w)), Ours(config, lora, layout)
    pairs = share_weights(ours, rival)
    hidden, context = torch.randn(args.batch, layout.tokens, args.width), torch.randn(args.batch, 512, args.width)
    modulation = torch.randn(args.batch, 1, 6, args.width).expand(-1, 2, -1, -1) / 4
    inputs = hidden, modulation, context
    for model in (ours, rival):
        step(model, inputs)
    for name, (mine, other) in pairs.items():
        tolerance = 1e-4 * float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, atol=tolerance, rtol=1e-3, msg=name)
    return ours, rival, inputs


def main() -> None:
    args = arguments()
    ours, rival, inputs = both(args)
    times = [(seconds(lambda: step(ours, inputs)), seconds(lambda: step(rival, inputs))) for _ in range(args.repeats)]
    mine, other = (min(column) for column in zip(*times, strict=True))  # the least disturbed of each
    bytes_mine, bytes_other = peak_bytes(ours, inputs), peak_bytes(rival, inputs)
    print(f"ours {mine:.3f} s, {bytes_mine >> 20} MiB; diffusers + peft {other:.3f} s, {bytes_other >> 20} MiB")
    figures = {
        "seconds": round(mine, 4),
        "rival_seconds": round(other, 4),
        "mib": round(bytes_mine / 2**20, 1),
        "rival_mib": round(bytes_other / 2**20, 1),
        "x_rival_time": round(other / mine, 3),
        "x_rival_memory": round(bytes_other / bytes_mine, 3),
        "tokens": inputs[0].shape[1],
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
