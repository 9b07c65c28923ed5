"""What was trained, and the base under it: a run, an adapter or nothing goes in, an engine that computes it comes out.

Training takes its model from the same two functions, `make_model` and `base_weights`, so that a config becomes a model
in one way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from transpixeler import configfile
from transpixeler.adapters import export
from transpixeler.adapters import files as adapter_files
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import ADAPTER_FILE, CONFIG_FILE
from transpixeler.config import Config, UserError
from transpixeler.models import lora
from transpixeler.models.backbone import VideoModel, model_class
from transpixeler.models.streams import Scope, scope_span
from transpixeler.models.weights import Readable, WeightSource, resolve
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.build import build_engine
from transpixeler.parallel.pipeline import Engine
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import CONFIG, LATEST, METRICS, configured_run

MODEL = "transformer"  # folder of a model that was trained in full
EMA = "ema"
_PUSHED = (f"{MODEL}/*", "*.safetensors", CONFIG, CONFIG_FILE)  # of a repository, what is needed to sample from it


# --- a config's model ------------------------------------------------------------------------------------------------


def make_model(config: Config) -> VideoModel:
    """The whole model on the current default device, without weights."""
    model_cls = model_class(config.model.family)
    return model_cls.from_config(
        model_cls.read_config(config.model.path),
        streams=tuple(config.streams),
        rgb_attends_aux=config.model.rgb_attends_aux,
        attention=config.model.attention,
    )


def base_weights(config: Config) -> Readable:
    """Where base weights are read from, with `model.fuse`'s adapters added on the way."""
    source = WeightSource(config.model.path, model_class(config.model.family).stored_names)
    fused = export.read_fused(config.model.fuse)
    return export.FusedSource(source, fused) if fused else source


def first_adapter(config: Config) -> Adapter | None:
    """What `lora.init_from` starts training from; one that the model has no place for is refused."""
    path = config.lora.init_from
    if not path:
        return None
    companion = next(iter([*config.streams][1:]), "seg")  # the published code's files do not name theirs
    adapter = adapter_files.read_adapter(path, stream=companion, key="lora.init_from")
    with torch.device("meta"):
        _check_fits(adapter, make_model(config), f"lora.init_from: {path}", config.model.path)
    return adapter


def first_scopes(config: Config, adapter: Adapter | None) -> dict[str, Scope]:
    """By target, what `adapter` has in place of `lora.scope`: with these, training starts as the adapter is."""
    own = adapter.scopes if adapter is not None else {}
    return {target: scope for target, scope in own.items() if scope != config.lora.scope}


# --- what was trained ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Trained:
    """What to sample from or to evaluate."""

    config: Config
    name: str  # as the user knows it: a path, a Hub id or `base`
    adapter: Adapter | None = None  # of a model that was trained in full: its stream embeddings
    weights: Path | None = None  # of a model that was trained in full
    run: Path | None = None
    raw: bool = False  # where averaged weights, which are taken unasked, stand beside

    @property
    def step(self) -> int | None:
        text = self.adapter.metadata.get("step", "") if self.adapter else ""
        return int(text) if text.isdigit() else _step(self.weights) if self.weights else None


def base(config: Config) -> Trained:
    """The model before anything is learned."""
    return Trained(config, "base")


def base_alone(overrides: Sequence[str]) -> Trained:
    """A base model without any config: it knows one stream."""
    config = configfile.from_overrides(["streams={rgb: ''}", "lora.enabled=false", *overrides])
    if not config.model.path:
        raise UserError("sample: name a run or an adapter, or give a base with --model")
    return base(config)


def chosen(
    config_or_run: str, overrides: Sequence[str], *, adapter: str = "", bare: bool = False, ema: bool | None = None
) -> Trained:
    """What `eval` is about: a config or run says on which data; its newest save, another adapter or the bare base."""
    path = Path(config_or_run).expanduser()
    run = _run_folder(path) if path.is_dir() else None
    if path.is_dir() and run is None:
        raise UserError(f"{path}: holds no run; give a run's folder or a config")
    given = run / CONFIG if run else path
    config = configfile.load(given, overrides)
    if bare:
        return replace(base(config), run=run)
    run = run or configured_run(config)
    if not adapter and not (run / CONFIG).is_file():
        missing = f"output_dir: {config.output_dir} holds no run yet"
        if config.run_name:
            missing = f"run_name: {config.output_dir} holds no run {config.run_name}"
        raise UserError(f"{missing}; train first, or add --adapter PATH or --base")
    return find(adapter or str(run), overrides, given=given, ema=ema)


def _run_folder(path: Path) -> Path | None:
    """The run that a path means: itself, or the latest in it."""
    return next((folder.resolve() for folder in (path / LATEST, path) if (folder / CONFIG).is_file()), None)


def find(source: str, overrides: Sequence[str] = (), *, given: Path | None = None, ema: bool | None = None) -> Trained:
    """A run (its newest save), a save, an adapter file or a Hub id; `ema` as in `locate`.

    The config stands beside what was saved; a bare adapter file says itself what it needs. Of a given one all holds but
    what the adapter says of its own model.
    """
    save, run = locate(source, ema=ema)
    weights = save / MODEL if (save / MODEL).is_dir() else None
    adapter = adapter_files.read_adapter(save) if weights is None or (save / ADAPTER_FILE).is_file() else None
    name = str(save) if Path(source).expanduser().exists() else source
    run, folder = run or run_of(save), save if save.is_dir() else save.parent
    beside = _config_beside(folder)
    if given is not None:
        config = configfile.load(given, [*_said(adapter), *overrides])
    elif adapter is None or beside.is_file():
        config = configfile.load(beside, overrides)
    else:
        config = _config_from(adapter, str(save), overrides)
    return Trained(config, name, adapter, weights=weights, run=run, raw=_is_save(folder / EMA))


def run_of(save: Path) -> Path | None:
    """The run's folder around a save; a file that was copied elsewhere has none."""
    return next((folder for folder in save.resolve().parents[:3] if (folder / METRICS).is_file()), None)


def locate(source: str, *, ema: bool | None = None) -> tuple[Path, Path | None]:
    """The save that is meant, and its run where that was named. `ema`: the means, or not; None for means where there
    are any."""
    path = resolve(source, only=_PUSHED, key="adapter")
    run = _run_folder(path)
    run = None if run is None or _is_save(run) else run
    return _choose(path if run is None else _newest(run), ema), run


def _is_save(folder: Path) -> bool:
    return (folder / MODEL).is_dir() or (folder / ADAPTER_FILE).is_file()


def _newest(run: Path) -> Path:
    full = [folder for name in ("epoch*", "step*") for folder in run.glob(f"{name}/{MODEL}")]
    if full:
        return max(full, key=lambda folder: (_step(folder) or 0, folder.stat().st_mtime)).parent
    if not any(run.glob(f"*/{ADAPTER_FILE}")):
        raise UserError(f"{run}: nothing is saved there yet; save.every_steps and save.every_epochs say when")
    return adapter_files.adapter_file(run).parent


def _step(weights: Path) -> int | None:
    """Of a model that was trained in full, by the header of its first file."""
    steps = [adapter_files.step_of(file) for file in sorted(weights.glob("*.safetensors"))[:1]]
    return steps[0] if steps and steps[0] >= 0 else None


def _choose(save: Path, ema: bool | None) -> Path:
    """The folder of the means beside the raw weights."""
    if ema is False or not save.is_dir() or save.name == EMA:
        return save
    if _is_save(save / EMA):
        return save / EMA
    if ema:
        raise UserError(f"--ema: {save} holds no {EMA}; it was trained with optim.ema=0. Leave the option out")
    return save


def _config_beside(folder: Path) -> Path:
    own = folder / CONFIG
    return own if own.is_file() or folder.name != EMA else folder.parent / CONFIG


def _said(adapter: Adapter | None) -> list[str]:
    """What belongs to an adapter as its weights do, in a config's words; other programs' files say nothing of it."""
    said = adapter.metadata if adapter is not None else {}
    if "rgb_attends_aux" not in said:
        return []
    return [f"model.rgb_attends_aux={said['rgb_attends_aux']}", f"model.fuse={said.get('fuse', '[]')}"]


def _config_from(adapter: Adapter, name: str, overrides: Sequence[str]) -> Config:
    """What a bare adapter file says of the model that it is for."""
    said = adapter.metadata
    streams = [s for s in said.get("streams", "").split(",") if s] or ["rgb", *adapter.stream_embeddings]
    keys = {"streams": json.dumps({s: f"_{s}" if i else "" for i, s in enumerate(streams)})}
    if said.get("base_model"):
        keys["model.path"] = said["base_model"]
    written = [f"{key}={value}" for key, value in keys.items()]
    config = configfile.from_overrides(["lora.enabled=false", *written, *_said(adapter), *overrides])
    if not config.model.path:
        raise UserError(f"{name} does not say which base it was trained on; give one with --model")
    return config


# --- its engine ------------------------------------------------------------------------------------------------------


def open_engine(trained: Trained, mesh: meshes.Mesh) -> Engine:
    """Nothing in it is trained: the adapter has the ranks, strengths and scopes that its file says."""
    config, adapter = _frozen(trained.config), trained.adapter

    def make() -> VideoModel:
        model = make_model(config)
        if adapter is not None:
            _check_fits(adapter, model, trained.name, config.model.path)
            export.inject_adapter(model, adapter)
        return model

    names = model_class(config.model.family).stored_names
    source = WeightSource(trained.weights, names) if trained.weights else base_weights(config)
    engine = build_engine(config, mesh, make, source)
    for model in engine.models() if adapter is not None else ():
        export.apply_adapter(model, adapter)
    return engine


def arranged(config: Config, runtime: Runtime, *, asked: bool) -> tuple[Config, meshes.Layout]:
    """The config's layout where it fits the processes at hand; else, unless the user asked for it, replicas."""
    try:
        return config, meshes.resolve(config.parallel, runtime.world_size)
    except UserError:
        if asked:
            raise
    parallel = replace(config.parallel, pipeline=1, replicate=0, shard=1, split=(), schedule="auto")
    return replace(config, parallel=parallel), meshes.resolve(parallel, runtime.world_size)


def _frozen(config: Config) -> Config:
    """No backward pass comes, so nothing is kept for one, and a compiler would take longer than it saves."""
    compile = "on" if config.parallel.compile == "on" else "off"
    return replace(
        config,
        model=replace(config.model, trainable=()),
        lora=replace(config.lora, enabled=False),
        parallel=replace(config.parallel, recompute="none", compile=compile),
    )


def _check_fits(adapter: Adapter, model: VideoModel, name: str, base: str) -> None:
    _check_streams(adapter, model.streams, name)
    linears, there = lora.targets(model), dict(model.named_parameters())
    wanted = {t: (adapter.up(t).shape[0], adapter.down(t).shape[1]) for t in adapter.targets}
    found = {t: (linears[t].out_features, linears[t].in_features) for t in adapter.targets if t in linears}
    for stream, embedding in adapter.stream_embeddings.items():
        wanted[f"embed.stream_embedding.{stream}"] = tuple(embedding.shape)
        found[f"embed.stream_embedding.{stream}"] = tuple(there[f"embed.stream_embedding.{stream}"].shape)
    for target, shape in wanted.items():
        if found.get(target) != shape:
            has = "×".join(map(str, found[target])) if target in found else "absent"
            raise UserError(
                f"{name}: the adapter is for another base: its {target} is {'×'.join(map(str, shape))}, which in "
                f"{base} is {has}; set model.path to the base that it was trained on"
            )


def _check_streams(adapter: Adapter, streams: Sequence[str], name: str) -> None:
    there = f"streams are {', '.join(streams)}: name them in `streams` as they were then"
    for stream in adapter.stream_embeddings:
        if stream not in streams[1:]:
            raise UserError(f"{name}: was trained for the stream {stream}; {there}")
    for target, scope in adapter.scopes.items():
        try:
            scope_span(scope, streams)
        except UserError:
            text = scope if isinstance(scope, str) else ", ".join(scope)
            raise UserError(f"{name}: its {target} has the scope {text}; {there}") from None
