"""A pair of TOML files becomes a config that loads; every key is in it or named with a reason."""

from __future__ import annotations

import importlib
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tooling

from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import BucketRule, Config, LoraConfig, SourceConfig
from transpixeler.families.wan.family import FAMILY

TOOLS = Path(__file__).parents[2] / "tools"

TRAIN = """
output_dir = "runs/alpha"
dataset = "configs/pairs.toml"
eval_datasets = [{name = "held", config = "configs/held.toml"}]
epochs = 200
max_steps = 5000
micro_batch_size_per_gpu = 2
image_micro_batch_size_per_gpu = 4
pipeline_stages = 2
gradient_accumulation_steps = 3
gradient_clipping = 0.5
warmup_steps = 10
lr_scheduler = "linear"
pseudo_huber_c = 0.5
eval_every_n_examples = 120
eval_before_first_step = false
eval_micro_batch_size_per_gpu = 1
save_every_n_steps = 50
checkpoint_every_n_minutes = 90
activation_checkpointing = "unsloth"
reentrant_activation_checkpointing = true
partition_method = "parameters"
save_dtype = "bfloat16"
caching_batch_size = 1
map_num_proc = 3
compile = true
steps_per_print = 1
video_clip_mode = "single_middle"
some_new_thing = 7

[model]
type = "wan"
ckpt_path = "weights/Wan2.1-T2V-1.3B"
dtype = "bfloat16"
transformer_dtype = "float8"
timestep_sample_method = "logit_normal"
llm_path = "umt5.safetensors"

[adapter]
type = "lora"
rank = 64
alpha = 1
dtype = "bfloat16"
init_from_existing = "earlier"

[optimizer]
type = "AdamW8bitKahan"
lr = 1e-3
betas = [0.9, 0.95]
weight_decay = 1e-4
eps = 1e-8
stabilize = false

[monitoring]
enable_wandb = true
wandb_api_key = "not-for-anyone"
wandb_tracker_name = "alpha"
wandb_run_name = "first"
"""
PAIRS = """
mode = "pair"
resolutions = [[832, 480], 512]
enable_ar_bucket = true
min_ar = 0.6
max_ar = 1.8
num_ar_buckets = 3
frame_buckets = [1, 33, 60]
cache_shuffle_num = 4

[[directory]]
path = "clips/a"
num_repeats = 5

[[directory]]
path = "clips/b"
mask_path = "clips/b/masks"
size_buckets = [[832, 480, 33]]
"""
HELD = """
resolutions = [512]
frame_buckets = [33]
min_ar = 0.9
[[directory]]
path = "clips/held"
"""


def migrate(*argv: object) -> int:
    sys.path.insert(0, str(TOOLS))
    try:
        module = importlib.import_module("migrate")
    finally:
        sys.path.remove(str(TOOLS))
    return tooling.run("migrate", module.main, [str(word) for word in argv])


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Where training was started: TOML files, a model and a data set."""
    for folder in ("weights/Wan2.1-T2V-1.3B", "clips/a", "clips/b", "clips/held", "configs", "earlier"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "configs/train.toml").write_text(TRAIN)
    (tmp_path / "configs/pairs.toml").write_text(PAIRS)
    (tmp_path / "configs/held.toml").write_text(HELD)
    return tmp_path


def migrated(home: Path, *options: object) -> Config:
    assert migrate(home / "configs/train.toml", "--root", home, "--out", home / "ours.yaml", *options) == 0
    return loading.load(home / "ours.yaml")


def test_a_pair_of_tomls_is_a_config(home: Path) -> None:
    config = migrated(home, "--gpus", 4)
    assert config.streams == {"rgb": "", "seg": "_seg"} and config.lora.scope == "aux"
    assert config.output_dir == str(home / "runs/alpha")
    model, lora, optim = config.model, config.lora, config.optim
    assert (model.path, model.quantize, model.dtype) == (str(home / "weights/Wan2.1-T2V-1.3B"), "fp8", "bfloat16")
    assert (lora.rank, lora.alpha, lora.init_from) == (64, 1.0, str(home / "earlier"))
    assert (optim.name, optim.lr, optim.betas, optim.weight_decay) == ("adamw8bit", 1e-3, (0.9, 0.95), 1e-4)
    assert (optim.schedule, optim.warmup_steps, optim.clip) == ("linear", 10, 0.5)
    train, parallel = config.train, config.parallel
    assert (train.epochs, train.max_steps, train.micro_batch, train.global_batch) == (200, 5000, 2, 2 * 3 * 2)
    assert (parallel.pipeline, parallel.recompute, parallel.compile) == (2, "offload", "auto")
    assert (config.eval.every_steps, config.eval.every_epochs, config.eval.before_first_step) == (10, 0, False)
    assert (config.save.every_steps, config.save.every_epochs) == (50, 0)
    assert (config.checkpoint.every_minutes, config.checkpoint.every_steps) == (90, 0)
    assert config.objective.density == "logit_normal" and config.log.wandb == "alpha"


def test_its_data_sets_are_sources(home: Path) -> None:
    data = migrated(home).data
    assert data.train == (
        SourceConfig(path=str(home / "clips/a"), repeats=5),
        SourceConfig(path=str(home / "clips/b"), sizes=((832, 480, 33),)),
    )
    held = SourceConfig(path=str(home / "clips/held"), name="held", resolutions=(512,), frames=(1, 33))
    assert data.eval == (held,)
    assert data.resolutions == ((832, 480), 512) and data.frames == (1, 33, 57)  # 60 is not 4k+1
    assert (data.aspect_min, data.aspect_max, data.aspect_count) == (0.6, 1.8, 3)
    assert data.buckets == (BucketRule(size=(0, 0, 1), micro_batch=4),)
    assert data.clip_mode == "single_middle" and data.workers == 3 and data.upscale


def test_no_key_vanishes(home: Path, capsys) -> None:
    """Each key that is taken out of the TOML changes the YAML or is named; a new one is named as unknown."""
    migrated(home)
    told, text = capsys.readouterr().out, (home / "ours.yaml").read_text()
    for key in ("pseudo_huber_c", "save_dtype", "model.llm_path", "adapter.dtype", "optimizer.stabilize",
                "monitoring.wandb_run_name", "cache_shuffle_num", "directory 1: mask_path", "held.toml: min_ar",
                "eval_micro_batch_size_per_gpu", "steps_per_print", "caching_batch_size"):  # fmt: skip
        assert f"{key} = " in told and f"{key} = " in text, key
    assert "some_new_thing = 7: an unknown key" in told
    assert "wandb_api_key = (hidden)" in told and "not-for-anyone" not in told + text
    left_out = told.count("\n  ")
    names = [line.split("=")[0] for part in (TRAIN, PAIRS, HELD) for line in part.splitlines() if "=" in line]
    assert f"{len(names) - left_out} keys carried over, {left_out} not" in told


def test_plan_accepts_it(home: Path, demo: Path, capsys) -> None:
    train = TRAIN.replace("weights/Wan2.1-T2V-1.3B", str(demo / "model")).replace("init_from_existing", "#")
    (home / "configs/train.toml").write_text(train.replace('[{name = "held", config = "configs/held.toml"}]', "[]"))
    clips = shutil.copytree(demo / "data/train", home / "pairs")  # beside which a plan remembers what it saw of them
    pairs = f'mode = "pair"\nresolutions = [64]\nframe_buckets = [1, 9]\n[[directory]]\npath = "{clips}"\n'
    (home / "configs/pairs.toml").write_text(pairs)
    migrated(home, "--gpus", 2)
    assert cli.main(["plan", str(home / "ours.yaml")]) == 0
    assert "64×64×9" in capsys.readouterr().out


@pytest.mark.parametrize("key", [line for line in TRAIN.splitlines() if " = " in line and "dataset" not in line])
def test_any_key_may_be_absent(home: Path, key: str) -> None:
    file = home / "configs/train.toml"
    file.write_text(TRAIN.replace(f"\n{key}\n", "\n"))
    assert migrate(file, "--root", home, "--out", home / "o.yaml") == (2 if key == 'type = "wan"' else 0)


def test_single_videos_without_an_adapter(home: Path) -> None:
    train = TRAIN.replace("[adapter]", "[gone]").replace('"AdamW8bitKahan"', '"Prodigy"').replace("lr = 1e-3", "lr = 1")
    (home / "configs/train.toml").write_text(train)
    (home / "configs/pairs.toml").write_text(
        'enable_ar_bucket = true\nar_buckets = [[832, 480], [512, 512]]\n[[directory]]\npath = "clips/a"\n'
    )
    config = migrated(home)
    assert config.streams == {"rgb": ""} and not config.lora.enabled and config.optim.lr == 1e-4
    assert config.data.aspect_ratios == (1.733333, 1.0)
    assert "optimizer.lr = 1: belongs to Prodigy" in (home / "ours.yaml").read_text()


def test_what_the_tomls_leave_out_is_as_it_was_there(home: Path, capsys) -> None:
    train = 'dataset = "configs/pairs.toml"\n[model]\ntype = "wan"\n[adapter]\nrank = 8\n[optimizer]\ntype = "adamw"\n'
    (home / "configs/train.toml").write_text(train)
    (home / "configs/pairs.toml").write_text('max_ar = 2\n[[directory]]\npath = "clips/a"\n')
    config = migrated(home)
    assert (config.optim.warmup_steps, config.objective.caption_dropout) == (0, 0.0)
    assert {*config.lora.targets} == {*FAMILY.lora_targets, "cross_attn.k", "cross_attn.v"}
    assert (config.data.frames, config.data.aspect_ratios) == ((1,), (1.0,))
    told = capsys.readouterr().out
    assert "here they are optim.betas (0.9, 0.99), optim.eps 1e-08, optim.weight_decay 0.01" in told
    assert "max_ar = 2: it had no effect" in told and "every clip became a square" in told


def test_what_is_said_stands(home: Path, capsys) -> None:
    (home / "configs/train.toml").write_text("uncond_fraction = 0.2\n" + TRAIN)
    config = migrated(home)
    assert (config.optim.warmup_steps, config.objective.caption_dropout) == (10, 0.2)
    assert config.lora.targets == LoraConfig().targets and "cross_attn.k and .v" in capsys.readouterr().out


def test_blocks_to_swap_are_blocks_that_wait(home: Path) -> None:
    (home / "configs/train.toml").write_text("blocks_to_swap = 20\n" + TRAIN)
    assert migrated(home).parallel.offload == 20
    (home / "configs/train.toml").write_text("blocks_to_swap = 20\n" + TRAIN.replace("[adapter]", "[gone]"))
    (home / "ours.yaml").unlink()
    assert migrated(home).parallel.offload is True


def test_one_stream_with_an_adapter_has_scope_all(home: Path) -> None:
    (home / "configs/pairs.toml").write_text('enable_ar_bucket = false\n[[directory]]\npath = "clips/a"\n')
    config = migrated(home)
    assert config.lora.scope == "all" and config.data.aspect_ratios == (1.0,)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            'type = "wan"',
            'type = "sdxl"',
            "model.type is 'sdxl'; only wan, hunyuan-video, ltx-video, flux can",
        ),
        ("epochs = 200", "epochs = ", "not valid TOML"),
        ("epochs = 200", 'epochs = "many"', "train.epochs: expected a whole number, found 'many'"),
        ("compile = true", "micro = 1\nactivation_checkpointing = 3", "not valid TOML"),
        ('"unsloth"', '"half"', "activation_checkpointing = 'half' is not a value for this key"),
        ("configs/pairs.toml", "configs/none.toml", "dataset names 'configs/none.toml', which does not exist"),
        ("[model]", "model = 3\n[models]", "model is not a table"),
        ("gradient_accumulation_steps = 3", "gradient_accumulation_steps = 0", "do not divide into pipelines"),
    ],
)
def test_what_is_wrong_is_one_line(home: Path, capsys, old: str, new: str, said: str) -> None:
    file = home / "configs/train.toml"
    file.write_text(TRAIN.replace(old, new))
    assert migrate(file, "--root", home, "--out", home / "o.yaml") == 2
    error = capsys.readouterr().err.strip()
    assert said in error and "\n" not in error and not (home / "o.yaml").exists()


ODD = {
    "a date": TRAIN.replace("epochs = 200", "epochs = 1979-05-27"),
    "a time": TRAIN.replace("lr = 1e-3", "lr = 07:32:00"),
    "a huge number": TRAIN.replace("epochs = 200", "epochs = " + "9" * 5000),
    "deep brackets": "a = " + "[" * 3000 + "]" * 3000,
    "deep tables": "a = " + "{a=" * 2000 + "1" + "}" * 2000,
    "a long name": TRAIN.replace('"earlier"', '"' + "n" * 300 + '"'),
    "a long dataset": TRAIN.replace('"configs/pairs.toml"', '"' + "n" * 300 + '"'),
    "no list of eval sets": TRAIN.replace("eval_datasets = [", "eval_datasets = 3 # ["),
    "a list in an eval set": TRAIN.replace("eval_datasets = [", "eval_datasets = [[]] # ["),
    "a number for adapters": TRAIN.replace("rank = 64", "rank = 64\nfuse_adapters = 3"),
    "a list for a batch": TRAIN.replace("micro_batch_size_per_gpu = 2", "micro_batch_size_per_gpu = [[1], 3]", 1),
    "nothing": "",
    "a NUL": "a\0 = 1",
    "an array of tables": TRAIN.replace("[model]", "[[model]]"),
    "no UTF-8": b"\xff\xfe a = 1",
}


@pytest.mark.parametrize("name", ODD)
def test_odd_toml_is_no_traceback(home: Path, capsys, name: str) -> None:
    file, text = home / "configs/train.toml", ODD[name]
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    code = migrate(file, "--root", home, "--out", home / "o.yaml")
    error = capsys.readouterr().err.strip()
    assert (code, bool(error), "\n" in error) in ((2, True, False), (0, False, False))


@pytest.mark.parametrize("value", ["[[1, 2], [3]]", "[[]]", "3", '"x"', "07:32:00", "[{a = 1}]"])
def test_odd_sizes_are_no_traceback(home: Path, capsys, value: str) -> None:
    (home / "configs/held.toml").write_text(HELD.replace("[512]", value))
    assert migrate(home / "configs/train.toml", "--root", home, "--out", home / "o.yaml") == 2
    assert "\n" not in capsys.readouterr().err.strip()


def test_a_yaml_that_is_there_stays_and_the_tool_stands_by_itself(home: Path, capsys) -> None:
    words = [home / "configs/train.toml", "--root", home, "--out", home / "ours.yaml"]
    done = subprocess.run([sys.executable, TOOLS / "migrate.py", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert migrate(*words) == 2
    assert capsys.readouterr().err.startswith(f"migrate: {home / 'ours.yaml'}: already exists")


def test_python_without_a_toml_reader_is_told(home: Path, capsys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tomllib", None)
    monkeypatch.setitem(sys.modules, "tomli", None)
    assert migrate(home / "configs/train.toml", "--root", home, "--out", home / "o.yaml") == 2
    assert "pip install tomli" in capsys.readouterr().err
