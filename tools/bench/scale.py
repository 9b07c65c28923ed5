"""Count what a rank does at its start, by the clips of a set and the ranks of a job: seconds, memory, bytes, groups.

Two ranks of this machine share a catalog of so many clips: rank 0's is made up, as if it had been read, and an index
knows a record for each of its keys. From there each rank does what training does: it maps the catalog, looks all keys
up, puts the clips in order, draws an epoch and makes the first batch's clips. Memory is what is added to a process that
has loaded torch; `private` leaves out the mapped file, which is in memory once for all ranks of a machine. `objects` is
what was sent to each rank when clips were objects, measured on some of them.

More ranks are a model of these figures and of a fake process group's: each rank is told what is no column, a machine
of 8 ranks that does not see rank 0's file is sent it once, by rank 0 or by the machine before it in the line, and a
group of gloo opens 1.33 sockets to each peer. With `--train`, two ranks of the real command on a demo count their
collective calls: at the start, a step, a save.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
import time
from collections import Counter
from fractions import Fraction
from pathlib import Path
from typing import Any

RANKS = (2, 8, 64, 512)
CLIPS = (1_000, 100_000, 1_000_000)
PER_MACHINE = 8
SOCKETS = 1.33  # of gloo, to each peer of a group
SAMPLED = 1000  # clips that are made into objects
WORDS = ("a red star", "round ring", "of fire", "smoke", "flies slowly", "turns", "falls over", "dark", "at night")
FEW = ("train.max_steps=4", "save.every_steps=2", "train.global_batch=2", "data.eval=[]", "sample.prompts=[]")
CALLS = ("all_reduce", "broadcast", "barrier", "broadcast_object_list", "all_gather_object", "gather_object")


def memory() -> dict[str, float]:
    """Return MB in use: all, and without mapped files."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    whole, files = (int(lines[name].split()[0]) / 1000 for name in ("VmRSS", "RssFile"))
    return {"mb": whole, "private_mb": whole - files}


def catalog(clips: int, folder: Path) -> Any:
    """Make up the catalog of a set, and a cache that holds all of its records."""
    import numpy as np

    from transpixeler.data.buckets import Bucket, Clips
    from transpixeler.data.cache.index import KEY
    from transpixeler.data.catalog import Catalog
    from transpixeler.data.items import Items, Run
    from transpixeler.data.jobs import Jobs, TextJob
    from transpixeler.data.media.clip import Media
    from transpixeler.data.media.fill import KEEP
    from transpixeler.data.sources.samples import Sample, SampleWriter, in_order

    random, fps = np.random.default_rng(0), Fraction(16)
    kinds = [Media(81, 480, 832, fps, Fraction(81, 16), False), Media(33, 832, 480, fps, Fraction(33, 16), False)]
    offered, written = [Bucket(81, 480, 832), Bucket(33, 832, 480)], SampleWriter(fps)
    for number in range(clips):
        place = f"/data/set/{number // 1000:04}/{number:07}"
        paths = ("rgb", Path(f"{place}.mp4")), ("seg", Path(f"{place}_seg.mp4"))
        text = " ".join(random.choice(WORDS, 16)) + f" {number}"
        written.append(Sample(f"set/{number:07}", paths, text, 0, False, kinds[number % 2]))
    samples, _ = in_order(written)
    owners = np.arange(clips, dtype=np.int32)
    cut = Clips(samples, owners, (owners % 2).astype(np.int32), np.zeros(clips, np.int32), offered, fps)
    keys = random.integers(0, 2**64, (3 * clips + 1, 2), dtype=np.uint64)
    _index(folder, keys)
    runs = [Run(latents=2, texts=1)] * 2
    items = Items(cut, ("set",), (1,), keys=np.frombuffer(keys[1:], KEY), starts=3 * np.arange(clips), runs=runs)
    jobs = Jobs(items, (folder,), ("rgb", "seg"), (), ("text",), KEEP, {})
    empty = TextJob({"text": keys[0].tobytes()}, "", folder)
    return Catalog({"train": jobs}, {"train": ()}, (empty,), {}, (folder,))


def _index(folder: Path, keys: Any) -> None:
    """Write an index with a row for each key; all rows share the bytes of one record."""
    import numpy as np
    import torch

    from transpixeler.data.cache import index
    from transpixeler.data.cache.records import CacheWriter, Record

    with CacheWriter(folder) as writer:
        writer.put([Record("latent", bytes(16), torch.zeros(16, 1, 2, 2, dtype=torch.bfloat16))])
    path = next(folder.glob("*.idx"))
    rows = np.resize(np.frombuffer(path.read_bytes()[index.ROW_BYTES :], index.ROW), len(keys))
    rows["key"] = keys
    rows["check"] = index.checks(rows)
    path.write_bytes(index.header() + rows.tobytes())


def rank(clips: int, folder: Path) -> dict[str, float]:
    """Share a catalog and start on it, as one of two ranks."""
    import torch
    import torch.distributed as dist

    from transpixeler.data import dataset, encode, sharing
    from transpixeler.data.items import RECORDS
    from transpixeler.data.ranks import connected
    from transpixeler.parallel.runtime import Runtime

    del encode  # what a training has loaded
    number = int(os.environ["RANK"])
    dist.init_process_group("gloo")
    before = memory()
    made = [catalog(clips, folder)] if number == 0 else []
    figures: dict[str, float] = {}
    with connected(Runtime(number, 2, number, torch.device("cpu"))) as ranks:
        dist.barrier()
        start = time.perf_counter()
        found = sharing.shared(ranks, lambda _: made.pop(), (folder,))
        figures["shared_s"] = time.perf_counter() - start
    if number == 0:
        figures |= sizes(found)
    start, items = time.perf_counter(), found.items["train"]
    cache = dataset.Cache(*found.folders)
    assert not cache.absent(items.keys_of(RECORDS)).any()
    data = dataset.Dataset(items, ("rgb", "seg"), found.empty_text_keys, cache)
    order = data.order(seed=0, global_batch=64)
    batch = next(order.batches(0))
    assert all(items[int(row)].caption for row in batch)
    figures["start_s"] = time.perf_counter() - start
    after = memory()
    figures |= {f"added_{name}": after[name] - before[name] for name in after}
    dist.destroy_process_group()
    return figures


def sizes(made: Any) -> dict[str, float]:
    """Return the MB that are told to each rank, that lie in the file, that a machine is sent; and objects' bytes."""
    import zlib

    buffers: list[pickle.PickleBuffer] = []
    told = pickle.dumps(made, protocol=5, buffer_callback=buffers.append)
    views = [buffer.raw() for buffer in buffers]
    piece = 16 << 20
    sent = sum(len(zlib.compress(view[at : at + piece], 1)) for view in views for at in range(0, len(view), piece))
    jobs = made.jobs["train"]
    some = range(min(SAMPLED, len(jobs.items)))
    objects = len(pickle.dumps([(jobs.items[row], jobs.clip(row), jobs.texts(row)) for row in some])) / len(some)
    mb = {
        "told_mb": len(told),
        "file_mb": sum(map(len, views)),
        "sent_mb": sent,
        "objects_mb": objects * len(jobs.items),
    }
    return {name: value / 1e6 for name, value in mb.items()}


def groups(ranks: int) -> int:
    """Return the groups of a rank of a job of replicas, on a fake process group: each with as many peers."""
    import torch
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from transpixeler.parallel import mesh
    from transpixeler.parallel.runtime import Runtime

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    mesh.build(mesh.Layout(1, ranks, 1), Runtime(0, ranks, 0, torch.device("cpu")))
    found = sum(group.size() == ranks for group in dist.distributed_c10d._world.pg_map)
    dist.destroy_process_group()
    return found


def train(argv: list[str]) -> None:
    """Run the real command on this rank, and count its collective calls by what the trainer is at."""
    import torch.distributed as dist

    from transpixeler import cli
    from transpixeler.training import keeping, trainer

    counts, at = {name: Counter[str]() for name in ("start", "step", "save")}, ["start"]
    for name in CALLS:
        call = getattr(dist, name)
        setattr(dist, name, lambda *a, _name=name, _call=call, **o: (counts[at[0]].update([_name]), _call(*a, **o))[1])

    def within(owner: Any, name: str, phase: str) -> None:
        work = getattr(owner, name)

        def phased(*args: Any, **options: Any) -> Any:
            before, at[0] = at[0], phase
            try:
                return work(*args, **options)
            finally:
                at[0] = before

        setattr(owner, name, phased)

    within(trainer.Trainer, "train", "step")
    within(keeping.Keeper, "keep_what_is_due", "save")
    code = cli.main(argv)
    if os.environ["RANK"] == "0":
        files = len(list(Path("/proc/self/fd").iterdir()))
        print(json.dumps({"files": files} | {name: dict(found) for name, found in counts.items()}), flush=True)
    raise SystemExit(code)


def two(*words: str) -> list[dict[str, Any]]:
    """Run this file on two ranks; return what each printed."""
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29541", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, __file__, *words]
    ways = [os.environ | told | {"RANK": str(n), "LOCAL_RANK": str(n)} for n in range(2)]
    ranks = [subprocess.Popen(command, env=way, stdout=subprocess.PIPE, text=True) for way in ways]
    lines = [process.communicate()[0].splitlines() for process in ranks]
    if any(process.returncode for process in ranks):
        raise SystemExit("a rank has failed; it said why above")
    return [json.loads(found[-1]) for found in lines if found]


def main() -> None:
    import harness

    given = harness.parser(__doc__)
    given.add_argument("--clips", type=int, nargs="+", default=CLIPS)
    given.add_argument("--train", metavar="CONFIG", help="a demo's config, to count the calls of a real training too")
    options = given.parse_args()
    figures: dict[str, Any] = {}
    for clips in options.clips:
        with tempfile.TemporaryDirectory() as folder:
            main_rank, other = two("--child", str(clips), folder)
        figures[str(clips)] = found = {name: round(value, 4) for name, value in (main_rank | other).items()}
        for ranks in RANKS:
            blind = ranks > PER_MACHINE  # machines hand it on: rank 0 sends it to one
            row = f"{found['objects_mb'] * (ranks - 1):12,.1f} {found['told_mb'] * (ranks - 1):10,.2f} "
            row += f"{found['sent_mb'] * blind:12,.1f}"
            print(f"{clips:>9,} clips {ranks:4} ranks: MB sent as objects, told, to other machines {row}")
    for ranks in RANKS:
        count = groups(ranks)
        print(f"{ranks:4} ranks: {count} groups of all replicas, {round(count * SOCKETS * (ranks - 1)):,} sockets")
    if options.train:
        with tempfile.TemporaryDirectory() as folder:
            figures["calls"] = two("--count", "train", options.train, *FEW, f"output_dir={folder}")[0]
    harness.finish("scale", figures, record=not options.no_record)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(rank(int(sys.argv[2]), Path(sys.argv[3]))), flush=True)
    elif sys.argv[1:2] == ["--count"]:
        train(sys.argv[2:])
    else:
        main()
