"""`export` finds what was asked for, or says in one line what is wrong."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.adapters import METADATA, header, our_model, output, trained, trained_over
from transpixeler import cli
from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.command import export_command
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.merge import save_model
from transpixeler.adapters.on_model import adapter_of
from transpixeler.config.sections import UserError
from transpixeler.families.wan.family import WanFolder
from transpixeler.sampling.saves import load_saved


def test_a_runs_newest_adapter_is_exported(tmp_path: Path, base: Path) -> None:
    run = tmp_path / "output" / "run"
    for name, step in (("epoch2", 20), ("epoch10", 100), ("step50", 50)):
        write_adapter(adapter_of(trained(base), METADATA | {"step": str(step)}), run / name)
    (tmp_path / "output" / "latest").symlink_to(run)
    for path in (run, tmp_path / "output"):
        (out,) = export_command(path, format="kohya", out=tmp_path / "k.safetensors")
        assert header(out)["transpixeler.step"] == "100"
        assert all(key.startswith("lora_unet_") for key in load_file(out))


def test_a_runs_newest_whole_model_is_that_of_the_last_step_however_it_was_copied(tmp_path: Path, base: Path) -> None:
    for step in (1000, 2000):
        folder = tmp_path / f"step{step}"
        state = our_model(base).named_parameters()
        save_model(state, folder, model=WanFolder(str(base)), metadata={"step": str(step)})
        (folder / "config.yaml").write_text("streams: {rgb: ''}\nlora: {enabled: false}\n")
        os.utime(folder, (5000 - step, 5000 - step))
    (tmp_path / "config.yaml").write_text("streams: {rgb: ''}\n")
    found = load_saved(str(tmp_path))
    assert (found.name, found.step) == (str(tmp_path / "step2000"), 2000)


def test_an_export_has_the_averaged_weights_unless_the_raw_ones_are_asked_for(tmp_path: Path, base: Path) -> None:
    run = tmp_path / "output" / "run"
    for folder, ema in ((run / "step50", "false"), (run / "step50" / "ema", "true")):
        write_adapter(adapter_of(trained(base), METADATA | {"ema": ema}), folder)
    (run / "config.yaml").write_text("streams: {rgb: ''}\n")
    (tmp_path / "output" / "latest").symlink_to(run)
    for words, ema in (([], "true"), (["--ema"], "true"), (["--no-ema"], "false")):
        for path in (tmp_path / "output", run / "step50"):
            out = tmp_path / "k.safetensors"
            assert cli.main(["export", str(path), "--format", "kohya", "--out", str(out), *words]) == 0
            assert header(out)["transpixeler.ema"] == ema


def test_a_whole_model_needs_no_export(tmp_path: Path, base: Path, capsys: pytest.CaptureFixture) -> None:
    save_model(our_model(base).named_parameters(), tmp_path / "step1", model=WanFolder(str(base)))
    assert cli.main(["export", str(tmp_path / "step1"), "--format", "merged", "--out", str(tmp_path / "m")]) == 2
    assert "holds a whole model, not an adapter" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["k.pt", "k.GGUF"])
def test_a_file_of_another_kind_is_refused(
    name: str, tmp_path: Path, base: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter = write_adapter(adapter_of(trained(base), METADATA), tmp_path / "adapter")
    assert cli.main(["export", str(adapter), "--format", "kohya", "--out", str(tmp_path / name)]) == 2
    assert "weights are written as .safetensors; give such a name, or a folder" in capsys.readouterr().err
    assert not (tmp_path / name).exists()


def test_a_merged_export_finds_its_base_or_asks_for_it(tmp_path: Path, base: Path) -> None:
    adapter = adapter_of(trained(base), METADATA | {"base_model": str(base)})
    write_adapter(adapter, tmp_path / "a")
    assert export_command(tmp_path / "a", format="merged", out=tmp_path / "m") == [tmp_path / "m" / "transformer"]
    write_adapter(Adapter(**vars(adapter) | {"metadata": {"family": "wan"}}), tmp_path / "b")
    with pytest.raises(UserError, match="--base"):
        export_command(tmp_path / "b", format="merged", out=tmp_path / "n")
    export_command(tmp_path / "b", format="merged", out=tmp_path / "n", base=base)


def test_an_adapter_of_a_fused_base_brings_what_is_fused_along(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    style = write_adapter(adapter_of(trained(base, alpha=1.0, targets=("*.v",)), {}), tmp_path / "style.safetensors")
    model, config, file = trained_over(base, f"[{style}]", tmp_path / "a.safetensors")
    assert load_saved(str(file)).config.model == config.model
    for format in ("merged", "kohya"):
        assert cli.main(["export", str(file), "--format", format, "--out", str(tmp_path / format)]) == 0
    assert torch.allclose(output(our_model(tmp_path / "merged")), output(model), atol=1e-5)
    assert "with" in caplog.text and str(style) in caplog.text
    style.unlink()
    with pytest.raises(UserError, match=r"model\.fuse: .*style\.safetensors does not exist"):
        export_command(file, format="merged", out=tmp_path / "again")


def test_exporting_a_joint_adapter_for_others_warns(
    tmp_path: Path, base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_adapter(adapter_of(trained(base, "seg"), METADATA), tmp_path / "a")
    export_command(tmp_path / "a", format="transpixeler", out=tmp_path / "t.safetensors")
    assert not caplog.records
    export_command(tmp_path / "a", format="comfyui", out=tmp_path / "c.safetensors")
    assert "some streams only" in caplog.text


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"diffusion_model.blocks.0.self_attn.q.set_weight": torch.ones(1)}, "1 strange keys: diffusion_model.*set_w"),
        ({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.ones(1, 2)}, "not a pair"),
        ({"lora_unet_double_blocks_0_img_attn.lora_up.weight": torch.ones(1, 2)}, "strange keys"),
        ({}, "holds no LoRA weights"),
    ],
)
def test_a_file_that_is_no_adapter_of_ours_is_refused(stored: dict[str, Tensor], message: str, tmp_path: Path) -> None:
    save_file(stored, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=message):
        read_adapter(tmp_path / "x.safetensors")


def test_an_ambiguous_folder_a_pickle_a_torn_file_and_a_wrong_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds 0 \.safetensors files"):
        read_adapter(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"torn")
    with pytest.raises(UserError, match="name the file itself"):
        read_adapter(tmp_path)
    with pytest.raises(UserError, match="not a whole safetensors file"):
        read_adapter(tmp_path / "a.safetensors")
    (tmp_path / "x.pt").write_bytes(b"")
    with pytest.raises(UserError, match="only"):
        read_adapter(tmp_path / "x.pt")
    with pytest.raises(UserError, match="adapter: /no/such does not exist"):
        read_adapter("/no/such")
    with pytest.raises(UserError, match=r"--format: onnx is unknown; there are .*merged"):
        export_command(tmp_path, format="onnx", out=tmp_path / "x")
