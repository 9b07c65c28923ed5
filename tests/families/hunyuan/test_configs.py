"""The shipped configs hold what they say, and `plan` takes them, from the configs that are published and no weight."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from transpixeler import cli
from transpixeler.config import loading
from transpixeler.data.buckets import Bucket
from transpixeler.families.hunyuan.config import CLASS, HunyuanConfig, diffusers_config
from transpixeler.families.hunyuan.family import FAMILY
from transpixeler.families.hunyuan.model import HunyuanModel, fields
from transpixeler.models.costs import step_flops
from transpixeler.models.geometry import USUAL
from transpixeler.parallel import build
from transpixeler.parallel.mesh import Layout
from transpixeler.parallel.shard import wants_compile
from transpixeler.planning.layouts import USABLE_MEMORY
from transpixeler.training.estimates import Estimate, Load

CONFIGS, GPU = Path(__file__).parents[3] / "configs", torch.device("cuda")


def figures(name: str, bucket: tuple[int, int, int], *overrides: str, shard: int = 1) -> tuple[float, float, int]:
    """Return GB of memory, PFLOP a pair and trained numbers."""
    config = loading.load(CONFIGS / f"hunyuanvideo-{name}.yaml", list(overrides))
    streams = tuple(config.streams)
    shape = HunyuanConfig.read(FAMILY.shapes["13b-i2v" if name == "i2v-rgba" else "13b"])
    model = build.shape(config, lambda: HunyuanModel(shape, streams=streams), torch.bfloat16)
    estimate = Estimate.of(model, config, dtype=torch.bfloat16, compiled=wants_compile(config.parallel, GPU))
    layout = USUAL.layout(streams, (1,) * len(streams), bucket)
    recompute = config.parallel.recompute
    memory = estimate.memory(
        [Load(Bucket(*bucket), layout, 1, config.train.global_batch)], Layout(1, 1, shard), recompute
    ).total
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    flops = step_flops(estimate.costs, layout.lengths, recompute=recompute)
    return memory / 1e9, flops / 1e15, trained


def said(name: str) -> str:
    lines = (CONFIGS / f"hunyuanvideo-{name}.yaml").read_text(encoding="utf-8").splitlines()
    return " ".join(line.lstrip("# ") for line in lines)


def test_the_joint_config_holds_what_is_said() -> None:
    text, full = said("joint"), ("parallel.recompute=full",)
    memory, work, trained = figures("joint", (33, 544, 960))
    assert f"{memory:.1f} GB in all" in text and memory * 1e9 < USABLE_MEMORY * 80 * 2**30
    assert f"takes {work:.1f} PFLOP at 33 frames" in text and f"# {trained / 1e6:.0f} M parameters" in text
    short, long = (figures("joint", (frames, 544, 960), *full)[0] for frames in (33, 61))
    assert f"recompute: full takes {short:.1f}, and {long:.1f} at 61 frames" in text
    assert long * 1e9 < USABLE_MEMORY * 80 * 2**30
    assert f"and {figures('joint', (61, 544, 960))[1]:.1f} at 61" in text
    shared, lean = (figures("joint", (33, 544, 960), "parallel.shard=8", *o, shard=8)[0] for o in ((), full))
    assert f"{shared:.1f} GB at 33 frames; recompute: full {lean:.1f}" in text
    assert f"{figures('joint', (33, 544, 960), *full, 'model.quantize=int8')[0]:.1f} GB. One of 24 GB" in text


def test_the_config_for_a_small_card_holds_what_is_said() -> None:
    text = said("24gb")
    memory, work, _ = figures("24gb", (33, 480, 848))
    assert f"{memory:.1f} GB in all" in text and memory * 1e9 < USABLE_MEMORY * 24 * 2**30
    assert f"{work:.1f} PFLOP a pair" in text


def test_the_config_for_images_holds_what_is_said() -> None:
    text, bucket = said("i2v-rgba"), (33, 544, 960)
    memory, work, _ = figures("i2v-rgba", bucket)
    assert f"{memory:.1f} GB in all" in text and memory * 1e9 < USABLE_MEMORY * 80 * 2**30
    assert f"recompute: full takes {figures('i2v-rgba', bucket, 'parallel.recompute=full')[0]:.1f}." in text
    assert f"a pair takes {work:.1f} PFLOP" in text
    (field, _) = fields(HunyuanConfig.read(FAMILY.shapes["13b-i2v"]))
    assert f"{(field.length or 0) * 4096 * 2 / 1e6:.1f} MB of text a clip" in text
    assert f"{field.length} rows, of which {field.least} are the image's" in text


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the published configs, and no weight."""
    folder = tmp_path_factory.mktemp("hunyuan")
    parts = {
        "transformer/config.json": diffusers_config({}),
        "vae/config.json": {
            "latent_channels": 16,
            "scaling_factor": 0.476986,
            "spatial_compression_ratio": 8,
            "temporal_compression_ratio": 4,
        },
        "scheduler/scheduler_config.json": {"shift": 7.0},
        "text_encoder/config.json": {"hidden_size": 4096},
        "text_encoder_2/config.json": {"hidden_size": 768},
    }
    for name, content in parts.items():
        (folder / name).parent.mkdir()
        (folder / name).write_text(json.dumps(content))
    assert parts["transformer/config.json"]["_class_name"] == CLASS
    return folder


@pytest.mark.parametrize("name", ["joint", "24gb", "i2v-rgba"])
def test_plan_takes_the_config(
    name: str, folder: Path, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    if name == "i2v-rgba":
        shutil.copytree(folder, folder := tmp_path / "model")
        shape = diffusers_config(FAMILY.shapes["13b-i2v"])
        (folder / "transformer/config.json").write_text(json.dumps(shape))
    data = (f"data.train={demo / 'data/train'}", f"data.cache_dir={tmp_path}", "data.upscale=true", "data.frames=[17]")
    config = CONFIGS / f"hunyuanvideo-{name}.yaml"
    asked = ["plan", str(config), f"model.path={folder}", f"output_dir={tmp_path}", *data, "--json"]
    asked += ["streams.alpha=_seg"] if name == "i2v-rgba" else []  # the demo's pairs
    assert cli.main([*asked, "--device", "4090" if name == "24gb" else "h100"]) == 0
    value = json.loads(capsys.readouterr().out)
    parameters = value["parameters"]
    base = parameters["all"] - parameters["trained"]  # with the scales of quantized weights, where there are
    assert base == pytest.approx(12_821_012_544, rel=0.002) and value["layouts"]
