"""A path, a run or a Hub id goes in; what was saved there comes out, with the config that belongs to it.

`find_save` only looks where the files are. `load_saved` also reads the adapter and the config: a `SavedModel` is all
that `sample`, `eval` and `push` need to know.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.bases import on_trained_base
from transpixeler.adapters.files import CONFIG_FILE, read_adapter, read_experts
from transpixeler.adapters.saved import (
    ADAPTER_FILE,
    CONFIG,
    EMA,
    LATEST,
    MODEL_FOLDER,
    averaged,
    config_of,
    is_save,
    newest_save,
    run_of,
    saved_step,
    step_number,
)
from transpixeler.config import loading
from transpixeler.config.loading import Tree
from transpixeler.config.sections import Config, UserError
from transpixeler.models.family import Family, open_model, recognised
from transpixeler.models.resolve import resolve
from transpixeler.runs.folder import METRICS, configured_run

_PUSHED = (f"{MODEL_FOLDER}/*", "*.safetensors", CONFIG, CONFIG_FILE)  # of a repository, what is needed to sample


@dataclass(frozen=True)
class Save:
    """A save on this machine."""

    path: Path  # the save's folder, or an adapter file by itself
    run: Path | None  # the run that it belongs to

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def weights(self) -> Path | None:
        """The folder of a model that was trained in full."""
        return self.path / MODEL_FOLDER if (self.path / MODEL_FOLDER).is_dir() else None

    @property
    def has_adapter(self) -> bool:
        """Tell whether there is an adapter; a model that was trained in full has one if it has stream embeddings."""
        return self.weights is None or (self.path / ADAPTER_FILE).is_file()

    @property
    def config(self) -> Path:
        """Return the path of its config: beside it, or beside the raw weights or the experts that it is a part of."""
        return config_of(self.folder)


@dataclass(frozen=True, eq=False)
class SavedModel:
    """A model to sample from, evaluate or publish: what training saved, or the base model alone."""

    config: Config
    name: str  # as the user knows it: a path, a Hub id or `base`
    adapters: Mapping[str, Adapter] = field(default_factory=dict)  # by expert; of a whole model, its stream embeddings
    weights: Path | None = None  # of a model that was trained in full
    run: Path | None = None
    raw: bool = False  # raw weights were chosen although averaged ones, the default, were saved too

    @property
    def adapter(self) -> Adapter | None:
        """The adapter, or the first of several experts'; what their headers say of streams and step is the same."""
        return next(iter(self.adapters.values()), None)

    @property
    def family(self) -> Family:
        if self.adapter is not None:
            return self.adapter.family
        if self.config.model.family or self.weights is None:
            return open_model(self.config.model).family
        return recognised(self.weights.parent)[0]

    @property
    def step(self) -> int | None:
        step = step_number(self.adapter.metadata.get("step", "")) if self.adapter else -1
        if step < 0 and self.weights:
            step = saved_step(self.weights.parent)
        return step if step >= 0 else None


# --- a save ----------------------------------------------------------------------------------------------------------


def find_save(source: str, *, ema: bool | None = None) -> Save:
    """Find the save that is meant by a run (its newest), a save, an adapter file or a Hub id.

    `ema`: averaged weights, or not; None for averaged ones where they were saved.
    """
    place = Path(source).expanduser()
    if not place.exists() and (place.name == LATEST or place.parent.is_dir()):
        raise UserError(
            f"{source}: no such run, save or adapter here; train first, or give a run's folder, an adapter's file or a "
            "Hub id like user/name"
        )
    path = resolve(source, only=_PUSHED, key="adapter")
    run = run_of(path)
    if run is None or is_save(run):
        save = _choose_weights(path, ema)
        return Save(save, _run_around(save))
    newest = newest_save(run)
    if newest is None:
        raise UserError(f"{run}: nothing is saved there yet; save.every_steps and save.every_epochs say when")
    return Save(_choose_weights(newest, ema), run)


def _run_around(save: Path) -> Path | None:
    """Return the run that a save stands in; one that was copied elsewhere has none."""
    return next((folder for folder in save.resolve().parents[:3] if (folder / METRICS).is_file()), None)


def _choose_weights(save: Path, ema: bool | None) -> Path:
    """Return the folder of averaged or of raw weights."""
    if ema is False or not save.is_dir() or EMA in (save.name, save.parent.name):
        return save
    if found := averaged(save):
        return found
    if ema:
        raise UserError(f"--ema: {save} holds no {EMA}; it was trained with optim.ema=0. Leave the option out")
    return save


# --- with its config -------------------------------------------------------------------------------------------------


def base_model(config: Config) -> SavedModel:
    """Return the model as it is before anything is learned."""
    return SavedModel(config, "base")


def base_model_alone(overrides: Sequence[str]) -> SavedModel:
    """Return a base model that no config describes: it has one stream."""
    config = loading.from_overrides(["streams={rgb: ''}", "lora.enabled=false", *overrides])
    if not config.model.path:
        raise UserError("sample: name a run or an adapter, or give a base with --model")
    return base_model(on_trained_base(config))


def load_saved(source: str, overrides: Sequence[str] = (), *, ema: bool | None = None) -> SavedModel:
    """Load what `find_save` finds, with the config beside it; an adapter file by itself says which model it is for."""
    return read_save(find_save(source, ema=ema), source, overrides)


def load_for_eval(
    config_or_run: str, overrides: Sequence[str], *, adapter: str = "", base: bool = False, ema: bool | None = None
) -> SavedModel:
    """Load what is evaluated on a config's or run's data: its run's newest save, another adapter, or the base alone."""
    path = Path(config_or_run).expanduser()
    run = run_of(path) if path.is_dir() else None
    if path.is_dir() and run is None:
        raise UserError(f"{path}: holds no run; give a run's folder or a config")
    if not path.exists() and path.suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: no such run or config here; give a run's folder or a YAML file")
    tree = loading.read(run / CONFIG if run else path)
    config = on_trained_base(loading.build(tree, overrides))
    if base:
        return replace(base_model(config), run=run)
    run = run or configured_run(config)
    if not adapter and not (run / CONFIG).is_file():
        missing = f"output_dir: {config.output_dir} holds no run yet"
        if config.run_name:
            missing = f"run_name: {config.output_dir} holds no run {config.run_name}"
        raise UserError(f"{missing}; train first, or add --adapter PATH or --base")
    source = adapter or str(run)
    return read_save(find_save(source, ema=ema), source, overrides, tree=tree)


def read_save(save: Save, source: str, overrides: Sequence[str] = (), *, tree: Tree | None = None) -> SavedModel:
    """Read a save that `source` meant: its adapter, and its config unless `tree` is given instead."""
    adapters = read_experts(save.path, read_adapter) if save.has_adapter else {}
    adapter = next(iter(adapters.values()), None)
    if tree is None and adapter is not None and not save.config.is_file():
        config = _config_of(adapter, str(save.path), overrides)
    else:
        own = _config_keys(adapter) if tree is not None else []
        config = loading.build(tree or loading.read(save.config), [*own, *overrides])
    name = str(save.path) if Path(source).expanduser().exists() else source
    config = on_trained_base(config)
    return SavedModel(config, name, adapters, save.weights, save.run, raw=is_save(save.folder / EMA))


def _config_keys(adapter: Adapter | None) -> list[str]:
    """Return the config keys that an adapter's header sets; none for other programs' files."""
    said = adapter.metadata if adapter is not None else {}
    if "rgb_attends_aux" not in said:
        return []
    history = ["objective.history=off"] if said.get("history") == "off" else []
    return [f"model.rgb_attends_aux={said['rgb_attends_aux']}", f"model.fuse={said.get('fuse', '[]')}", *history]


def trained_scales(adapter: Adapter, streams: Sequence[str], name: str) -> tuple[int, ...]:
    """Return the scales that an adapter's streams were trained at. name: of its file, for an error."""
    scales = adapter.metadata["scales"].split(",") if "scales" in adapter.metadata else ["1"] * len(streams)
    if len(scales) != len(streams) or not all(re.fullmatch("[1-8]", scale) for scale in scales):
        raise UserError(f"{name}: damaged: the scales in its header are not a number from 1 to 8 for each stream")
    return tuple(map(int, scales))


def _config_of(adapter: Adapter, name: str, overrides: Sequence[str]) -> Config:
    """Return the config of the model that an adapter file's header describes."""
    said = adapter.metadata
    streams = [stream for stream in said.get("streams", "").split(",") if stream] or ["rgb", *adapter.stream_embeddings]
    tables: dict[str, str | dict[str, Any]] = {streams[0]: ""}
    for stream, scale in zip(streams[1:], trained_scales(adapter, streams, name)[1:]):
        tables[stream] = {"suffix": f"_{stream}", "scale": scale} if scale > 1 else f"_{stream}"
    keys = ["lora.enabled=false", f"streams={json.dumps(tables)}"]
    if said.get("base_model"):
        keys.append(f"model.path={said['base_model']}")
    config = loading.from_overrides([*keys, *_config_keys(adapter), *overrides])
    if not config.model.path:
        raise UserError(f"{name} does not say which base it was trained on; give one with --model")
    return config
