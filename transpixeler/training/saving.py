"""Write what is trained: an adapter, or a whole model, gathered from stages and shards that no rank holds together.

In: the engine and the EMA. Out: RUN/epoch1/ or RUN/step1000/ with the weights and the config, and the averaged weights
under ema/. A collective call: every rank gives its part, rank 0 writes.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor

from transpixeler.adapters import files as adapter_files
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.merge import save_model
from transpixeler.adapters.on_model import adapter_of
from transpixeler.adapters.saved import CONFIG
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.files import write_text
from transpixeler.models.experts import ALL
from transpixeler.models.family import open_model
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import ASIDE
from transpixeler.training.ema import Ema


@dataclass(frozen=True)
class Saver:
    """Writes saves; holds what does not change from one to the next."""

    config: Config
    runtime: Runtime
    engine: AnyEngine

    @property
    def mesh(self) -> Mesh:
        return self.engine.mesh

    def save(self, folder: Path, ema: Ema, step: int) -> str:
        """Write the raw weights and, with `optim.ema`, the averaged ones; the folder appears when it is whole.

        Return why it was not written, or "", the same on all ranks: a full disk is no reason to stop training.
        """
        draft = folder.with_name(f".{folder.name}.tmp")
        if self.runtime.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        self.runtime.barrier()
        faults = self._write_all(draft, {}, self._metadata(step, averaged=False))
        if ema.decay:  # also on a stage that trains nothing, since this is a collective call
            faults += self._write_all(draft / "ema", ema.shadow, self._metadata(step, averaged=True))
        if self.runtime.is_main and not any(faults):
            faults.append(_attempt(lambda: self._publish(draft, folder)))
        fault = str(self.runtime.broadcast(next(filter(None, faults), "")))
        if fault and self.runtime.is_main:
            shutil.rmtree(draft, ignore_errors=True)
        return fault

    def _publish(self, draft: Path, folder: Path) -> None:
        write_text(draft / CONFIG, loading.dump(self.config))
        shutil.rmtree(folder, ignore_errors=True)
        draft.replace(folder)
        # a save that was set aside is replaced by this one
        shutil.rmtree(folder.with_name(ASIDE) / folder.name, ignore_errors=True)

    def _metadata(self, step: int, *, averaged: bool) -> dict[str, str]:
        pictures = open_model(self.config.model).pictures
        return {
            "base_model": self.config.model.path,
            **({"pictures": ",".join(pictures)} if pictures else {}),
            **({"expert": self.config.model.expert} if self.config.model.expert != ALL else {}),
            **({"fuse": json.dumps(self.config.model.fuse, default=asdict)} if self.config.model.fuse else {}),
            "streams": ",".join(self.config.streams),
            **({"scales": ",".join(map(str, self.config.scales))} if max(self.config.scales) > 1 else {}),
            **({"history": "off"} if self.config.objective.history == "off" else {}),
            "fill": self.config.data.fill,
            "rgb_attends_aux": str(self.config.model.rgb_attends_aux).lower(),
            "step": str(step),
            "ema": str(averaged).lower(),
        }

    def _write_all(self, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> list[str]:
        """Write what is trained, or a folder of it for each expert."""
        if not self.config.lora.enabled:
            return [self._write_model(folder, values, metadata)]
        faults = []
        for name, engine in self.engine.by_expert.items():
            own = f"{name}." if name else ""
            mine = {key.removeprefix(own): value for key, value in values.items() if key.startswith(own)}
            told = {**metadata, "expert": name} if name else metadata
            faults.append(self._write_adapter(engine, folder / name, mine, told))
        return faults

    def _write_adapter(
        self, engine: Engine, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]
    ) -> str:
        own = [adapter_of(model, metadata, values=values) for model in engine.models()]
        parts = self._gather_stages(adapter_files.join(own))
        if not self.runtime.is_main:
            return ""
        return _attempt(lambda: adapter_files.write_adapter(adapter_files.join(parts), folder))

    def _gather_stages(self, own: Adapter) -> list[Adapter]:
        """Return the adapter of each pipeline rank, on rank 0; the ranks of a stage hold the same."""
        if self.mesh.stage_rank or self.mesh.layout.pipeline == 1:
            return [own]
        parts: list[Any] = [None] * self.mesh.layout.pipeline
        dist.gather_object(own, parts if self.runtime.is_main else None, dst=0, group=self.mesh.pipeline_group)
        return parts

    def _write_model(self, folder: Path, values: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
        whole, fault = self._whole_tensors(values), ""
        if self.runtime.is_main:
            model = open_model(self.config.model)
            fault = _attempt(lambda: save_model(whole, folder, model=model, metadata=metadata))
        for _ in whole:  # all ranks give the rest of their tensors, even if the disk refused one
            continue
        return fault

    def _whole_tensors(self, values: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor on rank 0, in the same order on all ranks, gathered from shards and stages one by one."""
        own = {name: values.get(name, p) for name, p in self.engine.named_parameters()}
        described = {name: (tuple(t.shape), t.dtype, self.mesh.pipeline_rank) for name, t in own.items()}
        everyone = {name: it for part in self.mesh.gather_stages(described) for name, it in part.items()}
        for name in sorted(everyone):
            shape, dtype, stage = everyone[name]
            whole = None
            if name in own:
                tensor = own[name].detach()
                whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if stage != 0 and self.mesh.stage_rank == 0:
                whole = self._to_first(whole, shape, dtype, stage)
            if self.runtime.is_main:
                assert whole is not None, "rank 0 holds the tensor or received it"
                yield name, whole.cpu()

    def _to_first(self, whole: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, stage: int) -> Tensor | None:
        """Send a tensor from its stage to the first one, which returns it."""
        group = self.mesh.pipeline_group
        if self.mesh.pipeline_rank == stage:
            assert whole is not None, "the stage holds its own tensor"
            dist.send(whole.to(self.mesh.device).contiguous(), dst=dist.get_global_rank(group, 0), group=group)
        elif self.mesh.pipeline_rank == 0:
            whole = torch.empty(shape, dtype=dtype, device=self.mesh.device)
            dist.recv(whole, src=dist.get_global_rank(group, stage), group=group)
        return whole


def _attempt(write: Callable[[], object]) -> str:
    """Write, and return why the disk refused, or ""."""
    try:
        write()
    except (OSError, SafetensorError) as fault:
        return f"{type(fault).__name__}: {fault}"
    return ""
