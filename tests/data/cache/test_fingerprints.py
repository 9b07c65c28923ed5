"""Files are hashed once until they change, whatever becomes of the memory."""

import os
from pathlib import Path

import pytest

from transpixeler.data.cache import fingerprints


def test_file_hashes_are_read_once_until_a_file_changes(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("a", "b")]
    for file in files:
        file.write_text(file.name)
        os.utime(file, (1e9, 1e9))
    first = fingerprints.FileHashes(tmp_path / "cache")
    digests = first.digests(files, 2)
    first.save()
    again = fingerprints.FileHashes(tmp_path / "cache")
    assert again.digests(files, 2) == digests and (first.read, again.read) == (2, 0)
    files[0].write_text("A")  # the same size, a new time
    third = fingerprints.FileHashes(tmp_path / "cache")
    assert third.digests(files, 2)[files[0]] != digests[files[0]] and third.read == 1
    third.save()
    fourth = fingerprints.FileHashes(tmp_path / "cache")
    fourth.digests(files, 2)
    assert fourth.read == 1  # changed so lately that it may change again unseen


@pytest.mark.parametrize("tail", ["nonsense\n", "f\t1\tx\tc\n", "\xff\xfe\n", "f\t1"])
def test_a_broken_memory_of_hashes_is_read_as_far_as_it_goes(tail: str, tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    os.utime(tmp_path / "a", (1e9, 1e9))
    hashes = fingerprints.FileHashes(tmp_path / "cache")
    digests = hashes.digests([tmp_path / "a"], 1)
    hashes.save()
    with (tmp_path / "cache/hashes.tsv").open("ab") as file:
        file.write(tail.encode("latin-1"))
    again = fingerprints.FileHashes(tmp_path / "cache")
    assert again.digests([tmp_path / "a"], 1) == digests and again.read == 0
