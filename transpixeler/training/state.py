"""Hold the training state: trained parameters, their optimizer, their averages and the number of steps done.

In: a built engine, and perhaps a checkpoint. Out: everything that a checkpoint holds. The order of samples, their noise
and their timesteps are pure functions of the step, so there is no other state.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.on_model import apply_adapter
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.order import Order
from transpixeler.flow import draws
from transpixeler.models import lora
from transpixeler.models.streams import Scope
from transpixeler.parallel.experts import AnyEngine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs import restore, training_state
from transpixeler.runs.folder import Run
from transpixeler.runs.restore import Restored
from transpixeler.sampling.model import initial_adapters, initial_scopes
from transpixeler.training import optim
from transpixeler.training.ema import Ema
from transpixeler.training.identity import Identity

logger = logging.getLogger("transpixeler")


@dataclasses.dataclass(frozen=True)
class Beginning:
    """The adapters that training starts from, if any, and the scopes that they bring in place of `lora.scope`."""

    adapters: Mapping[str, Adapter]  # by expert
    scopes: Mapping[str, Scope]


def find_beginning(config: Config, restored: Restored | None) -> Beginning:
    """Read `lora.init_from`. A resumed run keeps the scopes and takes its weights from the checkpoint.

    Only the base's stream embeddings, where they are not trained, are in no checkpoint.
    """
    if restored is not None:
        base = dataclasses.replace(config, lora=dataclasses.replace(config.lora, init_from=""))
        return Beginning(initial_adapters(base), restored.state.get("scopes", {}))
    adapters = initial_adapters(config)
    scopes = initial_scopes(config, adapters)
    if scopes:
        parts = dict.fromkeys(f"{lora.inside(target)}: {scope}" for target, scope in scopes.items())
        logger.info("lora.init_from: the adapter's scopes replace lora.scope: %s", ", ".join(parts))
    if embedded := dict.fromkeys(stream for adapter in adapters.values() for stream in adapter.stream_embeddings):
        logger.info("stream embeddings that training goes on with: %s", ", ".join(embedded))
    return Beginning(adapters, scopes)


class TrainingState:
    """Everything that training changes on this rank."""

    def __init__(
        self, config: Config, runtime: Runtime, engine: AnyEngine, beginning: Beginning, identity: Identity
    ) -> None:
        self.config, self.runtime, self.mesh = config, runtime, engine.mesh
        self.scopes, self.identity = beginning.scopes, identity
        self.parameters: dict[str, nn.Parameter] = {n: p for n, p in engine.named_parameters() if p.requires_grad}
        optim.check_groups(
            [name for part in self.mesh.gather_stages(list(self.parameters)) for name in part], config.optim
        )
        self.optimizer = optim.build(self.parameters, config.optim, self.mesh.data_group)
        for expert, adapter in beginning.adapters.items():
            for model in engine.by_expert[expert].models():
                apply_adapter(model, adapter)
        self.ema = Ema(self.parameters, config.optim.ema)
        self.step = 0  # steps that are done

    def gradient_norm(self) -> Tensor:
        """Return the norm of all gradients, the same on every rank of a pipeline. A collective call."""
        return optim.gradient_norm(self.parameters.values(), self.mesh.pipeline_group, self.mesh.device)

    def update(self, lr: float, norm: Tensor) -> None:
        """Clip the gradients and step; a stage that trains nothing has no optimizer."""
        if self.optimizer is None:
            return
        optim.clip(self.parameters.values(), self.config.optim.clip, norm)
        optim.set_rate(self.optimizer, self.config.optim, lr)
        self.optimizer.step()
        self.ema.update()

    def zero_grad(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    # -- to a checkpoint and back

    def tensors(self) -> dict[str, Tensor]:
        """Return all tensors of the state, under names that no layout changes."""
        moments = training_state.optimizer_tensors(self.parameters, self.optimizer)
        parameters = {f"model.{name}": p.detach() for name, p in self.parameters.items()}
        return parameters | moments | {f"ema.{name}": mean for name, mean in self.ema.shadow.items()}

    def facts(self, order: Order) -> dict[str, Any]:
        """Return what a checkpoint holds besides tensors. A collective call."""
        epoch, epoch_step = order.locate(self.step)
        return {
            "step": self.step,
            "epoch": epoch,
            "epoch_step": epoch_step,
            "layout": dataclasses.asdict(self.mesh.layout),
            "config": loading.plain(self.config),
            "optimizer": self._optimizer_numbers(),
            "scopes": dict(self.scopes),
            "identity": dataclasses.asdict(self.identity),
        }

    def _optimizer_numbers(self) -> dict[str, dict[str, float]]:
        """Return the numbers that an imported optimizer of any stage keeps; our own keep tensors alone."""
        if "." not in self.config.optim.name:
            return {}
        parts = self.mesh.gather_stages(optim.numbers(self.parameters, self.optimizer))
        return {name: values for part in reversed(parts) for name, values in part.items()}

    def resume(self, run: Run) -> None:
        """Go on from the run's checkpoint, of any layout; do nothing where there is none. A collective call."""
        restored = run.restored
        if restored is None:
            return
        if not run.going.weights_only:
            training_state.materialize(self.optimizer)
            restore.forget_unsaved(restored, self.parameters, self.optimizer)
        means = restored.holds_averages
        wanted = {name: tensor for name, tensor in self.tensors().items() if means or not name.startswith("ema.")}
        if run.going.weights_only:
            wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("optimizer.")}
        same_layout = {"context": 1, **restored.state["layout"]} == dataclasses.asdict(self.mesh.layout)
        restore.load(restored, wanted, same_layout=same_layout)
        if not run.going.weights_only:
            optim.set_numbers(self.parameters, self.optimizer, restored.state.get("optimizer", {}))
        if not means:  # averages begin where they are turned on
            self.ema = Ema(self.parameters, self.config.optim.ema)
        self.step = 0 if run.going.restart_steps else restored.step
        kept = "weights alone" if run.going.weights_only else "weights and optimizer"
        told = f"resumed {restored.folder} at step {restored.step}"
        if run.going.restart_steps:
            told = f"begins with the {kept} of {restored.folder}, its own steps from zero"
        elif run.going.weights_only:
            told += f", {kept}"
        logger.info("%s", told)
        for key, change in run.changed.items():
            logger.info("resumed with another config: %s %s", key, change)


def seed_torch(seed: int, *key: int) -> None:
    """Seed torch's own generator by the step, so that a resumed run draws the same."""
    torch.manual_seed(draws.generator(seed, *key).initial_seed())
