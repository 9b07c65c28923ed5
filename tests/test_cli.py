import errno
import os
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transpixeler import __version__, cli
from transpixeler.data.media.write import write_png

ROOT = Path(__file__).parents[1]


def run(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "transpixeler", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env={**os.environ, "PYTHONPATH": str(ROOT)})


def seconds(*arguments: str) -> float:
    """Return the work of a command: seconds of a processor, which other processes do not take from it."""
    times = []
    for _ in range(5):
        before = os.times()
        run(*arguments)
        after = os.times()
        times.append(after.children_user - before.children_user + after.children_system - before.children_system)
    return statistics.median(times)


def test_help_answers_in_a_blink() -> None:
    assert seconds("--help") < 0.3


def test_help_names_every_command() -> None:
    shown = run("--help").stdout
    assert "demo" in shown and "configs/reference.yaml" in shown


def test_the_version_is_said_once_for_the_program_and_its_package() -> None:
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert run("--version").stdout == f"transpixeler {__version__}\n"
    assert 'dynamic = ["version"]' in pyproject and "transpixeler.__version__" in pyproject


def test_torch_is_not_loaded_for_help_or_a_config() -> None:
    program = "import sys; from transpixeler import cli, configfile; assert not {'torch', 'numpy'} & set(sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_an_unknown_command_is_the_users_to_mend() -> None:
    done = run("dance")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]])
def test_debug_shows_the_traceback_as_well_and_stands_anywhere(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "transpixeler: no.yaml: no such file"


@pytest.mark.parametrize(
    ("number", "code"),
    [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENAMETOOLONG, 2), (errno.ENOSPC, 1), (errno.EIO, 1)],
)
def test_an_error_of_the_disk_is_one_line(
    number: int, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(_: object) -> int:
        raise OSError(number, os.strerror(number), "/data/out")

    monkeypatch.setitem(cli.COMMANDS, "report", fail)
    assert cli.main(["report", "x"]) == code
    assert capsys.readouterr().err == f"transpixeler: /data/out: {os.strerror(number)}\n"


def test_a_full_disk_in_a_thread_of_tensorboard_is_one_line() -> None:
    """The writer's thread meets the limit on file sizes, as it would meet the end of a disk."""
    program = """if True:
        import resource, signal, tempfile, threading, time
        from transpixeler import cli
        def writes(_):
            from torch.utils.tensorboard import SummaryWriter
            board = SummaryWriter(tempfile.mkdtemp(), flush_secs=1)
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (100, resource.RLIM_INFINITY))
            board.add_scalar("a" * 500, 1, 1)
            board.flush_thread = [thread.join(10) for thread in threading.enumerate() if thread.daemon]
            return 0
        cli.COMMANDS["report"] = writes
        raise SystemExit(cli.main(["report", "x"]))
    """
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, timeout=600)
    assert "transpixeler: File too large" in done.stderr and "Exception in thread" not in done.stderr, done.stderr


@pytest.mark.parametrize("words", [["--resume", "", "a.yaml"], ["a.yaml", "--resume", ""], ["--resume", "a.yaml"]])
def test_resume_without_a_run_means_the_latest(words: list[str]) -> None:
    """A variable of a shell that is empty is an empty word."""
    found = cli._parse(["train", *words])
    assert (found.resume, found.config, found.overrides) == ("", "a.yaml", [])


@pytest.mark.parametrize("name", ["it's here", 'say "so"', "a\\b", "größe: 3", "#1 {x}, [y]", "😀"])
def test_inspect_takes_a_folder_of_any_name(name: str, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    for file in ("a.png", "a_seg.png"):
        write_png(tmp_path / name / file, np.zeros((64, 64, 3), np.uint8))
    (tmp_path / name / "a.txt").write_text("a still")
    words = ["inspect", str(tmp_path / name), "data.resolutions=[64]", "--out", str(tmp_path / "page.html")]
    assert cli.main(words) == 0
    assert "1 samples can be used, 0 cannot" in capsys.readouterr().out


def test_a_command_ends_without_a_search_for_garbage() -> None:
    """What is frozen is not searched when the interpreter ends, which for all of torch takes most of a second."""
    program = """
import atexit, gc
atexit.register(lambda: print(gc.get_freeze_count() > 1000))  # the last that is registered runs first
from transpixeler import cli
raise SystemExit(cli.main(["report", "nowhere"]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout == "True\n" and done.returncode == 2, done.stderr
