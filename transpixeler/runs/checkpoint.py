"""Training state to disk and back: whole or not there at all, and the same on any layout.

In: tensors by name (parameters, optimizer, EMA; plain or sharded) and a small dict. Out: a folder that appears only
when every byte is written, synced and listed with its hash. A save runs beside training; its stall is measured.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transpixeler.config import CheckpointConfig, UserError
from transpixeler.files import sync, write_text
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.runtime import Runtime

logger = logging.getLogger("transpixeler")

FORMAT = 1
MANIFEST = "manifest.json"
STATE = "state.json"
PREFIX = "global_step"
WAIT_SECONDS = 300.0  # for another rank's part of a save, before it is given up; less than ranks wait for each other


class CheckpointFault(Exception):
    """Why a folder is no valid checkpoint, or a save did not come about."""


@dataclass(frozen=True)
class Restored:
    """A valid checkpoint that training goes on from: its folder, and what its small files say, read once."""

    folder: Path
    state: Mapping[str, Any]
    stored: frozenset[str]  # names of all tensors

    @classmethod
    def read(cls, folder: Path) -> Restored:
        return cls(folder, read_state(folder), frozenset(_stored(folder)))

    @property
    def step(self) -> int:
        return self.state["step"]

    @property
    def holds_means(self) -> bool:
        """Return whether `optim.ema` was on when the checkpoint was written."""
        return any(name.startswith("ema.") for name in self.stored)


# --- what is saved ---------------------------------------------------------------------------------------------------


def optimizer_tensors(parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None) -> dict[str, Tensor]:
    """Every tensor of the optimizer's state under its parameter's name, which no layout changes."""
    if optimizer is None:
        return {}
    return {
        f"optimizer.{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
        if isinstance(value, Tensor)
    }


def materialize(optimizer: Optimizer | None) -> None:
    """Makes the state that a first step would make, and changes no parameter: the shape that a load fills."""
    if optimizer is None:
        return
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * 0
        group["weight_decay"] = 0.0
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    for group, (lr, decay) in zip(optimizer.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, decay


def forget_unsaved(
    restored: Restored | Path, parameters: Mapping[str, nn.Parameter], optimizer: Optimizer | None
) -> None:
    """Leave a parameter without state where the checkpoint has none: it was saved before the first update."""
    if optimizer is None:
        return
    stored = restored.stored if isinstance(restored, Restored) else _stored(restored)
    known = {name.rpartition(".")[0] for name in stored if name.startswith("optimizer.")}
    for name, parameter in parameters.items():
        if f"optimizer.{name}" not in known:
            optimizer.state.pop(parameter, None)


def _quantized(tensor: Tensor) -> Tensor | None:
    """What this rank holds, where that is a tensor subclass of codes and scales."""
    inner = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    return inner if hasattr(type(inner), "__tensor_flatten__") and hasattr(inner, "codes") else None


def _plain(tensor: Tensor) -> Tensor:
    """Quantized moments as numbers: their blocks fit no other sharding."""
    inner = _quantized(tensor)
    if inner is None:
        return tensor
    values = inner.dequantize()
    if isinstance(tensor, DTensor):
        shape, stride = tensor.shape, tensor.stride()
        return DTensor.from_local(values, tensor.device_mesh, tensor.placements, shape=shape, stride=stride)
    return values


def _codes(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Quantized moments as they are, under their shard's place: the same layout resumes with the very same bits."""
    found = {}
    for name, tensor in tensors.items():
        inner = _quantized(tensor)
        if inner is not None:
            place = "0"
            if isinstance(tensor, DTensor):
                axes = zip(tensor.device_mesh.get_coordinate(), tensor.placements, strict=True)
                place = "-".join(str(at) for at, placement in axes if placement.is_shard())
            found |= {f"{name}.{part}.{place}": getattr(inner, part) for part in inner.__tensor_flatten__()[0]}
    return found


def own_part(tensors: Mapping[str, Tensor], mesh: Mesh) -> dict[str, Tensor]:
    """What this rank saves: replicas hold the same, so each of them copies and writes a part of it."""
    replica = mesh.data_rank // mesh.layout.shard
    names = sorted(tensors)[replica :: mesh.layout.replicate]
    return {name: tensors[name] for name in names}


# --- whole folders ---------------------------------------------------------------------------------------------------


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix(PREFIX))


def candidates(checkpoints: Path) -> list[Path]:
    """Finished folders, newest first; what is still being written has another name."""
    if not checkpoints.is_dir():
        return []
    found = [f for f in checkpoints.iterdir() if f.name.removeprefix(PREFIX).isdigit() and f.name.startswith(PREFIX)]
    return sorted(found, key=step_of, reverse=True)


def check(folder: Path, *, part: int = 0, parts: int = 1) -> None:
    """Raises `CheckpointFault` unless every file is there with its size; hashes one part of the files."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        raise CheckpointFault(f"{MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointFault(f"{MANIFEST} cannot be read: {error}") from None
    if manifest["format"] > FORMAT:
        raise CheckpointFault(f"written by a newer transpixeler (format {manifest['format']}); update this one")
    for i, (name, entry) in enumerate(sorted(manifest["files"].items())):
        path = folder / name
        if not path.is_file() or path.stat().st_size != entry["size"]:
            raise CheckpointFault(f"{name} is missing or has another size")
        if i % parts == part and _digest(path) != entry["blake2b"]:
            raise CheckpointFault(f"{name} has changed since it was written")


def fault_of(folder: Path, runtime: Runtime) -> str:
    """Why it is no valid checkpoint, the same on all ranks, each of which hashes its share. A collective call."""
    fault = ""
    try:
        check(folder, part=runtime.rank, parts=runtime.world_size)
    except (CheckpointFault, OSError) as error:
        fault = str(error)
    return next((found for found in runtime.gather(fault) if found), "")


def latest(checkpoints: Path, runtime: Runtime) -> Path | None:
    """The newest valid checkpoint; what is passed over is said, with the reason. A collective call."""
    for folder in runtime.broadcast([str(f) for f in candidates(checkpoints)]):
        fault = fault_of(Path(folder), runtime)
        if not fault:
            return Path(folder)
        if runtime.is_main:
            logger.warning("checkpoint %s is passed over: %s", Path(folder).name, fault)
    return None


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        while part := file.read(1 << 22):
            digest.update(part)
    return digest.hexdigest()


# --- saving ----------------------------------------------------------------------------------------------------------


@dataclass
class _Save:
    """One save under way on this rank."""

    step: int
    thread: threading.Thread | None = None
    fault: str = ""


@dataclass
class Checkpointer:
    """Saves into RUN/checkpoints, one at a time, and keeps the folder tidy."""

    folder: Path
    config: CheckpointConfig
    runtime: Runtime
    _stall: float = 0.0  # what the last save cost the training thread, until it is told
    _running: _Save | None = None
    _group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # an asynchronous save on the default group would wait for training's collectives, and they for it
        self._group = dist.new_group(backend="gloo", timeout=self.runtime.timeout)
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{PREFIX}*.tmp"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, wait: bool = False) -> str:
        """A collective call; returns when the tensors are copied, or written when `wait` is set, and why it failed."""
        start = time.perf_counter()
        self.wait()
        final = self.folder / folder_name(step)
        partial = final.with_name(final.name + ".tmp")
        save = _Save(step, fault=self._make_room(partial) if self.runtime.is_main and not final.exists() else "")
        if self.runtime.broadcast(final.exists()):  # saved at this very step already
            return ""
        self._running = save
        if self.runtime.broadcast(save.fault):
            return self.wait(ends=wait)
        plain = {name: _plain(tensor) for name, tensor in tensors.items()} | _codes(tensors)
        fault = ""
        if self.config.asynchronous and not wait:
            # `dcp.async_save` would write log records of every tensor on this thread, which takes as long as the copy
            staged = DefaultStager(StagingOptions(False, False, False, False)).stage(plain)
            save.thread = threading.Thread(target=self._finish, args=(save, staged, partial, final, dict(state)))
            save.thread.start()
        else:
            self._finish(save, plain, partial, final, state)
            fault = self.wait(ends=wait)
        self._stall = time.perf_counter() - start
        return fault

    def _make_room(self, partial: Path) -> str:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        except OSError as error:
            return _reason(error, self.folder)
        return ""

    def wait(self, *, ends: bool = False) -> str:
        """Ends the save under way; returns why it failed, the same on all ranks. A collective call.

        `ends`: training does so too.
        """
        if self._running is None:
            return ""
        if self._running.thread is not None:
            self._running.thread.join()
        save, self._running = self._running, None
        faults = [fault for fault in self.runtime.gather(save.fault) if fault]
        if not faults:
            return ""
        last = candidates(self.folder)
        kept = f"the last whole one is {last[0].name}" if last else "there is none yet"
        fault = f"the checkpoint of step {save.step} was not written: {faults[0]}; {kept}"
        if self.runtime.is_main:
            logger.error("%s%s", fault, "" if ends else "; training goes on")
            shutil.rmtree(self.folder / f"{folder_name(save.step)}.tmp", ignore_errors=True)
        return fault

    def close(self) -> None:
        """Lets this rank's part of a save come to its end, whatever ended training; not a collective call."""
        if self._running is not None and self._running.thread is not None:
            self._running.thread.join()

    def take_stall(self) -> float:
        """Seconds that a save kept training waiting since this was last asked."""
        stall, self._stall = self._stall, 0.0
        return stall

    # -- beside training

    def _finish(
        self, save: _Save, tensors: Mapping[str, Tensor], partial: Path, final: Path, state: Mapping[str, Any]
    ) -> None:
        try:
            if self.runtime.device.type == "cuda":
                torch.cuda.set_device(self.runtime.device)  # or every rank's thread takes memory of the first GPU
            dcp.save(tensors, checkpoint_id=partial, process_group=self._group)
            self._list_own_files(partial)
            if self.runtime.is_main:
                self._publish(partial, final, state)
        except (Exception, CheckpointException) as error:  # the latter is no Exception
            save.fault = _reason(error, self.folder)

    def _list_own_files(self, partial: Path) -> None:
        own = [f for f in partial.iterdir() if f.name.startswith(f"__{self.runtime.rank}_")]
        if self.runtime.is_main:
            own.append(partial / ".metadata")
        listed = {f.name: {"size": f.stat().st_size, "blake2b": _digest(f)} for f in own}
        write_text(partial / f"files_{self.runtime.rank}.json", json.dumps(listed))

    def _publish(self, partial: Path, final: Path, state: Mapping[str, Any]) -> None:
        """Rank 0 makes the folder valid once every rank has listed its files."""
        lists = [partial / f"files_{rank}.json" for rank in range(self.runtime.world_size)]
        deadline = time.monotonic() + WAIT_SECONDS
        while not all(path.exists() for path in lists):
            if time.monotonic() > deadline:
                raise CheckpointFault(f"not all ranks wrote their part within {WAIT_SECONDS:.0f} s")
            time.sleep(0.01)
        files: dict[str, Any] = {}
        for path in lists:
            files |= json.loads(path.read_text())
            path.unlink()
        write_text(partial / STATE, json.dumps(state, indent=1))
        files[STATE] = {"size": (partial / STATE).stat().st_size, "blake2b": _digest(partial / STATE)}
        write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync(partial)
        partial.replace(final)
        sync(self.folder)
        for old in self._surplus():
            shutil.rmtree(old)

    def _surplus(self) -> Iterator[Path]:
        """What neither `checkpoint.keep` nor `keep_every` holds on to."""
        for old in candidates(self.folder)[self.config.keep :]:
            every = self.config.keep_every
            if not every or step_of(old) % every:
                yield old


def _reason(error: BaseException, folder: Path) -> str:
    """The cause that a user knows, out of what a distributed save wraps round it, and what room the disk has."""
    inner = getattr(error, "failures", None)
    if inner:
        error = next(iter(inner.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    said = str(error).splitlines()[0] if str(error) else repr(error)
    if "inline_container" in said:  # torch's archive writer, which drops the number of the error
        said = "a file was cut off while it was written, as on a full disk"
    return f"{type(error).__name__}: {said} ({shutil.disk_usage(folder).free / 1e9:.1f} GB are free there)"


# --- loading ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def load(restored: Restored | Path, tensors: Mapping[str, Tensor], *, same_layout: bool) -> None:
    """Fill the tensors in place from a checkpoint of any layout. A collective call."""
    folder = restored.folder if isinstance(restored, Restored) else restored
    stored = restored.stored if isinstance(restored, Restored) else _stored(folder)
    plain = {name: _plain(tensor) for name, tensor in tensors.items()}
    codes = _codes(tensors) if same_layout else {}
    missing = sorted({*plain, *codes} - stored)
    if missing:
        raise UserError(
            f"{folder}: holds no {missing[0]} ({len(missing)} tensors are missing); it is of another config"
        )
    dcp.load(plain, checkpoint_id=folder)
    for name, tensor in tensors.items():
        inner = _quantized(tensor)
        if inner is not None:  # back into codes
            values = plain[name]
            inner.copy_(values.to_local() if isinstance(values, DTensor) else values)
    if same_layout and any(".codes." in name for name in stored):  # a rank without any joins the others
        dcp.load(codes, checkpoint_id=folder)


def _stored(folder: Path) -> set[str]:
    """Names of all tensors in a checkpoint."""
    return set(dcp.FileSystemReader(folder).read_metadata().state_dict_metadata)
