"""The program that asks a real ComfyUI says in one line what it was not given; it runs by hand, not here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "tools/clients/comfyui.py"
PARTS = ("options", "sd", "lora", "model_detection")


def run(folder: Path) -> tuple[int, str]:
    done = subprocess.run([sys.executable, str(PROGRAM), "--comfyui", str(folder)], capture_output=True, text=True)
    return done.returncode, done.stderr


def test_a_folder_that_is_no_comfyui_is_refused(tmp_path: Path) -> None:
    code, told = run(tmp_path)
    assert code == 2 and told.count("\n") == 1 and f"{tmp_path} is no ComfyUI: it has no comfy/sd.py" in told


def test_a_comfyui_whose_packages_are_not_here_is_refused(tmp_path: Path) -> None:
    (tmp_path / "comfy").mkdir()
    for part in PARTS:
        (tmp_path / "comfy" / f"{part}.py").write_text("import no_such_package_of_comfyui\n")
    code, told = run(tmp_path)
    assert code == 2 and told.count("\n") == 1 and "needs the package no_such_package_of_comfyui" in told
