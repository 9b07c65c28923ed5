"""A `model.path` that training wrote goes in; the base that it stands for comes out.

A model that was trained in full is a base like a published one: its transformer lies in a save, its VAE and encoders
where the model lies that it was trained from, and its stream embeddings beside the transformer. An adapter that acts
on every stream stands for its base with the adapter fused into it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from transpixeler import configfile
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import ADAPTER_FILE, MODEL_FOLDER, is_save, newest_save, read_adapter
from transpixeler.adapters.merge import read_fused
from transpixeler.config import Config, ModelConfig, UserError
from transpixeler.models.experts import ALL
from transpixeler.models.family import open_model

CONFIG = "config.yaml"
EMA = "ema"


def on_trained_base(config: Config) -> Config:
    """Return the config with a run or a save in `model.path` pinned to what it stands for; others as they are.

    The newest save of a run is taken, and averaged weights where they were saved.
    """
    save = _save_at(Path(config.model.path).expanduser()) if config.model.path else None
    if save is None:
        return config
    return replace(config, model=base_of_save(save, config.model))


def base_of_save(save: Path, model: ModelConfig) -> ModelConfig:
    """Return the config's model with a save as its base."""
    own = configfile.load(_config_of(save)).model
    if own.expert != ALL:
        raise UserError(
            f"model.path: {save} holds one expert ({own.expert}) of {own.path}, not the whole model; start from that "
            "model, and from this adapter with lora.init_from"
        )
    encoders, family = model.encoders or own.encoders, model.family or own.family
    if (save / MODEL_FOLDER).is_dir():
        return replace(model, path=str(save), encoders=encoders or own.path, family=family)
    adapter = read_adapter(save, key="model.path")
    if not all(scope == "all" for scope in adapter.scopes.values()):
        raise UserError(
            f"model.path: {save} holds an adapter that acts on some streams only (lora.scope), and all streams share "
            f"the base's weights, so that it cannot be merged into them; go on with the adapter itself: "
            f"model.path={own.path} lora.init_from={save}"
        )
    return replace(model, path=own.path, encoders=encoders, family=family, fuse=(*own.fuse, str(save), *model.fuse))


def _save_at(path: Path) -> Path | None:
    """Return the save that a path means, as training wrote it; None for a model of any other kind."""
    if not path.is_dir():
        return None
    run = next((folder for folder in (path / "latest", path) if (folder / CONFIG).is_file()), None)
    if run is not None and not is_save(run):
        save = newest_save(run.resolve())
        if save is None:
            raise UserError(f"model.path: {path}: nothing is saved in this run yet; save.every_steps says when")
    else:
        save = path.resolve()
    if not is_save(save) or not _config_of(save).is_file():
        return None
    return save / EMA if is_save(save / EMA) else save


def _config_of(save: Path) -> Path:
    """Return the path of a save's config: beside it, or beside the raw weights that averaged ones stand in."""
    own = save / CONFIG
    return own if own.is_file() or save.name != EMA else save.parent / CONFIG


# --- stream embeddings -----------------------------------------------------------------------------------------------


def base_embeddings(config: Config) -> dict[str, Tensor]:
    """Return the stream embeddings that the base brings: its own, and those of adapters that are fused into it."""
    path = Path(config.model.path).expanduser()
    own = [read_adapter(path, key="model.path")] if _holds_embeddings(path) else []
    found: dict[str, Tensor] = {}
    for adapter in (*own, *read_fused(config.model.fuse)):
        found |= adapter.stream_embeddings
    unknown = [stream for stream in found if stream not in config.streams]
    if unknown:
        raise UserError(
            f"model.path: {config.model.path} was trained for the stream {unknown[0]}; streams are "
            f"{', '.join(config.streams)}: name them in `streams` as they were then"
        )
    return found


def _holds_embeddings(path: Path) -> bool:
    return (path / MODEL_FOLDER).is_dir() and (path / ADAPTER_FILE).is_file()


def over_base(config: Config, adapter: Adapter | None) -> Adapter | None:
    """Return the adapter with the base's stream embeddings where it has none of its own; None where neither has any."""
    embeddings = base_embeddings(config)
    if not embeddings:
        return adapter
    if adapter is not None:
        return replace(adapter, stream_embeddings=embeddings | dict(adapter.stream_embeddings))
    return _embeddings_alone(config, embeddings)


def _embeddings_alone(config: Config, embeddings: Mapping[str, Tensor]) -> Adapter:
    return Adapter({}, {}, {}, embeddings, {"family": open_model(config.model).family.name})
