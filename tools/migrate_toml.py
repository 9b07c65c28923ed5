"""Convert the TOML files of a diffusion-pipe or TransPixeler training: its tables in, a config of ours out."""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from migrate_keys import BY_CLASS, EXAMPLES, EXPERTS, FAMILIES, OPTIMIZERS, SAME, STEPS, UNSAID, Migration, Table, Value
from migrate_targets import targets

from transpixeler.config.sections import OptimConfig, UserError
from transpixeler.models.family import find_family


def convert(arguments: argparse.Namespace, migration: Migration) -> None:
    """Fill the migration's config from the training TOML and the dataset TOMLs that it names."""
    values = _toml(arguments.config)
    tables = {name: values.pop(name, None) for name in ("model", "adapter", "optimizer", "monitoring")}
    train = Table(values, str(arguments.config), "", migration)
    if wrong := [name for name, table in tables.items() if not isinstance(table, dict | None)]:
        raise UserError(f"{arguments.config}: {wrong[0]} is not a table; write [{wrong[0]}]")
    parts = {name: Table(table or {}, train.where, f"{name}.", migration) for name, table in tables.items()}
    _model(parts["model"], migration)
    _data(train, arguments, migration)
    _adapter(parts["adapter"], migration, given=tables["adapter"] is not None)
    _optimizer(parts["optimizer"], migration)
    _monitoring(parts["monitoring"], migration)
    _batch(train, migration)
    _rhythm(train, migration)
    _memory(train, migration)
    train.finish()
    _unsaid(migration)


def _toml_reader() -> ModuleType:
    try:
        import tomllib
    except ImportError:  # Python 3.10
        try:
            import tomli as tomllib  # pyright: ignore[reportMissingImports]  for Python 3.10 only
        except ImportError:
            raise UserError("Python 3.10 cannot read TOML: pip install tomli, or use Python 3.11") from None
    return tomllib


def _toml(path: Path) -> dict[str, Value]:
    reader = _toml_reader()
    try:
        return _without_times(reader.loads(path.read_text(encoding="utf-8-sig")))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except (ValueError, RecursionError) as error:  # also a number of 5,000 digits, a thousand brackets
        raise UserError(f"{path}: not valid TOML: {error}") from None


def _without_times(value: Value) -> Value:
    """Return dates and times as text: no key takes one, and YAML could not write all of them."""
    if isinstance(value, dict):
        return {name: _without_times(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_times(one) for one in value]
    return str(value) if isinstance(value, datetime.date | datetime.time) else value


# --- the sections ----------------------------------------------------------------------------------------------------


def _model(table: Table, migration: Migration) -> None:
    kind = str(table.take("type", ""))
    name = "wan" if kind.startswith("wan") else FAMILIES.get(kind)
    if name is None:
        raise UserError(f"{table.where}: model.type is {kind!r}; only wan, {', '.join(FAMILIES)} can be trained here")
    migration.set("model", {"family": name})
    _mode(table, migration)
    _places(table, migration)
    if table.values.get("dtype") in ("bfloat16", "float32"):
        migration.set("model.dtype", table.take("dtype"))
    table.leave("dtype", "model.dtype is bfloat16 or float32")
    if (kept := str(table.values.get("transformer_dtype", ""))).startswith("float8"):
        table.take("transformer_dtype")
        migration.set("model.quantize", "fp8")
    elif kept == migration.get("model.dtype"):
        table.take("transformer_dtype")
    table.leave("transformer_dtype", "model.quantize is none, fp8 or int8")
    if name == "flux" and table.values.get("flux_shift") is True:
        table.take("flux_shift")
        migration.set("objective.shift", "auto")
    table.apply("first_frame_conditioning_p", lambda share: migration.set("objective.tasks", _first_frames(share)))
    if table.values.get("timestep_sample_method") not in (None, "logit_normal", "uniform"):
        table.leave("timestep_sample_method", "objective.density is logit_normal or uniform")
    table.finish()


def _places(table: Table, migration: Migration) -> None:
    """Set model.path, and where the transformer lies apart from the rest, model.expert or model.encoders."""
    for name in ("ckpt_path", "diffusers_path"):
        table.apply(name, lambda value: migration.set("model.path", migration.place(value)))
    folder = migration.get("model.path", "")
    for name in ("transformer_path", "single_file_path"):
        table.apply(name, lambda value: _transformer(str(value), folder, migration))


def _transformer(path: str, folder: str, migration: Migration) -> None:
    expert = EXPERTS.get(Path(path).name)
    if expert and migration.place(str(Path(path).parent)) == folder:
        migration.set("model.expert", expert)
        return
    migration.set("model.path", migration.place(path))
    if folder:
        migration.set("model.encoders", folder)
    else:
        migration.notes.append("model.encoders is empty: name a folder with the VAE and the text encoders there")


def _first_frames(share: float) -> dict[str, float]:
    """Return the tasks of a training in which the first frame is given so often."""
    return {name: chance for name, chance in (("joint", 1 - share), ("image_to_video", share)) if chance}


def _mode(table: Table, migration: Migration) -> None:
    if table.values.get("mode") == "pair":
        table.take("mode")
        migration.pair = True
    table.leave("mode", "mode is `pair` or absent; without it a data set has single videos")


def _adapter(table: Table, migration: Migration, *, given: bool) -> None:
    migration.set("lora.enabled", given)
    if not given:
        migration.notes.append("there is no [adapter], so the whole base is trained: lora.enabled is false")
        if migration.config["model"].pop("quantize", None):
            migration.mapped -= 1
            migration.leave("model.transformer_dtype", "float8", "a base that is trained cannot be quantized")
        return
    if table.values.get("type", "lora") == "lora":
        table.take("type")
    table.leave("type", "LoRA is the only adapter type, and is used")
    targets(table, migration, find_family(migration.get("model.family")))
    table.apply("init_from_existing", lambda value: migration.set("lora.init_from", migration.place(value)))
    fused = table.values.get("fuse_adapters", [])
    if isinstance(fused, list) and all(isinstance(one, dict) and "path" in one for one in fused):
        table.apply(
            "fuse_adapters",
            lambda ones: migration.set(
                "model.fuse",
                [
                    migration.place(o["path"])
                    if o.get("weight", 1.0) == 1.0
                    else {"path": migration.place(o["path"]), "strength": o["weight"]}
                    for o in ones
                ],
            ),
        )
    table.leave("fuse_adapters", "model.fuse wants a path for each")
    if "alpha" not in table.values and migration.pair:
        migration.notes.append(
            "without adapter.alpha the LoRA scale is 1 here; published TransPixeler adapters have 1/rank. To use their "
            "rate of 1e-3, set lora.alpha: 1.0; else lower the rate"
        )
    table.finish()


def _optimizer(table: Table, migration: Migration) -> None:
    kind = str(table.values.get("type", ""))
    known = OPTIMIZERS.get(kind.lower())
    if known:
        table.take("type")
        migration.set("optim.name", known)
        if ours := [f"optim.{name} {getattr(OptimConfig(), name)}" for name in BY_CLASS if name not in table.values]:
            migration.notes.append(
                f"[optimizer] leaves out values that its class set there; here they are {', '.join(ours)}"
            )
    elif kind:
        table.leave("type", "not built in here; adamw is set (optim.name also takes any importable module.Class)")
        for name in list(table.values):
            table.leave(name, f"belongs to {kind}")
    table.finish()


def _monitoring(table: Table, migration: Migration) -> None:
    if table.take("enable_wandb", False):
        table.apply("wandb_tracker_name", lambda value: migration.set("log.wandb", str(value)))
    table.leave("wandb_tracker_name", "Weights & Biases is not enabled")
    table.finish()


def _batch(table: Table, migration: Migration) -> None:
    """Turn batch sizes per GPU into one for all GPUs."""

    def images(value: int) -> None:
        migration.set("data.buckets", [{"size": [0, 0, 1], "micro_batch": int(value)}])

    micro = table.take("micro_batch_size_per_gpu", 1)
    if isinstance(micro, list):
        migration.mapped -= 1
        migration.leave(
            "micro_batch_size_per_gpu", micro, "the smallest is used for all; data.buckets can set it by size"
        )
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], int) for pair in micro):
            raise UserError(f"{table.where}: micro_batch_size_per_gpu = {micro!r} is not a number or a list of pairs")
        micro = min((pair[1] for pair in micro), default=1)
    stages = table.values.get("pipeline_stages", 1)
    gpus = migration.gpus or stages
    accumulated = table.take("gradient_accumulation_steps", 1)
    if not all(isinstance(n, int) and n > 0 for n in (micro, stages, accumulated, gpus)) or gpus % stages:
        raise UserError(f"--gpus: {gpus} GPUs do not divide into pipelines of {stages} stages")
    migration.set("train.micro_batch", micro)
    migration.set("train.global_batch", micro * accumulated * (gpus // stages))
    table.apply("image_micro_batch_size_per_gpu", images)


def _rhythm(table: Table, migration: Migration) -> None:
    """Convert intervals; a given one switches our default interval off."""
    for name, key in EXAMPLES.items():
        batch = migration.get("train.global_batch")
        table.apply(name, lambda value, key=key, batch=batch: migration.set(key, max(1, round(value / batch))))
    for section, ours in (("eval", "every_epochs"), ("save", "every_epochs"), ("checkpoint", "every_steps")):
        given = [name for name in SAME if name.startswith(f"{section}_every") and name in table.values]
        if given or migration.get(f"{section}.every_steps"):
            migration.config.setdefault(section, {}).setdefault(ours, 0)


def _unsaid(migration: Migration) -> None:
    for key, value in UNSAID.items():
        if migration.get(key) is None:
            migration.set(key, value)


def _memory(table: Table, migration: Migration) -> None:
    modes = {True: "full", False: "none", "unsloth": "offload"}
    table.apply("activation_checkpointing", lambda value: _known(modes, value, "parallel.recompute", migration))
    if migration.get("parallel.recompute") == "offload" and table.values.get("compile"):
        table.leave("compile", "cannot be combined with parallel.recompute: offload, which replaces unsloth")
    table.apply("compile", lambda value: migration.set("parallel.compile", "on" if value else "off"))
    if table.values.get("partition_method") == "parameters":
        table.take("partition_method")  # an empty parallel.split is balanced too
    table.leave("partition_method", "parallel.split gives the blocks of each stage")
    if "blocks_to_swap" in table.values:
        swapped = table.take("blocks_to_swap") or False  # in full fine-tuning all weights wait, or none
        migration.set("parallel.offload", swapped if migration.get("lora.enabled") else bool(swapped))
    if table.values.get("lr_scheduler") not in (None, "constant", "linear", "cosine"):
        table.leave("lr_scheduler", "optim.schedule is constant, linear or cosine")


def _known(names: Mapping[Value, str], value: Value, key: str, migration: Migration) -> None:
    if value not in names:
        raise ValueError(value)
    migration.set(key, names[value])


# --- data ------------------------------------------------------------------------------------------------------------


def _data(train: Table, arguments: argparse.Namespace, migration: Migration) -> None:
    _mode(train, migration)
    train.apply("output_dir", lambda value: migration.set("output_dir", migration.local(value)))
    named = train.take("dataset")
    if arguments.dataset is None and not isinstance(named, str):
        raise UserError(f"{train.where}: names no dataset; name its TOML with --dataset")
    sources = _dataset(arguments.dataset or migration.found(named, "dataset"), migration, name="")
    migration.set("data.train", sources)
    held_out = []
    entries = train.take("eval_datasets", [])
    if not isinstance(entries, list) or not all(isinstance(entry, str | dict) for entry in entries):
        raise UserError(f"{train.where}: eval_datasets = {entries!r} is not a list of files or tables")
    for entry in entries:
        entry = {"config": entry} if isinstance(entry, str) else entry
        path = migration.found(str(entry.get("config", "")), "eval_datasets")
        held_out += _dataset(path, migration, name=str(entry.get("name", path.stem)))
    if held_out:
        migration.set("data.eval", held_out)
    migration.set("streams", {"rgb": "", "seg": "_seg"} if migration.pair else {"rgb": ""})
    migration.set("data.upscale", True)
    migration.notes.append("data.upscale is true, because every clip was scaled there; false drops smaller clips")


def _dataset(path: Path, migration: Migration, *, name: str) -> list[dict[str, Value]]:
    """Return a dataset's sources; its common settings go to `data`, or for an eval set to each source."""
    values = _toml(path)
    folders = values.pop("directory", [])
    if not isinstance(folders, list) or not folders or not all(isinstance(folder, dict) for folder in folders):
        raise UserError(f"{path}: has no [[directory]]")
    table = Table(values, str(path), f"{path.name}: ", migration)
    common = _shape(table, migration)
    _aspect(table, migration, held_out=bool(name), sized="sizes" in common)
    sources = []
    for number, folder in enumerate(folders):
        own = Table(folder, str(path), f"{path.name}: directory {number}: ", migration)
        sources.append((common if name else {}) | _source(own, migration, name=name))
    if not name:
        migration.config.setdefault("data", {}).update(common)
    table.finish(same=False)
    return sources


def _source(table: Table, migration: Migration, *, name: str) -> dict[str, Value]:
    source: dict[str, Value] = {"path": None}
    table.apply("path", lambda value: source.update(path=migration.local(value)))
    if source["path"] is None:
        raise UserError(f"{table.where}: a [[directory]] has no path")
    if name:
        source["name"] = name
    table.apply("num_repeats", lambda value: source.update(repeats=max(1, round(value))))
    source |= _shape(table, migration)
    for key in ("enable_ar_bucket", "min_ar", "max_ar", "num_ar_buckets", "ar_buckets"):
        table.leave(key, "all sources have the same shapes, those of data.aspect_ratios")
    table.finish(same=False)
    return source


def _shape(table: Table, migration: Migration) -> dict[str, Value]:
    """Return sizes, lengths and the clip mode, which apply to all sources or to one."""
    shape: dict[str, Value] = {}
    _mode(table, migration)
    table.apply("resolutions", lambda value: shape.update(resolutions=[_size(one) for one in value]))
    table.apply(
        "frame_buckets", lambda value: shape.update(frames=sorted({1, *(_length(one, migration) for one in value)}))
    )
    table.apply(
        "size_buckets", lambda value: shape.update(sizes=[[int(w), int(h), _length(f, migration)] for w, h, f in value])
    )
    table.apply("video_clip_mode", lambda value: shape.update(clip_mode=str(value)))
    return shape


def _size(value: Value) -> int | list[int]:
    return [int(value[0]), int(value[1])] if isinstance(value, list) else int(value)


def _length(frames: int, migration: Migration) -> int:
    """Round a length down to 4k+1 frames, or as the model takes them; rounded up, clips would not fill it."""
    if frames < 1:
        raise ValueError(frames)
    step = STEPS.get(migration.get("model.family"), 4)
    return (int(frames) - 1) // step * step + 1 if step else 1


def _aspect(table: Table, migration: Migration, *, held_out: bool, sized: bool) -> None:
    names = {"min_ar": "aspect_min", "max_ar": "aspect_max", "num_ar_buckets": "aspect_count"}
    if held_out:
        for name in (*names, "enable_ar_bucket", "ar_buckets"):
            table.leave(name, "eval sets have the training set's shapes, those of data.aspect_ratios")
        return
    if not table.take("enable_ar_bucket", False) and not sized:
        migration.set("data.aspect_ratios", [1.0])
        migration.notes.append("without enable_ar_bucket every clip became a square, so data.aspect_ratios is [1.0]")
        for name in (*names, "ar_buckets"):
            table.leave(name, "it had no effect without enable_ar_bucket")
    for name, ours in names.items():
        table.apply(name, lambda value, ours=ours: migration.set(f"data.{ours}", value))
    table.apply("ar_buckets", lambda value: migration.set("data.aspect_ratios", [_ratio(one) for one in value]))


def _ratio(value: Value) -> float:
    return round(value[0] / value[1], 6) if isinstance(value, list) else float(value)
