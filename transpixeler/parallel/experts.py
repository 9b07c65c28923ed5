"""Hold a model's experts side by side, of which one works at a time, and keep the weights of the idle ones elsewhere.

In: an `Engine` for each expert. Out: what an `Engine` offers, for all of them. A step trains the expert that its
example names; a forward pass asks the one whose range holds the noise level. Frozen weights of an idle expert stay on
the device, wait in host memory, or are read again from their files, which the system caches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from transpixeler.config.sections import ParallelConfig
from transpixeler.flow.objective import Example
from transpixeler.models.backbone import Backbone
from transpixeler.models.costs import Costs
from transpixeler.models.experts import Expert, experts_at
from transpixeler.models.lora import is_base
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import devices
from transpixeler.parallel.mesh import Mesh
from transpixeler.parallel.pipeline import Engine

DEVICE_SHARE = 0.5  # of a device's memory that all experts' weights may take; activations need the rest
HOST_SHARE = 0.6  # of a rank's share of a machine's free memory that waiting weights may take

Fill = Callable[[], None]  # reads an engine's base again


class Experts:
    """Engines of a model's experts, as one."""

    def __init__(self) -> None:
        self.by_expert: dict[str, Engine] = {}
        self.experts: list[Expert] = []
        self._frozen: dict[str, Frozen] = {}
        self._awake = ""

    def add(self, expert: Expert, engine: Engine, fill: Fill, wait: str) -> None:
        """Take the engine of one more expert, which is on the device from now on. wait: as `resolve_wait` returns."""
        if self._awake:
            self._frozen[self._awake].leave()
        self.experts.append(expert)
        self.by_expert[expert.name], self._awake = engine, expert.name
        self._frozen[expert.name] = Frozen(engine, fill, wait)

    @property
    def _any(self) -> Engine:
        return self.by_expert[self._awake]

    @property
    def mesh(self) -> Mesh:
        return self._any.mesh

    @property
    def config(self) -> ParallelConfig:
        return self._any.config

    @property
    def dtype(self) -> torch.dtype:
        return self._any.dtype

    @property
    def costs(self) -> Costs:
        """Return the costs of the one that works."""
        return self._any.costs

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what this rank holds, under names that begin with the expert's."""
        for expert, engine in self.by_expert.items():
            yield from ((f"{expert}.{name}", parameter) for name, parameter in engine.named_parameters())

    def models(self) -> list[Backbone]:
        return [model for engine in self.by_expert.values() for model in engine.models()]

    def forward_backward(self, example: Example, micro_batch: int, *, last: bool = True) -> Tensor:
        """Train the expert that the example is drawn for; the others are left as they are."""
        return self._wake(example.expert).forward_backward(example, micro_batch, last=last)

    @torch.no_grad()
    def forward(
        self, x: Tensor, inputs: Sequence[Tensor], layout: StreamLayout, micro_batch: int | None = None
    ) -> Tensor:
        """Return what is predicted, [b, N], each row's by the expert that its noise level is for."""
        levels = inputs[0].max(dim=1).values  # what is given is at 0
        found = torch.empty(x.shape, dtype=torch.float32, device=x.device)
        for name, rows in self._rows(levels).items():
            part = self._wake(name).forward(x[rows], [each[rows] for each in inputs], layout, micro_batch)
            found[rows] = part.float()
        return found

    def _rows(self, levels: Tensor) -> dict[str, Tensor]:
        """Return which rows each expert takes; the one that is awake comes first."""
        names = [expert.name for expert in experts_at(self.experts, levels)]
        order = sorted(dict.fromkeys(names), key=lambda name: name != self._awake)
        return {name: torch.tensor([i for i, other in enumerate(names) if other == name]) for name in order}

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        with ExitStack() as stack:
            for engine in self.by_expert.values():
                stack.enter_context(engine.evaluating())
            yield

    @contextmanager
    def remembering_rgb(self, layout: StreamLayout, *, rows: int, where: str) -> Iterator[None]:
        """Do what `Engine.remembering_rgb` does; let go of what was computed when another expert takes over."""
        with ExitStack() as stack:
            for engine in self.by_expert.values():
                stack.enter_context(engine.remembering_rgb(layout, rows=rows, where=where))
            yield

    def _wake(self, name: str) -> Engine:
        """Bring an expert's weights to the device, and let go of the other's."""
        if name != self._awake:
            for model in self.by_expert[self._awake].models():
                if model.rgb_memory is not None:
                    model.rgb_memory.forget()
            self._frozen[self._awake].leave()
            self._frozen[name].come()
            self._awake = name
        return self.by_expert[name]


class Frozen:
    """The weights of an engine that nothing changes, which may leave the device and come back the same."""

    def __init__(self, engine: Engine, fill: Fill, wait: str) -> None:
        self.fill, self.wait, self.device, self.swap = fill, wait, engine.mesh.device, engine.swap
        self.parameters = base_of(engine)
        self.host: list[Tensor] = []  # made once, as the weights never change

    def leave(self) -> None:
        """Free the device's memory of them."""
        if self.swap is not None:
            self.swap.clear()
        if self.wait == "host":
            self.host = self.host or [_on_host(p) for p in self.parameters]
            for parameter, copy in zip(self.parameters, self.host, strict=True):
                parameter.data = copy
        elif self.wait == "disk":
            for parameter in self.parameters:  # one number stands for all, so that shapes stay known
                parameter.data = parameter.data.flatten()[:1].clone().expand(parameter.shape)

    def come(self) -> None:
        """Hold them on the device again."""
        if self.wait == "host":
            for parameter, copy in zip(self.parameters, self.host, strict=True):
                parameter.data = copy.to(self.device, non_blocking=True)
        elif self.wait == "disk":
            for parameter in self.parameters:
                parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype, device=self.device)
            self.fill()


def base_of(engine: Engine) -> list[nn.Parameter]:
    """Return the weights of the base that this rank holds on its device, also while another expert works."""
    named = ((name, parameter) for name, parameter in engine.named_parameters() if is_base(name))
    return [parameter for _, parameter in named if engine.swap is None or not engine.swap.holds(parameter)]


def resolve_wait(config: ParallelConfig, engine: Engine, *, experts: int) -> str:
    """Resolve `parallel.idle_expert: auto` by memory: the device's, then the host's.

    Shards belong to FSDP, which keeps them where `parallel.offload` says.
    """
    if engine.sharded:
        return "device"
    if config.idle_expert != "auto" or engine.mesh.device.type == "cpu":
        return config.idle_expert if config.idle_expert != "auto" else "device"
    weights = experts * sum(p.numel() * p.element_size() for p in base_of(engine))
    if weights <= DEVICE_SHARE * torch.cuda.get_device_properties(engine.mesh.device).total_memory:
        return "device"
    return "host" if weights <= HOST_SHARE * devices.free_host_memory() else "disk"


def _on_host(parameter: Tensor) -> Tensor:
    """Copy a tensor to host memory, from which the device takes it back at full speed."""
    copy = torch.empty(parameter.shape, dtype=parameter.dtype, pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.data)


AnyEngine = Engine | Experts
