"""Every key that diffusion-pipe and TransPixeler publish is carried over or named with its reason, and none is cut."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.families.cases import CASES
from tests.tools.test_migrate import migrate
from transpixeler import cli
from transpixeler.config import loading
from transpixeler.config.sections import Config, SourceConfig
from transpixeler.families.wan.family import FAMILY
from transpixeler.models.family import open_model

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    tomllib = pytest.importorskip("tomli")

ALL = [*FAMILY.lora_targets, "cross_attn.k", "cross_attn.v"]
# the keys of its documentation, with values of our own
DIFFUSION_PIPE = """
output_dir = "runs"
dataset = "data.toml"
eval_datasets = [{name = "near", config = "near.toml"}, {name = "far", config = "far.toml"}]
epochs = 40
max_steps = 900
micro_batch_size_per_gpu = [[512, 4], [1024, 2]]
image_micro_batch_size_per_gpu = 3
pipeline_stages = 1
gradient_accumulation_steps = 2
gradient_clipping = 0.7
warmup_steps = 25
force_constant_lr = 3e-5
lr_scheduler = "linear"
ema_decay = 0.998
blocks_to_swap = 1
pseudo_huber_c = 0.3
eval_every_n_epochs = 2
eval_every_n_steps = 40
eval_every_n_examples = 400
eval_before_first_step = false
eval_micro_batch_size_per_gpu = 2
image_eval_micro_batch_size_per_gpu = 2
eval_gradient_accumulation_steps = 2
disable_block_swap_for_eval = false
save_every_n_epochs = 3
save_every_n_steps = 60
save_every_n_examples = 600
checkpoint_every_n_epochs = 4
checkpoint_every_n_minutes = 30
activation_checkpointing = true
reentrant_activation_checkpointing = false
upload_hf_from_epoch = 5
huggingface_repo = "someone/something"
partition_method = "manual"
partition_split = [2]
save_dtype = "float32"
caching_batch_size = 5
map_num_proc = 2
compile = false
steps_per_print = 7
video_clip_mode = "single_middle"
x_axis_examples = true
uncond_fraction = 0.15

[model]
type = "wan"
ckpt_path = "MODEL"
dtype = "float32"
transformer_dtype = "nf4"
timestep_sample_method = "uniform"
llm_path = "texts.safetensors"
vae_path = "vae.safetensors"
min_t = 0.1
max_t = 0.9
shift = 2.5
sigmoid_scale = 1.1
flux_shift = true

[adapter]
type = "lora"
rank = 12
alpha = 6
dtype = "float32"
dropout = 0.05
target_modules = ["self_attn.q", "v", "ffn.0", "head.head"]
fuse_adapters = []
decompose_factor = 4

[optimizer]
type = "AdamW8bitKahan"
lr = 4e-5
betas = [0.9, 0.98]
weight_decay = 0.02
eps = 1e-7
stabilize = true
gradient_release = true

[monitoring]
enable_wandb = true
wandb_api_key = "nobody-may-see-this"
wandb_tracker_name = "clips"
wandb_run_name = "third"

[eval_dump]
enabled = true
output_dir = "dumps"
"""
DATA = """
resolutions = [64]
enable_ar_bucket = true
min_ar = 0.8
max_ar = 1.25
num_ar_buckets = 3
ar_buckets = [1.0]
frame_buckets = [1, 9]
size_buckets = [[64, 64, 9]]
cache_shuffle_num = 3
cache_shuffle_delimiter = ";"
skip_empty_caption = true
shuffle_tags = true
caption_prefix = "a clip of "

[[directory]]
path = "clips"
num_repeats = 2
mask_path = "clips/masks"
control_path = "clips/control"
caption_prefix = "one of "
frame_buckets = [9]
resolutions = [64]
ar_buckets = [1.0]
"""
HELD = """
resolutions = [64]
frame_buckets = [9]
enable_ar_bucket = true
[[directory]]
path = "clips"
"""
TRANSPIXELER = """
output_dir = "alpha"
dataset = "data.toml"
epochs = 1000
micro_batch_size_per_gpu = 1
pipeline_stages = 1
gradient_accumulation_steps = 1
gradient_clipping = 1.0
warmup_steps = 100
eval_every_n_epochs = 1
eval_before_first_step = true
eval_micro_batch_size_per_gpu = 1
eval_gradient_accumulation_steps = 1
save_every_n_epochs = 10
checkpoint_every_n_minutes = 120
activation_checkpointing = true
partition_method = "parameters"
save_dtype = "bfloat16"
caching_batch_size = 1
steps_per_print = 1
video_clip_mode = "single_beginning"

[model]
type = "wan"
mode = "pair"
ckpt_path = "MODEL"
dtype = "bfloat16"
timestep_sample_method = "logit_normal"

[adapter]
type = "lora"
rank = 16
dtype = "bfloat16"
target_modules = ["q", "k", "v", "o", "ffn.0", "ffn.2"]

[optimizer]
type = "adamw_optimi"
lr = 1e-3
betas = [0.9, 0.99]
weight_decay = 0.01
eps = 1e-8
"""


def keys(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every key of a TOML as messages say it, with its value."""
    for name, value in table.items():
        if isinstance(value, dict) and name in ("model", "adapter", "optimizer", "monitoring"):
            yield from keys(value, f"{name}.")
        elif name == "directory":
            for number, one in enumerate(value):
                yield from keys(one, f"{prefix}directory {number}: ")
        else:
            yield prefix + name, value


def lay(folder: Path, demo: Path, train: str, data: str = DATA) -> Path:
    """Write the files of a training where it was started."""
    shutil.copytree(demo / "data/train", folder / "clips")
    (folder / "train.toml").write_text(train.replace("MODEL", str(demo / "model")))
    (folder / "data.toml").write_text(data)
    for name in ("near", "far"):
        (folder / f"{name}.toml").write_text(HELD)
    return folder


def migrated(folder: Path, *options: object) -> Config:
    assert migrate(folder / "train.toml", "--root", folder, "--out", folder / "ours.yaml", *options) == 0
    return loading.load(folder / "ours.yaml")


def named(told: str) -> dict[str, tuple[Any, str]]:
    """Return what was named: the value and the reason by key."""
    found = {}
    for key, rest in re.findall(r"^  (.+?) = (.+)$", told, re.MULTILINE):
        hidden = "(hidden)"
        value, end = (hidden, len(hidden)) if rest.startswith(hidden) else json.JSONDecoder().raw_decode(rest)
        assert rest[end:].startswith(": "), rest
        found[key] = value, rest[end + 2 :]
    return found


@pytest.mark.parametrize("train", [DIFFUSION_PIPE, TRANSPIXELER], ids=["diffusion-pipe", "TransPixeler"])
def test_every_published_key_is_carried_or_named_whole(tmp_path: Path, demo: Path, capsys, train: str) -> None:
    """Counted on both sides: what is carried and what is named are all keys, and each is named with all its value."""
    migrated(lay(tmp_path, demo, train))
    told, text = capsys.readouterr().out, (tmp_path / "ours.yaml").read_text()
    left = named(told)
    there = dict(keys(tomllib.loads((tmp_path / "train.toml").read_text())))
    there |= dict(keys(tomllib.loads(DATA), "data.toml: "))
    if train is DIFFUSION_PIPE:
        for name in ("near", "far"):
            there |= dict(keys(tomllib.loads(HELD), f"{name}.toml: "))
    count = re.search(r"(\d+) keys carried over, (\d+) not", told)
    assert count, told
    parts = {key for key in left if key.startswith("adapter.target_modules")}  # of a value that was carried in part
    assert set(left) - parts <= set(there)
    assert int(count[1]) == len(there) - len(set(left) - parts) and int(count[2]) == told.count("\n  ")
    for key in set(left) - parts - {"monitoring.wandb_api_key"}:
        assert left[key][0] == there[key], key
    for line in re.findall(r"^(  .+ = .+)$", told, re.MULTILINE):
        assert f"# {line}\n" in text and "…" not in line
    assert all("unknown" not in reason for key, (_, reason) in left.items() if key != "eval_dump")


def test_what_has_a_key_here_is_carried(tmp_path: Path, demo: Path, capsys) -> None:
    config = migrated(lay(tmp_path, demo, DIFFUSION_PIPE), "--gpus", 2)
    assert config.optim.ema == 0.998 and config.optim.force_lr == 3e-5
    assert config.lora.targets == ("self_attn.q", "self_attn.v", "cross_attn.v", "ffn.0")
    clips = str(tmp_path / "clips")
    near, far = (SourceConfig(path=clips, name=name, resolutions=(64,), frames=(1, 9)) for name in ("near", "far"))
    assert config.data.eval == (near, far)
    assert config.model.path == str(demo / "model") and config.objective.density == "uniform"
    assert (config.objective.t_min, config.objective.t_max, config.objective.shift) == (0.1, 0.9, 2.5)
    value, reason = named(capsys.readouterr().out)["adapter.target_modules"]
    assert value == "head.head" and reason.startswith("it is not the name of a block's linear layer")
    assert "ffn.2 and patterns of them" in reason and reason.endswith("the model's own choice is adapted")


@pytest.mark.parametrize("train", [DIFFUSION_PIPE, TRANSPIXELER], ids=["diffusion-pipe", "TransPixeler"])
def test_plan_works_with_the_paths_given(tmp_path: Path, demo: Path, capsys, train: str) -> None:
    config = migrated(lay(tmp_path, demo, train.replace("gradient_release = true", "")))
    assert cli.main(["plan", str(tmp_path / "ours.yaml")]) == 0
    assert "64×64×9" in capsys.readouterr().out
    assert len(config.data.eval) == (2 if train is DIFFUSION_PIPE else 0)


@pytest.mark.parametrize(
    ("value", "pair", "wanted", "left"),
    [
        ('"all-linear"', False, ALL, 0),
        ('["WanAttentionBlock"]', False, ALL, 0),
        ('["WanAttentionBlock"]', True, FAMILY.lora_targets, 2),
        ('["k"]', True, ["self_attn.k"], 1),
        (r"'blocks\.\d+\.self_attn\.(q|k)'", False, ["self_attn.q", "self_attn.k"], 0),
        (r"'blocks\.7\.self_attn\.q'", False, (), 1),
        ('["attn.q"]', False, (), 1),
        ("'blocks.(['", False, (), 1),
        ('[""]', False, (), 1),
        ("[]", False, (), 0),
    ],
)
def test_target_modules_are_found_as_peft_finds_them(
    tmp_path: Path, demo: Path, capsys, value: str, pair: bool, wanted: list[str], left: int
) -> None:
    train = re.sub("target_modules = .*", lambda _: f"target_modules = {value}", TRANSPIXELER)
    config = migrated(lay(tmp_path, demo, train if pair else train.replace('mode = "pair"', "")))
    assert config.lora.scope == ("aux" if pair else "all") and set(config.lora.targets) == set(wanted)
    assert capsys.readouterr().out.count("  adapter.target_modules") == left


@pytest.mark.parametrize("value", ["3", "[1]", "true", "[[]]"])
def test_target_modules_of_another_kind_are_one_line(tmp_path: Path, demo: Path, capsys, value: str) -> None:
    lay(tmp_path, demo, re.sub("target_modules = .*", f"target_modules = {value}", TRANSPIXELER))
    assert migrate(tmp_path / "train.toml", "--root", tmp_path, "--out", tmp_path / "o.yaml") == 2
    error = capsys.readouterr().err.strip()
    assert "adapter.target_modules = " in error and "is not a value for this key" in error and "\n" not in error


def test_a_transformer_apart_from_its_folder_is_found(tmp_path: Path, demo: Path) -> None:
    (tmp_path / "A14B/low_noise_model").mkdir(parents=True)
    (tmp_path / "one.safetensors").touch()
    for path, wanted in (
        ("A14B/low_noise_model", (str(tmp_path / "A14B"), "", "low")),
        ("one.safetensors", (str(tmp_path / "one.safetensors"), str(tmp_path / "A14B"), "all")),
    ):
        train = TRANSPIXELER.replace('"MODEL"', f'"A14B"\ntransformer_path = "{path}"')
        shutil.rmtree(tmp_path / "clips", ignore_errors=True)
        model = migrated(lay(tmp_path, demo, train), "--force").model
        assert (model.path, model.encoders, model.expert) == wanted


@pytest.mark.parametrize("line", ["\u2028x: [", "\\u2029", "a\\nb: c", "\\u001b[31m", "\u0085- 1"])
def test_no_value_ends_the_line_that_names_it(tmp_path: Path, demo: Path, capsys, line: str) -> None:
    """A line separator in a comment would begin a line of YAML."""
    config = migrated(lay(tmp_path, demo, TRANSPIXELER.replace("steps_per_print = 1", f'steps_per_print = "{line}"')))
    assert config.train.epochs == 1000
    told = capsys.readouterr().out
    assert told.splitlines() == told.split("\n")[:-1] and "\x1b" not in told


def test_a_long_value_is_named_whole(tmp_path: Path, demo: Path, capsys) -> None:
    names = [f"part {number} of a long list" for number in range(200)]
    migrated(lay(tmp_path, demo, f"strange = {json.dumps(names)}\n" + TRANSPIXELER))
    told = capsys.readouterr().out
    assert f"  strange = {json.dumps(names)}: an unknown key ({tmp_path / 'train.toml'})\n" in told


def test_paths_under_home_are_found(tmp_path: Path, demo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    train = DIFFUSION_PIPE.replace('"runs"', '"~/runs"').replace('"data.toml"', '"~/data.toml"')
    data = DATA.replace('path = "clips"', 'path = "~/clips"')
    config = migrated(lay(tmp_path, demo, train, data))
    assert config.output_dir == str(tmp_path / "runs") and config.data.train[0].path == str(tmp_path / "clips")


@pytest.mark.parametrize(
    ("kind", "family", "keys", "frames"),
    [
        ("hunyuan-video", "hunyuan", 'ckpt_path = "MODEL"', (1, 33, 61)),
        ("ltx-video", "ltx", 'diffusers_path = "MODEL"\nfirst_frame_conditioning_p = 0.25', (1, 33, 57)),
        ("flux", "flux", 'diffusers_path = "MODEL"\nflux_shift = true\nbypass_guidance_embedding = true', (1,)),
    ],
)
def test_other_types_of_model_are_the_families_that_are_here(
    tmp_path: Path, demo: Path, capsys, kind: str, family: str, keys: str, frames: tuple[int, ...]
) -> None:
    CASES[family].write(tmp_path / "model")
    train = TRANSPIXELER.replace('type = "wan"\nmode = "pair"\nckpt_path = "MODEL"', f'type = "{kind}"\n{keys}')
    folder = lay(tmp_path, demo, train.replace("MODEL", str(tmp_path / "model")))
    (folder / "data.toml").write_text(
        'resolutions = [64]\nframe_buckets = [1, 33, 61]\n[[directory]]\npath = "clips"\n'
    )
    config = migrated(folder)
    assert config.model.family == family and config.data.frames == frames and config.lora.scope == "all"
    assert config.objective.tasks == ({"joint": 0.75, "image_to_video": 0.25} if family == "ltx" else {"joint": 1.0})
    assert config.objective.shift == ("auto" if family == "flux" else 1.0)
    folder_of = open_model(config.model)
    assert folder_of.family.name == family and not folder_of.geometry.length_fault(frames[-1])
    told = capsys.readouterr().out
    assert "unknown key" not in told and '  adapter.target_modules = "q": it is not the name' in told


def test_a_file_without_its_folder_is_the_model(tmp_path: Path, demo: Path, capsys) -> None:
    (tmp_path / "one.safetensors").touch()
    train = TRANSPIXELER.replace(
        'ckpt_path = "MODEL"', 'transformer_path = "one.safetensors"\nvae_path = "v.safetensors"'
    )
    model = migrated(lay(tmp_path, demo, train)).model
    told = capsys.readouterr().out
    assert model.path == str(tmp_path / "one.safetensors") and "note: model.encoders is empty" in told
    assert '  model.vae_path = "v.safetensors": the encoders' in told
