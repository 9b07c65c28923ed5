"""Time a training step's wait for data: the loader over a million records against files opened in the step.

Every side reads samples of two streams of 33 frames at 480×832 and a caption, in bf16 and in random order, and hands
over the same fp32 batch. The loader also draws the noise, as in training; its rivals need not. A step is a pause, since
what a GPU computes leaves the CPU free: at 40 % of an H200's peak a sample of these takes Wan 1.3B 1.7 s under LoRA.
`busy` puts work on the CPU in the pause's place, small operators one after another as when kernels are launched, and
tells what the loader's thread takes from it.

The page cache is warm for all. The cache's index has a million rows of its own; many of them share their bytes.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from harness import alternate, finish, parser, seconds
from rounds import COARSE, Times, ratio
from safetensors.torch import load_file, save_file
from torch import Tensor

from transpixeler.config.sections import ObjectiveConfig
from transpixeler.data.cache import index
from transpixeler.data.cache.records import Cache, CacheWriter, Record
from transpixeler.data.dataset import Dataset
from transpixeler.data.items import Item
from transpixeler.data.loader import Assembler, Batch, Loader
from transpixeler.data.order import make_order
from transpixeler.flow import objective
from transpixeler.models.family import Field
from transpixeler.models.streams import StreamLayout

STREAMS = ("rgb", "seg")
PATCH = (1, 2, 2)
BUCKET = (33, 480, 832)
TEXT_LEN = 512
CAPTION_TOKENS = 160
EPOCHS_ORDERED = 3
BATCHES_HELD = 5  # by the loader at most, the one at work included
BUCKETS = 5  # among the samples that are put in order


def sample(number: int, shape: Sequence[int], text_dim: int) -> dict[str, Tensor]:
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(number))
    return {"latents": draw(len(STREAMS), *shape).bfloat16(), "text": draw(CAPTION_TOKENS, text_dim).bfloat16()}


def write(folder: Path, count: int, shape: Sequence[int], text_dim: int) -> None:
    """Write the same samples as records, as safetensors files and as pickles."""
    with CacheWriter(folder / "cache") as writer:
        for number in range(count):
            made = sample(number, shape, text_dim)
            keys = [f"{number}/{part}".encode().ljust(16) for part in (*STREAMS, "text")]
            latents = [Record("latent", key, value) for key, value in zip(keys, made["latents"])]
            writer.put([*latents, Record("text", keys[-1], made["text"])])
            save_file(made, folder / f"{number}.safetensors")
            torch.save(made, folder / f"{number}.pt")


def widen(folder: Path, samples: int) -> np.ndarray:
    """Give the index a row for each record of so many samples; return their keys [samples, records, 16]."""
    path = next(folder.glob("*.idx"))
    written = path.read_bytes()
    rows = np.resize(np.frombuffer(written[index.ROW_BYTES :], index.ROW), samples * (len(STREAMS) + 1))
    keys = np.random.default_rng(0).integers(0, 2**64, (len(rows), 2), dtype=np.uint64)
    rows["key"] = keys
    rows["check"] = index.checks(rows)
    path.write_bytes(index.header() + rows.tobytes())
    return keys.view("V16").reshape(samples, len(STREAMS) + 1)


def dataset(cache: Cache, keys: np.ndarray) -> Dataset:
    items = [
        Item(f"sample{n}", f"sample{n}", "", BUCKET, tuple(row[:-1]), (row[-1],)) for n, row in enumerate(keys.tolist())
    ]
    return Dataset(tuple(items), STREAMS, items[0].text_keys, cache)


def prepare(batch: Batch) -> objective.Example:
    return objective.prepare(
        ObjectiveConfig(),
        seed=0,
        step=batch.step,
        layout=batch.layout,
        latents=batch.latents,
        fields=batch.fields,
        empty=batch.empty,
        ids=batch.ids,
        slots=batch.slots,
        batch=len(batch.ids),
        shift=1.0,
    )


def files(read: Callable[[int], dict[str, Tensor]], *, count: int, batch: int, layout: StreamLayout) -> Iterator[Any]:
    """Yield batches without end, each read when it is asked for."""
    random = np.random.default_rng(0)
    while True:
        samples = [read(int(number)) for number in random.integers(0, count, batch)]
        latents = torch.empty(batch, layout.elements)
        text = torch.zeros(batch, TEXT_LEN, samples[0]["text"].shape[1])
        for place, one in enumerate(samples):
            for stream, out in enumerate(layout.unpack(latents)):
                out[place].copy_(one["latents"][stream])
            text[place, :CAPTION_TOKENS].copy_(one["text"])
        yield latents, text


def waits(ways: dict[str, Iterator[Any]], *, steps: int, pause: float, repeats: int) -> dict[str, Times]:
    """Return the seconds that a step of each way waits for its batch: a mean for every round of steps."""
    found: dict[str, list[float]] = {name: [] for name in ways}

    def steps_of(name: str) -> None:
        waited = 0.0
        for _ in range(steps):
            start = time.perf_counter()
            batch = next(ways[name])
            waited += time.perf_counter() - start
            del batch  # what it held is given back in the step's time, not while the next one is waited for
            time.sleep(pause)
        found[name].append(waited / steps)

    alternate({name: partial(steps_of, name) for name in ways}, repeats=repeats)
    return {name: Times(tuple(values[1:])) for name, values in found.items()}  # the first was the warm-up


def busy(loader: Loader, *, pause: float, repeats: int) -> float:
    """Return the time of a step's work beside the thread that reads, over the same work alone."""
    small = torch.ones(16)

    def work(count: int) -> None:
        for _ in range(count):
            small.add_(1.0)

    count = round(10_000 * pause / seconds(lambda: work(10_000)))
    taken: dict[str, list[float]] = {"alone": [], "beside": []}
    for _ in range(repeats):
        for name, times in taken.items():
            time.sleep(pause)  # the loader has filled its queue again, and rests
            if name == "beside":
                next(loader)  # which it replaces meanwhile
            times.append(seconds(lambda: work(count)))
    return median(taken["beside"]) / median(taken["alone"])


def ordering(samples: int) -> dict[str, float]:
    """Return the seconds to put samples in order, and to find a place in the middle of a later epoch."""
    buckets = [(n % BUCKETS, 8, 8) for n in range(samples)]
    start = time.perf_counter()
    order = make_order(buckets=buckets, repeats=[1] * samples, batches=[min(64, samples // 50)] * samples, seed=0)
    made = time.perf_counter()
    next(order.batches(0))
    first = time.perf_counter()
    middle = order.first_step(EPOCHS_ORDERED) - order.steps(EPOCHS_ORDERED - 1) // 2
    next(order.batches(*order.locate(middle)))
    return {"order": made - start, "first_batch": first - made, "resume": time.perf_counter() - first}


def measure(options: Any, folder: Path) -> dict[str, Any]:
    shape = (16, (BUCKET[0] - 1) // 4 + 1, *options.grid)
    layout = StreamLayout.equal(STREAMS, shape, PATCH)
    write(folder, options.files, shape, options.text_dim)
    keys = widen(folder / "cache", options.records // (len(STREAMS) + 1))
    start = time.perf_counter()
    cache = Cache(folder / "cache")
    opened = time.perf_counter() - start
    data = dataset(cache, keys)
    start = time.perf_counter()
    assert not cache.missing([key for item in data.items for key in (*item.latent_keys, *item.text_keys)])
    looked = time.perf_counter() - start
    order = data.order(seed=0, global_batch=options.batch)
    read = partial(files, count=options.files, batch=options.batch, layout=layout)
    rivals = {
        "safetensors": read(lambda number: load_file(folder / f"{number}.safetensors")),
        "pickle": read(lambda number: torch.load(folder / f"{number}.pt")),
    }
    assembler = Assembler(data, patch=PATCH, fields=(Field("text", width=options.text_dim, length=TEXT_LEN),))
    with Loader(assembler, order, prepare=prepare) as loader:
        found = waits({"loader": loader, **rivals}, steps=options.steps, pause=options.step, repeats=options.repeats)
        beside = busy(loader, pause=options.step, repeats=options.repeats)
        made = Times(tuple(drained(loader) for _ in range(options.repeats)))
    ordered = ordering(options.records)
    _tell(found, made, step=options.step, records=len(cache))
    return {
        "wait_share": round(found["loader"].median / (options.step + found["loader"].median), 6),
        "wait_ms": round(1e3 * found["loader"].median, 3),
        "step_seconds": options.step,
        "x_safetensors": _over_the_loader(found, "safetensors"),
        "x_pickle": _over_the_loader(found, "pickle"),
        **{f"{name}_wait_ms": round(1e3 * found[name].median, 2) for name in rivals},
        "x_busy_step": round(beside, 3),
        "batch_ms": round(1e3 * made.median, 1),
        "batch": options.batch,
        "records": len(cache),
        "open_seconds": round(opened, 3),
        "look_up_all_seconds": round(looked, 3),
        **{f"{name}_seconds": round(value, 3) for name, value in ordered.items()},
    }


def _tell(found: dict[str, Times], batch: Times, *, step: float, records: int) -> None:
    for name, times in found.items():
        print(f"{name:12} waits {1e3 * times.median:9.3f} ms a step of {step:g} s, ± {times.spread:.0%}")
    print(f"a batch takes the loader's thread {1e3 * batch.median:.1f} ms; {records:,} records")


def _over_the_loader(waits: dict[str, Times], rival: str) -> float | str:
    theirs, ours = waits[rival].seconds, waits["loader"].seconds
    return ratio(theirs, ours, rounds=len(ours), precision=COARSE).figure


def drained(loader: Loader) -> float:
    """Return the seconds of a batch when nothing lies ready any more and the thread works alone."""
    for _ in range(BATCHES_HELD):
        next(loader)
    start = time.perf_counter()
    for _ in range(BATCHES_HELD):
        next(loader)
    return (time.perf_counter() - start) / BATCHES_HELD


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--records", type=int, default=1_000_000)
    given.add_argument("--files", type=int, default=48, help="samples whose bytes differ")
    given.add_argument("--grid", type=int, nargs=2, default=(60, 104), help="latent rows and columns")
    given.add_argument("--text-dim", type=int, default=4096)
    given.add_argument("--batch", type=int, default=2)
    given.add_argument("--step", type=float, default=0.5, help="seconds")
    given.add_argument("--steps", type=int, default=8, help="in a round")
    options = given.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        figures = measure(options, Path(name))
    finish("load", figures, record=not options.no_record)


if __name__ == "__main__":
    main()
