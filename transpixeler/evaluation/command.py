"""The command `transpixeler eval`: a saved model goes in, a table and eval.json come out."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from transpixeler.config.sections import UserError
from transpixeler.data.encode import encode_missing
from transpixeler.evaluation.heldout import Evaluator
from transpixeler.evaluation.results import table
from transpixeler.files import printable, refuse_file, shown_path, write_text
from transpixeler.models.family import open_model
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.folder import SAMPLES, sample_folder
from transpixeler.sampling.model import fit_layout, open_engine
from transpixeler.sampling.saves import EMA, SavedModel
from transpixeler.sampling.video import name_part
from transpixeler.scoring.file import check_scorer

logger = logging.getLogger("transpixeler")


def eval_command(source: SavedModel, runtime: Runtime, *, out: str = "", asked_layout: bool = False) -> Path:
    """Evaluate a run, an adapter or the base on `data.eval`: print a table, write OUT/eval.json, return OUT."""
    config, layout = fit_layout(source.config, runtime, asked=asked_layout)
    if not config.data.eval:
        raise UserError("data.eval: set it to a folder of pairs or a manifest that training does not see")
    if out:
        refuse_file(Path(out), "--out")
    check_scorer(config)
    config = replace(config, data=replace(config.data, train=()))
    data = encode_missing(config, open_model(config.model), runtime).eval
    data.refuse_empty()
    mesh = meshes.build(layout, runtime)
    engine = open_engine(replace(source, config=config), mesh)
    evaluator = Evaluator(config, runtime, engine, data)
    folder = Path(out) if out else _default_folder(source)
    found: dict[str, dict[str, Any]] = {name: {"loss": loss} for name, loss in evaluator.losses().items()}
    facts = {"model": config.model.path, "adapter": source.name, "step": source.step}
    for name, values in evaluator.samples(folder / SAMPLES, facts).items():
        found.setdefault(name, {})["metrics"] = values
    if runtime.is_main:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "eval.json", json.dumps(facts | {"eval": found}, indent=1))
        print(printable(f"{table(found)}\n{shown_path(folder / 'eval.json')}"))
    runtime.barrier()
    return folder


def _default_folder(source: SavedModel) -> Path:
    """Return a folder that no other model shares: in a run by step, elsewhere named for where the model comes from."""
    saved = Path(source.name)
    if source.run is None:
        name = name_part("-".join(saved.parts[-2:]))
    elif source.step is not None:
        name = sample_folder(source.step)
    else:
        name = saved.parent.name if saved.name == EMA else saved.name
    return (source.run or Path(source.config.output_dir)) / "eval" / f"{name}{'-raw' if source.raw else ''}"
