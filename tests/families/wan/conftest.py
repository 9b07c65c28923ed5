"""Fixtures of Wan's tests."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
from torch import Tensor

from tests.families.wan.pipelines import write_experts
from tests.support.weights import diffusers_wan
from transpixeler import cli
from transpixeler.families.wan.names import NAMES as wan_names

EXPERTS_CONFIG = """\
output_dir: output
model: {{path: {model}}}
data: {{train: data/train, eval: data/eval, cache_dir: cache, fps: 16, resolutions: [64], frames: [9]}}
lora: {{rank: 2}}
objective: {{shift: auto, tasks: {{joint: 1}}}}
optim: {{lr: 0.01, warmup_steps: 0}}
train: {{max_steps: 2, global_batch: 2, expert_steps: 1}}
eval: {{every_epochs: 0, before_first_step: false, times: [0.1, 0.9], samples: 1}}
sample: {{size: [64, 64, 9], steps: 2, shift: auto, prompts: [a red circle], guidance: {{high: 4, low: 3}}}}
log: {{tensorboard: false}}
"""


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return {
        wan_names.parameter(name, source="diffusers", to="original"): tensor
        for name, tensor in diffusers_wan().state_dict().items()
    }


@pytest.fixture(scope="module")
def a14b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_experts(tmp_path_factory.mktemp("experts"), "t2v")


@pytest.fixture(scope="module")
def project(a14b: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config and its clips, encoded."""
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    made = tmp_path_factory.mktemp("project")
    for name, count in (("train", 4), ("eval", 1)):
        drawn = scenes(count, formats=[Format(64, 64, 9, Fraction(16))], held_out=name == "eval", seed=0)
        write_pairs(made / "data" / name, drawn)
    (made / "config.yaml").write_text(EXPERTS_CONFIG.format(model=a14b))
    assert cli.main(["cache", str(made / "config.yaml")]) == 0
    return made
