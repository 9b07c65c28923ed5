"""Time random reads of a pair's latents: the cache against a safetensors file a sample and against pickled shards.

All hold the same bf16 numbers on the same disk, are read in the same random order by one thread with the page cache
warm, and end in the same preallocated tensor. The pickled shards are what shard-wise tools leave: one `torch.save` of a
list of 64 samples, which `torch.load` reads whole to give one of them.

The cache is read copied out (a record's checksum is verified when it is first read), as a view without the copy, and as
training reads (copied, verified on every read). `memory` copies the same bytes from memory to memory: no reader that
copies can be faster, so that `x_limit` is the best that `x_safetensors` can be on this machine.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from harness import alternate, finish, parser
from rounds import COARSE, Rounds
from safetensors.torch import load_file, save_file
from torch import Tensor

from transpixeler.data.cache import index
from transpixeler.data.cache.records import Cache, CacheWriter, Record

SHAPE = (16, 9, 60, 104)  # of one stream: 33 frames of 480×832
STREAMS = 2
SHARD = 64  # samples in a pickled shard
PICKLE_SHARE = 8  # one in so many pairs is read from pickles, which takes long
PROBE = """
import sys, time
from pathlib import Path
from transpixeler.data.cache import index
path = Path(sys.argv[1])
segment = next(path.parent.glob("*.seg"))
start = time.perf_counter()
table = index.Table([index.open_index(path, index.map_rows(path), {0: index.Segment(segment, segment.stat().st_size)})])
seconds = time.perf_counter() - start
rss = int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6
print(seconds, rss, len(table))
"""


def key(number: int, stream: int) -> bytes:
    return hashlib.blake2b(f"{number}/{stream}".encode(), digest_size=16).digest()


def write(folder: Path, count: int) -> None:
    (folder / "safetensors").mkdir()
    (folder / "pickle").mkdir()
    shard: list[Tensor] = []
    with CacheWriter(folder / "cache") as writer:
        for number in range(count):
            pair = torch.randn(STREAMS, *SHAPE, generator=torch.Generator().manual_seed(number)).bfloat16()
            writer.put([Record("latent", key(number, stream), pair[stream]) for stream in range(STREAMS)])
            save_file({"latents": pair}, folder / f"safetensors/{number:06d}.safetensors")
            shard.append(pair)
            if len(shard) == SHARD:
                torch.save(shard, folder / f"pickle/{number // SHARD:04d}.pt")
                shard = []


def run(ways: dict[str, Callable[[int], object]], order: list[int], repeats: int) -> Rounds:
    """Read all pairs each way, an eighth of them from pickles; the first round warms the page cache."""
    some = dict.fromkeys(ways, order) | {"pickle": order[: len(order) // PICKLE_SHARE]}

    def all_of(name: str) -> None:
        for number in some[name]:
            ways[name](number)

    return alternate({name: partial(all_of, name) for name in ways}, repeats=repeats)


def million(folder: Path, count: int) -> tuple[float, float]:
    """Return seconds and resident megabytes of a fresh process that opens an index of so many rows."""
    spec = index.Spec("latent", "bfloat16", (2, 1, 4, 4))
    data = np.random.default_rng(0).bytes(64 * count)
    keys = [data[64 * n : 64 * n + 16] for n in range(count)]
    crcs = np.array([zlib.crc32(data[64 * n : 64 * n + 64]) for n in range(count)], np.uint32)
    rows = index.make_rows(keys, spec, segment=0, offsets=np.arange(count) * 64, crcs=crcs.tolist())
    folder.mkdir()
    (folder / "w.idx").write_bytes(index.header() + rows.tobytes())
    (folder / f"w.00000.{spec.segment}.seg").write_bytes(data)
    probe = [sys.executable, "-c", PROBE, str(folder / "w.idx")]
    seconds, rss, found = map(float, subprocess.run(probe, capture_output=True, text=True, check=True).stdout.split())
    assert found == count
    return seconds, rss


def ways_to_read(folder: Path, count: int, out: Tensor) -> dict[str, Callable[[int], object]]:
    cache = Cache(folder / "cache")

    def latent(number: int, stream: int) -> Tensor:
        found = cache.get(key(number, stream))
        assert found is not None
        return found

    numbers = torch.stack([latent(n, stream) for n in range(count) for stream in range(STREAMS)])
    numbers = numbers.view(count, *out.shape)

    def view(number: int) -> list[Tensor]:
        return [latent(number, stream) for stream in range(STREAMS)]

    def copied(number: int) -> None:
        for stream in range(STREAMS):
            out[stream].copy_(latent(number, stream))

    def verified(number: int) -> None:
        for stream in range(STREAMS):
            cache.copy(key(number, stream), out[stream])

    def safetensors(number: int) -> None:
        out.copy_(load_file(folder / f"safetensors/{number:06d}.safetensors")["latents"])

    def pickled(number: int) -> None:
        out.copy_(torch.load(folder / f"pickle/{number // SHARD:04d}.pt")[number % SHARD])

    return {
        "cache": copied,
        "view": view,
        "verified": verified,
        "safetensors": safetensors,
        "pickle": pickled,
        "memory": lambda number: out.copy_(numbers[number]),
    }


def check(ways: dict[str, Callable[[int], object]], out: Tensor) -> None:
    """Check that all ways read the same numbers."""
    for number in (0, 7):
        reads = []
        for name, read in ways.items():
            if name != "view":
                out.zero_()
                read(number)
                reads.append(out.clone())
        assert all(torch.equal(reads[0], other) for other in reads)


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--count", type=int, default=128, help="pairs in the data set")
    given.add_argument("--rows", type=int, default=1_000_000, help="of the index whose opening is timed")
    given.add_argument("--folder", default=None, help="where to write the data sets")
    arguments = given.parse_args()
    torch.set_num_threads(1)
    count = -(-arguments.count // SHARD) * SHARD
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        write(folder, count)
        out = torch.empty(STREAMS, *SHAPE, dtype=torch.bfloat16)
        ways = ways_to_read(folder, count, out)
        check(ways, out)
        taken = run(ways, np.random.default_rng(0).permutation(count).tolist(), arguments.repeats)
        seconds, resident = million(folder / "million", arguments.rows)
    found = {name: count / (PICKLE_SHARE if name == "pickle" else 1) / times.median for name, times in taken.items()}
    for name, pairs in found.items():
        print(f"{name:12} {pairs:10.1f} pairs/s {pairs * out.nbytes / 1e9:8.2f} GB/s")
    print(f"{arguments.rows:,} records open in {seconds:.3f} s, {resident:.0f} MB resident")
    over = partial(taken.ratio, precision=COARSE)
    figures = {
        "x_safetensors": over("safetensors", "cache").figure,
        "x_pickle": over("pickle", "cache").times(PICKLE_SHARE).figure,
        "records_per_s": round(found["cache"] * STREAMS),
        "x_limit": over("safetensors", "memory").figure,
        "x_safetensors_view": over("safetensors", "view").figure,
        "verified_records_per_s": round(found["verified"] * STREAMS),
        "million_open_seconds": round(seconds, 3),
        "million_resident_mb": round(resident),
    }
    finish("cache", figures, record=not arguments.no_record)


if __name__ == "__main__":
    main()
