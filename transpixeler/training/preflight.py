"""Check a config before anything is loaded: what several keys, or the layout, do not allow together.

In: a config and a layout. Out: nothing, or a `UserError`. Each key by itself is checked where configs are read.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
import yaml

from transpixeler.adapters.files import CONFIG_FILE
from transpixeler.adapters.on_model import check_names
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.config.sections import Config, UserError
from transpixeler.data.buckets import batch_sizes
from transpixeler.flow import tasks
from transpixeler.flow.experts import shares, training_shift
from transpixeler.models.experts import chosen_experts
from transpixeler.models.family import ModelFolder, examples
from transpixeler.models.ladder import slots_fault
from transpixeler.models.streams import Scope
from transpixeler.parallel import build, shard
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.pipeline import NOMINAL_TOKENS
from transpixeler.runs.folder import MANIFEST, METRICS
from transpixeler.sampling.guidance import check_sample
from transpixeler.sampling.model import make_model
from transpixeler.scoring.file import check_scorer
from transpixeler.training import room


def check(config: Config, layout: Layout) -> None:
    """Refuse what cannot be trained."""
    if not config.model.path:
        raise UserError(f"model.path: set it to a model's folder, file or Hub id, such as {examples()}")
    if not config.data.train:
        raise UserError("data.train: set it to a folder of pairs or a manifest")
    if not config.train.epochs and not config.train.max_steps:
        raise UserError("train.epochs: set it or train.max_steps, so that training ends")
    for batch in batch_sizes(config):
        _check_divides(batch, layout, "train.global_batch" if batch == config.train.global_batch else "data.buckets")
    _check_memory(config, layout)
    tasks.check_tasks(config.objective, tuple(config.streams))


def _check_divides(batch: int, layout: Layout, key: str) -> None:
    """Refuse a step whose samples cannot be shared evenly."""
    ranks = layout.data
    if batch % ranks:
        near = ranks * max(1, round(batch / ranks))
        fewer = next(n for n in range(min(ranks, batch), 0, -1) if batch % n == 0)
        raise UserError(
            f"{key}: {batch} samples do not divide over {ranks} data ranks (replicate {layout.replicate} "
            f"× shard {layout.shard}); {near} would, but then a step learns from {near}; {batch} divide over {fewer}: "
            "launch fewer processes, or raise parallel.pipeline"
        )


def _check_memory(config: Config, layout: Layout) -> None:
    """Refuse ways of saving memory that do not go with the rest."""
    hosted = bool(config.parallel.offload) and shard.by_fsdp(config.parallel, layout.shard)  # what is trained, too
    if config.optim.name.lower() == "muon" and hosted:
        raise UserError("optim.name: muon orthogonalises whole matrices on the device; set parallel.offload=false")
    if config.parallel.offload and shard.splits_backward(config.parallel):
        raise UserError(
            f"parallel.offload: {str(config.parallel.offload).lower()} does not go with "
            f"parallel.schedule={config.parallel.schedule}, which runs the backward pass in two parts; "
            "set interleaved-1f1b or auto"
        )
    gpu = torch.device("cuda")
    shard.recompute_mode(config.parallel, gpu)  # refuses what does not go with it
    if config.parallel.recompute == "attention" and not room.keeps_attention(config, gpu):
        if torch.__version__ < room.KEEPS_FLEX:
            raise UserError(
                "parallel.recompute: attention cannot keep the outputs of model.attention=flex before torch "
                f"{room.KEEPS_FLEX}, and this is {torch.__version__}; set full"
            )
        raise UserError(  # flex then compiles itself, and what it keeps cannot be chosen
            "parallel.recompute: attention cannot keep the outputs of model.attention=flex with parallel.compile=off; "
            "set full, or parallel.compile=auto"
        )
    if shard.swaps(config.parallel, layout.shard) and not config.lora.enabled:
        raise UserError(
            f"parallel.offload: {config.parallel.offload} moves frozen weights alone, and lora.enabled=false trains "
            "the model's own; set true, and all wait in host memory with what the optimizer keeps"
        )
    if config.optim.bf16_parameters and (layout.shard > 1 or hosted):
        raise UserError(
            "optim.bf16_parameters: shards and offload need trained weights of one dtype; set it false, or "
            "parallel.shard to 1 and parallel.offload to false"
        )


def check_model(config: Config, layout: Layout, model: ModelFolder, scopes: Mapping[str, Scope]) -> None:
    """Refuse what this model cannot train, or could train and not save, before anything is encoded.

    scopes: by target, those of the adapter that training starts from.
    """
    check_settings(config, layout, model)
    whole = build.shape(config, partial(make_model, config), torch.float32, scopes=scopes)
    check_names(whole, model.family)
    shard.waiting_places(config.parallel, len(whole.blocks))


def check_settings(config: Config, layout: Layout, model: ModelFolder) -> None:
    """Refuse settings of training and of its samples that do not suit the model."""
    tasks.check_given(config, model)
    if ladder := model.ladder(config.objective):
        for batch in batch_sizes(config):
            if fault := slots_fault(ladder, batch, config.data.sync_group, layout.data):
                raise UserError(fault)
    if fault := model.noising.fault(config.objective):
        raise UserError(fault)
    check_sample(config.sample, model)
    check_scorer(config)
    check_experts(config, model)


def check_experts(config: Config, model: ModelFolder) -> None:
    """Refuse experts that the model has not, that no noise level is left for, or that could not be saved."""
    chosen = chosen_experts(config.model, model.experts)
    if len(chosen) > 1 and not config.lora.enabled:
        names = " or ".join(expert.name for expert in chosen)
        raise UserError(f"model.expert: all experts at once train adapters only; set lora.enabled=true, or say {names}")
    known = [expert.name for expert in model.experts]
    for one in config.model.fuse:
        if not isinstance(one, str) and one.expert and one.expert not in known:
            has = f"has {', '.join(known)}" if any(known) else "is one: leave expert out"
            raise UserError(f"model.fuse: {one.path} is for the expert {one.expert}, and the model {has}")
    shares(config.objective, chosen, shift=training_shift(config.objective, model, (1, 1, NOMINAL_TOKENS)))


WRITTEN_BY_TRAINING = (METRICS, MANIFEST, ADAPTER_FILE, CONFIG_FILE)  # beside the config.yaml of a run or an adapter


def check_import(config: Config, file: str, overrides: Sequence[str]) -> None:
    """Refuse to import an optimizer that only the config of a run or an adapter names.

    Such a folder may be somebody else's, and importing a module executes it. On the command line it is the user's word.
    """
    if "." not in config.optim.name or any(override.startswith("optim.name=") for override in overrides):
        return
    for path in _config_files(Path(file)):
        if any((path.parent / name).exists() for name in WRITTEN_BY_TRAINING):
            raise UserError(
                f"optim.name: {config.optim.name} is named by {path}, which training wrote, and importing it would "
                f"execute it. If you trust it, add optim.name={config.optim.name} to the command"
            )


def _config_files(path: Path) -> Iterator[Path]:
    """Yield a config file and the files that it names as `base`, which were read before."""
    yield path
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    bases = content.get("base", []) if isinstance(content, dict) else []
    for base in [bases] if isinstance(bases, str) else bases:
        yield from _config_files(path.parent / base)
