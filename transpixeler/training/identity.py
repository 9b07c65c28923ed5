"""Say what is trained: fingerprints of the code, the base's weights and the clips, kept in every checkpoint.

In: the package's files, the base's files and the data sets. Out: an `Identity`, compared with the other ranks' at the
start and with the checkpoint's on resume. Another base or other clips make another experiment and are refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import transpixeler
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.config.sections import Config, UserError
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import Run

logger = logging.getLogger("transpixeler")

SMALL_FILE = 64 << 20  # bytes up to which a file is read whole
BLOCK = 4096  # bytes read of each tensor of a larger file, or of each part of one that is no safetensors
PARTS = 1024  # of a larger file that is no safetensors
SIZES_READ = 256  # of a data set's files: asking a network disk for each of a million would take minutes
WEIGHTS_AND_SHAPES = {".safetensors", ".pth", ".pt", ".bin", ".json"}


@dataclass(frozen=True)
class Identity:
    """Code, base and clips of a run, in short hashes."""

    code: str
    base: str
    data: dict[str, dict[str, Any]]  # by set: the number of clips, and hashes of their names and of their records


class Rank(NamedTuple):
    """Code and base of one rank, and the host that it runs on."""

    host: str
    code: str
    base: str


def check_hosts(config: Config, runtime: Runtime, bases: Sequence[Path]) -> Rank:
    """Return rank 0's code and base; refuse hosts that have others, or other data sets. A collective call.

    All hosts encode from rank 0's list of clips, so this comes before anything is encoded.
    """
    base = base_fingerprint(bases, config.model.fused_paths)
    ranks = runtime.gather(Rank(platform.node(), code_fingerprint(), base))
    first = ranks[0]
    for number, rank in enumerate(ranks):
        here, there = f"rank {number} on {rank.host}", f"rank 0 on {first.host}"
        if rank.code != first.code:
            raise UserError(
                f"{here} runs other code of transpixeler than {there}; install the same version on all hosts"
            )
        if rank.base != first.base:
            raise UserError(
                f"model.path: {config.model.path} holds other weights for {here} than for {there}; "
                "give all hosts the same files"
            )
    _check_sources(config, runtime)
    return first


def check(config: Config, runtime: Runtime, run: Run, first: Rank, data: Datasets) -> Identity:
    """Return what is trained; refuse what differs from the checkpoint. first: of `check_hosts`. A collective call."""
    sets = {"train": data_fingerprint(data.train), "eval": data_fingerprint(data.eval)} if runtime.is_main else {}
    shared = runtime.broadcast(sets)
    assert isinstance(shared, dict)
    found = Identity(first.code, first.base, shared)
    if run.restored is not None:
        own_clips = not run.going.restart_steps  # whose order begins at zero may be trained on other clips
        for line in compare(run.restored.state.get("identity"), found, config, run.changed, own_clips=own_clips):
            logger.warning("%s", line)
    return found


def _check_sources(config: Config, runtime: Runtime) -> None:
    """Refuse hosts that see other files in the data sets than rank 0."""
    if runtime.world_size == 1:
        return
    for key, sources in (("train", config.data.train), ("eval", config.data.eval)):
        for source in sources:
            seen = runtime.gather((platform.node(), source_fingerprint(Path(source.path).expanduser())))
            for number, (host, files) in enumerate(seen):
                if files != seen[0][1]:
                    raise UserError(
                        f"data.{key}: {source.path} holds other files for rank {number} on {host} than for rank 0 on "
                        f"{seen[0][0]}; all hosts must see the same data"
                    )


def compare(
    there: Mapping[str, Any] | None,
    here: Identity,
    config: Config,
    changed: Mapping[str, str],
    *,
    own_clips: bool = True,
) -> Iterator[str]:
    """Yield what differs from a checkpoint's identity; refuse what makes another experiment.

    changed: the keys whose value is not the checkpoint's. They explain other clips, and are logged by themselves.
    own_clips: whether the training clips must be those of the checkpoint.
    """
    if there is None:
        yield "the checkpoint was written before base and clips were fingerprinted: they cannot be compared"
        return
    if there["code"] != here.code:
        yield "resumed with other code than the checkpoint was written by: numbers may differ in their last bits"
    differences = {}
    if there["base"] != here.base:
        differences["base"] = f"model.path: the weights in {config.model.path} are not those that it was trained on"
    if own_clips and (train := _other_clips("train", there["data"], here.data)) and not _explained(changed):
        differences["data"] = train
    refused = {what: text for what, text in differences.items() if what not in config.train.allow_changed}
    if refused:
        allowed = ", ".join(dict.fromkeys([*config.train.allow_changed, *refused]))
        raise UserError(
            f"--resume: {'; '.join(refused.values())}. Put back what was there, start a new run, or go on all the "
            f"same with train.allow_changed=[{allowed}]"
        )
    yield from differences.values()
    if held_out := _other_clips("eval", there["data"], here.data):
        yield f"{held_out}: its losses do not compare with earlier ones"


def _other_clips(name: str, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Return how the clips of a set differ, or ""."""
    before, now = there[name], here[name]
    if before["clips"] != now["clips"]:
        return f"data.{name}: {before['clips']} clips then, {now['clips']} now"
    if before["names"] != now["names"]:
        return f"data.{name}: {now['clips']} clips as then, but others, or of other sizes"
    if before["records"] != now["records"]:
        return f"data.{name}: the same clips, but their files, captions or encoders have changed"
    return ""


def _explained(changed: Mapping[str, str]) -> bool:
    return any(key.startswith("data.") for key in changed)


# --- fingerprints ----------------------------------------------------------------------------------------------------


def code_fingerprint() -> str:
    """Return a hash of the package's source files."""
    root, digest = Path(transpixeler.__file__).parent, _hash()
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())
    return digest.hexdigest()


def data_fingerprint(data: Dataset) -> dict[str, Any]:
    """Return the number of clips, and hashes of their names and sizes, and of what their records are made from."""
    names, records = _hash(), _hash()
    for item in data.items:
        names.update(f"{item.id}\0{item.bucket}\0{item.repeats}\n".encode("utf-8", "surrogateescape"))
        records.update(b"".join([*data.video_keys(item), *item.text_keys, *(item.shown.all if item.shown else ())]))
    return {"clips": len(data.items), "names": names.hexdigest(), "records": records.hexdigest()}


def source_fingerprint(source: Path) -> str:
    """Return a hash of a manifest, or of the names of a folder's files, and of some of these: size, or caption."""
    digest = _hash()
    files = [source]
    if source.is_dir():
        with os.scandir(source) as entries:
            names = sorted(entry.name for entry in entries if not entry.is_dir())
        digest.update("\0".join(names).encode("utf-8", "surrogateescape"))
        files = [source / name for name in names[:: -(-len(names) // SIZES_READ) or 1]]
    for file in files:
        size = file.stat().st_size if file.is_file() else -1
        digest.update(f"{size}\0".encode())
        if 0 <= size <= BLOCK or (size > 0 and file == source):
            for part in _parts(file):
                digest.update(part)
    return digest.hexdigest()


def base_fingerprint(bases: Sequence[Path], fused: Sequence[str] = ()) -> str:
    """Return a hash of the base's weight files and configs, one place an expert, and of the adapters added to it.

    Large files are not read whole: of each tensor one block is, so that a change of any layer shows within a second.
    """
    digest = _hash()
    for root in (*bases, *(Path(path).expanduser() for path in fused)):
        for file in _files(root):
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode("utf-8", "surrogateescape"))
            for part in _parts(file):
                digest.update(part)
    return digest.hexdigest()


def _files(root: Path) -> list[Path]:
    """Return the files that hold a model's or an adapter's weights and shape."""
    if root.is_file():
        return [root]
    folders = [folder for folder in sorted(root.glob("transformer*")) if folder.is_dir()] or [root]
    embeddings = [] if folders == [root] else sorted(root.glob(ADAPTER_FILE))  # of a model that was trained in full
    return embeddings + [
        file for folder in folders for file in sorted(folder.iterdir()) if file.suffix in WEIGHTS_AND_SHAPES
    ]


def _parts(file: Path) -> Iterator[bytes]:
    """Yield the bytes of a file that stand for the whole."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        if size <= SMALL_FILE:
            yield opened.read()
            return
        starts = [size * part // PARTS for part in range(PARTS)]
        if file.suffix == ".safetensors":
            length = int.from_bytes(opened.read(8), "little")
            header = opened.read(length)
            yield header
            spans = [entry["data_offsets"] for name, entry in json.loads(header).items() if name != "__metadata__"]
            starts = [8 + length + (first + last) // 2 for first, last in spans]
        for start in sorted(starts):
            opened.seek(start)
            yield opened.read(BLOCK)


def _hash() -> hashlib.blake2b:
    return hashlib.blake2b(digest_size=16)
