"""A `model.path` that training wrote goes in; the base that it stands for comes out.

A model that was trained in full is a base like a published one: its transformer lies in a save, its VAE and encoders
where the model lies that it was trained from, and its stream embeddings beside the transformer. An adapter that acts
on every stream stands for its base with the adapter fused into it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter, read_embeddings
from transpixeler.adapters.saved import (
    ADAPTER_FILE,
    MODEL_FOLDER,
    averaged,
    config_of,
    is_save,
    newest_save,
    run_of,
)
from transpixeler.config import loading
from transpixeler.config.sections import Config, ModelConfig, UserError
from transpixeler.models.experts import ALL
from transpixeler.models.family import open_model


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
    own = loading.load(config_of(save)).model
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
    save, run = path.resolve(), run_of(path)
    if run is not None and not is_save(run):
        save = newest_save(run)
        if save is None:
            raise UserError(f"model.path: {path}: nothing is saved in this run yet; save.every_steps says when")
    if not is_save(save) or not config_of(save).is_file():
        return None
    return averaged(save) or save


# --- stream embeddings -----------------------------------------------------------------------------------------------


def over_base(config: Config, adapters: Mapping[str, Adapter], experts: Sequence[str]) -> dict[str, Adapter]:
    """Return the adapters by expert, with the base's stream embeddings where one has none of its own."""
    embeddings = _base_embeddings(config)
    if not embeddings:
        return dict(adapters)
    alone = Adapter({}, {}, {}, {}, {"family": open_model(config.model).family.name})
    found = {expert: adapters.get(expert, alone) for expert in experts}
    return {
        expert: replace(adapter, stream_embeddings=embeddings | dict(adapter.stream_embeddings))
        for expert, adapter in found.items()
    }


def _base_embeddings(config: Config) -> dict[str, Tensor]:
    """Return the stream embeddings that the base brings: its own, and those of adapters that are fused into it."""
    path = Path(config.model.path).expanduser()
    found = read_embeddings(path, key="model.path") if _holds_embeddings(path) else {}
    for fused in config.model.fused_paths:
        found |= read_embeddings(fused, key="model.fuse")
    unknown = [stream for stream in found if stream not in config.streams]
    if unknown:
        raise UserError(
            f"model.path: {config.model.path} was trained for the stream {unknown[0]}; streams are "
            f"{', '.join(config.streams)}: name them in `streams` as they were then"
        )
    return found


def _holds_embeddings(path: Path) -> bool:
    return (path / MODEL_FOLDER).is_dir() and (path / ADAPTER_FILE).is_file()
