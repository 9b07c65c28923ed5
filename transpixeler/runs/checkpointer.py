"""Save checkpoints beside training, each whole or not there, and remove what is older than the config keeps.

In: the tensors of `training_state` and a small dict. Out: RUN/checkpoints/global_step…, which appears only when every
byte is written, synced and hashed.
"""

from __future__ import annotations

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
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import save as write_tensors

from transpixeler.config.sections import CheckpointConfig
from transpixeler.files import sync, write_text
from transpixeler.parallel.contact import is_lost_contact
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.checkpoint import (
    FORMAT,
    MANIFEST,
    METADATA,
    PREFIX,
    STATE,
    CheckpointFault,
    candidates,
    digest,
    folder_name,
    step_of,
)
from transpixeler.runs.training_state import codes, dequantized

logger = logging.getLogger("transpixeler")

WAIT_SECONDS = 300.0  # for another rank's part of a save, before it is given up
WAIT_SHARE = 0.5  # of the time that ranks wait for each other, which it must stay below


@dataclass
class _Save:
    """One save under way on this rank."""

    step: int
    thread: threading.Thread | None = None
    fault: str = ""
    lost: RuntimeError | None = None  # another rank does not answer


@dataclass
class Checkpointer:
    """Saves into RUN/checkpoints, one at a time, and removes old checkpoints."""

    folder: Path
    config: CheckpointConfig
    runtime: Runtime
    _stall: float = 0.0  # seconds that the last save kept the training thread, until `take_stall`
    _running: _Save | None = None
    _group: dist.ProcessGroup | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # An asynchronous save on the default group would wait for training's collectives, and they for it.
        group = dist.new_group(backend="gloo", timeout=self.runtime.timeout)
        assert isinstance(group, dist.ProcessGroup), "every rank belongs to the group of all ranks"
        self._group = group
        if self.runtime.is_main:
            self.folder.mkdir(parents=True, exist_ok=True)
            for leftover in self.folder.glob(f"{PREFIX}*.tmp"):
                shutil.rmtree(leftover)

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any], *, wait: bool = False) -> str:
        """Save a step and return why that failed, as far as it is known by then. A collective call.

        Returns when the tensors are copied, or with `wait` when they are written.
        """
        start = time.perf_counter()
        self.wait()
        final = self.folder / folder_name(step)
        partial = final.with_name(final.name + ".tmp")
        save = _Save(step, fault=self._make_room(partial) if self.runtime.is_main and not final.exists() else "")
        if self.runtime.broadcast(final.exists()):  # this very step is saved already
            return ""
        self._running = save
        if self.runtime.broadcast(save.fault):
            return self.wait(ends=wait)
        stored = {name: dequantized(tensor) for name, tensor in tensors.items()} | codes(tensors)
        fault = ""
        if self.config.asynchronous and not wait:
            # `dcp.async_save` would write log records of every tensor on this thread, which takes as long as the copy.
            staged = DefaultStager(StagingOptions(False, False, False, False)).stage(stored)
            save.thread = threading.Thread(target=self._finish, args=(save, staged, partial, final, dict(state)))
            save.thread.start()
        else:
            self._finish(save, stored, partial, final, state)
            fault = self.wait(ends=wait)
        self._stall = time.perf_counter() - start
        return fault

    def _make_room(self, partial: Path) -> str:
        try:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()  # without parents: a run's folder that is lost must not be made again
        except OSError as error:
            return _reason(error, self.folder)
        return ""

    def wait(self, *, ends: bool = False) -> str:
        """Wait for the save under way; return why it failed, the same on all ranks. A collective call.

        ends: training ends too, so the log does not say that it goes on.
        """
        if self._running is None:
            return ""
        if self._running.thread is not None:
            self._running.thread.join()
        save, self._running = self._running, None
        if save.lost is not None:  # to ask the others would be to wait once more
            raise save.lost
        faults = self.runtime.faults(save.fault)
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
        """Wait for this rank's part of a save, whatever ended training. Not a collective call."""
        if self._running is not None and self._running.thread is not None:
            self._running.thread.join()

    def take_stall(self) -> float:
        """Return the seconds that saves kept training waiting since the last call."""
        stall, self._stall = self._stall, 0.0
        return stall

    # -- beside training

    def _finish(
        self, save: _Save, tensors: dict[str, Tensor], partial: Path, final: Path, state: Mapping[str, Any]
    ) -> None:
        try:
            if self.runtime.device.type == "cuda":
                torch.cuda.set_device(self.runtime.device)  # else each rank's thread takes memory of the first GPU
            write_tensors(tensors, checkpoint_id=partial, process_group=self._group)
            self._list_own_files(partial)
            if self.runtime.is_main:
                self._publish(partial, final, state)
        except (Exception, CheckpointException) as error:  # CheckpointException is a BaseException
            save.fault = _reason(error, self.folder)
            if is_lost_contact(root := _root(error)):
                save.lost = RuntimeError(str(root))

    def _list_own_files(self, partial: Path) -> None:
        own = [f for f in partial.iterdir() if f.name.startswith(f"__{self.runtime.rank}_")]
        if self.runtime.is_main:
            own.append(partial / METADATA)
        listed = {f.name: {"size": f.stat().st_size, "blake2b": digest(f)} for f in own}
        write_text(partial / f"files_{self.runtime.rank}.json", json.dumps(listed))

    def _publish(self, partial: Path, final: Path, state: Mapping[str, Any]) -> None:
        """Make the folder valid once every rank has listed its files, then remove surplus ones; rank 0 calls it."""
        lists = [partial / f"files_{rank}.json" for rank in range(self.runtime.world_size)]
        limit = min(WAIT_SECONDS, WAIT_SHARE * self.runtime.timeout.total_seconds())
        deadline = time.monotonic() + limit
        while not all(path.exists() for path in lists):
            if time.monotonic() > deadline:
                raise CheckpointFault(f"not all ranks wrote their part within {limit:.0f} s")
            time.sleep(0.01)
        files: dict[str, Any] = {}
        for path in lists:
            files |= json.loads(path.read_text())
            path.unlink()
        write_text(partial / STATE, json.dumps(state, indent=1))
        files[STATE] = {"size": (partial / STATE).stat().st_size, "blake2b": digest(partial / STATE)}
        write_text(partial / MANIFEST, json.dumps({"format": FORMAT, "files": files}, indent=1))
        sync(partial)
        partial.replace(final)
        sync(self.folder)
        self._remove_surplus()

    def _remove_surplus(self) -> None:
        """Remove old checkpoints; a kill in the middle leaves only folders that do not look like one."""
        for old in self._surplus():
            emptied = old.with_name(f"{old.name}.old.tmp")
            try:
                old.replace(emptied)
                shutil.rmtree(emptied)
            except OSError as error:  # the new checkpoint is whole all the same
                logger.warning("%s is not needed any more and cannot be removed: %s", old, error)

    def _surplus(self) -> Iterator[Path]:
        """Yield the checkpoints that neither `checkpoint.keep` nor `keep_every` keeps."""
        for old in candidates(self.folder)[self.config.keep :]:
            every = self.config.keep_every
            if not every or step_of(old) % every:
                yield old


def _root(error: BaseException) -> BaseException:
    """Unwrap the root cause from torch's exceptions."""
    inner = getattr(error, "failures", None)
    if inner:
        error = next(iter(inner.values()))[0]
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _reason(error: BaseException, folder: Path) -> str:
    """Return the root cause of a failed save, and the free space of the disk."""
    error = _root(error)
    said = str(error).splitlines()[0] if str(error) else repr(error)
    if "inline_container" in said:  # torch's archive writer drops the error number
        said = "a file was cut off while it was written, as on a full disk"
    try:
        room = f"{shutil.disk_usage(folder).free / 1e9:.1f} GB are free there"
    except OSError:
        room = f"{folder} is gone"
    return f"{type(error).__name__}: {said} ({room})"
