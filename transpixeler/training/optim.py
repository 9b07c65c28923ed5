"""Make the optimizer, set its rates, and clip gradients, for plain and sharded parameters.

In: named parameters and `optim.*`. Out: a torch optimizer, and the norm of all gradients over every stage and shard.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from transpixeler.config.sections import OptimConfig, UserError
from transpixeler.models.shards import local, local_slices

Named = Mapping[str, nn.Parameter]
TORCHAO = {"adamw8bit": "AdamW8bit", "adamw4bit": "AdamW4bit", "adamw_fp8": "AdamWFp8"}


def build(parameters: Named, config: OptimConfig, ranks: dist.ProcessGroup | None = None) -> Optimizer | None:
    """Return the configured optimizer, or None for a stage that trains nothing. ranks: those that hold the same."""
    if not parameters:
        return None
    groups = list(_groups(parameters, config))
    try:
        return _maker(config, ranks)(groups)
    except (TypeError, ValueError) as fault:
        if config.args:
            raise UserError(f"optim.args: {config.name} does not take {dict(config.args)}: {fault}") from None
        if "." in config.name:
            raise UserError(f"optim.name: {config.name!r} cannot be made: {fault}") from None
        raise


def check(config: OptimConfig) -> None:
    """Refuse a name that is no optimizer, before anything is encoded or built."""
    _maker(config, None)


def _groups(parameters: Named, config: OptimConfig) -> Iterator[dict[str, Any]]:
    """Yield one group for each rule and one for the rest; the first rule that matches a name takes it."""
    rules = [(rule.pattern, rule.lr, rule.weight_decay) for rule in config.groups]
    left = dict(parameters)
    for number, (pattern, lr, decay) in enumerate([*rules, ("*", None, None)]):
        chosen = {name: p for name, p in left.items() if fnmatchcase(name, pattern)}
        left = {name: p for name, p in left.items() if name not in chosen}
        base = config.lr if lr is None else lr
        for flat, members in _by_dimensions(chosen):
            weight_decay = config.weight_decay if decay is None else decay
            yield {
                "name": f"{number}{' vectors' if flat else ''}",  # the same on every stage
                "params": list(members.items()),
                "lr": base,
                "base_lr": base,
                # vectors (norms, biases, tables, stream embeddings) have no weight decay unless a rule sets it
                "weight_decay": 0.0 if flat and decay is None else weight_decay,
            }


def _by_dimensions(parameters: Named) -> Iterator[tuple[bool, dict[str, nn.Parameter]]]:
    """Yield (False, the matrices) and (True, the vectors), where there are any."""
    for flat in (False, True):
        members = {name: p for name, p in parameters.items() if (p.ndim < 2) is flat}
        if members:
            yield flat, members


def check_groups(names: Iterable[str], config: OptimConfig) -> None:
    """Refuse a pattern that matches nothing. names: the trained parameters of all stages."""
    known = list(names)
    for i, rule in enumerate(config.groups):
        if not any(fnmatchcase(name, rule.pattern) for name in known):
            example = ", ".join(known[:3])
            raise UserError(
                f"optim.groups.{i}.pattern: {rule.pattern!r} matches no trained parameter (such as {example})"
            )


def _maker(config: OptimConfig, ranks: dist.ProcessGroup | None) -> Callable[[list[dict[str, Any]]], Optimizer]:
    adam: dict[str, Any] = {"betas": config.betas, "eps": config.eps, **config.args}
    args: dict[str, Any] = dict(config.args)
    name = config.name.lower()
    if config.bf16_parameters and name != "adamw" and name not in TORCHAO:
        known = ", ".join(["adamw", *TORCHAO])
        raise UserError(f"optim.bf16_parameters: only {known} round stochastically; set one of them or false")
    if name == "adamw" and config.bf16_parameters:
        return _torchao("_AdamW", adam, stochastic=True)
    if name == "adamw":
        return lambda groups: AdamW(groups, **{"fused": True, **adam})
    if name == "sgd":
        return lambda groups: torch.optim.SGD(groups, momentum=config.momentum, **args)
    if name == "adafactor":
        return lambda groups: torch.optim.Adafactor(groups, **args)
    if name == "muon":
        return lambda groups: Muon(groups, momentum=config.momentum or 0.95, ranks=ranks, **adam)
    if name in TORCHAO:
        return _torchao(TORCHAO[name], adam, stochastic=config.bf16_parameters)
    if "." in config.name:
        return _imported(config)
    known = ", ".join(["adamw", "sgd", "adafactor", "muon", *TORCHAO])
    raise UserError(f"optim.name: {config.name!r} is not one of {known}, nor module.Class")


def _torchao(cls: str, options: dict[str, Any], *, stochastic: bool) -> Callable[[list[dict[str, Any]]], Optimizer]:
    # this cache confuses the compiled updates of different optimizers
    functorch.enable_autograd_cache = False
    from torchao import optim as torchao_optim

    if stochastic:
        options = {**options, "bf16_stochastic_round": True}
    return lambda groups: getattr(torchao_optim, cls)(_unnamed(groups), **options)


def _imported(config: OptimConfig) -> Callable[[list[dict[str, Any]]], Optimizer]:
    """Import an optimizer of another library, and refuse what is none or cannot be stepped from outside."""
    module, _, cls = config.name.rpartition(".")
    try:
        made = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UserError(f"optim.name: {config.name!r} cannot be imported as module.Class: {error}") from None
    if not (isinstance(made, type) and issubclass(made, Optimizer)):
        raise UserError(f"optim.name: {config.name!r} is no class of optimizers; name a subclass of torch's Optimizer")
    closure = inspect.signature(made.step).parameters.get("closure")
    if closure is not None and closure.default is inspect.Parameter.empty:
        raise UserError(f"optim.name: {config.name!r} runs the model itself in a step, which training cannot let it do")
    args: dict[str, Any] = dict(config.args)
    return lambda groups: made(_unnamed(groups), **args)


def _unnamed(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the groups without names, since other libraries take no (name, parameter) pairs."""
    return [{**group, "params": [p for _, p in group["params"]]} for group in groups]


class AdamW(torch.optim.AdamW):
    """Steps the shards themselves: of 800 sharded tensors, the first step would else take seconds."""

    def _init_group(self, group: Any, *lists: Any) -> bool:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Collect a group's tensors, as a step asks for them."""
        has_complex = super()._init_group(group, *lists)
        for tensors in lists:
            if isinstance(tensors, list):
                tensors[:] = map(local, tensors)
        return has_complex


class Muon(Optimizer):
    """Steps matrices by their orthogonalised momentum, and everything else by AdamW.

    A sharded matrix is gathered for its step, because orthogonality is a property of the whole. Ranks that hold the
    same matrices share that work: each orthogonalises some of them and broadcasts the result.
    """

    def __init__(
        self,
        groups: Any,
        *,
        momentum: float,
        betas: tuple[float, float],
        eps: float,
        ranks: dist.ProcessGroup | None = None,
    ) -> None:
        super().__init__(groups, {"lr": 1e-3, "weight_decay": 0.0, "momentum": momentum, "betas": betas, "eps": eps})
        self.ranks = ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]  no closure here
        given = [(p, group) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, group in given:
            if parameter.ndim != 2:
                _move(local(parameter), self._vector(parameter, group), group)
        # sorted by size, so that matrices that ranks orthogonalise at once take equally long
        matrices = sorted(((p, group) for p, group in given if p.ndim == 2), key=lambda one: -one[0].numel())
        at_once = dist.get_world_size(self.ranks) if self.ranks else 1
        for first in range(0, len(matrices), at_once):
            self._step_matrices(matrices[first : first + at_once])

    def _step_matrices(self, matrices: Sequence[tuple[nn.Parameter, dict[str, Any]]]) -> None:
        """Step at most one matrix for each rank."""
        own = dist.get_rank(self.ranks) if self.ranks else 0
        ours: Tensor | None = None
        for place, (parameter, group) in enumerate(matrices):
            momentum = self._momentum(parameter, group)
            if place == own:
                # the scale makes one rate fit matrices of any shape
                scale = max(1.0, momentum.shape[0] / momentum.shape[1]) ** 0.5
                ours = (scale * orthogonalize(momentum)).contiguous()
        for place, (parameter, group) in enumerate(matrices):
            whole = ours if place == own else torch.empty(parameter.shape, device=parameter.device)
            assert whole is not None, "this rank orthogonalised the matrix at its own place"
            if self.ranks:
                dist.broadcast(whole, group=self.ranks, group_src=place)
            _move(local(parameter), whole[local_slices(parameter)], group)

    def _momentum(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Return the matrix's Nesterov momentum, gathered from its shards."""
        state, gradient = self.state[parameter], parameter.grad
        assert gradient is not None, "only parameters with a gradient step"
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        update = torch.lerp(gradient, buffer, group["momentum"])
        return update.full_tensor() if isinstance(update, DTensor) else update

    def _vector(self, parameter: nn.Parameter, group: dict[str, Any]) -> Tensor:
        """Return AdamW's update of this rank's part of a vector."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        assert parameter.grad is not None, "only parameters with a gradient step"
        gradient = local(parameter.grad)
        if not state:
            state |= {"step": torch.tensor(0.0)}
            state |= {"exp_avg": torch.zeros_like(parameter), "exp_avg_sq": torch.zeros_like(parameter)}
        state["step"] += 1
        count = float(state["step"])
        mean = local(state["exp_avg"]).lerp_(gradient, 1 - beta1) / (1 - beta1**count)
        square = local(state["exp_avg_sq"]).lerp_(gradient.square(), 1 - beta2) / (1 - beta2**count)
        return mean / (square.sqrt() + group["eps"])


def _move(parameter: Tensor, update: Tensor, group: dict[str, Any]) -> None:
    """Decay the parameter and subtract its update."""
    parameter.mul_(1 - group["lr"] * group["weight_decay"])
    parameter.add_(update, alpha=-group["lr"])


def orthogonalize(matrix: Tensor, steps: int = 5) -> Tensor:
    """Bring singular values near one by Newton–Schulz iterations, which are matmuls alone."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = matrix.to(torch.bfloat16 if matrix.is_cuda else torch.float32)
    x = x.mT if matrix.shape[0] > matrix.shape[1] else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if matrix.shape[0] > matrix.shape[1] else x).to(matrix.dtype)


# --- numbers in checkpoints ------------------------------------------------------------------------------------------

FROM_CONFIG = ("lr", "base_lr", "weight_decay")  # a resumed run takes these from its config


def numbers(parameters: Named, optimizer: Optimizer | None) -> dict[str, dict[str, float]]:
    """Return the numbers that an imported optimizer keeps beside tensors, by group and by parameter."""
    if optimizer is None:
        return {}
    kept = {f"group {group['name']}": group for group in optimizer.param_groups}
    kept |= {name: optimizer.state[p] for name, p in parameters.items() if p in optimizer.state}
    found = {name: {k: v for k, v in it.items() if _is_number(v) and k not in FROM_CONFIG} for name, it in kept.items()}
    return {name: values for name, values in found.items() if values}


def set_numbers(parameters: Named, optimizer: Optimizer | None, values: Mapping[str, Mapping[str, float]]) -> None:
    """Give an optimizer the numbers that `numbers` returned."""
    if optimizer is None:
        return
    for group in optimizer.param_groups:
        group.update(values.get(f"group {group['name']}", {}))
    for name, parameter in parameters.items():
        if parameter in optimizer.state:
            optimizer.state[parameter].update(values.get(name, {}))


def _is_number(value: object) -> bool:
    return isinstance(value, bool | int | float)


# --- the rate --------------------------------------------------------------------------------------------------------


def set_rate(optimizer: Optimizer, config: OptimConfig, lr: float) -> None:
    """Set each group's own rate, which follows the same curve."""
    for group in optimizer.param_groups:
        value = lr * (group["base_lr"] / config.lr if config.lr else 1.0)
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)  # compiled optimizers hold it as a tensor
        else:
            group["lr"] = value


# --- the norm --------------------------------------------------------------------------------------------------------


def gradient_norm(
    parameters: Iterable[nn.Parameter], pipeline_group: dist.ProcessGroup, device: torch.device
) -> Tensor:
    """Return the norm over all stages and shards, the same on every rank. A collective call."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    total = torch.zeros((), device=device)
    for sharded in (False, True):
        kind = [g for g in gradients if isinstance(g, DTensor) is sharded]
        if kind:
            # of the shards themselves: a DTensor's own norm takes six times as long
            square = torch.nn.utils.get_total_norm(map(local, kind)).to(device).float().square()
            for group in _shard_groups(kind[0]):
                dist.all_reduce(square, group=group)
            total += square
    dist.all_reduce(total, group=pipeline_group)
    return total.sqrt()


def _shard_groups(tensor: Tensor) -> list[dist.ProcessGroup]:
    """Return the groups of ranks that hold parts of a tensor, one for each axis that it is sharded over."""
    if not isinstance(tensor, DTensor):
        return []
    return [tensor.device_mesh.get_group(axis) for axis, place in enumerate(tensor.placements) if place.is_shard()]


def clip(parameters: Iterable[nn.Parameter], limit: float, norm: Tensor) -> None:
    """Scale all gradients so that their norm is at most `limit`; 0 clips nothing."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not limit or not gradients:
        return
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    own = [local(g) for g in gradients]
    torch._foreach_mul_(own, scale.to(own[0].device))  # pyright: ignore[reportPrivateImportUsage]  not in the stubs
