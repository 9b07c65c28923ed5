"""Time a training step of joint blocks against its own arithmetic, and against diffusers' blocks with a peft LoRA.

`limit` is what any such step must multiply, and nothing else, on tensors that are there already: every projection
forward and for its input's gradient, the adapter's products on its scope with both weight gradients, both attentions
forward and backward, and what has to be computed again when all that a block keeps is its input and its attentions'
outputs (all projections but the last, whose result no gradient needs). The rival is what one would write without us:
diffusers' blocks, a peft LoRA whose output is masked, every block checkpointed whole.

All ratios are ours over theirs, so smaller is better: `x_limit` (time), `x_rival_time`, `x_rival_memory`, and
`x_rival_memory_full`, where ours keeps as little between blocks as the rival. `x_half_time` and `x_half_memory` are
ours with a companion at scale 2 over ours with one of full size, and `x_half_rival_time` is that over the rival, whose
companion is of full size. `x_forward_only` and `x_forward_only_memory` are of a
step whose RGB sees itself alone: RGB forward only over RGB with a backward pass too. On CPUs time is one thread's CPU
time.
`--against PATH` compares ours with ours of another checkout; `limit`, the same in both, shows how far to trust it.

Both sides hold the same weights, start from the same hidden states, which want a gradient as between two blocks, and
must agree on every gradient of the adapter before anything is timed. Memory is the peak of live tensor bytes within a
step, counted operator by operator.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import Any

import harness
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from transpixeler.config.sections import LoraConfig
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanBlock, WanModel
from transpixeler.families.wan.names import NAMES
from transpixeler.models.linear import Linear
from transpixeler.models.lora import LoraLinear, inject, lora_linears
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel.shard import set_recompute

TEXT_TOKENS = 512
LAST_PROJECTION = "ffn.2"  # of a block; no gradient needs its result, which is only added

APART = {"attends": False, "forward_only": True}  # RGB sees itself alone, and has no backward pass
BOTH_WAYS = {"attends": False}
WAYS = {"forward_only": APART, "both_ways": BOTH_WAYS}

Inputs = tuple[Tensor, Tensor, Tensor]  # hidden [B, T, D], modulation [B, S, 6, D], context [B, TEXT_TOKENS, D]


# -- the limit


class Limit:
    """Run the products of one step, each on preallocated tensors; `flops` is their sum."""

    def __init__(self, blocks: Sequence[WanBlock], *, tokens: int, batch: int, recompute: bool = True) -> None:
        self.tokens, self.batch, self.flops = tokens, batch, 0
        self.tensor = cache(lambda slot, *shape: torch.randn(shape) / 8)
        self.products: list[Callable[[], object]] = []
        for block in blocks:
            for name, linear in block.named_modules():
                if isinstance(linear, Linear):
                    self._projection(name, linear, again=recompute)
            for keys in (tokens, TEXT_TOKENS):
                self._attention(block.self_attn.heads, keys, width=block.self_attn.q.weight.shape[1])

    def __call__(self) -> None:
        for product in self.products:
            product()

    def _projection(self, name: str, linear: Linear, *, again: bool) -> None:
        """Add a projection's products: forward, once more if recomputed, and backward."""
        on_text, (wide, narrow) = name in ("cross_attn.k", "cross_attn.v"), linear.weight.shape
        rows = self.batch * (TEXT_TOKENS if on_text else self.tokens)
        x, y, weight = self.tensor("x", rows, narrow), self.tensor("y", rows, wide), linear.weight.detach()
        for _ in range(1 + (again and name != LAST_PROJECTION)):
            self._multiply(x, weight.t(), y)
        if not on_text:  # the text wants no gradient
            self._multiply(y, weight, self.tensor("gx", rows, narrow))
        if isinstance(linear, LoraLinear):
            self._adapter(name, linear, rows // 2, again=again)

    def _adapter(self, name: str, linear: LoraLinear, rows: int, *, again: bool) -> None:
        down, up = (tensor.detach() for tensor in linear.pairs[0][:2])
        x, y = self.tensor("x", 2 * rows, down.shape[1])[:rows], self.tensor("y", 2 * rows, up.shape[0])[:rows]
        inner, grad = self.tensor("inner", rows, len(down)), self.tensor("gx", 2 * rows, down.shape[1])[:rows]
        for _ in range(1 + again):
            self._multiply(x, down.t(), inner)
        for _ in range(1 + (again and name != LAST_PROJECTION)):
            self._multiply(inner, up.t(), y, add=True)
        grad_inner = self.tensor("ginner", rows, len(down))
        self._multiply(y, up, grad_inner)
        self._multiply(grad_inner, down, grad, add=True)
        self._multiply(grad_inner.t(), x, torch.empty_like(down))
        self._multiply(y.t(), inner, torch.empty_like(up))

    def _multiply(self, a: Tensor, b: Tensor, out: Tensor, *, add: bool = False) -> None:
        self.flops += 2 * a.shape[0] * a.shape[1] * b.shape[1]
        self.products.append(
            partial(torch.addmm, out, a, b, beta=1e-3, alpha=1e-3, out=out) if add else partial(torch.mm, a, b, out=out)
        )

    def _attention(self, heads: int, keys: int, *, width: int) -> None:
        def tensor(slot: str, length: int) -> Tensor:
            return self.tensor(slot, self.batch, length, heads, width // heads).transpose(1, 2)

        q, k, v, grad = tensor("q", self.tokens), tensor("k", keys), tensor("v", keys), tensor("g", self.tokens)
        leaves = tuple(t.detach().requires_grad_() for t in (q, k, v))
        out = F.scaled_dot_product_attention(leaves[0], leaves[1], leaves[2])
        self.flops += 14 * q.numel() * keys  # two products forward, five backward
        self.products.append(partial(F.scaled_dot_product_attention, q, k, v))
        self.products.append(partial(torch.autograd.grad, out, leaves, grad, retain_graph=True))


# -- the two sides


class Rival(nn.Module):
    """Diffusers' blocks under peft, its LoRA masked to the second half of the tokens, each block checkpointed."""

    def __init__(self, config: dict[str, Any], lora: LoraConfig, grid: tuple[int, int, int]) -> None:
        super().__init__()
        from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
        from peft import LoraConfig as PeftConfig
        from peft import inject_adapter_in_model
        from peft.tuners.lora import Linear as PeftLinear

        model = WanTransformer3DModel(**config)
        targets = [f"blocks.0.{target}" for target in lora.targets or WanModel.lora_targets]
        wanted = [NAMES.module(name, source="original", to="diffusers").removeprefix("blocks.0.") for name in targets]
        peft = PeftConfig(r=lora.rank, lora_alpha=lora.rank, target_modules=wanted)
        blocks = inject_adapter_in_model(peft, model).blocks
        assert isinstance(blocks, nn.ModuleList)
        self.blocks = blocks
        f, h, w = grid
        cos, sin = model.rope(torch.empty(1, 1, f, 2 * h, 2 * w))
        self.rope = torch.cat([cos, cos], 1), torch.cat([sin, sin], 1)
        mask = torch.cat([torch.zeros(1, f * h * w, 1), torch.ones(1, f * h * w, 1)], 1)

        def masked(_module: nn.Module, _inputs: Any, out: Tensor) -> Tensor:
            return out * mask

        for module in self.blocks.modules():
            if isinstance(module, PeftLinear):
                module.lora_B["default"].register_forward_hook(masked)

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        for block in self.blocks:
            hidden = checkpoint(block, hidden, context, modulation[:, 0], self.rope, use_reentrant=False)
        return hidden


class Ours(nn.Module):
    """Our blocks, which keep their attentions' outputs."""

    def __init__(self, config: dict[str, Any], lora: LoraConfig, layout: StreamLayout) -> None:
        super().__init__()
        model = WanModel(WanConfig.read(config), streams=layout.names)
        inject(model, lora)
        self.blocks, self.positions = model.blocks, model.positions
        self.lay_out(layout)
        self.keep("attention")

    def lay_out(self, layout: StreamLayout, *, attends: bool = True, forward_only: bool = False) -> None:
        """attends: RGB sees the companion; forward_only: it has no backward pass."""
        tokens = self.positions(layout, torch.device("cpu"))
        self.tokens = tokens._replace(rgb_attends_aux=attends, rgb_forward_only=forward_only)

    def keep(self, mode: str) -> None:
        set_recompute(self.layers(), mode)

    def layers(self) -> list[WanBlock]:
        """Return the blocks in order."""
        return [block for block in self.blocks.values() if isinstance(block, WanBlock)]

    def forward(self, hidden: Tensor, modulation: Tensor, context: Tensor) -> Tensor:
        others, first = (modulation, context, modulation[:, :, 0]), self.tokens.lengths[0]
        apart = self.tokens.rgb_forward_only
        flow = (hidden[:, first:], hidden.detach()[:, :first], *others) if apart else (hidden, *others)
        for block in self.blocks.values():
            flow = block(flow, self.tokens)
        return torch.cat([flow[1], flow[0]], dim=1) if apart else flow[0]


def share_weights(ours: Ours, rival: Rival) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    """Copy the rival's weights and adapter into ours; return the pairs of adapter parameters."""
    theirs = {name.replace(".base_layer", ""): p for name, p in rival.named_parameters()}
    mine = dict(ours.named_parameters())
    with torch.no_grad():
        for name, parameter in theirs.items():
            if ".lora_" not in name:
                mine[NAMES.parameter(name, source="diffusers", to="original")].copy_(parameter)
        pairs = {}
        for name, module in lora_linears(ours):
            for kind in ("lora_A", "lora_B"):
                there = NAMES.module(name, source="original", to="diffusers")
                other = theirs[f"{there}.{kind}.default.weight"]
                nn.init.normal_(other, std=0.02)
                getattr(module, kind).copy_(other)
                pairs[f"{name}.{kind}"] = (getattr(module, kind), other)
    return pairs


def layout_of(args: argparse.Namespace, *, scale: int = 1) -> StreamLayout:
    """Return the layout of two streams of the asked grid, the second at a scale."""
    f, h, w = args.grid
    shapes = (16, f, 2 * h, 2 * w), (16, f, 2 * h // scale, 2 * w // scale)
    return StreamLayout(("rgb", "seg"), shapes, (1, 2, 2), scales=(1, scale))


def make_ours(args: argparse.Namespace) -> Ours:
    """Return our blocks with their adapter."""
    return Ours(harness.wan_config(args, text_dim=64), LoraConfig(rank=args.rank), layout_of(args))


def make_inputs(args: argparse.Namespace) -> Inputs:
    """Return what enters the first block; hidden states want a gradient, as between two blocks."""
    tokens, width = layout_of(args).tokens, args.width
    hidden, context = torch.randn(args.batch, tokens, width), torch.randn(args.batch, TEXT_TOKENS, width)
    modulation = torch.randn(args.batch, 1, 6, width).expand(-1, 2, -1, -1) / 4
    return hidden.requires_grad_(), modulation, context


def shortened(inputs: Inputs, layout: StreamLayout) -> Inputs:
    """Return the same with only as many tokens as a layout has."""
    hidden, modulation, context = inputs
    return hidden.detach()[:, : layout.tokens].clone().requires_grad_(), modulation, context


def both(args: argparse.Namespace) -> tuple[Ours, Rival, Inputs]:
    """Return both sides with the same weights and what they start from, once they are seen to compute the same."""
    torch.manual_seed(0)
    rival = Rival(harness.wan_config(args, text_dim=64), LoraConfig(rank=args.rank), args.grid)
    ours = make_ours(args)
    pairs = share_weights(ours, rival)
    inputs = make_inputs(args)
    entering = []
    for model in (ours, rival):
        step(model, inputs)
        entering.append(inputs[0].grad)
    for name, (mine, other) in {**{n: (m.grad, o.grad) for n, (m, o) in pairs.items()}, "hidden": entering}.items():
        assert mine is not None and other is not None, name
        torch.testing.assert_close(mine, other, atol=1e-4 * float(other.abs().max()), rtol=1e-3, msg=name)
    return ours, rival, inputs


def step(model: nn.Module, inputs: Inputs) -> None:
    model.zero_grad(set_to_none=True)
    inputs[0].grad = None
    model(*inputs).square().mean().backward()


def step_of(ours: Ours, inputs: Inputs, layout: StreamLayout, **how: bool) -> None:
    """Run our step of a layout."""
    ours.lay_out(layout, **how)
    step(ours, inputs)


# -- memory


class LiveBytes(TorchDispatchMode):
    """Count the bytes in storages that operators made and that are still alive, and their peak."""

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


def peak_bytes(model: nn.Module, inputs: Inputs) -> int:
    with LiveBytes() as live:
        step(model, inputs)
    return live.peak


def peak_of(ours: Ours, inputs: Inputs, layout: StreamLayout, **how: bool) -> int:
    ours.lay_out(layout, **how)
    return peak_bytes(ours, inputs)


def peaks(ours: Ours, rival: Rival, inputs: Inputs) -> Iterator[int]:
    """Yield the peaks of ours, of ours when it keeps only what enters a block, and of the rival."""
    yield peak_bytes(ours, inputs)
    ours.keep("full")
    yield peak_bytes(ours, inputs)
    ours.keep("attention")
    yield peak_bytes(rival, inputs)


# -- the bench


def profile(model: nn.Module, inputs: Inputs, rows: int) -> None:
    """Print the time of a step by operator and shapes."""
    with torch.profiler.profile(record_shapes=True) as profiler:
        step(model, inputs)
    print(profiler.key_averages(group_by_input_shape=True).table("self_cpu_time_total", row_limit=rows))


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.parser(__doc__, repeats=12, comparable=True)
    harness.wan_arguments(parser)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile our blocks, as on a GPU")
    parser.add_argument("--profile", type=int, default=0, metavar="ROWS", help="show our step's operators and end")
    return parser.parse_args(argv)


def limit_of(ours: Ours, inputs: Inputs, args: argparse.Namespace) -> Limit:
    """Return the limit of our blocks, which are compiled if that is asked for."""
    if args.compile:
        for block in ours.layers():
            block.compile()
    return Limit(ours.layers(), tokens=inputs[0].shape[1], batch=args.batch)


def actions(argv: Sequence[str]) -> dict[str, Callable[[], object]]:
    """Return what `--against` compares with another checkout's."""
    args = arguments(argv)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ours, inputs = make_ours(args), make_inputs(args)
    return {"limit": limit_of(ours, inputs, args), "ours": partial(step, ours, inputs)}


def main(argv: Sequence[str] | None = None) -> None:
    """Compare in this process, or with another checkout in two processes."""
    args = arguments(argv)
    if args.against:
        harness.compare("step", args, argv)
        return
    torch.set_num_threads(1)
    ours, rival, inputs = both(args)
    if args.profile:
        profile(ours, inputs, args.profile)
        return
    mine, mine_full, other = peaks(ours, rival, inputs)
    limit, whole, half = limit_of(ours, inputs, args), layout_of(args), layout_of(args, scale=2)
    fewer = shortened(inputs, half)
    mine_half = peak_of(ours, fewer, half)
    mine_apart, mine_both_ways = peak_of(ours, inputs, whole, **APART), peak_of(ours, inputs, whole, **BOTH_WAYS)
    step_ours = partial(step_of, ours, inputs, whole)
    sides = {"limit": limit, "ours": step_ours, "half": partial(step_of, ours, fewer, half)}
    sides |= {name: partial(step_ours, **how) for name, how in WAYS.items()} | {"rival": partial(step, rival, inputs)}
    times = harness.alternate(sides, repeats=args.repeats, clock=harness.step_clock())
    figures = {
        "seconds": round(times["ours"].median, 4),
        "limit_seconds": round(times["limit"].median, 4),
        "rival_seconds": round(times["rival"].median, 4),
        "spread": round(max(t.spread for t in times.values()), 3),
        "x_limit": times.ratio("ours", "limit").figure,
        "x_rival_time": times.ratio("ours", "rival").figure,
        "x_rival_memory": round(mine / other, 3),
        "x_rival_memory_full": round(mine_full / other, 3),
        "x_half_time": times.ratio("half", "ours").figure,
        "x_half_memory": round(mine_half / mine, 3),
        "x_half_rival_time": times.ratio("half", "rival").figure,
        "x_forward_only": times.ratio("forward_only", "both_ways").figure,
        "x_forward_only_memory": round(mine_apart / mine_both_ways, 3),
        "mib": round(mine / 2**20, 1),
        "rival_mib": round(other / 2**20, 1),
        "gflop": round(limit.flops / 1e9, 1),
        "tokens": inputs[0].shape[1],
    }
    harness.finish("step", figures, record=not args.no_record, argv=argv)


if __name__ == "__main__":
    main()
