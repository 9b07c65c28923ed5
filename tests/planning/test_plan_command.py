"""The command `plan` prints tables and JSON, of devices that it knows or is told of."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from transpixeler import cli
from transpixeler.config.sections import Config
from transpixeler.planning import plan


def test_the_command_prints_tables_and_the_same_as_json(demo: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["plan", str(demo / "config.yaml"), "data.frames=[17]", "train.global_batch=2", "--gpus", "2"]
    assert cli.main([*command, "--device", "a100"]) == 0
    shown = capsys.readouterr().out
    assert "replicate 2" in shown and "64×64×17" in shown and "(this config)" in shown and "an assumption" in shown
    assert cli.main([*command, "--device", "a100", "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["memory"][str(value["recompute"])]["total"] == sum(
        part for name, part in value["memory"][str(value["recompute"])].items() if name != "total"
    )
    assert all(reason in shown for _, reason in value["dropped"]["train"]) and value["layouts"]
    assert "e-0" not in shown and "µs a step" in shown, "a time is told in a unit that suits it"


def test_a_device_that_is_not_known_needs_its_numbers(demo: Path, capsys: pytest.CaptureFixture) -> None:
    command = ["plan", str(demo / "config.yaml"), "train.global_batch=2", "--device", "tpu"]
    assert cli.main(command) == 2
    assert "--peak" in capsys.readouterr().err
    assert cli.main([*command, "--peak", "100", "--memory", "16"]) == 0


@pytest.mark.parametrize("words", [("--memory", "0"), ("--memory=-3",), ("--peak", "0"), ("--peak", "nan")], ids=str)
def test_a_device_without_memory_or_speed_is_refused(
    demo: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["plan", str(demo / "config.yaml"), *words])
    assert "is not a number above 0" in capsys.readouterr().err


def test_a_device_that_comes_in_several_sizes_has_the_one_that_its_name_tells() -> None:
    def gib(device: str, memory: float = 0.0, peak: float = 0.0) -> float:
        _, machine = plan.find_machine(Config(), gpus=1, memory=memory, device=device, peak=peak)
        return machine.memory / plan.GIB

    assert [gib(name) for name in ("a100", "A100-40GB", "NVIDIA A100-SXM4-40GB", "H100 80GB HBM3")] == [80, 40, 40, 80]
    assert gib("A100-40GB", memory=20) == 20 and gib("gpu-96gb", peak=300) == 96


def test_nothing_is_printed_beside_the_plan(demo: Path) -> None:
    """Not what libraries say of themselves where they are loaded first."""
    words = [sys.executable, "-m", "transpixeler", "plan", demo / "config.yaml", "--json"]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stderr == "" and json.loads(done.stdout)["steps"]
