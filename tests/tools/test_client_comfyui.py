"""The programs that ask a real ComfyUI: what they were not given is told in one line, and with one they agree with us.

TRANSPIXELER_COMFYUI=/path/to/ComfyUI python -m pytest tests/tools/test_client_comfyui.py
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CLIENTS = Path(__file__).parents[2] / "tools/clients"
EXAMPLES = CLIENTS.parent / "comfyui/transpixeler/example_workflows"
PARTS = ("options", "sd", "lora", "model_detection")
COMFYUI = os.environ.get("TRANSPIXELER_COMFYUI", "")
with_comfyui = pytest.mark.skipif(not COMFYUI, reason="TRANSPIXELER_COMFYUI names no folder of a ComfyUI")


def run(folder: Path | str, program: str = "comfyui", *options: str) -> tuple[int, str]:
    command = [sys.executable, str(CLIENTS / f"{program}.py"), "--comfyui", str(folder), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.returncode, done.stdout if COMFYUI and str(folder) == COMFYUI else done.stderr


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path: Path) -> None:
    code, told = run(tmp_path)
    assert code == 2 and told.count("\n") == 1 and f"{tmp_path} is no ComfyUI: it has no comfy/sd.py" in told


def test_a_comfyui_whose_packages_are_not_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    for part in PARTS:
        (tmp_path / "comfy" / f"{part}.py").write_text("import no_such_package_of_comfyui\n")
    code, told = run(tmp_path)
    assert code == 2 and told.count("\n") == 1 and "needs the package no_such_package_of_comfyui" in told


def test_each_example_workflow_is_drawn_and_asked_for() -> None:
    drawn, asked = ({file.stem for file in folder.glob("*.json")} for folder in (EXAMPLES, EXAMPLES / "api"))
    assert drawn == asked != set()
    for name in drawn:
        page, prompt = (json.loads((place / f"{name}.json").read_text()) for place in (EXAMPLES, EXAMPLES / "api"))
        kinds = {str(node["id"]): node["type"] for node in page["nodes"]}
        assert kinds == {key: node["class_type"] for key, node in prompt.items()}
        links = {(str(a), slot, str(b)) for _, a, slot, b, _, _ in page["links"]}
        linked = [
            (*value, key)
            for key, node in prompt.items()
            for value in node["inputs"].values()
            if isinstance(value, list)
        ]
        assert links == set(linked) and len(page["links"]) == len(linked)


@with_comfyui
@pytest.mark.slow
def test_a_real_comfyui_reads_every_export_as_ours() -> None:
    code, told = run(COMFYUI)
    lines = [json.loads(line) for line in told.splitlines()]
    assert code == 0 and len(lines) > 25 and all(line["as_said"] for line in lines), told


@with_comfyui
@pytest.mark.slow
def test_a_real_comfyui_makes_what_our_sampler_makes() -> None:
    code, told = run(COMFYUI, "workflows")
    lines = [json.loads(line) for line in told.splitlines()]
    assert code == 0 and len(lines) == 14 and all(line["error"] < 1e-4 for line in lines), told
    by_name = {line["workflow"]: line["given"] for line in lines}
    assert by_name["matting"] == {"rgb": 3} and by_name["matting, painting"] == {"seg": 3}
    assert by_name["image_to_rgba"] == by_name["image_to_rgba, Wan 2.2 5B"] == {"rgb": 1}
    assert by_name["image_to_rgba, with its matte"] == {"rgb": 1, "seg": 1}
