"""A checkpoint from outside runs no code and reads no other file, and a damaged one is passed over with a reason."""

from __future__ import annotations

import io
import json
import os
import pickle
import pickletools
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import metadata as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo

from tests.support.ranks import run_ranks
from transpixeler.config.sections import CheckpointConfig, UserError
from transpixeler.parallel import runtime
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import checkpoint, checkpointer, metadata, restore, training_state


@pytest.fixture(scope="module")
def here() -> Iterator[Runtime]:
    with runtime.running(device="cpu") as alone:
        yield alone


@pytest.fixture(scope="module")
def honest(here: Runtime, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint of two steps of AdamW. Nobody writes into it."""
    weight = torch.nn.Parameter(torch.ones(8, 4))
    optimizer = torch.optim.AdamW([weight])
    for _ in range(2):
        weight.grad = torch.ones(8, 4)
        optimizer.step()
    folder = tmp_path_factory.mktemp("honest")
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    assert not keeper.save(2, tensors(weight, optimizer), {"step": 2, "config": {}}, wait=True)
    return folder / checkpoint.folder_name(2)


@pytest.fixture
def folder(honest: Path, tmp_path: Path) -> Path:
    """Return a copy of the honest checkpoint, to be changed."""
    return shutil.copytree(honest, tmp_path / "checkpoints" / honest.name)


def tensors(weight: torch.nn.Parameter, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    moments = training_state.optimizer_tensors({"weight": weight}, optimizer)
    return {"model.weight": weight.detach(), **moments, "half": torch.ones(4, dtype=torch.bfloat16)}


def listed(folder: Path) -> None:
    """List every file as it is now: who forges a checkpoint forges its manifest too."""
    files = [file for file in folder.iterdir() if file.name != checkpoint.MANIFEST]
    entries = {f.name: {"size": f.stat().st_size, "blake2b": checkpoint.digest(f)} for f in files}
    (folder / checkpoint.MANIFEST).write_text(json.dumps({"format": 1, "files": entries}))


def forge(folder: Path, content: bytes) -> None:
    (folder / ".metadata").write_bytes(content)
    listed(folder)
    checkpoint.check(folder)  # the hashes are right: they are no help


def honest_metadata(folder: Path) -> Any:
    return pickle.loads((folder / ".metadata").read_bytes())


def test_a_checkpoint_is_read_as_it_was_written(honest: Path, here: Runtime) -> None:
    ours, theirs = metadata.read_metadata(honest), honest_metadata(honest)
    for entry in theirs.state_dict_metadata.values():
        if hasattr(getattr(entry, "properties", None), "strides"):
            entry.properties.strides = None  # which torch 2.15 notes beside: all that is saved is contiguous
    assert ours.state_dict_metadata == theirs.state_dict_metadata and ours.storage_data == theirs.storage_data
    weight = torch.nn.Parameter(torch.zeros(8, 4))
    optimizer = torch.optim.AdamW([weight])
    training_state.materialize(optimizer)
    filled = tensors(weight, optimizer)
    restore.load(restore.Restored.read(honest), filled, same_layout=True)
    assert float(filled["optimizer.weight.step"]) == 2 and bool((filled["model.weight"] < 1).all())


def test_an_honest_checkpoint_names_no_more_than_is_allowed(honest: Path) -> None:
    class Recording(metadata._Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            named.add((module, name))
            return super().find_class(module, name)

    named: set[tuple[str, str]] = set()
    Recording(io.BytesIO((honest / ".metadata").read_bytes())).load()
    assert len(named) == 13 and ("torch", "bfloat16") in named  # twelve, and a second dtype
    assert named - {("torch", "float32"), ("torch", "bfloat16")} <= metadata._STOOD_IN_FOR


# --- attacks ---------------------------------------------------------------------------------------------------------


class Call:
    """Pickles as a call of any function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


def named(module: str, name: str, argument: str) -> bytes:
    """Return a pickle that calls module.name(argument), whatever the name."""
    text = b"".join(b"\x8c" + bytes([len(part)]) + part.encode() for part in (module, name))
    return b"\x80\x04" + text + b"\x93\x8c" + bytes([len(argument)]) + argument.encode() + b"\x85R."


NAMES = [
    ("os", "system"),
    ("posix", "system"),
    ("torch.distributed.checkpoint.filesystem", "os.system"),  # passes a rule of prefixes
    ("torch.distributed.checkpoint.metadata", "os.system"),
    ("torch.serialization", "os.system"),
    ("pathlib", "os.system"),
    ("torch", "os.system"),
]


@pytest.mark.parametrize(("module", "name"), NAMES)
def test_nothing_that_metadata_names_is_run(folder: Path, here: Runtime, module: str, name: str) -> None:
    marker = folder.parent / "ran"
    forge(folder, named(module, name, f"touch {marker}"))
    with pytest.raises(UserError, match=r"\.metadata names .*which no checkpoint of ours does"):
        restore.load(restore.Restored.read(folder), {"model.weight": torch.zeros(8, 4)}, same_layout=True)
    assert not marker.exists()


def test_a_call_among_honest_values_is_not_run(folder: Path, here: Runtime) -> None:
    marker, forged = folder.parent / "ran", honest_metadata(folder)
    forged.planner_data = {"model.weight": Call(os.system, f"touch {marker}")}
    forge(folder, pickle.dumps(forged))
    with pytest.raises(UserError, match="system"):
        restore.load(restore.Restored.read(folder), {"model.weight": torch.zeros(8, 4)}, same_layout=True)
    assert not marker.exists()


def test_an_entry_of_bytes_is_not_unpickled(folder: Path, here: Runtime) -> None:
    marker, forged = folder.parent / "ran", honest_metadata(folder)
    content = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), content)
    (folder / "__0_0.distcp").write_bytes(content.getvalue())
    index = dcp.MetadataIndex("model.weight")
    forged.state_dict_metadata = {"model.weight": dcp.BytesStorageMetadata()}
    forged.storage_data = {index: _StorageInfo("__0_0.distcp", 0, len(content.getvalue()))}
    forge(folder, pickle.dumps(forged))
    with pytest.raises(UserError, match="BytesStorageMetadata"):
        restore.load(restore.Restored.read(folder), {"model.weight": torch.zeros(8, 4)}, same_layout=True)
    assert not marker.exists()


@pytest.mark.parametrize("path", ["../outside", "/etc/hostname", "state.json/../../outside", "..", "", "a\0b"])
def test_no_file_is_read_that_the_manifest_does_not_list(folder: Path, here: Runtime, path: str) -> None:
    shutil.copy(folder / "__0_0.distcp", folder.parent / "outside")
    forged = honest_metadata(folder)
    forged.storage_data = {index: _StorageInfo(path, p.offset, p.length) for index, p in forged.storage_data.items()}
    forge(folder, pickle.dumps(forged))
    with pytest.raises(UserError, match="which the manifest does not list"):
        restore.load(restore.Restored.read(folder), {"model.weight": torch.zeros(8, 4)}, same_layout=True)


def test_what_a_pickle_does_to_a_class_it_names_harms_nobody(folder: Path) -> None:
    """BUILD sets attributes of whatever is on the stack, a class too."""
    text = b"\x8c" + bytes([len(metadata._METADATA)]) + metadata._METADATA.encode() + b"\x8c\x08Metadata\x93"
    forge(folder, b"\x80\x04" + text + b"N}\x8c\x07version\x8c\x04evil\x73\x86b.")
    before = dict(vars(dcp.Metadata))
    with pytest.raises(checkpoint.CheckpointFault):
        metadata.read_metadata(folder)
    assert dict(vars(dcp.Metadata)) == before


def test_metadata_that_is_cut_or_garbled_is_a_fault(folder: Path) -> None:
    whole = (folder / ".metadata").read_bytes()
    ends = [position for _, _, position in pickletools.genops(whole)][::7]
    for end in ends:
        for content in (whole[:end], whole[:end] + b"\xff" + whole[end + 1 :], whole[:end] + whole[end + 1 :]):
            forge(folder, content)
            try:
                found = metadata.read_metadata(folder)
            except checkpoint.CheckpointFault:
                continue
            assert isinstance(found, dcp.Metadata)


def test_tensors_of_another_shape_are_refused(honest: Path, here: Runtime) -> None:
    with pytest.raises(UserError, match=r"model\.weight has shape \[8, 4\], not \[8, 5\]"):
        restore.load(restore.Restored.read(honest), {"model.weight": torch.zeros(8, 5)}, same_layout=True)


def test_a_damaged_tensor_file_is_one_line(folder: Path, here: Runtime) -> None:
    file = folder / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    listed(folder)
    with pytest.raises(UserError, match=r"tensors cannot be read \(UnpicklingError\); use another checkpoint$"):
        restore.load(restore.Restored.read(folder), {"model.weight": torch.zeros(8, 4)}, same_layout=True)


# --- damaged manifests -----------------------------------------------------------------------------------------------

ENTRY = {"size": 1, "blake2b": "0"}
MANIFESTS: list[Any] = [
    *(None, [], "text", 3, {}, {"format": 1}, {"format": "1", "files": {}}, {"format": None, "files": {}}),
    *({"format": True, "files": {}}, {"format": 1, "files": []}, {"format": 1, "files": "x"}, {"format": 1.5}),
    *({"format": 1, "files": {"a": entry}} for entry in (None, [], 3, "x", {}, {"size": 1}, {"size": "1"} | ENTRY)),
    *({"format": 1, "files": {"a": ENTRY | change}} for change in ({"size": None}, {"blake2b": 3}, {"size": 1.0})),
    *({"format": 1, "files": {name: ENTRY}} for name in ("../a", "/etc/passwd", "..", "", "a\0", "a/b")),
    {"format": 1, "files": {}},
    {"format": 10**400, "files": {}},
]


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda manifest: json.dumps(manifest)[:60])
def test_a_checkpoint_with_a_damaged_manifest_is_passed_over(
    folder: Path, here: Runtime, manifest: object, caplog: pytest.LogCaptureFixture
) -> None:
    newer = shutil.copytree(folder, folder.with_name(checkpoint.folder_name(3)))
    (newer / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert checkpoint.latest(folder.parent, here) == folder
    assert f"checkpoint {newer.name} is passed over: " in caplog.text


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"format": 1' + b"0" * 5000 + b"}"])
def test_a_checkpoint_whose_manifest_is_no_json_is_passed_over(folder: Path, here: Runtime, content: bytes) -> None:
    newer = shutil.copytree(folder, folder.with_name(checkpoint.folder_name(3)))
    (newer / checkpoint.MANIFEST).write_bytes(content)
    assert checkpoint.latest(folder.parent, here) == folder


@pytest.mark.parametrize("state", ["[]", "3", "{", '{"step": "4"}', '{"step": 1, "config": []}', '{"layout": 3}'])
def test_a_state_of_another_kind_is_one_line(folder: Path, state: str) -> None:
    (folder / checkpoint.STATE).write_text(state)
    with pytest.raises(UserError, match=r"state\.json"):
        checkpoint.read_state(folder)


def test_folders_with_odd_digits_are_no_checkpoints(tmp_path: Path) -> None:
    for name in ("global_step²", "global_step٣x", "global_step", "global_step1.tmp", "global_step-1"):
        (tmp_path / name).mkdir()
    assert checkpoint.candidates(tmp_path) == []


# --- surplus ---------------------------------------------------------------------------------------------------------


def test_a_kill_while_surplus_is_removed_leaves_nothing_that_looks_valid(
    here: Runtime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(path: Path, ignore_errors: bool = False) -> None:
        if not ignore_errors:
            (path / "__0_0.distcp").unlink()
            raise OSError("killed here")

    keeper = checkpointer.Checkpointer(tmp_path, CheckpointConfig(keep=1), here)
    assert not keeper.save(1, {"a": torch.ones(2)}, {"step": 1}, wait=True)
    monkeypatch.setattr(shutil, "rmtree", killed)
    assert not keeper.save(2, {"a": torch.ones(2)}, {"step": 2}, wait=True)
    monkeypatch.undo()
    assert [found.name for found in checkpoint.candidates(tmp_path)] == [checkpoint.folder_name(2)]
    checkpointer.Checkpointer(tmp_path, CheckpointConfig(keep=1), here)
    assert [found.name for found in tmp_path.iterdir()] == [checkpoint.folder_name(2)]


def _without_a_part(rank: int, world_size: int, folder: Path) -> str:
    here = Runtime(rank, world_size, rank, torch.device("cpu"), timeout=timedelta(seconds=4))
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    if rank:
        keeper._list_own_files = lambda partial: None  # type: ignore[method-assign]
    return keeper.save(1, {f"model.{rank}": torch.ones(4)}, {}, wait=True)


def test_a_part_that_does_not_come_is_waited_for_less_long_than_a_rank(tmp_path: Path) -> None:
    """Else a rank that has lost the others would hold the run for minutes after they have ended."""
    for fault in run_ranks(_without_a_part, 2, tmp_path / "checkpoints"):
        assert "not all ranks wrote their part within 2 s" in fault


def _after_the_other_is_gone(rank: int, world_size: int, folder: Path) -> float:
    here = Runtime(rank, world_size, rank, torch.device("cpu"), timeout=timedelta(seconds=2))
    keeper = checkpointer.Checkpointer(folder, CheckpointConfig(), here)
    keeper.save(1, {f"model.{rank}": torch.ones(4)}, {})
    keeper.wait()
    if rank:
        return 0.0
    write, start = checkpointer.write_tensors, time.monotonic()
    checkpointer.write_tensors = lambda *args, **options: dist.barrier(
        group=keeper._group
    )  # which the other never joins
    try:
        keeper._running = save = checkpointer._Save(2)
        keeper._finish(save, {}, folder, folder, {})
        with pytest.raises(RuntimeError, match=r"[Tt]ime"):
            keeper.wait()
    finally:
        checkpointer.write_tensors = write
    return time.monotonic() - start


def test_a_save_that_lost_another_rank_says_so_at_once(tmp_path: Path) -> None:
    waited, _ = run_ranks(_after_the_other_is_gone, 2, tmp_path / "checkpoints")
    assert waited < 3.5  # one limit of two seconds, not two
