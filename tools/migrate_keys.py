"""Map the keys of a diffusion-pipe or TransPixeler TOML to ours, and record what `migrate.py` carries over."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError

Value = Any
SECRET = re.compile("key|token|password|secret", re.IGNORECASE)

# TOML key → ours, where the meaning is the same
SAME = {
    "epochs": "train.epochs",
    "max_steps": "train.max_steps",
    "pipeline_stages": "parallel.pipeline",
    "gradient_clipping": "optim.clip",
    "warmup_steps": "optim.warmup_steps",
    "uncond_fraction": "objective.caption_dropout",
    "force_constant_lr": "optim.force_lr",
    "ema_decay": "optim.ema",
    "lr_scheduler": "optim.schedule",
    "eval_every_n_epochs": "eval.every_epochs",
    "eval_every_n_steps": "eval.every_steps",
    "eval_before_first_step": "eval.before_first_step",
    "save_every_n_epochs": "save.every_epochs",
    "save_every_n_steps": "save.every_steps",
    "checkpoint_every_n_epochs": "checkpoint.every_epochs",
    "checkpoint_every_n_steps": "checkpoint.every_steps",
    "checkpoint_every_n_minutes": "checkpoint.every_minutes",
    "map_num_proc": "data.workers",
    "video_clip_mode": "data.clip_mode",
    "model.timestep_sample_method": "objective.density",
    "model.sigmoid_scale": "objective.logit_std",
    "model.shift": "objective.shift",
    "model.min_t": "objective.t_min",
    "model.max_t": "objective.t_max",
    "adapter.rank": "lora.rank",
    "adapter.alpha": "lora.alpha",
    "adapter.dropout": "lora.dropout",
    "optimizer.lr": "optim.lr",
    "optimizer.betas": "optim.betas",
    "optimizer.eps": "optim.eps",
    "optimizer.weight_decay": "optim.weight_decay",
    "optimizer.momentum": "optim.momentum",
}
# our key → the other program's default, where ours differs
UNSAID = {"optim.warmup_steps": 0, "objective.caption_dropout": 0.0, "data.frames": [1]}
BY_CLASS = ("betas", "eps", "weight_decay")  # keys whose default depends on the optimizer class there
EXAMPLES = {"eval_every_n_examples": "eval.every_steps", "save_every_n_examples": "save.every_steps"}
OPTIMIZERS = {
    "adamw": "adamw",
    "adamw_optimi": "adamw",
    "adamw8bit": "adamw8bit",
    "adamw8bitkahan": "adamw8bit",
    "sgd": "sgd",
    "adafactor": "adafactor",
    "muon": "muon",
}

FAMILIES = {"hunyuan-video": "hunyuan", "ltx-video": "ltx", "flux": "flux"}  # model.type → ours, beside wan
STEPS = {"ltx": 8, "flux": 0}  # frames from one length to the next that a family takes; 0: stills alone; others 4
EXPERTS = {"low_noise_model": "low", "high_noise_model": "high"}  # folders of a model of two, as published

_EVAL = "evaluation here does not depend on the batch size"
_CAPTIONS = "captions are used as their files say; change the files"
_SIDE = "the encoders and the VAE are read from model.path, in the diffusers or original layout"
_DTYPE = "trained weights are kept and saved in fp32"
_HUB = "use `transpixeler push`, or the key hub.repo"
# TOML key → why it has no counterpart here
ABSENT = {
    "pseudo_huber_c": "the loss is always the mean squared error of the velocity",
    "eval_micro_batch_size_per_gpu": _EVAL,
    "image_eval_micro_batch_size_per_gpu": _EVAL,
    "eval_gradient_accumulation_steps": _EVAL,
    "disable_block_swap_for_eval": "offloading applies to evaluation too",
    "reentrant_activation_checkpointing": "recomputation is never reentrant, also in a pipeline",
    "partition_split": "it also counts layers outside the blocks; parallel.split gives the blocks of each stage",
    "save_dtype": _DTYPE,
    "caching_batch_size": "the cache chooses its batch sizes",
    "steps_per_print": "metrics.jsonl has every step; log.every_steps thins out TensorBoard only",
    "x_axis_examples": "metrics are plotted by step",
    "huggingface_repo": _HUB,
    "upload_hf_from_epoch": _HUB,
    "model.clip_path": _SIDE,
    "model.bypass_guidance_embedding": "guidance is a condition of the base, and stays one",
    "model.llm_path": _SIDE,
    "model.vae_path": _SIDE,
    "model.flux_shift": "objective.shift is one number for all sizes",
    "adapter.dtype": _DTYPE,
    "adapter.decompose_factor": "LoRA is the only adapter type",
    "optimizer.stabilize": "parameters are fp32 and need no bf16 compensation",
    "optimizer.gradient_release": "gradient clipping needs all gradients; adamw8bit and parallel.offload save memory",
    "monitoring.wandb_api_key": "set WANDB_API_KEY in the environment instead",
    "monitoring.wandb_run_name": "run_name names the run; by default it is the date and time",
    "cache_shuffle_num": _CAPTIONS,
    "cache_shuffle_delimiter": _CAPTIONS,
    "shuffle_tags": _CAPTIONS,
    "caption_prefix": _CAPTIONS,
    "skip_empty_caption": "samples without a caption are always left out, and listed",
    "mask_path": "the loss covers the whole frame; objective.stream_weights weighs streams",
    "control_path": "there are no editing pairs; the second stream of a pair is NAME_seg",
}


class Migration:
    """The config as it is built, and the keys that were not carried over, with reasons."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config: dict[str, Any] = {}
        self.left_out: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.root: Path = arguments.root
        self.gpus: int | None = arguments.gpus
        self.where = str(arguments.config)
        self.same: Mapping[str, str] = SAME
        self.absent: Mapping[str, str] = ABSENT
        self.show: Callable[[Value], str] = partial(json.dumps, ensure_ascii=False, default=str)
        self.pair = False
        self.mapped = 0

    def set(self, key: str, value: Value) -> None:
        """Set a dotted key of the config."""
        *sections, last = key.split(".")
        level = self.config
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = value

    def get(self, key: str, default: Value = None) -> Value:
        """Return the value of a dotted key, or the default."""
        level: Any = self.config
        for name in key.split("."):
            level = level.get(name, {}) if isinstance(level, dict) else {}
        return default if level == {} else level

    def leave(self, key: str, value: Value, why: str) -> None:
        """Record a key that is not carried over; secrets are not shown."""
        shown = "(hidden)" if SECRET.search(key.rpartition(": ")[2]) else self.show(value)
        self.left_out.append((f"{key} = {shown}", why))

    def found(self, value: str, key: str) -> Path:
        """Return a file relative to the training folder or to the config, which `key` names."""
        config = Path(self.where).resolve()
        for folder in (self.root, config.parent, config.parent.parent):
            file = folder / os.path.expanduser(value)  # noqa: PTH111  Path raises where there is no such user
            if value and os.path.isfile(file):  # noqa: PTH113  false for a name that is too long; Path raises
                return file
        raise UserError(f"{self.where}: {key} names {value!r}, which does not exist; set --root or --dataset")

    def local(self, value: str) -> str:
        """Return a path relative to the training folder, which need not be there yet."""
        return str((self.root / Path(value).expanduser()).resolve())

    def place(self, value: str) -> str:
        """Return a path relative to the training folder, or a Hub id unchanged."""
        there = self.root / Path(value).expanduser()
        found = os.path.exists(there)  # noqa: PTH110  false for a name that is too long; Path.exists raises
        return str(there.resolve()) if found or Path(value).is_absolute() else value


class Table:
    """A TOML table in which every key is either carried over or recorded with a reason."""

    def __init__(self, values: Mapping[str, Value], where: str, prefix: str, migration: Migration) -> None:
        self.values, self.where, self.prefix, self.migration = dict(values), where, prefix, migration

    def take(self, name: str, default: Value = None) -> Value:
        """Remove and return a key's value, and count it as carried over."""
        self.migration.mapped += name in self.values
        return self.values.pop(name, default)

    def apply(self, name: str, change: Callable[[Value], None]) -> None:
        """Call `change` with a key's value, if it is there; an error of `change` becomes one that names the key."""
        if name not in self.values:
            return
        value = self.take(name)
        try:
            change(value)
        except (TypeError, ValueError, ArithmeticError, AttributeError, LookupError, RuntimeError):
            raise self.fault(name, value) from None

    def fault(self, name: str, value: Value) -> UserError:
        """Return the error for a value that a key cannot have."""
        return UserError(f"{self.where}: {self.prefix}{name} = {value!r} is not a value for this key")

    def leave(self, name: str, why: str) -> None:
        """Record a key, if it is there, as not carried over."""
        if name in self.values:
            self.migration.leave(f"{self.prefix}{name}", self.values.pop(name), why)

    def finish(self, *, same: bool = True) -> None:
        """Carry over the remaining keys that mean the same here, and record all others."""
        for name in list(self.values):
            key = f"{self.prefix}{name}"
            known, absent = self.migration.same, self.migration.absent
            if same and key in known:
                self.migration.set(known[key], self.take(name))
            else:
                why = absent.get(key) or absent.get(name) or absent.get(self.prefix.rstrip("."))
                self.leave(name, why or f"an unknown key ({self.where})")
