import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "transpixeler", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)})


def seconds(*arguments: str) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        run(*arguments)
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def test_help_answers_in_a_blink() -> None:
    assert seconds("--help") < 0.3


def test_help_names_every_command() -> None:
    shown = run("--help").stdout
    assert "demo" in shown and "configs/reference.yaml" in shown


def test_torch_is_not_loaded_for_help_or_a_config() -> None:
    program = "import sys; from transpixeler import cli, configfile; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_an_unknown_command_is_the_users_to_mend() -> None:
    done = run("dance")
    assert done.returncode == 2 and "Traceback" not in done.stderr
