"""One small world for each family: a model folder, pairs and a config; the cache is filled by the real command."""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from tests.support.families.cases import EVERY, Case
from tests.support.shared import made_once, session_folder, settle
from transpixeler import cli

CONFIG = """\
output_dir: output
model: {{path: model}}
streams: {{rgb: "", seg: _seg}}
data: {{train: data/train, eval: data/eval, cache_dir: data/cache, fps: 16, resolutions: [64], frames: {frames}}}
lora: {{rank: 4}}
objective: {{tasks: {{joint: 0.5, rgb_to_aux: 0.5}}}}
optim: {{lr: 0.01, warmup_steps: 0, schedule: constant, ema: 0.5}}
train: {{max_steps: 2, global_batch: 2, micro_batch: 1}}
checkpoint: {{every_steps: 1}}
save: {{every_epochs: 0, every_steps: 2}}
eval: {{every_epochs: 0, before_first_step: false, times: [0.5], samples: 1}}
sample: {{prompts: [a red circle], size: [64, 64, {longest}], steps: 2, guidance: 2}}
log: {{tensorboard: false}}
"""


@pytest.fixture(scope="session")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return session_folder(tmp_path_factory) / "shared/families"


@pytest.fixture(params=EVERY.values(), ids=EVERY)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


@pytest.fixture
def world(case: Case, worlds: Path) -> Iterator[Path]:
    """Lend the folder of a family's world, with everything in its cache. Nobody writes into it."""
    with made_once(worlds / case.name, lambda folder: _write(folder, case)) as folder:
        yield folder


@pytest.fixture
def run(case: Case, world: Path, worlds: Path) -> Iterator[Path]:
    """Lend the folder of a LoRA run of two steps. Nobody writes into it."""
    with made_once(worlds / f"{case.name}-lora", lambda folder: train(world, folder)) as output:
        yield (output / "latest").resolve()


def train(world: Path, output: Path, *overrides: str) -> Path:
    """Run the command; return the run's folder."""
    assert cli.main(["train", str(world / "config.yaml"), f"output_dir={output}", *overrides]) == 0
    return (output / "latest").resolve()


def _write(folder: Path, case: Case) -> None:
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    folder.mkdir(parents=True)
    case.write(folder / "model")
    lengths = [Format(64, 64, frames, Fraction(16)) for frames in case.frames]
    write_pairs(folder / "data/train", scenes(4, formats=lengths, held_out=False, seed=0))
    write_pairs(folder / "data/eval", scenes(1, formats=lengths[1:], held_out=True, seed=0))
    settle(folder)
    settings = yaml.safe_load(CONFIG.format(frames=list(case.frames), longest=case.frames[1]))
    settings |= {section: {**settings[section], **values} for section, values in case.more.items()}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    assert cli.main(["cache", str(folder / "config.yaml")]) == 0
