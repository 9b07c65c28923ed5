"""Do from Python what the commands do: paths and configs go in; arrays, data sets and run folders come out.

`import transpixeler as tp` offers these names and loads this module, and torch with it, when one of them is first used.
"""

from __future__ import annotations

import atexit
import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from transpixeler.adapters.bases import on_trained_base
from transpixeler.config import loading
from transpixeler.config.sections import Config, UserError
from transpixeler.data.dataset import Datasets
from transpixeler.data.encode import encode_missing
from transpixeler.data.prompts import GivenFiles, Prompt, prompt_lines
from transpixeler.data.sampled import frame_rate
from transpixeler.files import check_place, writing_to
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime, start
from transpixeler.sampling.command import facts_of
from transpixeler.sampling.files import alpha_of
from transpixeler.sampling.made import asked_for
from transpixeler.sampling.saves import SavedModel, base_model_alone, load_saved
from transpixeler.sampling.session import Session
from transpixeler.sampling.video import write_video
from transpixeler.training import trainer
from transpixeler.training.callbacks import Callbacks
from transpixeler.training.preflight import check_import

logger = logging.getLogger("transpixeler")
Source = Config | str | Path


def read_config(path: str | Path = "", *overrides: str) -> Config:
    """Return the config of a YAML file, or the defaults, with overrides such as "optim.lr=5e-5"."""
    if not path:
        return loading.from_overrides(overrides)
    found = loading.load(path, overrides)
    check_import(found, str(path), overrides)
    return found


def encode(source: Source, *overrides: str) -> Datasets:
    """Encode what the cache lacks of a config, a YAML file or a folder of pairs; return its train and eval sets.

    A folder needs the model in an override: encode("clips", "model.path=FOLDER").
    """
    found = _config_of(source, overrides)
    return encode_missing(found, open_model(found.model), _runtime(found))


def train(
    source: Source, *overrides: str, resume: str | Path | None = None, callbacks: Callbacks | None = None
) -> Path:
    """Train a config or a YAML file; return the run's folder.

    resume: a run or a checkpoint to go on from. callbacks: what to call after steps, evaluations and saves.
    """
    found = _config_of(source, overrides)
    return trainer.train(
        found, _runtime(found), resume=None if resume is None else str(resume), callbacks=callbacks or Callbacks()
    )


def load(source: str | Path = "", *overrides: str, ema: bool | None = None) -> Model:
    """Load a run, a save, an adapter file or a Hub id; without one, the base of "model.path=FOLDER".

    ema: the averaged weights, or not; None for averaged ones where they were saved.
    """
    return Model(load_saved(str(source), overrides, ema=ema) if source else base_model_alone(overrides))


@dataclass(frozen=True, eq=False)
class Sample:
    """A video that was made: frames by stream, and the folder of its files where they were asked for."""

    prompt: str
    seed: int
    streams: Mapping[str, np.ndarray]  # uint8 [F, H, W, 3] by name, RGB first
    fps: Fraction
    folder: Path | None = None

    @property
    def rgb(self) -> np.ndarray:
        """Return the first stream, uint8 [F, H, W, 3]."""
        return next(iter(self.streams.values()))

    @property
    def alpha(self) -> np.ndarray | None:
        """Return the second stream as alpha, uint8 [F, H, W]; None where the model has one stream."""
        others = list(self.streams.values())[1:]
        return alpha_of(others[0]) if others else None

    @property
    def rgba(self) -> np.ndarray:
        """Return uint8 [F, H, W, 4] with straight alpha; opaque where the model has one stream."""
        alpha = np.full(self.rgb.shape[:3], 255, np.uint8) if self.alpha is None else self.alpha
        return np.concatenate([self.rgb, alpha[..., None]], axis=3)


class Model:
    """Make videos with what was trained, or with a base. Its weights are read for the first of them, and stay."""

    def __init__(self, source: SavedModel) -> None:
        self._source = source
        self._session: Session | None = None

    def __repr__(self) -> str:
        return f"<Model {self.name}: {', '.join(self.config.streams)} of {self.config.model.path}>"

    @property
    def config(self) -> Config:
        """Return the config that belongs to it."""
        return self._source.config

    @property
    def name(self) -> str:
        """Return the path or Hub id that it came from."""
        return self._source.name

    @property
    def step(self) -> int | None:
        """Return how many steps it was trained; None where that is not known."""
        return self._source.step

    def sample(
        self,
        prompts: str | Prompt | Path | Iterable[str | Prompt] = "",
        *,
        out: str | Path = "",
        count: int = 1,
        rgb: str | Path = "",
        alpha: str | Path = "",
        image: str | Path = "",
        last: str | Path = "",
        between: str | Path = "",
        factor: int = 0,
        extend: str | Path = "",
        frames: int = 0,
        **settings: Any,
    ) -> list[Sample]:
        """Make videos of prompts, or of a Path to a list of them; return them, and write their files to `out` if given.

        count: videos of each prompt. rgb, alpha, image, last: files to start from. between: a clip to make `factor`
        times as many frames of; extend: one to go on from, to `frames` in all. settings: keys of `sample`, such as
        steps=20, seed=7, size=(832, 480, 33) or formats=("mov",).
        """
        runtime = _runtime(self.config)
        self._session = session = self._session or Session(self._source, runtime)
        source = session.with_sample(_with(self.config, settings).sample)
        files = {"rgb": rgb, "alpha": alpha, "image": image, "last": last, "between": between, "extend": extend}
        given = GivenFiles(**{name: str(path) for name, path in files.items()}, factor=factor, frames=frames)
        requests = session.requests(source, _prompts(prompts), given=given, count=count)
        if out:
            check_place(Path(out), "out")
        asked = asked_for(requests, source, session.model) if out else []
        made = []
        for one in session.make(source, requests):
            request, fps, folder = requests[one.number], one.video.fps or frame_rate(source.config), None
            if out:
                with writing_to(Path(out), "out"):
                    facts = facts_of(source, request, asked[one.number])
                    folder = write_video(Path(out), one.video, one.streams, source.config, facts, one.plate)
            made.append(Sample(request.prompt, request.seed, one.streams, fps, folder))
        return made


# --- shared ----------------------------------------------------------------------------------------------------------


def _prompts(prompts: str | Prompt | Path | Iterable[str | Prompt]) -> list[Prompt]:
    if isinstance(prompts, Path):
        return prompt_lines(str(prompts), key="prompts")
    several = [prompts] if isinstance(prompts, str | Prompt) else prompts
    return [Prompt(one) if isinstance(one, str) else one for one in several]


def _with(config: Config, settings: Mapping[str, Any]) -> Config:
    """Return a config with other keys of `sample`, checked as those of a file are."""
    tree = loading.Tree(loading.plain(config))
    tree.values["sample"] |= {key: loading.plain(value) for key, value in settings.items()}
    tree.origins = {("sample", key): "sample()" for key in settings}
    return replace(config, sample=loading.build(tree).sample)


def _config_of(source: Source, overrides: tuple[str, ...]) -> Config:
    if isinstance(source, Config):
        if overrides:
            raise UserError("overrides are for a file; change a config with dataclasses.replace, or make it with them")
        found = source
    elif Path(source).is_dir():
        found = read_config("", f"data.train=[{{path: {loading.quoted(str(source))}}}]", *overrides)
    else:
        found = read_config(source, *overrides)
    return on_trained_base(found)


def _runtime(config: Config) -> Runtime:
    """Join the process group once: what is loaded goes on using it, so a process that is alone leaves it at its end."""
    fresh = not dist.is_initialized()
    runtime = start(timeout_minutes=config.parallel.timeout_minutes)
    if fresh and runtime.world_size == 1:
        atexit.register(_leave)
    return runtime


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
