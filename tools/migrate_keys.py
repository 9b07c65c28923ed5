"""What the keys of a diffusion-pipe or TransPixeler TOML are called here, and the book that `migrate.py` keeps."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transpixeler.config import UserError

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
# ours → what holds there where the TOML says nothing, and another value would here
UNSAID = {"optim.warmup_steps": 0, "objective.caption_dropout": 0.0, "data.frames": [1]}
BY_CLASS = ("betas", "eps", "weight_decay")  # of an optimizer; each class there has its own
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

_EVAL = "an evaluation here does not depend on the batch"
_CAPTIONS = "captions are taken as they stand in their files; change them there"
_SIDE = "the encoders and the VAE are read from model.path, in the diffusers or the original layout"
_DTYPE = "trained weights and what is saved of them are fp32"
_HUB = "the Hub is written to with `transpixeler push`"
# TOML key → why it has no counterpart
ABSENT = {
    "pseudo_huber_c": "the loss is the mean square of the velocity's error",
    "eval_micro_batch_size_per_gpu": _EVAL,
    "image_eval_micro_batch_size_per_gpu": _EVAL,
    "eval_gradient_accumulation_steps": _EVAL,
    "disable_block_swap_for_eval": "offloading holds for evaluation too",
    "reentrant_activation_checkpointing": "recomputation here is not reentrant, also with a pipeline",
    "partition_split": "its layers count what comes before and after the blocks; parallel.split takes blocks a stage",
    "save_dtype": _DTYPE,
    "caching_batch_size": "the cache chooses its batches itself",
    "steps_per_print": "metrics.jsonl has every step; log.every_steps thins TensorBoard alone",
    "x_axis_examples": "metrics are told by step",
    "huggingface_repo": _HUB,
    "upload_hf_from_epoch": _HUB,
    "model.transformer_path": "model.path takes one place: a folder, or one file that holds the whole model",
    "model.llm_path": _SIDE,
    "model.vae_path": _SIDE,
    "model.flux_shift": "objective.shift is one number, the same for all sizes",
    "adapter.dtype": _DTYPE,
    "adapter.decompose_factor": "there is LoRA alone",
    "optimizer.stabilize": "fp32 parameters need no compensation for bf16",
    "optimizer.gradient_release": "gradients are kept for the norm; adamw8bit and parallel.offload save memory",
    "monitoring.wandb_api_key": "a secret: set WANDB_API_KEY in the environment",
    "monitoring.wandb_run_name": "runs are named by run_name, or by date and time",
    "cache_shuffle_num": _CAPTIONS,
    "cache_shuffle_delimiter": _CAPTIONS,
    "shuffle_tags": _CAPTIONS,
    "caption_prefix": _CAPTIONS,
    "skip_empty_caption": "a sample without a caption is left out and named",
    "mask_path": "the loss is taken over the whole picture; objective.stream_weights weighs streams",
    "control_path": "there are no editing pairs; a companion of a stream is NAME_seg",
}


class Migration:
    """The config as it grows, and what was not carried over, with its reason."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.config: dict[str, Any] = {}
        self.left_out: list[tuple[str, str]] = []
        self.notes: list[str] = []
        self.root: Path = arguments.root
        self.gpus: int | None = arguments.gpus
        self.pair = False
        self.mapped = 0

    def set(self, key: str, value: Value) -> None:
        *sections, last = key.split(".")
        level = self.config
        for section in sections:
            level = level.setdefault(section, {})
        level[last] = value

    def get(self, key: str, default: Value = None) -> Value:
        level: Any = self.config
        for name in key.split("."):
            level = level.get(name, {}) if isinstance(level, dict) else {}
        return default if level == {} else level

    def leave(self, key: str, value: Value, why: str) -> None:
        shown = (
            "(hidden)" if SECRET.search(key.rpartition(": ")[2]) else json.dumps(value, ensure_ascii=False, default=str)
        )
        self.left_out.append((f"{key} = {shown}", why))

    def place(self, value: str) -> str:
        """A path as the training saw it, or a Hub id as it is."""
        there = self.root / Path(value).expanduser()
        return str(there.resolve()) if there.exists() or Path(value).is_absolute() else value


class Table:
    """A TOML table whose every key is taken, or left over and named."""

    def __init__(self, values: Mapping[str, Value], where: str, prefix: str, migration: Migration) -> None:
        self.values, self.where, self.prefix, self.migration = dict(values), where, prefix, migration

    def take(self, name: str, default: Value = None) -> Value:
        self.migration.mapped += name in self.values
        return self.values.pop(name, default)

    def apply(self, name: str, change: Callable[[Value], None]) -> None:
        """`change` with the key's value, if it is there; what is wrong with it names the key."""
        if name not in self.values:
            return
        value = self.take(name)
        try:
            change(value)
        except (TypeError, ValueError, ArithmeticError, AttributeError):
            raise UserError(f"{self.where}: {self.prefix}{name} = {value!r} is not what this key takes") from None

    def leave(self, name: str, why: str) -> None:
        if name in self.values:
            self.migration.leave(f"{self.prefix}{name}", self.values.pop(name), why)

    def finish(self, *, same: bool = True) -> None:
        """What has the same meaning is carried over, everything else is named."""
        for name in list(self.values):
            key = f"{self.prefix}{name}"
            if same and key in SAME:
                self.migration.set(SAME[key], self.take(name))
            else:
                self.leave(name, ABSENT.get(key) or ABSENT.get(name) or f"not a key that is known ({self.where})")
