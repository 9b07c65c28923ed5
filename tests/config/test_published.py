"""The configs that are shipped load, and the reference says every key, its default and how to choose."""

import dataclasses
import json
import re
import textwrap
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
import yaml

from tests.support.models import wan_model
from transpixeler.config import loading
from transpixeler.config.sections import Config
from transpixeler.data.buckets import Bucket
from transpixeler.models import lora
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import build, mesh
from transpixeler.planning.layouts import USABLE_MEMORY
from transpixeler.training.estimates import Estimate, Load

CONFIGS = Path(__file__).parents[2] / "configs"
REFERENCE = CONFIGS / "reference.yaml"
LINES = REFERENCE.read_text(encoding="utf-8").splitlines()
SHIPPED = sorted(CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("path", [path for path in SHIPPED if path != REFERENCE], ids=lambda path: path.stem)
def test_runs_are_written_where_the_guides_look_for_them(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert loading.load(path).output_dir == str(tmp_path / "output"), "in the working folder, not in configs/"


# --- what the dataclasses say ----------------------------------------------------------------------------------------


def defaults() -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(Config())))


def entries(cls: type, key: str = "") -> Iterator[tuple[str, type]]:
    """Lists of dataclasses, whose keys no default shows: (the list's key, the dataclass)."""
    for name, hint in get_type_hints(cls).items():
        here = f"{key}{name}"
        if dataclasses.is_dataclass(hint):
            yield from entries(hint, f"{here}.")
        for inner in parts(hint):
            yield here, inner


def parts(hint: Any) -> Iterator[type]:
    if get_origin(hint) in (tuple, dict, Union, types.UnionType):
        for argument in get_args(hint):
            if dataclasses.is_dataclass(argument):
                yield argument
            yield from parts(argument)


# --- what the file says ----------------------------------------------------------------------------------------------


def keys(node: yaml.MappingNode, known: dict[str, Any], key: str = "") -> Iterator[tuple[str, int]]:
    """Every key with its line; names within a table are the user's."""
    for name, value in node.value:
        here = f"{key}{name.value}"
        yield here, name.start_mark.line
        inside = known.get(name.value)
        if isinstance(value, yaml.MappingNode) and not key and dataclasses.is_dataclass(getattr(Config(), name.value)):
            yield from keys(value, inside, f"{here}.")


REFERENCE_KEYS = dict(keys(yaml.compose("\n".join(LINES)), defaults()))


def is_example(line: str) -> bool:
    """Lines indented behind their `#` are examples, all other comments are prose."""
    return re.match(r"\s*#   ", line) is not None


def comment_above(line: int) -> list[str]:
    above = []
    while line and LINES[line - 1].lstrip().startswith("#"):
        line -= 1
        above.insert(0, LINES[line])
    return above


def examples(key: str) -> str:
    """The YAML shown as example above a key."""
    lines = [line.lstrip()[1:] for line in comment_above(REFERENCE_KEYS[key]) if is_example(line)]
    return textwrap.dedent("\n".join(lines))


WITH_EXAMPLE = [key for key in REFERENCE_KEYS if examples(key)]


def test_the_reference_has_every_key_in_the_order_of_the_dataclasses_and_no_other() -> None:
    def order(tree: dict[str, Any]) -> Iterator[str]:
        for section, value in tree.items():
            yield section
            if dataclasses.is_dataclass(getattr(Config(), section)):
                yield from (f"{section}.{name}" for name in value)

    wanted, found = list(order(defaults())), list(REFERENCE_KEYS)
    assert [key for key in wanted if key not in found] == [], "not documented in configs/reference.yaml"
    assert [key for key in found if key not in wanted] == [], "documented in configs/reference.yaml, but no key"
    assert found == wanted


def test_every_value_of_the_reference_is_the_default() -> None:
    said = yaml.safe_load("\n".join(LINES))
    for section, value in defaults().items():
        assert said[section] == value, section


def test_the_reference_loads_as_the_defaults() -> None:
    reference = loading.load(REFERENCE)
    assert dataclasses.replace(reference, output_dir="") == dataclasses.replace(Config(), output_dir="")


@pytest.mark.parametrize("key", REFERENCE_KEYS)
def test_every_key_has_a_comment(key: str) -> None:
    line = REFERENCE_KEYS[key]
    if "." not in key and dataclasses.is_dataclass(getattr(Config(), key)):
        return  # a section has a heading
    prose = [text for text in comment_above(line) if not is_example(text)]
    assert len(" ".join(prose)) > 10, f"{key} has no comment in configs/reference.yaml"


@pytest.mark.parametrize("section", [f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default)])
def test_every_section_has_a_heading(section: str) -> None:
    before = max(line for line in REFERENCE_KEYS.values() if line < REFERENCE_KEYS[section])
    between = LINES[before + 1 : REFERENCE_KEYS[section]]
    assert any(line.startswith("# --- ") for line in between), f"{section} has no heading in configs/reference.yaml"


@pytest.mark.parametrize("key", WITH_EXAMPLE)
def test_every_example_is_a_config(key: str, tmp_path: Path) -> None:
    section, _, name = key.rpartition(".")
    shown = yaml.safe_load(examples(key))
    assert list(shown) == [name]
    (tmp_path / "example.yaml").write_text(yaml.safe_dump({section: shown} if section else shown, sort_keys=False))
    loading.load(tmp_path / "example.yaml")


@pytest.mark.parametrize(("key", "cls"), entries(Config), ids=str)
def test_every_key_of_a_list_entry_stands_in_an_example_with_a_comment(key: str, cls: type) -> None:
    alike = [other for other, same in entries(Config) if same is cls]  # one example will do for all of them
    shown = {}
    for text in [line for other in alike for line in examples(other).splitlines()]:
        shown.setdefault(text.strip(" -").partition(":")[0], text)
    missing = [field.name for field in dataclasses.fields(cls) if "#" not in shown.get(field.name, "")]
    assert missing == [], f"no example with a comment above {key} in configs/reference.yaml"


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_loads(path: Path) -> None:
    loading.load(path)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_every_shipped_config_opens_with_what_it_is_for(path: Path) -> None:
    opening = path.read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    assert len(opening) >= 2 and all(line.startswith("#") for line in opening)


# --- what the shipped configs say of themselves ----------------------------------------------------------------------


WAN = {
    "attention_head_dim": 128,
    "in_channels": 16,
    "out_channels": 16,
    "text_dim": 4096,
    "freq_dim": 256,
    "patch_size": [1, 2, 2],
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 1024,
}
SIZES = {
    "1.3b": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
    "14b": {"num_attention_heads": 40, "num_layers": 40, "ffn_dim": 13824},
}


def shipped(name: str) -> Config:
    return loading.load(CONFIGS / f"wan2.1-t2v-{name}.yaml")


@pytest.mark.parametrize(
    ("name", "processes", "layout"),
    [
        ("1.3b-joint", 1, (1, 1, 1)),
        ("1.3b-joint", 8, (1, 8, 1)),
        ("1.3b-plain", 1, (1, 1, 1)),
        ("1.3b-full", 1, (1, 1, 1)),
        ("1.3b-full", 8, (1, 1, 8)),
        ("14b-joint", 8, (1, 1, 8)),
        ("14b-joint", 4, (1, 1, 4)),
        ("14b-24gb", 1, (1, 1, 1)),
    ],
)
def test_a_shipped_config_fits_the_machine_that_it_names(name: str, processes: int, layout: tuple[int, ...]) -> None:
    config = shipped(name)
    found = mesh.resolve(config.parallel, processes)
    assert (found.pipeline, found.replicate, found.shard) == layout
    assert config.train.global_batch % found.data == 0


@pytest.mark.parametrize(
    ("name", "trained"), [("1.3b-joint", 151), ("1.3b-plain", 44), ("14b-joint", 509), ("14b-24gb", 127)]
)
def test_a_shipped_adapter_fits_wan_and_has_the_parameters_that_are_said(name: str, trained: int) -> None:
    config = shipped(name)
    with torch.device("meta"):
        model = wan_model(WAN | SIZES[name.split("-")[0]], streams=tuple(config.streams))
        lora.inject(model, config.lora)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert round(count / 1e6) == trained
    assert f"# {trained} M parameters" in (CONFIGS / f"wan2.1-t2v-{name}.yaml").read_text(encoding="utf-8")


def test_the_14b_on_a_small_card_holds_what_is_said() -> None:
    config = shipped("14b-24gb")
    streams = tuple(config.streams)
    model = build.shape(config, lambda: wan_model(WAN | SIZES["14b"], streams=streams), torch.bfloat16)
    estimate = Estimate.of(model, config, dtype=torch.bfloat16, compiled=False)
    load = Load(
        Bucket(33, 480, 832), StreamLayout.equal(streams, (16, 9, 60, 104), (1, 2, 2)), 1, config.train.global_batch
    )
    memory = estimate.memory([load], mesh.Layout(1, 1, 1), config.parallel.recompute).total
    assert f"{memory / 1e9:.1f} GB in all" in (CONFIGS / "wan2.1-t2v-14b-24gb.yaml").read_text(encoding="utf-8")
    assert memory < USABLE_MEMORY * 24 * 2**30


@pytest.mark.parametrize(("name", "trained"), [("joint", 138), ("24gb", 69)])
def test_an_adapter_of_the_5b_has_the_parameters_that_are_said(name: str, trained: int) -> None:
    path = CONFIGS / f"wan2.2-ti2v-5b-{name}.yaml"
    config = loading.load(path)
    five = {"num_attention_heads": 24, "num_layers": 30, "ffn_dim": 14336, "in_channels": 48, "out_channels": 48}
    with torch.device("meta"):
        model = wan_model(WAN | five, streams=tuple(config.streams))
        base = sum(p.numel() for p in model.parameters())
        lora.inject(model, config.lora)
    assert round(base / 1e6) == 5000
    assert round(sum(p.numel() for p in model.parameters() if p.requires_grad) / 1e6) == trained
    assert f"# {trained} M parameters" in path.read_text(encoding="utf-8")
    assert (config.data.fps, config.sample.shift, config.sample.guidance) == (24, 5, 5)


def test_the_image_to_video_config_has_the_parameters_that_are_said() -> None:
    path = CONFIGS / "wan2.1-i2v-14b-480p.yaml"
    config = loading.load(path)
    image = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
    with torch.device("meta"):
        model = wan_model(WAN | SIZES["14b"] | image, streams=tuple(config.streams))
        base = sum(p.numel() for name, p in model.named_parameters() if "stream_embedding" not in name)
    assert f"{base / 1e9:.3f} B parameters" in path.read_text(encoding="utf-8")
    assert (config.sample.shift, config.sample.steps, config.objective.tasks) == (3, 40, {"image_to_video": 1.0})


def test_the_plain_config_has_one_stream() -> None:
    assert shipped("1.3b-plain").streams == {"rgb": ""}
