"""A config of Open-Sora becomes one of ours: every key carried or named, its buckets as they were, nothing executed."""

from __future__ import annotations

import csv
import re
import shutil
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from tests.support.families.cases import CASES
from tests.tools.test_migrate import TOOLS, migrate
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, DataConfig, SourceConfig
from transpixeler.data.buckets import Bucket, assign, rule_for
from transpixeler.data.draws import Draws
from transpixeler.data.media.clip import Media
from transpixeler.data.sources.pairs import scan
from transpixeler.data.sources.samples import Sample
from transpixeler.models.family import open_model
from transpixeler.models.geometry import USUAL

HEADER = ["path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps"]
# keys of Open-Sora 2.0's guides, with values of our own
BASE = """
\"\"\"What others build on.\"\"\"
dataset = dict(type="video_text", transform_name="resize_crop", fps_max=12, vmaf=True, data_path="clips.csv")
grad_ckpt_settings = (4, 50)
bucket_config = {"256px": {1: (1.0, 9)}, "512px": {1: (0.5, 3)}}
model = dict(
    type="flux",
    from_pretrained=None,
    grad_ckpt_settings=grad_ckpt_settings,
    axes_dim=[16, 56, 56],
)
dropout_ratio = {"t5": 0.5, "clip": 0.5}
ae = dict(type="hunyuan_vae", from_pretrained="./vae.safetensors")
t5 = dict(type="text_embedder", max_length=512)
clip = dict(type="text_embedder", max_length=77)
lr = 3e-5
eps = 1e-12
optim = dict(cls="HybridAdam", lr=lr, eps=eps, weight_decay=0.01, adamw_mode=True)
warmup_steps = 7
update_warmup_steps = True
grad_clip = 0.9
accumulation_steps = 2
ema_decay = None
prefetch_factor = 2
num_workers = 12
num_bucket_build_workers = 64
dtype = "bf16"
plugin = "zero2"
grad_checkpoint = True
plugin_config = dict(reduce_bucket_size_in_m=128, overlap_allgather=False)
pin_memory_cache_pre_alloc_numels = [(260 + 20) * 1024 * 1024] * 24
async_io = False
seed = 42
outputs = "outputs"
epochs = 30
log_every = 10
ckpt_every = 100
keep_n_latest = 20
wandb_project = "clips"
"""
STAGE = """
_base_ = ["base.py"]
dataset = dict(memory_efficient=True)
grad_ckpt_buffer_size = 25 * 1024**3
bucket_config = {
    "_delete_": True,
    "32px": {1: (1.0, 9), 5: (0.75, 4), 9: ((0.8, 0.25), 2)},
    "64px": {1: (0.5, 3), 9: (0.25, 1), 12: (0.0, None)},
    "96px": {1: (1.0, 2)},
}
condition_config = dict(t2v=1, i2v_head=5, i2v_loop=2, i2v_tail=1, v2v_head=1)
is_causal_vae = True
model = dict(cond_embed=True)
ema_decay = 0.995
"""


def lay(folder: Path, demo: Path, stage: str = STAGE, *, clips: str = "clips") -> Path:
    """Write a config and its csv beside the demo's clips."""
    shutil.copytree(demo / "data/train", folder / clips)
    (folder / "base.py").write_text(BASE)
    (folder / "stage.py").write_text(stage)
    with (folder / "clips.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(HEADER)
        for path in sorted((folder / clips).glob("*.mp4")):
            if not path.stem.endswith("_seg"):
                writer.writerow([f"clips/{path.name}", "a thing", "", "", "", "1.0", "4096", ""])
    return folder


def migrated(folder: Path, demo: Path, *options: object) -> Config:
    words = ("--root", folder, "--out", folder / "ours.yaml", "--gpus", 4, "--model", demo / "model", *options)
    assert migrate(folder / "stage.py", *words) == 0
    return loading.load(folder / "ours.yaml")


def refused(folder: Path, capsys: Any, *options: object) -> str:
    options = options or ("--gpus", 4)
    assert migrate(folder / "stage.py", "--root", folder, "--out", folder / "ours.yaml", *options) == 2
    error = capsys.readouterr().err.strip()
    assert "\n" not in error and error.startswith("migrate: ") and not (folder / "ours.yaml").exists()
    return error


def test_a_config_over_its_base_is_one_of_ours(tmp_path: Path, demo: Path) -> None:
    config = migrated(lay(tmp_path, demo), demo)
    assert config.model.path == str(demo / "model") and config.model.dtype == "bfloat16"
    assert config.streams == {"rgb": ""} and not config.lora.enabled and config.seed == 42
    optim = config.optim
    assert (optim.name, optim.lr, optim.eps, optim.weight_decay, optim.betas) == (
        "adamw",
        3e-5,
        1e-12,
        0.01,
        (0.9, 0.999),
    )
    assert (optim.warmup_steps, optim.clip, optim.ema) == (7, 0.9, 0.995)
    assert config.objective.tasks == {"joint": 1, "image_to_video": 5, "ends_to_video": 2, "last_to_video": 1}
    assert config.objective.caption_dropout == 0.25  # both texts at once
    assert (config.train.epochs, config.checkpoint.every_steps, config.checkpoint.keep) == (30, 100, 20)
    assert not config.checkpoint.asynchronous and config.parallel.recompute == "offload" and config.parallel.shard == 0
    assert config.parallel.host_gb == 25
    assert config.output_dir == str(tmp_path / "outputs") and config.data.fps == 12


def test_buckets_keep_and_batch_as_there(tmp_path: Path, demo: Path, capsys) -> None:
    data = (config := migrated(lay(tmp_path, demo), demo)).data
    assert data.train == (SourceConfig(path=str(tmp_path / "clips.csv")),) and data.draw == "epoch"
    assert data.resolutions == (32, 64, 96) and data.frames == (1, 5, 9)
    wanted = {  # micro_batch, global_batch over 4 GPUs and 2 accumulated, keep, keep_resolution
        (1, 32, 32): (9, 72, 1.0, 1.0),
        (5, 32, 32): (4, 32, 1.0, 0.75),
        (9, 32, 32): (2, 16, 0.75, 0.8),  # a quarter goes to the next shorter length first
        (9, 48, 32): (2, 16, 0.75, 0.8),
        (1, 64, 64): (3, 24, 1.0, 0.5),
        (5, 64, 64): (None, None, 0.0, 1.0),  # no such length at this size
        (9, 64, 64): (1, 8, 1.0, 0.25),
        (1, 96, 96): (2, 16, 1.0, 1.0),
        (1, 144, 64): (2, 16, 1.0, 1.0),
        (9, 96, 96): (None, None, 0.0, 1.0),
    }
    found = {shape: rule_for(Bucket(*shape), data.buckets) for shape in wanted}
    told = {s: (r.micro_batch, r.global_batch, r.keep, r.keep_resolution) for s, r in found.items()}
    assert told == wanted and config.train.global_batch == 8
    said = capsys.readouterr().out
    assert "bucket_config: 64px: 12 = ((0.0, 1.0), None): with this model 12 frames come to 9, which another" in said
    assert "\n  - {size: [96, 96, 9], keep: 0.0}\n" in (tmp_path / "ours.yaml").read_text()


def test_each_clip_has_the_chances_that_it_had_there(tmp_path: Path, demo: Path) -> None:
    """Of a video of 64×64 and 9 frames, written out by hand; and none is kept at a size that sends it on."""
    data = migrated(lay(tmp_path, demo), demo).data
    found = offered(data, 9, 64)
    draws = Draws.of(["a"] * len(found), found, rules=data.buckets, seed=0)
    wanted = {(9, 64): 0.25, (9, 32): 0.75 * 0.75 * 0.8, (5, 32): 0.75 * 0.25 * 0.75}
    assert {bucket[:2]: chance for bucket, chance in zip(found, draws.chances())} == pytest.approx(wanted)
    shutil.rmtree(tmp_path / "clips")
    sent_on = STAGE.replace("9: (0.25, 1), 12: (0.0, None)", "5: (1.0, 1), 9: (0.0, None)")
    data = migrated(lay(tmp_path, demo, sent_on), demo, "--force").data
    assert [bucket[:2] for bucket in offered(data, 9, 64)] == [(9, 32), (5, 32)]
    assert [bucket[:2] for bucket in offered(data, 5, 64)] == [(5, 64)]


def offered(data: DataConfig, frames: int, side: int) -> list[Bucket]:
    """Return the buckets that some epoch draws a square video for."""
    media = Media(frames, side, side, Fraction(12), Fraction(frames, 12), False)
    sample = Sample("a", (("rgb", Path("a.mp4")),), "", 0, False, media)
    found = [bucket for _, _, bucket in assign([sample], data.train, data, geometry=USUAL, seed=0).clips]
    chances = Draws.of(["a"] * len(found), found, rules=data.buckets, seed=0).chances()
    return [bucket for bucket, chance in zip(found, chances, strict=True) if chance]


def test_no_key_vanishes(tmp_path: Path, demo: Path, capsys) -> None:
    migrated(lay(tmp_path, demo), demo)
    told, text = capsys.readouterr().out, (tmp_path / "ours.yaml").read_text()
    assert "pin_memory_cache_pre_alloc_numels = [(260 + 20) * 1024 * 1024] * 24: pinned" in told
    for key in ("model.type", "model.grad_ckpt_settings", "model.cond_embed", "model.axes_dim", "ae.type",
                "t5.max_length", "clip.type", "dataset.type", "dataset.vmaf", "dataset.memory_efficient",
                "condition_config.v2v_head", "num_workers", "update_warmup_steps", "wandb_project", "is_causal_vae",
                "grad_ckpt_settings", "plugin_config.reduce_bucket_size_in_m"):  # fmt: skip
        assert f"  {key} = " in told and f"#   {key} = " in text, key
    assert "unknown key" not in told
    names = set(re.findall(r"^(\w+) = ", BASE + STAGE, re.MULTILINE)) - {"_base_", "lr", "eps"}
    carried = {"bucket_config", "grad_ckpt_buffer_size",
               "dropout_ratio", "warmup_steps", "grad_clip", "accumulation_steps", "ema_decay",
               "dtype", "plugin", "grad_checkpoint", "async_io", "seed", "outputs", "epochs", "log_every", "ckpt_every",
               "keep_n_latest", "optim"}  # fmt: skip
    assert {name for name in names if f"  {name} = " not in told and f"  {name}." not in told} == carried


def test_a_key_that_is_new_is_named(tmp_path: Path, demo: Path, capsys) -> None:
    migrated(lay(tmp_path, demo, STAGE + "brand_new = {1: (2, None)}\nimport os\nlr *= 2\n"), demo)
    told = capsys.readouterr().out
    assert f"  brand_new = {{1: (2, None)}}: an unknown key ({tmp_path / 'stage.py'})\n" in told
    assert "  import os: a statement, and nothing of a config is executed\n" in told
    assert "  lr *= 2: a statement" in told


def test_plan_and_the_scan_take_its_csv_as_a_manifest(tmp_path: Path, demo: Path, capsys) -> None:
    stage = re.sub(r", \d\)", ", 1)", STAGE) + "accumulation_steps = 1\n"  # there are few clips
    config = migrated(lay(tmp_path, demo, stage), demo, "--gpus", 1)
    assert config.data.columns == {"rgb": "path"}
    found = scan(config.data.train[:1], config.suffixes, config.data)
    assert len(found.samples) == len(list((tmp_path / "clips").glob("*_seg.mp4"))) > 0 and not found.bad
    assert cli.main(["plan", str(tmp_path / "ours.yaml")]) == 0
    assert "64×64×9" in capsys.readouterr().out


def test_a_csv_whose_paths_begin_elsewhere_becomes_a_manifest(tmp_path: Path, demo: Path, capsys) -> None:
    folder = lay(tmp_path, demo)
    (folder / "meta").mkdir()
    (folder / "clips.csv").rename(folder / "meta/clips.csv")
    config = migrated(folder, demo, "--dataset", folder / "meta/clips.csv")
    made = folder / "ours-data.csv"
    assert {source.path for source in config.data.train} == {str(made)}
    assert made.read_text().startswith(",".join(HEADER)) and "ours-data.csv is the same" in capsys.readouterr().out
    assert scan(config.data.train[:1], config.suffixes, config.data).bad == ()


def test_earlier_files_name_sizes_and_chances_otherwise(tmp_path: Path, demo: Path, capsys) -> None:
    stage = """
dataset = dict(type="VariableVideoTextDataset", frame_interval=3, image_size=(None, None), num_frames=None)
bucket_config = {"64": {1: (0.4, 8), 16: ((0.5, 0.3), 2)}, "144p": {32: (1.0, 1)}}
mask_ratios = {"identity": 0.75}
vae = dict(type="VideoAutoencoderKL", micro_batch_size=4)
text_encoder = dict(type="t5", shardformer=True)
scheduler = dict(type="rflow", sample_method="uniform")
model = dict(type="STDiT3-XL/2")
lr = 2e-5
adam_eps = 1e-15
batch_size = None
load = None
wandb = False
sp_size = 1
"""
    config = migrated(lay(tmp_path, demo, stage), demo, "--dataset", tmp_path / "clips.csv")
    data = config.data
    assert data.resolutions == (64, (256, 144)) and data.frames == (1, 13, 29)
    rule = rule_for(Bucket(13, 64, 64), data.buckets)
    assert (rule.keep, rule.keep_resolution) == (0.3, 0.5)  # the second chance is to stay at the length
    assert config.optim.lr == 2e-5 and config.optim.eps == 1e-15 and config.objective.density == "uniform"
    told = capsys.readouterr().out
    assert "16 → 13, 32 → 29" in told and "unknown key" not in told
    assert "mask_ratios = {'identity': 0.75}: objective.tasks gives" in told


def test_groups_of_gpus_share_a_sample(tmp_path: Path, demo: Path) -> None:
    stage = (
        STAGE
        + 'plugin = "hybrid"\nplugin_config = dict(_delete_=True, pp_size=2, tp_size=1, sp_size=1, zero_stage=2)\n'
    )
    config = migrated(lay(tmp_path, demo, stage), demo)
    assert config.parallel.pipeline == 2 and config.parallel.shard == 0
    assert rule_for(Bucket(1, 32, 32), config.data.buckets).global_batch == 9 * 2 * 2
    shutil.rmtree(tmp_path / "clips")
    stage = stage.replace("pp_size=2", "pp_size=1").replace("sp_size=1", "sp_size=2")
    shared = migrated(lay(tmp_path, demo, stage), demo, "--force")
    assert (shared.parallel.context, shared.parallel.pipeline) == (2, 1)
    assert rule_for(Bucket(1, 32, 32), shared.data.buckets).global_batch == 9 * 2 * 2


def test_an_adapter_there_is_one_here(tmp_path: Path, demo: Path, capsys) -> None:
    config = migrated(
        lay(tmp_path, demo, STAGE + 'lora_config = dict(r=8, lora_alpha=4, target_modules=["q"])\n'), demo
    )
    assert config.lora.enabled and (config.lora.rank, config.lora.alpha, config.lora.scope) == (8, 4, "all")
    assert "lora_config.target_modules = ['q']: an adapter here" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("bucket_config = {", "buckets = {", "", ),
        ('"32px": {', '"huge": {', "bucket_config: 'huge' is not a size such as 256px"),
        ("5: (0.75, 4)", "5: 4", "bucket_config: ['32px'][5] = 4 is not (chance to keep, batch size)"),
        ("5: (0.75, 4)", "5: (1.5, 4)", "['32px'][5] = (1.5, 4): the chance is not a number from 0 to 1"),
        ("5: (0.75, 4)", "5: (0.75, 0)", "the batch size is not a number above 0"),
        ("5: (0.75, 4)", "5: (0.75, None)", "the batch size is not a number above 0"),
        ("5: (0.75, 4)", "5: (0.75, 9 ** 99)", "the batch size is not a number above 0"),
        ("5: (0.75, 4)", "'5': (0.75, 4)", "the length is not a number of frames"),
        ("5: (0.75, 4)", "-5: (0.75, 4)", "the length is not a number of frames"),
        ('"96px": {1: (1.0, 2)}', '"96px": 7', "bucket_config: ['96px'] = 7 is not a table of lengths"),
        ('["base.py"]', '["none.py"]', "none.py: cannot be read"),
        ('["base.py"]', '["stage.py"]', "which is based on this file"),
        ('["base.py"]', "[3]", "_base_ = [3] is not a file name"),
        ("ema_decay = 0.995", "ema_decay = ", "not a Python file: line"),
        ("ema_decay = 0.995", "ema_decay = 2.0", "optim.ema"),
        ("ema_decay = 0.995", "x = " + "(" * 3000 + ")" * 3000, "not a Python file"),
        ("ema_decay = 0.995", "x = " + "9" * 5000, "not a Python file"),
        ("ema_decay = 0.995", "x = '\0'", "not a Python file"),
        ("ema_decay = 0.995", "accumulation_steps = 'two'", "accumulation_steps = 'two' is not a value for this key"),
        ("ema_decay = 0.995", "dropout_ratio = 3", "dropout_ratio = 3 is not a value for this key"),
        ("ema_decay = 0.995", "plugin_config = dict(sp_size=3)", "4 GPUs do not divide into groups of 3"),
        ("ema_decay = 0.995", "plugin_config = dict(sp_size='3')", "are not whole numbers"),
        ("memory_efficient=True", "data_path='gone.csv'", "dataset.data_path names 'gone.csv', which does not exist"),
        ("memory_efficient=True", "data_path='base.py'", "base.py: is no manifest that is there"),
        ("memory_efficient=True", "data_path=None", "dataset.data_path names no data"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path: Path, demo: Path, capsys, old: str, new: str, said: str) -> None:
    assert old in STAGE
    error = refused(lay(tmp_path, demo, STAGE.replace(old, new)), capsys, "--gpus", 4) if said else ""
    assert said in error


def test_what_is_not_told_is_asked_for(tmp_path: Path, demo: Path, capsys) -> None:
    folder = lay(tmp_path, demo)
    assert "--gpus: batch sizes of Open-Sora are per GPU" in refused(folder, capsys, "--force")
    (folder / "base.py").write_text("seed = 1\n")
    (folder / "stage.py").write_text("lr = 1e-4\n")
    assert "has no bucket_config" in refused(folder, capsys)
    (folder / "train.toml").touch()
    assert migrate(folder / "train.toml", "--out", folder / "o.yaml", "--model", "m") == 2
    assert "--model: a TOML names its own model" in capsys.readouterr().err


def test_a_manifest_without_its_files_or_columns_is_one_line(tmp_path: Path, demo: Path, capsys) -> None:
    folder = lay(tmp_path, demo)
    shutil.rmtree(folder / "clips")
    assert "paths leads to a file, neither beside it nor in" in refused(folder, capsys)
    (folder / "clips.csv").write_text("name,text\na,b\n")
    assert "has no column 'path'; its columns are name, text" in refused(folder, capsys)
    (folder / "clips.csv").write_text("path,prompt\na,b\n")
    assert "the first line names no column 'text'" in refused(folder, capsys)


def test_its_own_model_is_the_base_where_no_other_is_named(tmp_path: Path, demo: Path, capsys) -> None:
    stage = STAGE.replace("model = dict(", "model = dict(from_pretrained='ckpts/own.safetensors', ")
    folder = lay(tmp_path, demo, stage)
    (folder / "ckpts").mkdir()
    CASES["opensora"].write(folder / "ckpts/own.safetensors")
    assert migrate(folder / "stage.py", "--root", folder, "--out", folder / "ours.yaml", "--gpus", 1) == 0
    config = loading.load(folder / "ours.yaml")
    assert (config.model.family, config.model.path) == ("opensora", str(folder / "ckpts/own.safetensors"))
    assert config.objective.caption_dropout == {"text": 0.5, "pooled": 0.5} and config.objective.shift == "auto"
    assert "model.from_pretrained" not in capsys.readouterr().out and open_model(config.model).family.name == "opensora"


def test_without_a_model_the_yaml_says_what_it_lacks(tmp_path: Path, demo: Path, capsys) -> None:
    folder = lay(tmp_path, demo)
    assert migrate(folder / "stage.py", "--root", folder, "--out", folder / "ours.yaml", "--gpus", 1) == 0
    assert "note: model.path is empty: name the base to train there, or with --model" in capsys.readouterr().out


@pytest.mark.parametrize("harm", ["open('HARM', 'w')", "[open('HARM', 'w') for _ in (1,)]", "dict(**open('HARM', 'w'))",
                                  "{open('HARM', 'w'): 1}", "(lambda: open('HARM', 'w'))()"])  # fmt: skip
def test_nothing_of_a_config_is_executed(tmp_path: Path, demo: Path, capsys, harm: str) -> None:
    harm = harm.replace("HARM", str(tmp_path / "harm"))
    migrated(lay(tmp_path, demo, f"{harm}\nstrange = {harm}\nfor _ in (1,):\n    {harm}\n" + STAGE), demo)
    assert not (tmp_path / "harm").exists() and "  strange = " in capsys.readouterr().out


def test_values_are_read_as_python_reads_them(tmp_path: Path) -> None:
    sys.path.insert(0, str(TOOLS))
    try:
        from migrate_python import read
    finally:
        sys.path.remove(str(TOOLS))
    (tmp_path / "one.py").write_text("a = dict(x=1, y=dict(z=2), w=[1])\nb = (1, -2.5)\nc: int = 3\nd = e = 4\n")
    (tmp_path / "two.py").write_text(
        "_base_ = './one.py'\na = dict(y=dict(q=c), w=[2])\nf = {**a}\nc = 3\ng = [c, d]\n"
    )
    values, statements = read(tmp_path / "two.py")
    expected = {"a": {"x": 1, "y": {"z": 2, "q": "c"}, "w": [2]}, "b": (1, -2.5), "c": 3, "d": 4, "e": 4, "f": "{**a}"}
    assert values == expected | {"g": [3, "d"]} and statements == []
    (tmp_path / "four.py").write_text(
        "a = 25 * 1024**3\nb = [(1 + 2) * a, -1]\nc = 9**9**9\nd = 'x' * 10**9\ne = [0] * 9\n"
    )
    large = {"c": "9 ** 9 ** 9", "d": "'x' * 10 ** 9", "e": "[0] * 9"}
    assert read(tmp_path / "four.py")[0] == {"a": 25 * 2**30, "b": [75 * 2**30, -1]} | large
    (tmp_path / "three.py").write_text("_base_ = ['one.py']\na = dict(_delete_=True, y=1)\n")
    assert read(tmp_path / "three.py")[0]["a"] == {"y": 1}
