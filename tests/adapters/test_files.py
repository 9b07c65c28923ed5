"""An adapter file holds what was trained, comes back the same in every spelling and is whole or absent."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from tests.support.adapters import METADATA, TARGETS, TEXT_TARGETS, header, moved, trained
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import CONFIG_FILE, FORMATS, read_adapter, write_adapter
from transpixeler.adapters.on_model import adapter_of
from transpixeler.adapters.saved import ADAPTER_FILE

GOLDEN = Path(__file__).parent / "golden"


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("kind", ["plain", "joint"])
def test_the_keys_of_each_format_are_golden(format: str, kind: str, tmp_path: Path, base: Path) -> None:
    model = trained(base, *(["seg"] if kind == "joint" else []))
    file = write_adapter(adapter_of(model, METADATA), tmp_path / "a.safetensors", format=format)
    keys = sorted({re.sub(r"(blocks[._])\d+", r"\1N", key) for key in load_file(file)})
    assert keys == (GOLDEN / f"adapter_{kind}_{format}.txt").read_text().splitlines()


def test_an_adapter_folder_says_what_it_holds(tmp_path: Path, base: Path) -> None:
    write_adapter(adapter_of(trained(base, "seg", alpha=2.0), METADATA), tmp_path / "epoch1")
    assert {file.name for file in (tmp_path / "epoch1").iterdir()} == {ADAPTER_FILE, CONFIG_FILE}
    assert header(tmp_path / "epoch1" / ADAPTER_FILE) == {
        "format": "pt",
        "transpixeler.format": "adapter",
        "transpixeler.version": "1",
        "transpixeler.rank": "4",
        "transpixeler.alpha": "2.0",
        "transpixeler.scope": "aux",
    } | {f"transpixeler.{key}": value for key, value in METADATA.items()}
    config = json.loads((tmp_path / "epoch1" / CONFIG_FILE).read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", 4, 2.0)
    assert config["target_modules"] == sorted(TARGETS)
    assert config["transpixeler"]["fill"] == "keep"


scales = st.sampled_from([0.25, 1.0, 2.0, 0.3])
scopes = st.sampled_from(["aux", "all", ("seg",), ("rgb", "seg")])
modules = st.builds(
    lambda block, part: f"blocks.{block}.{part}", st.integers(0, 12), st.sampled_from([*TARGETS, *TEXT_TARGETS])
) | st.sampled_from(["head.head", "embed.text_embedding.0", "embed.time_projection.1", "embed.time_embedding.2"])


@st.composite
def adapters(draw: st.DrawFn) -> Adapter:
    targets = draw(st.lists(modules, min_size=1, max_size=4, unique=True))
    ranks = {target: draw(st.integers(1, 4)) for target in targets}
    tensors = {f"{t}.lora_A": moved((r, 5), t) for t, r in ranks.items()}
    tensors |= {f"{t}.lora_B": moved((6, r), t) for t, r in ranks.items()}
    alphas = {t: torch.tensor(draw(scales) * r).item() for t, r in ranks.items()}
    embeddings = {name: moved((5,), name) for name in draw(st.sets(st.sampled_from(["seg", "depth.x", "a_b"])))}
    return Adapter(tensors, alphas, {t: draw(scopes) for t in targets}, embeddings, METADATA)


@pytest.mark.parametrize("format", FORMATS)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(adapter=adapters())
def test_what_is_exported_comes_back_the_same(format: str, adapter: Adapter, tmp_path: Path) -> None:
    back = read_adapter(write_adapter(adapter, tmp_path / "a.safetensors", format=format))
    assert back.matches(adapter)
    if all(adapter.scale(t) in (0.25, 1.0, 2.0) for t in adapter.targets) or format != "diffusers":
        for ours, theirs in ((adapter.tensors, back.tensors), (adapter.stream_embeddings, back.stream_embeddings)):
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)  # to the last bit


def test_a_changed_weight_scale_or_scope_does_not_match(base: Path) -> None:
    adapter = adapter_of(trained(base, "seg"), METADATA)
    target = adapter.targets[0]
    for change in (
        {"tensors": adapter.tensors | {f"{target}.lora_A": adapter.down(target) + 1e-5}},
        {"alphas": adapter.alphas | {target: 1.0}},
        {"scopes": adapter.scopes | {target: "all"}},
        {"metadata": {}},
        {"stream_embeddings": {}},
    ):
        assert not adapter.matches(Adapter(**(vars(adapter) | change)))


def test_a_failed_write_leaves_the_old_file_and_no_draft(
    tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = adapter_of(trained(base), METADATA)
    file = write_adapter(adapter, tmp_path / "a.safetensors")
    before = file.read_bytes()

    def torn(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(before[:100])
        raise OSError("disk full")

    monkeypatch.setattr("transpixeler.adapters.tensorfile.save_file", torn)
    with pytest.raises(OSError, match="disk full"):
        write_adapter(adapter, file)
    assert file.read_bytes() == before
    assert list(tmp_path.iterdir()) == [file]


def test_whoever_reads_the_old_file_while_it_is_replaced_reads_the_old_file(tmp_path: Path, base: Path) -> None:
    file = write_adapter(adapter_of(trained(base), METADATA), tmp_path / "a.safetensors")
    before = file.read_bytes()
    with file.open("rb") as reader:
        write_adapter(adapter_of(trained(base, alpha=1.0), METADATA), file)
        assert reader.read() == before
    assert file.read_bytes() != before
