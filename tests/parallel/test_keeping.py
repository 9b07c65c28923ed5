"""As many blocks as fit a budget recompute nothing: the same to the bit, and never more bytes than allowed."""

from __future__ import annotations

from functools import cache
from itertools import pairwise

import pytest
import torch

from tests.families.conformance.test_layouts import Result, assert_no_bit_differs, layout, train
from tests.support import tiny
from tests.support.bytes_held import kept_for_backward
from tests.support.families.cases import CASES, STREAMS
from transpixeler.config import loading
from transpixeler.config.sections import ParallelConfig, UserError
from transpixeler.models.backbone import Backbone
from transpixeler.models.costs import Costs, activation_bytes
from transpixeler.models.kept import Kept
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import shard
from transpixeler.parallel.keeping import Keeping

SHARES = (0, 0.3, 0.55, 0.8, 1.001)
# By family: room for some of the four tiny blocks. The toy's are of two kinds, and carry text.
FAMILIES = {"wan": "parallel.keep_gb=0.001", "toy": "parallel.keep_gb=0.0002"}
ALIKE = {  # by name: ranks, and what is set besides
    "full": (1, (*layout(1, 1, 1), "parallel.recompute=full")),
    "attention": (1, (*layout(1, 1, 1), "parallel.recompute=attention")),
    "offload": (1, (*layout(1, 1, 1), "parallel.recompute=offload")),
    "all trained": (1, (*layout(1, 1, 1), "parallel.recompute=full", "lora.enabled=false", "optim.lr=0.1")),
    "swapped": (1, (*layout(1, 1, 1), "parallel.recompute=full", "parallel.offload=4")),
    "blind": (1, (*layout(1, 1, 1), "parallel.recompute=full", "model.rgb_attends_aux=false")),
    "1f1b": (2, (*layout(2, 1, 1), "parallel.schedule=1f1b", "parallel.recompute=full")),
    "shards": (2, (*layout(1, 1, 2), "parallel.recompute=full")),
}


@cache
def both(name: str, ranks: int) -> dict[str, Result]:
    runs = {run: overrides for run, (count, overrides) in ALIKE.items() if count == ranks}
    runs |= {f"{run} kept": (*overrides, FAMILIES[name]) for run, overrides in runs.items()}
    return train(ranks, name, runs, steps=2)


@pytest.mark.parametrize("how", ALIKE)
@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_that_recompute_nothing_change_no_bit(name: str, how: str) -> None:
    ranks, _ = ALIKE[how]
    assert_no_bit_differs(both(name, ranks)[f"{how} kept"], both(name, ranks)[how])


def _kept(model: Backbone, kept: list[Kept], laid: StreamLayout, budget: float) -> tuple[int, int]:
    """Run a model's blocks, full recompute but for the budget; return blocks that kept, and the bytes kept of all."""
    blocks = model.block_list()
    shard.set_recompute(blocks, "full")
    keeping = Keeping(blocks, kept, budget)
    flow = tuple(
        torch.randn(t.shape).to(t.dtype) if t.is_floating_point() else torch.full(t.shape, 512, dtype=t.dtype)
        for t in model.divided(model.flow_meta(laid, 2, torch.float32), laid)
    )
    flow = tuple(t.requires_grad_(place < model.differentiated) for place, t in enumerate(flow))
    given = {t.untyped_storage()._cdata for t in (*model.parameters(), *flow)}
    tokens = model.tokens(laid, flow[0].device)
    given.add(tokens.rope.untyped_storage()._cdata)
    with kept_for_backward() as sizes:
        for block in blocks:
            flow = block(flow, tokens)
    return keeping.count(2, laid.lengths), sum(size for key, size in sizes.items() if key not in given)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_kept_follows_the_budget_and_stays_under_it(name: str) -> None:
    case = CASES[name]
    model = case.make(streams=STREAMS[:2], rgb_attends_aux=True)
    laid = StreamLayout.equal(STREAMS[:2], case.shapes[1], model.patch)
    kept = [each.eager for each in Costs.of(model).kept]
    all_of_it = 2 * sum(each.bytes(laid.lengths) for each in kept)
    found = [_kept(model, kept, laid, share * all_of_it) for share in SHARES]
    inputs = found[0][1]
    counts, sizes = zip(*found)
    assert counts == tuple(sorted(counts)) and counts[0] == 0 and counts[-1] == 4 and len(set(counts)) > 3
    assert all(b > a for (n, a), (m, b) in pairwise(found) if m > n), sizes
    for share, size in zip(SHARES, sizes):
        assert size - inputs <= share * all_of_it


def test_microbatches_that_are_held_together_share_the_budget() -> None:
    model = tiny.make(tiny.config())
    kept = [each.eager for each in Costs.of(model).kept]
    laid = model.layout(tiny.SHAPES[1])
    keeping = Keeping([], kept, 4 * kept[0].bytes(laid.lengths))
    assert keeping.count(1, laid.lengths) == 4 and keeping.count(2, laid.lengths) == 2
    keeping.microbatches = 2
    assert keeping.count(1, laid.lengths) == 2


def parallel(*overrides: str) -> ParallelConfig:
    return loading.from_overrides(list(overrides)).parallel


@pytest.mark.parametrize("recompute", ["none", "3"])
def test_two_ways_of_choosing_blocks_are_told(recompute: str) -> None:
    with pytest.raises(UserError, match=rf"parallel.keep_gb: 8 chooses .*recompute={recompute}; set keep_gb=0"):
        shard.recompute_mode(parallel("parallel.keep_gb=8", f"parallel.recompute={recompute}"), torch.device("cpu"))
    with pytest.raises(UserError, match=r"parallel.keep_gb: .* out of range"):
        parallel("parallel.keep_gb=-1")


def test_the_other_blocks_recompute_where_nothing_says_how() -> None:
    chosen = parallel("parallel.keep_gb=8")
    assert shard.recompute_mode(chosen, torch.device("cpu")) == "full"
    assert shard.recompute_mode(chosen, torch.device("cuda")) == "attention"
    assert shard.recompute_mode(parallel(), torch.device("cpu")) == "none"


# --- pieces ----------------------------------------------------------------------------------------------------------


def test_pieces_are_auto_where_nothing_compiles_them_and_no_schedule_splits_the_backward_pass() -> None:
    split = ("parallel.pipeline=2", "parallel.schedule=interleaved-zero-bubble")
    assert shard.chunk_tokens(parallel(), compiled=False) == shard.CHUNK
    assert shard.chunk_tokens(parallel(), compiled=True) == 0
    assert shard.chunk_tokens(parallel("parallel.chunk=off"), compiled=False) == 0
    assert shard.chunk_tokens(parallel(*split), compiled=False) == 0
    assert shard.chunk_tokens(parallel("parallel.chunk=77"), compiled=True) == 77
    with pytest.raises(UserError, match=r"parallel.chunk: 77 does not go with parallel.schedule=interleaved-zero"):
        shard.chunk_tokens(parallel("parallel.chunk=77", *split), compiled=False)


def test_what_a_piece_saves_is_known_beforehand() -> None:
    model = CASES["wan"].model(2)
    found, lengths = Costs.of(model), (4096, 4096)
    whole, pieces, more = (
        activation_bytes(found, lengths, size=4, recompute="full", chunk=chunk) for chunk in (0, 256, 8192)
    )
    assert pieces < 0.8 * whole and more == whole
    kept = activation_bytes(found, lengths, size=4, chunk=256)
    assert kept == activation_bytes(found, lengths, size=4), "blocks that keep everything are left whole"
