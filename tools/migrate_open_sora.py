"""Convert a training config of Open-Sora (1.1 to 2.0): a Python file in, a config of ours and its manifest out."""

from __future__ import annotations

import argparse
import itertools
import math
from functools import partial
from pathlib import Path

from manifests import ENDINGS, moved, rows_into
from migrate_buckets import ASPECTS, entries, fitted, grid, rules
from migrate_keys import Migration, Table, Value
from migrate_open_sora_keys import ABSENT, PARTS, SAME, TASKS, UNSAID
from migrate_python import read

from transpixeler.config.sections import ModelConfig, UserError
from transpixeler.data.sources.manifest import rows
from transpixeler.models.family import open_model
from transpixeler.models.geometry import USUAL, Geometry

LOOKED_AT = 1000  # rows of a manifest, for one whose file is there
OWN = "opensora"  # the family of 2.0
TEXTS = {"t5": "text", "clip": "pooled"}  # its encoders there → the fields of a caption
COLUMNS = {"rgb": "path"}  # ours → theirs; text, num_frames, height, width and fps have the same name


def convert(arguments: argparse.Namespace, migration: Migration) -> None:
    """Fill the migration's config from the Python file."""
    values, statements = read(arguments.config)
    for text in statements:
        migration.left_out.append((text, "a statement, and nothing of a config is executed"))
    migration.same, migration.absent, migration.show = SAME, ABSENT, repr
    table = Table(values, str(arguments.config), "", migration)
    if "bucket_config" not in table.values:
        raise UserError(f"{table.where}: has no bucket_config; configs of Open-Sora 1.1 to 2.0 for training have one")
    if not arguments.gpus or arguments.gpus < 1:
        raise UserError("--gpus: batch sizes of Open-Sora are per GPU; say how many GPUs the config was used with")
    _model(table, arguments, migration)
    _data(table, arguments, migration)
    groups = _layout(table, arguments.gpus, migration)
    _buckets(table, groups, migration)
    _learning(table, migration)
    _run(table, migration)
    for name in PARTS:
        _part(table, name).finish()
    table.finish()
    for key, value in UNSAID.items():
        if migration.get(key) is None:
            migration.set(key, value)


def _part(table: Table, name: str) -> Table:
    """Return a table within the file; what is no table is one that holds nothing."""
    inner = table.values.get(name)
    if isinstance(inner, dict):
        table.values.pop(name)
    inner = {str(key): value for key, value in inner.items()} if isinstance(inner, dict) else {}
    return Table(inner, table.where, f"{name}.", table.migration)


def _before_2(table: Table) -> bool:
    """Tell files of 1.1 to 1.3 by their sizes' names, and by what 2.0 no longer has."""
    sizes = table.values["bucket_config"]
    named = any(str(name).isdigit() for name in sizes) if isinstance(sizes, dict) else False
    return named or "text_encoder" in table.values or "vae" in table.values


def _model(table: Table, arguments: argparse.Namespace, migration: Migration) -> None:
    model = table.values.get("model")
    given = model.get("from_pretrained") if isinstance(model, dict) else None
    if arguments.model:
        migration.set("model.path", migration.place(arguments.model))
    elif _before_2(table):
        migration.notes.append(
            "models before 2.0 are not trained here: name another base in model.path, or with --model"
        )
    else:
        migration.set("model.family", OWN)
        if isinstance(given, str):
            part = _part(table, "model")
            part.apply("from_pretrained", lambda value: migration.set("model.path", migration.place(value)))
            table.values["model"] = part.values
        else:
            migration.notes.append("model.path is empty: name the base to train there, or with --model")
    dtype = {"bf16": "bfloat16", "fp32": "float32"}.get(str(table.values.get("dtype")))
    if dtype:
        table.take("dtype")
        migration.set("model.dtype", dtype)
    table.leave("dtype", "model.dtype is bfloat16 or float32")
    migration.set("streams", {"rgb": ""})
    migration.set("lora.enabled", isinstance(table.values.get("lora_config"), dict))
    if migration.get("lora.enabled"):
        migration.set("lora.scope", "all")
    _part(table, "lora_config").finish()


# --- data ------------------------------------------------------------------------------------------------------------


def _data(table: Table, arguments: argparse.Namespace, migration: Migration) -> None:
    data = _part(table, "dataset")
    named = data.take("data_path")
    if arguments.dataset is None and not isinstance(named, str):
        raise UserError(f"{table.where}: dataset.data_path names no data; name the csv or parquet file with --dataset")
    path = arguments.dataset or migration.found(named, "dataset.data_path")
    if path.suffix.lower() not in ENDINGS or not path.is_file():
        raise UserError(f"{path}: is no manifest that is there; give a file that ends in {', '.join(ENDINGS)}")
    migration.set("data.train", [{"path": str(_manifest(path, arguments, migration))}])
    migration.set("data.columns", dict(COLUMNS))
    if data.values.get("transform_name") in ("resize_crop", None):
        data.take("transform_name")  # as here
    data.finish()


def _manifest(path: Path, arguments: argparse.Namespace, migration: Migration) -> Path:
    """Return the manifest, or where its paths are relative to another folder, one beside the YAML with other paths."""
    first = list(itertools.islice((row for _, row in rows(path) if isinstance(row, dict)), LOOKED_AT))
    if first and "path" not in first[0]:
        raise UserError(f"{path}: has no column 'path'; its columns are {', '.join(map(str, first[0]))}")
    given = [row["path"] for row in first if isinstance(row["path"], str) and row["path"].strip()]
    if any((path.parent / name).exists() for name in given):
        return path.resolve()
    if not any((arguments.root / name).exists() for name in given):
        where = f"neither beside it nor in {arguments.root.resolve()}"
        raise UserError(f"{path}: none of its first {len(given)} paths leads to a file, {where}; set --root")
    out = arguments.out.with_name(f"{arguments.out.stem}-data.csv")
    if out.exists() and not arguments.force:
        raise UserError(f"{out}: already exists; choose another --out, or --force")
    with rows_into(out, list(first[0])) as put:
        for number, row in rows(path):
            if isinstance(row, str):
                migration.leave(f"{path.name}: row {number}", None, row)
            else:
                put(moved(row, ["path"], arguments.root, out.parent))
    migration.notes.append(f"paths of {path.name} are relative to another folder; {out.name} is the same with its own")
    return out.resolve()


def _buckets(table: Table, groups: int, migration: Migration) -> None:
    geometry = _geometry(migration)
    before = _before_2(table)
    found = entries(table.take("bucket_config"), migration, second_skips=not before)
    lines = fitted(found, migration, geometry)
    if not lines:
        raise UserError(f"{table.where}: bucket_config holds no length that this model takes")
    accumulated = table.take("accumulation_steps", 1)
    if not isinstance(accumulated, int) or accumulated < 1:
        raise table.fault("accumulation_steps", accumulated)
    made = rules(lines, geometry, groups=groups, accumulation=accumulated)
    for key, value in grid(lines).items():
        migration.set(f"data.{key}", value)
    migration.set("data.aspect_ratios", list(ASPECTS))
    migration.set("data.buckets", made)
    migration.set("data.draw", "epoch")
    migration.set(
        "train.global_batch", min((rule["global_batch"] for rule in made if "global_batch" in rule), default=1)
    )
    migration.notes += [
        "train.global_batch is the smallest of the buckets' own, which stand in data.buckets",
        "a size took clips of 0.8 of its pixels there; here smaller clips are left out, unless data.upscale is true",
        "a longer video gave a random part there; here data.clip_mode says which",
    ]


def _geometry(migration: Migration) -> Geometry:
    """Return what sizes the model takes; of one that is not here yet, a usual one's."""
    path = migration.get("model.path")
    if path and Path(path).exists():
        return open_model(ModelConfig(path=path)).geometry
    migration.notes.append("sizes and lengths are those of a usual video model (16 pixels, 4k+1 frames)")
    return USUAL


# --- what is learned, and how ----------------------------------------------------------------------------------------


def _learning(table: Table, migration: Migration) -> None:
    optim = _part(table, "optim")
    if "lr" in optim.values:
        table.values.pop("lr", None)  # the same rate, named once more
    table.apply("lr", lambda value: migration.set("optim.lr", value))
    for name in ("eps", "adam_eps"):
        table.apply(name, lambda value: migration.set("optim.eps", value))
    if str(optim.values.get("cls", "")).lower() in ("hybridadam", "adamw", "adam", "fusedadam", "cpuadam"):
        optim.take("cls")
        migration.set("optim.name", "adamw")
    optim.leave("cls", "not built in here; adamw is set (optim.name also takes any importable module.Class)")
    if optim.values.get("adamw_mode") is True:
        optim.take("adamw_mode")
    optim.finish()
    if table.values.get("ema_decay", 0) is None:
        table.values["ema_decay"] = 0.0
    if table.values.get("warmup_steps", 0) is None:
        table.values["warmup_steps"] = 0
    table.apply("use_cosine_scheduler", lambda on: migration.set("optim.schedule", "cosine" if on else "constant"))
    own = migration.get("model.family") == OWN
    table.apply("dropout_ratio", lambda value: migration.set("objective.caption_dropout", _dropped(value, own=own)))
    _tasks(_part(table, "condition_config"), migration)
    scheduler = _part(table, "scheduler")
    density = {"logit-normal": "logit_normal", "uniform": "uniform"}.get(str(scheduler.values.get("sample_method")))
    if density:
        scheduler.take("sample_method")
        migration.set("objective.density", density)
    scheduler.finish()
    if own:
        migration.set("objective.shift", "auto")  # by a clip's size and length, as there
    else:
        migration.notes.append("noise was shifted by a clip's size there; objective.shift is one number, or auto")


def _dropped(ratios: Value, *, own: bool) -> float | dict[str, float]:
    """Return how often each encoder's text is left out; for a base with other encoders, how often all are at once."""
    if not isinstance(ratios, dict) or not ratios:
        raise ValueError(ratios)
    if own and set(ratios) <= set(TEXTS):
        return {TEXTS[name]: float(ratio) for name, ratio in ratios.items()}
    return round(math.prod(float(ratio) for ratio in ratios.values()), 6)


def _tasks(conditions: Table, migration: Migration) -> None:
    """Turn weights of given frames into tasks."""
    tasks = {}
    for name, task in TASKS.items():
        if name in conditions.values:
            tasks[task] = conditions.take(name)
    if tasks:
        migration.set("objective.tasks", tasks)
    for name in list(conditions.values):
        conditions.leave(name, f"no task here gives these frames; there are {', '.join(TASKS.values())}")


def _layout(table: Table, gpus: int, migration: Migration) -> int:
    """Set parallel and return how many groups of GPUs train on samples of their own."""
    plugin, settings = table.values.get("plugin"), _part(table, "plugin_config")
    sizes = {name: settings.values.get(name, 1) for name in ("pp_size", "tp_size", "sp_size")}
    if not isinstance(table.values.get("sp_size", 1), int) or not all(isinstance(n, int) for n in sizes.values()):
        raise UserError(f"{table.where}: pp_size, tp_size and sp_size are not whole numbers")
    together = sizes["pp_size"] * sizes["tp_size"] * sizes["sp_size"] * table.values.get("sp_size", 1)
    if together < 1 or gpus % together:
        raise UserError(f"--gpus: {gpus} GPUs do not divide into groups of {together} (pp_size × tp_size × sp_size)")
    settings.apply("pp_size", lambda value: migration.set("parallel.pipeline", value))
    if settings.values.get("tp_size") == 1:
        settings.take("tp_size")
    context = settings.take("sp_size", 1) * table.take("sp_size", 1)
    if context > 1:
        migration.set("parallel.context", context)
    sharded = str(plugin).startswith(("zero", "gemini")) or (plugin == "hybrid" and settings.take("zero_stage", 0))
    if sharded or plugin in ("hybrid", "ddp", "torch_ddp"):
        table.take("plugin")
    if sharded:
        migration.set("parallel.replicate", 1)
        migration.set("parallel.shard", 0)
        migration.notes.append("parallel.shard: 0 shards weights too, not only what the optimizer holds")
    settings.finish()
    return gpus // together


def _run(table: Table, migration: Migration) -> None:
    table.apply("outputs", lambda value: migration.set("output_dir", migration.local(value)))
    table.apply("grad_checkpoint", lambda on: migration.set("parallel.recompute", "full" if on else "none"))
    table.apply("grad_ckpt_buffer_size", partial(_host_memory, migration))
    if table.values.get("wandb") is True:
        table.take("wandb")
        table.apply("wandb_project", lambda value: migration.set("log.wandb", str(value)))
        migration.set("log.wandb", migration.get("log.wandb") or "Open-Sora")
    elif table.values.get("wandb") is False:
        table.take("wandb")  # as here
    if table.values.get("exp_name", "") is None:
        table.take("exp_name")
    if table.values.get("keep_n_latest") in (0, -1):
        table.leave("keep_n_latest", "checkpoint.keep is at least 1; checkpoint.keep_every: 1 keeps all")
    for name in ("batch_size", "load", "start_epoch", "start_step", "lora_checkpoint"):
        if table.values.get(name, 0) is None:
            table.take(name)


def _host_memory(migration: Migration, size: Value) -> None:
    """Let the inputs of recomputed blocks wait in as much host memory."""
    if size and migration.get("parallel.recompute") == "full":
        migration.set("parallel.recompute", "offload")
        migration.set("parallel.host_gb", size / 2**30)
