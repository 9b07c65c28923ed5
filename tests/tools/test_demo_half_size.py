"""The command that compares sizes of companions goes its whole way; what it finds is a matter of longer trainings."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
from tooling import run

import tests.support.toolbox  # noqa: F401 - the tools are found from here on
from transpixeler.demo.scenes import Format, scenes

SMALL = Format(64, 64, 5, Fraction(16))


def test_thin_shapes_are_told_apart_and_an_alpha_beside_its_shape_is_found() -> None:
    import demo_half_size as tool
    from demo_figures import true_streams

    asked = scenes(12, formats=[SMALL], held_out=True, seed=3)
    truths, attributes = [true_streams(scene) for scene in asked], [scene.attributes for scene in asked]
    rows = [tool.pair_figures(true, true["rgb"], one) for true, one in zip(truths, attributes, strict=True)]
    moved = [
        tool.pair_figures({**true, "seg": true["seg"][:, ::-1]}, true["rgb"], one)
        for true, one in zip(truths, attributes, strict=True)
    ]
    right, wrong = tool.by_thinness(rows, attributes), tool.by_thinness(moved, attributes)
    for end in ("", "_thin"):
        assert right[f"alpha_iou{end}"] > 0.9 and right[f"alpha_mad{end}"] < 0.03 and right[f"rgb_drift{end}"] == 0
        assert right[f"alpha_iou{end}"] > wrong[f"alpha_iou{end}"]
        assert right[f"alpha_mad{end}"] < wrong[f"alpha_mad{end}"]
    thin = [row["alpha_iou"] for row, one in zip(rows, attributes, strict=True) if one.shape in ("ring", "star")]
    assert 0 < len(thin) < len(rows) and right["alpha_iou_thin"] == pytest.approx(sum(thin) / len(thin))


def test_the_whole_way_in_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import demo_half_size as tool

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tool, "FORMAT", SMALL)
    words = [str(tmp_path), "--clips", "4", "--captions", "3", "--base-steps", "2", "--steps", "2"]
    keys = ["sample.steps=1", "train.global_batch=2", "train.micro_batch=2"]
    said = []
    for _ in range(2):  # the second time nothing is trained or measured again
        assert run("demo_half_size", tool.main, [*words, *keys]) == 0
        out, log = capsys.readouterr()
        said.append((json.loads(out.splitlines()[-1]), "learns until" in log, "is measured" in log))
    (first, *done), (again, *anew) = said
    assert done == [True, True] and anew == [False, False] and first == again
    assert first["tokens_step_cpu_seconds"] > 0 and first["half_step_cpu_seconds"] > 0
    for name in tool.COLUMNS:
        assert 0 <= first[f"{name}_matte_seg_mad"] <= 1
    assert first["vae_tokens_matte_seg_iou"] > 0.9
    assert (tmp_path / "beside.png").read_bytes().startswith(b"\x89PNG")
    sizes = {name: (tmp_path / f"demo/output/{name}/config.yaml").read_text() for name in tool.SCALES}
    assert "scale: 2" in sizes["half"] and "scale: 2" not in sizes["tokens"]
