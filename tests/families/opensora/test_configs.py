"""The shipped configs of Open-Sora 2 are planned at the published size, and say of it what is so."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests.families.opensora.folder import TINY, write_encoders
from tests.families.opensora.test_stages import write_world
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.families.opensora.config import OpenSoraConfig, published_config
from transpixeler.families.opensora.family import FAMILY
from transpixeler.families.opensora.model import OpenSoraModel

CONFIGS = Path(__file__).parents[3] / "configs"
STAGES = ("images", "stage1", "stage2", "i2v")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Clips, and a model folder of the published sizes without weights."""
    place = tmp_path_factory.mktemp("published")
    write_world(place, place / "model")
    write_encoders(place / "tiny")
    (model := place / "model" / "transformer").mkdir(parents=True)
    (model / "config.json").write_text(json.dumps(published_config(FAMILY.shapes["11b"])))
    shutil.copytree(place / "tiny/vae", place / "model/vae")
    vae = json.loads((place / "model/vae/config.json").read_text())
    (place / "model/vae/config.json").write_text(json.dumps(vae | {"latent_channels": 16}))
    return place


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_is_planned(stage: str, world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = world / ("data/train-images" if stage == "images" else "data/train")
    keys = [f"model.path={world / 'model'}", f"data.train=[{{path: {data}, repeats: 1000}}]", f"data.cache_dir={world}"]
    words = [str(CONFIGS / f"open-sora-{stage}.yaml"), *keys, "data.fps=16", "data.upscale=true"]
    assert cli.main(["plan", *words, "--device", "h100", "--gpus", "8", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["parameters"] == {"trained": 11_891_390_528, "all": 11_891_390_528}
    assert planned["layouts"] and planned["buckets"]


def test_the_configs_say_how_large_the_model_is() -> None:
    with torch.device("meta"):
        model = OpenSoraModel(OpenSoraConfig.read(FAMILY.shapes["11b"]), streams=("rgb",))
    billions = sum(parameter.numel() for parameter in model.parameters()) / 1e9
    assert f"{billions:.2f} B parameters" in (CONFIGS / "open-sora-images.yaml").read_text(encoding="utf-8")


def test_each_stage_has_the_published_settings() -> None:
    configs = {stage: loading.load(CONFIGS / f"open-sora-{stage}.yaml") for stage in STAGES}
    assert [config.optim.lr for config in configs.values()] == [1e-5, 5e-5, 5e-5, 1e-5]
    for config in configs.values():
        assert config.objective.caption_dropout == {"text": 0.316, "pooled": 0.316}
        assert (config.sample.steps, config.sample.guidance, config.sample.oscillate) == (50, 7.5, 10)
        assert (config.objective.density, config.objective.shift, config.data.fps) == ("logit_normal", "auto", 24)
    assert configs["i2v"].objective.tasks == {"joint": 1, "image_to_video": 5, "ends_to_video": 1, "last_to_video": 1}
    assert (configs["i2v"].sample.image_guidance, configs["i2v"].sample.image_falloff) == (3, True)


def test_the_tiny_shape_is_of_the_same_kind() -> None:
    assert published_config(TINY).keys() == published_config(FAMILY.shapes["11b"]).keys()
