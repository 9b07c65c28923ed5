"""What training hands over: an adapter folder, or a whole model's, from stages and shards that no rank holds together.

In: the engine, the mesh and the EMA. Out: RUN/epoch1/ or RUN/step1000/ with the weights, the config, and the same under
ema/. A collective call: every rank gives its part, rank 0 writes.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from transpixeler import configfile
from transpixeler.adapters import export
from transpixeler.adapters import files as adapter_files
from transpixeler.adapters.adapter import Adapter
from transpixeler.config import Config
from transpixeler.files import write_text
from transpixeler.models.backbone import VideoModel
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import ASIDE
from transpixeler.training.ema import Ema

logger = logging.getLogger("transpixeler")


@dataclass(frozen=True)
class Saver:
    """Writes what is trained; holds what does not change from one save to the next."""

    config: Config
    runtime: Runtime
    mesh: Mesh
    engine: Engine
    model_cls: type[VideoModel]

    def save(self, folder: Path, ema: Ema, step: int) -> str:
        """The raw weights and, where there are any, their means; a folder appears when it is whole.

        Returns why it was not written, the same on all ranks: a full disk here is no reason to stop training.
        """
        draft = folder.with_name(f".{folder.name}.tmp")
        if self.runtime.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        self.runtime.barrier()
        faults = [self._write(draft, {}, self._metadata(step, averaged=False))]
        if ema.decay:  # a stage that trains nothing has no means, and takes part all the same
            faults.append(self._write(draft / "ema", ema.shadow, self._metadata(step, averaged=True)))
        if self.runtime.is_main and not any(faults):
            faults.append(_attempt(lambda: self._publish(draft, folder)))
        fault = str(self.runtime.broadcast(next(filter(None, faults), "")))
        if fault and self.runtime.is_main:
            logger.error("%s was not written: %s; training goes on", folder, fault)
            shutil.rmtree(draft, ignore_errors=True)
        return fault

    def _publish(self, draft: Path, folder: Path) -> None:
        write_text(draft / "config.yaml", configfile.dump(self.config))
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
        shutil.rmtree(folder.with_name(ASIDE) / folder.name, ignore_errors=True)  # of the course that this one replaces

    def _metadata(self, step: int, *, averaged: bool) -> dict[str, str]:
        return {
            "base_model": self.config.model.path,
            **({"fuse": json.dumps(self.config.model.fuse)} if self.config.model.fuse else {}),
            "streams": ",".join(self.config.streams),
            "fill": self.config.data.fill,
            "rgb_attends_aux": str(self.config.model.rgb_attends_aux).lower(),
            "step": str(step),
            "ema": str(averaged).lower(),
        }

    def _write(self, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        if self.config.lora.enabled:
            return self._write_adapter(folder, values, metadata)
        return self._write_model(folder, values, metadata)

    def _write_adapter(self, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        own = [export.adapter_of(model, metadata, values=values) for model in self.engine.models()]
        parts = self._gather_stages(adapter_files.join(own))
        if not self.runtime.is_main:
            return ""
        return _attempt(lambda: adapter_files.write_adapter(adapter_files.join(parts), folder))

    def _gather_stages(self, own: Adapter) -> list[Adapter]:
        """One of each pipeline rank, on rank 0; data ranks hold the same."""
        if self.mesh.data_rank or self.mesh.layout.pipeline == 1:
            return [own]
        parts: list = [None] * self.mesh.layout.pipeline if self.runtime.is_main else None
        dist.gather_object(own, parts, dst=0, group=self.mesh.pipeline_group)
        return parts or []

    def _write_model(self, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        whole, fault = self._whole_tensors(values), ""
        if self.runtime.is_main:
            config = self.model_cls.read_config(self.config.model.path)
            fault = _attempt(lambda: export.save_model(whole, folder, config=config, metadata=metadata))
        for _ in whole:  # the other ranks give their tensors whether or not the disk took them
            continue
        return fault

    def _whole_tensors(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Every tensor in one order, gathered from its shards and sent by its stage; one at a time in memory."""
        own = {name: values.get(name, p) for name, p in self.engine.named_parameters()}
        described = {name: (tuple(t.shape), t.dtype, self.mesh.pipeline_rank) for name, t in own.items()}
        everyone = {name: it for part in self.runtime.gather(described) for name, it in part.items()}
        for name in sorted(everyone):
            shape, dtype, stage = everyone[name]
            whole = None
            if name in own:
                tensor = own[name].detach()
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if stage != 0 and self.mesh.data_rank == 0:
                whole = self._to_first(whole, shape, dtype, stage)
            if self.runtime.is_main:
                yield name, whole.cpu()

    def _to_first(self, whole: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor | None:
        group = self.mesh.pipeline_group
        if self.mesh.pipeline_rank == stage:
            dist.send(whole.to(self.mesh.device).contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        elif self.mesh.pipeline_rank == 0:
            whole = torch.empty(shape, dtype=dtype, device=self.mesh.device)
            dist.recv(whole, src=dist.get_global_rank(group, stage), group=group)
        return whole


def _attempt(write: Callable[[], object]) -> str:
    """What the disk said against it."""
    try:
        write()
    except (OSError, SafetensorError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""
