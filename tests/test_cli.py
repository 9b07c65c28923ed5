import errno
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from transpixeler import __version__, cli, files
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
    program = (
        "import sys, transpixeler.cli, transpixeler.config.loading; assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT).returncode == 0


def test_an_unknown_command_is_the_users_to_mend() -> None:
    done = run("dance")
    assert done.returncode == 2 and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", [["--debug", "train", "no.yaml"], ["train", "no.yaml", "--debug"]])
def test_debug_shows_the_traceback_as_well_and_stands_anywhere(words: list[str]) -> None:
    done = run(*words)
    assert done.returncode == 2 and "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == (
        "transpixeler: no.yaml: no such file; name a YAML file, such as those in configs/"
    )


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


# --- help ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_help_ends_with_examples(command: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out.partition("examples:\n")[2].splitlines()
    assert shown and all(f"transpixeler {command}" in line and len(line) <= 110 for line in shown)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["trian", "a.yaml"], "'trian' is not a command; did you mean train?"),
        (["--debug", "smaple"], "did you mean sample?"),
        (["dance"], "'dance' is not a command; commands are demo, init, plan"),
        (["sample", "run", "--promt", "x"], "unrecognized arguments: --promt x; did you mean --prompt?"),
        (["train", "a.yaml", "--resumed=x"], "unrecognized arguments: --resumed=x; did you mean --resume?"),
        (["plan", "a.yaml", "--zzz"], "options are -h, --help, --debug, --gpus"),
        (["train", "a.yaml", "--learning_rate=1"], "--learning_rate is a config key here: optim.lr=1e-4"),
    ],
)
def test_a_misspelt_word_gets_the_nearest(words: list[str], said: str, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_an_option_of_two_commands_is_read_as_each_means_it() -> None:
    assert cli._parse(["sample", "--resume", "run", "--prompt", "x"]).source == "run"
    assert cli._parse(["train", "--resume", "run", "a.yaml"]).resume == "run"


def test_completion_is_a_script_of_the_shell_or_says_what_is_missing(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert cli.main(["completion", "bash"]) == 2
    assert "needs the package shtab; run `pip install 'transpixeler[completion]'`" in capsys.readouterr().err


def test_bash_completes_commands_options_and_files(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("shtab")
    assert cli.main(["completion", "bash"]) == 0
    (tmp_path / "done.sh").write_text(capsys.readouterr().out)
    (tmp_path / "mine.yaml").touch()

    def completed(*words: str) -> list[str]:
        ask = f"source done.sh; COMP_WORDS=({' '.join(words)}); COMP_CWORD={len(words) - 1}; "
        ask += "$(complete -p transpixeler | sed -E 's/.* -F ([^ ]+) .*/\\1/'); printf '%s\\n' \"${COMPREPLY[@]}\""
        return subprocess.run(["bash", "-c", ask], cwd=tmp_path, capture_output=True, text=True).stdout.split()

    assert completed("transpixeler", "tr") == ["train"]
    assert "--dry-run" in completed("transpixeler", "train", "--d")
    assert completed("transpixeler", "train", "mi") == ["mine.yaml"]
    assert "comfyui" in completed("transpixeler", "export", "--format", "c")


@pytest.mark.parametrize("more", [[], ["--resume"]])
def test_a_sampling_that_is_stopped_says_how_to_go_on(
    more: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def stop(_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setitem(cli.COMMANDS, "sample", stop)
    assert cli.main(["sample", "run", "--prompt", "a b", *more]) == 130
    assert capsys.readouterr().err.endswith("to go on: transpixeler sample run --prompt 'a b' --resume\n")


# --- make ------------------------------------------------------------------------------------------------------------


def test_make_help_says_what_each_target_does() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)[0].split()
    shown = subprocess.run(["make", "-s", "help"], cwd=ROOT, capture_output=True, text=True).stdout
    said = dict(re.findall(r"^  ([a-z]+) +(\S.*)$", shown, re.MULTILINE))
    assert sorted(said) == sorted(targets) and max(map(len, shown.splitlines())) <= 110
    assert "CONFIG=" in shown and "make train CONFIG=my.yaml" in shown


def test_make_setup_says_what_it_does_and_what_it_needs(tmp_path: Path) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "python2").write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 2.7\nexit 1\n')
    (tmp_path / "python2").chmod(0o755)
    done = subprocess.run(["make", "setup", "PYTHON=./python2"], cwd=tmp_path, capture_output=True, text=True)
    assert "Python 3.10 or newer is needed, and ./python2 is Python 2.7" in done.stdout and done.returncode == 2
    planned = subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True).stdout
    assert "setup: making .venv with" in planned and "ready: .venv has" in planned
    for words in (["bench"], ["bench", "ARGS=nope"]):  # as if setup had been done, which takes minutes
        said = subprocess.run(["make", "-o", ".venv/.ready", *words], cwd=ROOT, capture_output=True, text=True).stdout
        assert "name a bench with ARGS=, such as ARGS=step; there are" in said and "cache" in said
    missing = subprocess.run(["make", "-n", "train", "CONFIG=my.yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert "my.yaml: no such file; name a config with CONFIG=" in missing.stdout and "No rule" not in missing.stderr


# --- what is told ----------------------------------------------------------------------------------------------------


def test_paths_below_the_working_folder_are_told_from_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert files.near(f"{tmp_path}/a.yaml: see '{tmp_path}/b c' and /else{tmp_path}/d") == (
        f"a.yaml: see 'b c' and /else{tmp_path}/d"
    )
    assert files.near(f"{tmp_path} and {tmp_path}/") == f"{tmp_path} and {tmp_path}/"
    assert files.shown_path(tmp_path / "a/b") == "a/b" and files.shown_path(tmp_path.parent / "x") == "../x"
    assert files.shown_path("/x") == "/x"
    assert cli.main(["train", str(tmp_path / "no.yaml")]) == 2


def test_a_key_of_a_base_that_the_model_cannot_use_names_the_base(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "base.yaml").write_text(f"base: {demo}/config.yaml\nobjective: {{tasks: {{rgb_to_moon: 1}}}}\n")
    (tmp_path / "mine.yaml").write_text("base: base.yaml\nseed: 1\n")
    for command in (["train", "--dry-run"], ["plan"]):
        assert cli.main([command[0], str(tmp_path / "mine.yaml"), *command[1:]]) == 2
        said = capsys.readouterr().err
        assert "objective.tasks.rgb_to_moon: not a task of these streams" in said
        assert said.endswith(f"(in {tmp_path}/base.yaml)\n")
    words = ["objective.tasks={rgb_to_moon: 1}"]
    assert cli.main(["plan", str(tmp_path / "mine.yaml"), *words]) == 2
    assert "base.yaml" not in capsys.readouterr().err
