"""The cache keeps what was written, and never hands out what was not."""

import hashlib
import os
import resource
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transpixeler.config.sections import Fault, UserError
from transpixeler.data.cache import index
from transpixeler.data.cache import records as cache_module
from transpixeler.data.cache.records import Cache, CacheDamaged, CacheWriter, Record

SHAPE = (4, 3, 5, 7)
Folders = pytest.TempPathFactory


def key(number: int) -> bytes:
    return hashlib.blake2b(str(number).encode(), digest_size=16).digest()


def latent(number: int, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(number)).to(torch.bfloat16)


def record(number: int, shape: tuple[int, ...] = SHAPE) -> Record:
    return Record("latent", key(number), latent(number, shape))


def fill(folder: Path, numbers: range, name: str = "w") -> None:
    with CacheWriter(folder, name) as writer:
        for number in numbers:
            writer.put([record(number)])


def only(folder: Path, pattern: str) -> Path:
    (path,) = folder.glob(pattern)
    return path


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


def test_a_record_comes_back_bit_for_bit(tmp_path: Path) -> None:
    shapes = [(16, 3, 4, 6), (16, 1, 4, 6), (1, 1, 1, 1), (7, 3, 5, 3)]
    with CacheWriter(tmp_path) as writer:
        writer.put([record(n, shape) for n, shape in enumerate(shapes)])
        writer.put([Record("text", key(100), torch.randn(9, 32)), Record("text", key(101), torch.ones(1, 32))])
    cache = Cache(tmp_path)
    for n, shape in enumerate(shapes):
        found = cache.get(key(n))
        assert found.dtype == torch.bfloat16 and torch.equal(found, latent(n, shape))
    assert cache.get(key(100)).shape == (9, 32) and cache.get(key(101)).eq(1).all()
    assert cache.get(key(5)) is None and cache.missing([key(5), key(1), key(6), key(5)]) == [key(5), key(6)]


def test_texts_of_any_length_share_a_segment_and_latents_of_a_shape_do(tmp_path: Path) -> None:
    with CacheWriter(tmp_path) as writer:
        for n in range(1, 9):
            writer.put([Record("text", key(n), torch.zeros(n, 8)), record(100 + n), record(200 + n, (4, 1, 5, 7))])
    assert sorted(path.name.split(".")[2] for path in tmp_path.glob("*.seg")) == [
        "latent-bfloat16-4x1x5x7",
        "latent-bfloat16-4x3x5x7",
        "text-float32-8",
    ]


def test_a_read_is_a_view_that_leaves_no_file_open_and_cannot_change_the_file(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    before, files = only(tmp_path, "*.seg").read_bytes(), len(list(Path("/proc/self/fd").iterdir()))
    cache = Cache(tmp_path)
    first, again = cache.get(key(1)), cache.get(key(1))
    assert first.data_ptr() == again.data_ptr()
    first.zero_()
    assert only(tmp_path, "*.seg").read_bytes() == before
    assert len(list(Path("/proc/self/fd").iterdir())) - files == 1  # the index


def test_a_full_segment_is_followed_by_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_module, "SEGMENT_BYTES", 3000)
    fill(tmp_path, range(10))
    assert len(list(tmp_path.glob("*.seg"))) == 4
    assert all(path.stat().st_size <= 3000 for path in tmp_path.glob("*.seg"))
    cache = Cache(tmp_path)
    assert all(torch.equal(cache.get(key(n)), latent(n)) for n in range(10))


def test_writers_at_the_same_time_share_a_folder(tmp_path: Path) -> None:
    with CacheWriter(tmp_path, "rank0") as one, CacheWriter(tmp_path, "rank1") as two:
        for n in range(0, 20, 2):
            one.put([record(n)])
            two.put([record(n + 1)])
        assert len(Cache(tmp_path)) == 20  # visible while both still write
    assert not Cache(tmp_path).missing([key(n) for n in range(20)])


def test_a_record_that_is_put_while_a_folder_is_opened_is_not_called_truncated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with CacheWriter(tmp_path) as writer:
        writer.put([record(0)])
        measured = cache_module.segments_of

        def slow(folder: Path) -> dict[str, dict[int, index.Segment]]:
            writer.put([record(1)])
            found = measured(folder)
            writer.put([record(2)])
            return found

        monkeypatch.setattr(cache_module, "segments_of", slow)
        (file,) = cache_module.open_indexes(tmp_path)
    assert not len(file.short) and file.valid.all()


def test_several_folders_read_as_one(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(3))
    fill(tmp_path / "b", range(2, 6))
    cache = Cache(tmp_path / "a", tmp_path / "b", tmp_path / "none")
    assert all(torch.equal(cache.get(key(n)), latent(n)) for n in range(6))


# --- nothing half-written is ever read -------------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(cut=st.integers(0, 64 * 6))
def test_an_index_cut_anywhere_loses_only_the_rows_after_the_cut(
    tmp_path_factory: pytest.TempPathFactory, cut: int
) -> None:
    folder = tmp_path_factory.mktemp("cut")
    fill(folder, range(5))
    path = only(folder, "*.idx")
    path.write_bytes(path.read_bytes()[:cut])
    cache = Cache(folder)
    assert [n for n in range(5) if key(n) in cache] == list(range(max(0, cut // 64 - 1)))


@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 64 * 5 - 1), bit=st.integers(0, 7))
def test_a_flipped_bit_in_a_row_makes_it_no_record(tmp_path_factory: Folders, at: int, bit: int) -> None:
    folder = tmp_path_factory.mktemp("row")
    fill(folder, range(5))
    path = only(folder, "*.idx")
    data = bytearray(path.read_bytes())
    data[64 + at] ^= 1 << bit
    path.write_bytes(data)
    cache = Cache(folder)
    assert cache.missing([key(n) for n in range(5)]) == [key(at // 64)]
    assert list(cache.table.files[0].damaged) == [at // 64]


def test_a_row_of_zeros_left_by_a_power_cut_is_no_record(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    with only(tmp_path, "*.idx").open("ab") as file:
        file.write(bytes(64 * 3))
    cache = Cache(tmp_path)
    assert len(cache) == 2 and not len(cache.table.files[0].damaged) and bytes(16) not in cache


@pytest.mark.parametrize("at", [0, 1, 4 * 3 * 5 * 7, 839])
def test_a_flipped_byte_in_a_record_is_refused(tmp_path: Path, at: int) -> None:
    fill(tmp_path, range(3))
    flip(only(tmp_path, "*.seg"), 896 + at)  # the second record
    cache = Cache(tmp_path)
    for read in (cache.get, lambda k: cache.copy(k, torch.empty(SHAPE))):
        with pytest.raises(CacheDamaged, match=rf"{key(1).hex()} at byte 896 is damaged.*--verify"):
            read(key(1))
    assert torch.equal(cache.get(key(2)), latent(2))


def test_a_byte_that_flips_after_the_first_read_is_refused_by_copy(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    cache, out = Cache(tmp_path), torch.empty(SHAPE)
    cache.copy(key(1), out)
    assert torch.equal(out, latent(1).float())
    with only(tmp_path, "*.seg").open("r+b") as file:
        file.seek(900)
        file.write(b"\xff\x00\xff")
    with pytest.raises(CacheDamaged):
        cache.copy(key(1), out)


@pytest.mark.parametrize("keep", [0, 100, 896 * 2 - 57])
def test_a_truncated_segment_holds_only_what_is_whole(tmp_path: Path, keep: int) -> None:
    fill(tmp_path, range(3))
    os.truncate(only(tmp_path, "*.seg"), keep)
    cache = Cache(tmp_path)
    assert cache.missing([key(n) for n in range(3)]) == [key(n) for n in range(3) if 896 * n + 840 > keep]
    assert len(cache.table.files[0].short) == len(cache.missing([key(n) for n in range(3)]))


CUT_WHILE_OPEN = """
import os, sys, torch
from pathlib import Path
from transpixeler.data.cache.records import Cache, CacheDamaged
folder = Path(sys.argv[1])
cache, out = Cache(folder), torch.empty(4, 3, 50, 70)
key = cache.table.files[0].rows[0]["key"].tobytes()
cache.copy(key, out)
os.truncate(next(folder.glob("*.seg")), 100)
for read in (lambda: cache.copy(key, out), lambda: cache.verify(0, 0)):
    try:
        read()
    except CacheDamaged as fault:
        print(fault)
"""


def test_a_segment_that_is_truncated_under_a_reader_is_a_clear_line(tmp_path: Path) -> None:
    """Reading a mapping beyond the file's end would kill the process with SIGBUS."""
    with CacheWriter(tmp_path) as writer:
        writer.put([Record("latent", key(0), torch.zeros(4, 3, 50, 70))])
    done = subprocess.run([sys.executable, "-c", CUT_WHILE_OPEN, tmp_path], capture_output=True, text=True)
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert done.stdout.count(".seg was truncated while in use: it has 100 bytes") == 2


def test_a_missing_segment_or_index_holds_nothing(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(3))
    only(tmp_path / "a", "*.seg").unlink()
    fill(tmp_path / "b", range(3))
    only(tmp_path / "b", "*.idx").unlink()
    assert len(Cache(tmp_path / "a")) == len(Cache(tmp_path / "b")) == 0


def test_a_newer_format_is_refused_with_both_numbers(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    path = only(tmp_path, "*.idx")
    data = bytearray(path.read_bytes())
    data[8] = index.FORMAT + 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"format {index.FORMAT + 1}.*up to {index.FORMAT}.*upgrade"):
        Cache(tmp_path)


def _in_child(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    return child


def _put_the_row_first(self: CacheWriter, records: list[Record]) -> None:
    """The broken twin: visible before it is whole."""
    for record in records:
        data = memoryview(record.value.flatten().view(torch.uint8).numpy())
        spec = index.Spec(record.kind, "bfloat16", tuple(record.value.shape))
        segment = self._segment(spec)
        row = index.make_rows(
            [record.key], spec, segment=segment.number, offsets=[segment.end], crcs=[zlib.crc32(data)]
        )
        os.write(self._index, row.tobytes())
        time.sleep(0.001)  # so that a kill soon falls between the two
        segment.write(data)


def test_a_killed_writer_costs_at_most_the_record_in_flight(tmp_path: Path) -> None:
    _kill_writers(tmp_path)


def test_a_writer_that_shows_its_records_too_early_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CacheWriter, "put", _put_the_row_first)
    with pytest.raises(AssertionError):
        for _ in range(20):
            _kill_writers(tmp_path)


def _kill_writers(tmp_path: Path) -> None:
    """What a writer reported as put before the kill is there afterwards, and whatever is there is whole."""
    rng = np.random.default_rng(0)
    done = len(Cache(tmp_path))
    for _ in range(25):
        read, write = os.pipe()
        start = done

        def work(start: int = start, write: int = write) -> None:
            with CacheWriter(tmp_path) as writer:
                for n in range(start, start + 100_000):
                    writer.put([record(n)])
                    os.write(write, n.to_bytes(4, "little"))

        child = _in_child(work)
        os.close(write)
        os.read(read, 4)
        time.sleep(rng.uniform(0, 0.02))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        reported = start + 1 + sum(len(block) for block in iter(lambda read=read: os.read(read, 4096), b"")) // 4
        os.close(read)
        cache = Cache(tmp_path)
        done = len(cache)
        assert done - reported in (0, 1)
    assert all(torch.equal(cache.get(key(n)), latent(n)) for n in range(done))
    assert not any(len(file.damaged) or len(file.short) for file in cache.table.files)


def test_a_full_disk_is_one_clear_line_and_what_was_written_stays(tmp_path: Path) -> None:
    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (896 * 5 + 300, resource.RLIM_INFINITY))
        with pytest.raises(Fault, match=r"no space left .*stays valid.*data\.cache_dir"):
            fill(tmp_path, range(100))

    assert os.waitpid(_in_child(work), 0)[1] == 0
    cache = Cache(tmp_path)
    assert [n for n in range(100) if key(n) in cache] == list(range(5))
    assert all(torch.equal(cache.get(key(n)), latent(n)) for n in range(5))


def test_a_folder_that_cannot_be_written_names_the_way_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"cannot be written \(Read-only file system\): set data\.cache_dir"):
        CacheWriter(tmp_path / "cache")


# --- a million -------------------------------------------------------------------------------------------------------

PROBE = """
import sys, time
from pathlib import Path
from transpixeler.data.cache import index
def rss():
    return int(open("/proc/self/statm").read().split()[1]) * 4096 / 1e6
start = time.process_time()  # others do not take from it
path = Path(sys.argv[1])
segment = next(path.parent.glob("*.seg"))
table = index.Table([index.open_index(path, index.map_rows(path), {0: index.Segment(segment, segment.stat().st_size)})])
print(len(table), time.process_time() - start, rss())
"""


def write_million(folder: Path, count: int) -> list[bytes]:
    """The rows and bytes that `put` would write, written at once."""
    spec = index.Spec("latent", "bfloat16", (2, 1, 4, 4))
    data = np.random.default_rng(0).bytes(64 * count)
    keys = [data[64 * n : 64 * n + 16] for n in range(count)]
    crcs = np.array([zlib.crc32(data[64 * n : 64 * n + 64]) for n in range(count)], np.uint32)
    rows = index.make_rows(keys, spec, segment=0, offsets=np.arange(count) * 64, crcs=crcs)
    (folder / "w.idx").write_bytes(index.header() + rows.tobytes())
    (folder / f"w.00000.{spec.segment}.seg").write_bytes(data)
    return keys


def test_a_million_records_open_in_a_second_and_little_memory(tmp_path: Path) -> None:
    keys = write_million(tmp_path, 1_000_000)
    probe = [sys.executable, "-c", PROBE, str(tmp_path / "w.idx")]
    runs = [subprocess.run(probe, capture_output=True, text=True, check=True).stdout.split() for _ in range(3)]
    assert all(int(count) == 1_000_000 and float(megabytes) < 200 for count, _, megabytes in runs)
    assert min(float(seconds) for _, seconds, _ in runs) < 1
    cache = Cache(tmp_path)
    assert cache.missing([*keys, b"\1" * 16]) == [b"\1" * 16]
    for n in np.random.default_rng(1).integers(0, len(keys), 2000):
        assert cache.get(keys[n]).view(torch.uint8).flatten()[:16].numpy().tobytes() == keys[n]


def _anonymous_megabytes() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024


def test_random_reads_hold_no_memory_beyond_the_page_cache(tmp_path: Path) -> None:
    with CacheWriter(tmp_path) as writer:
        writer.put([record(n, (16, 4, 32, 32)) for n in range(256)])  # 32 MiB
    cache, out = Cache(tmp_path), torch.empty(16, 4, 32, 32)
    cache.copy(key(0), out)
    before = _anonymous_megabytes()
    for n in np.random.default_rng(0).integers(0, 256, 2000):
        cache.copy(key(int(n)), out)
    assert _anonymous_megabytes() - before < 8
