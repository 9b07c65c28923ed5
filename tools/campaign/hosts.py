"""Train on two hosts that differ, and cut the cable between two that do not.

The hosts are Linux namespaces of this machine; torchrun starts one rank on each, as the guide says. A second host with
another base, other code or other data must be named in one line at the start, and both must end. Training whose cable
is cut at a random step must end on both hosts within `parallel.timeout_minutes`, each with one line that says what to
do; once the cable is back, `--resume` must come to the same adapter, bit for bit, as a training that nobody cut. A
round is one cut. Before, a host with a cache of its own is killed, and another torchrun started in its place: the job
must take it in and come to the same adapter. A torchrun that lost its store looks for it for minutes after its rank has
ended, which is torch's own and is only counted (`torchruns_left`). It needs root and `ip`, `mount`, `nsenter` and
`unshare`; without, it says so and exits with 2.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from campaign import QUIET, ROOT, Figures, command, environment, finished, kill, main, write_demo
from namespaces import NAMES, Host, lacking, two_hosts

STEPS = 16
SHORT = 0.25  # parallel.timeout_minutes, where the cable is cut
LATE = 15.0  # seconds beyond it that a rank may still take, on a machine that others use too
TORCHRUN = 30.0  # seconds for torchrun to end after its rank; the one without the store looks for it for minutes
START = 300.0  # seconds that a start or a whole training may take
CAPTION = "something else"
WORDS = (*QUIET, f"train.max_steps={STEPS}", "checkpoint.every_steps=2", "data.frames=[1, 9]", "train.global_batch=2")
TOLD = "transpixeler: "
LAUNCHER = "torch.distributed.run"
LOST = rf"on {{host}}: another rank .*parallel.timeout_minutes={SHORT:g}.*--resume goes on from global_step\d+"


@dataclass
class Job:
    """One training on both hosts: its torchruns, and when each of their lines was first seen."""

    hosts: Sequence[Host]
    processes: list[subprocess.Popen[bytes]]
    outputs: list[Path]
    start: float = field(default_factory=time.monotonic)
    seen: dict[tuple[str, str], float] = field(default_factory=dict)

    def look(self) -> bool:
        """Note the lines that are new; return whether both torchruns have ended."""
        for host, output in zip(self.hosts, self.outputs, strict=True):
            for line in output.read_text(errors="replace").splitlines():
                if line.startswith(TOLD):
                    self.seen.setdefault((host.name, line.removeprefix(TOLD)), time.monotonic() - self.start)
        return all(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait for the end of both, or for something else; return whether it came."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.look() or until():
                return True
            time.sleep(0.05)
        return False

    def ranks(self) -> list[int]:
        """Return the ranks that still run on either host, without their torchruns."""
        words = {process: _words_of(process) for host in self.hosts for process in host.processes()}
        return [process for process, said in words.items() if "transpixeler" in said and LAUNCHER not in said]

    def log(self) -> str:
        """Return the end of what both hosts said."""
        return "\n".join(f"--- {file.name}\n{file.read_text(errors='replace')[-3000:]}" for file in self.outputs)


def campaign(arguments: argparse.Namespace, folder: Path) -> Figures:
    """Return in how many seconds each difference was named and each cut ended training."""
    draw = random.Random(arguments.seed)
    config = write_demo(folder / "demo")
    finished(command("cache", config, *WORDS))
    figures: Figures = {"wrong": 0}
    for kind, differ in DIFFERENT.items():
        figures |= different_hosts(kind, differ, config, folder, figures)
    figures |= {"cuts": 0, "timeout_s": SHORT * 60, "told_s": [], "ended_s": [], "torchruns_left": 0}
    figures |= {"resumed": 0, "bitwise": 0, "replaced": 0}
    with two_hosts(folder) as hosts, training(hosts, config, folder / "whole") as job:
        _expect(job.wait(START) and not any(p.returncode for p in job.processes), "an uncut training", job, figures)
    replaced(config, folder, figures)
    for _ in range(arguments.rounds):
        cut(config, folder, draw, figures)
    return figures


@contextmanager
def training(hosts: Sequence[Host], config: Path, output: Path, *words: str, apart: bool = False) -> Iterator[Job]:
    """Start one training on both hosts with torchrun, and kill it at the end. apart: as `start` takes it."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        outputs = [output.with_name(f"{output.name}.{host.name}.txt") for host in hosts]
        both = zip(hosts, outputs, strict=True)
        yield Job(hosts, [start(stack, *one, config, output, *words, apart=apart) for one in both], outputs)


def start(
    stack: ExitStack, host: Host, said: Path, config: Path, output: Path, *words: str, apart: bool
) -> subprocess.Popen[bytes]:
    """Start one host's torchrun, which is killed at the end.

    apart: each host has a cache of its own, and torchrun starts again what was lost, on another host as well.
    """
    launch = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-id", "run", "--rdzv-backend", "c10d"]
    launch += ["--rdzv-endpoint", f"{NAMES[0]}:29500", "--max-restarts", str(int(apart))]
    launch += ["-m", "transpixeler", "train", str(config), *WORDS, f"output_dir={output}", "run_name=run"]
    launch += [f"data.cache_dir={output}.{host.name}.cache"] if apart else []
    process = subprocess.Popen(
        host.words(sys.executable, "-m", LAUNCHER, *launch, *words),
        env={**environment(), "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": str(int(apart))},
        stdout=subprocess.DEVNULL,
        stderr=stack.enter_context(said.open("ab")),
        start_new_session=True,
    )
    stack.callback(kill, process)
    return process


# --- hosts that differ -----------------------------------------------------------------------------------------------


def other_base(config: Path, folder: Path) -> tuple[Path, Path, str]:
    """Return a model folder, another one with one value changed, and what must be said of it."""
    from safetensors.torch import load_file, save_file

    model = config.parent / "model"
    other = Path(shutil.copytree(model, folder / "model"))
    weights = next((other / "transformer").glob("*.safetensors"))
    tensors = load_file(weights)
    next(iter(tensors.values())).view(-1)[0] += 0.01
    save_file(tensors, weights)
    return model, other, r"model\.path: .* holds other weights for rank 1 on (first|second) than for rank 0 on"


def other_code(config: Path, folder: Path) -> tuple[Path, Path, str]:
    """Return the package, a copy with one line more, and what must be said of it."""
    package = ROOT / "transpixeler"
    other = Path(shutil.copytree(package, folder / "package"))
    with (other / "flow" / "solver.py").open("a") as file:
        file.write("CHANGED = True\n")
    return package, other, "rank 1 on (first|second) runs other code of transpixeler than rank 0 on"


def other_caption(config: Path, folder: Path) -> tuple[Path, Path, str]:
    """Return the clips, a copy with another caption of the same length, and what must be said of it."""
    clips = config.parent / "data" / "train"
    other = Path(shutil.copytree(clips, folder / "clips"))
    caption = sorted(other.glob("*.txt"))[0]
    text = caption.read_text()
    caption.write_text((CAPTION * len(text))[: len(text)])
    return clips, other, "data.train: .* holds other files for rank 1 on (first|second) than for rank 0 on"


def removed_clip(config: Path, folder: Path) -> tuple[Path, Path, str]:
    """Return the clips, a copy without one of them, and what must be said of it."""
    clips = config.parent / "data" / "train"
    other = Path(shutil.copytree(clips, folder / "fewer"))
    name = sorted(other.glob("*.txt"))[0].stem
    for file in other.glob(f"{name}*"):
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    return clips, other, "data.train: .* holds other files for rank 1 on (first|second) than for rank 0 on"


Differ = Callable[[Path, Path], tuple[Path, Path, str]]
DIFFERENT: dict[str, Differ] = {
    "base": other_base,
    "code": other_code,
    "caption": other_caption,
    "clip": removed_clip,
}


def different_hosts(kind: str, differ: Differ, config: Path, folder: Path, figures: Figures) -> Figures:
    """Train on two hosts of which the second sees another folder in the same place; return the seconds it took."""
    place, other, pattern = differ(config, folder)
    with two_hosts(folder) as hosts:
        hosts[1].show(other, at=place)
        with training(hosts, config, folder / kind) as job:
            ended = job.wait(START)
            took = round(time.monotonic() - job.start, 1)
            named = [seconds for (_, line), seconds in job.seen.items() if re.search(pattern, line)]
            _expect(ended and len(job.seen) == len(named) == 1, f"{kind}: {pattern}", job, figures)
            _expect(all(process.returncode for process in job.processes), f"{kind}: both fail", job, figures)
    return {f"{kind}_named_s": round(named[0], 1) if named else None, f"{kind}_ended_s": took}


# --- a host that is lost ---------------------------------------------------------------------------------------------


def replaced(config: Path, folder: Path, figures: Figures) -> None:
    """Kill one of two hosts with caches of their own, and start another in its place while the first one waits."""
    output = folder / "replaced"
    metrics = output / "run" / "metrics.jsonl"
    with two_hosts(folder) as hosts, training(hosts, config, output, apart=True) as job, ExitStack() as stack:
        _expect(job.wait(START, lambda: metrics.exists() and metrics.stat().st_size > 0), "a first step", job, figures)
        hosts[1].kill()
        job.processes[1] = start(stack, hosts[1], job.outputs[1], config, output, apart=True)
        done = job.wait(START) and not any(process.returncode for process in job.processes)
        _expect(done, "a host in the place of a lost one", job, figures)
    figures["replaced"] += done and saved(output) == saved(folder / "whole")
    _expect(figures["replaced"] == 1, "the same adapter", job, figures)


# --- a cable that is cut ---------------------------------------------------------------------------------------------


def cut(config: Path, folder: Path, draw: random.Random, figures: Figures) -> None:
    """Cut the cable of one training at a random step, plug it in again, go on and compare."""
    output = folder / f"cut{figures['cuts']}"
    metrics, step = output / "run" / "metrics.jsonl", draw.randint(4, STEPS - 4)
    limit = f"parallel.timeout_minutes={SHORT:g}"
    with two_hosts(folder) as hosts:
        with training(hosts, config, output, limit) as job:
            reached = job.wait(START, lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= step)
            _expect(reached and not job.look(), f"step {step} is reached", job, figures)
            hosts[draw.randrange(2)].plug("down")
            job.start, job.seen = time.monotonic(), {}
            ended = job.wait(SHORT * 60 + LATE, lambda: not job.ranks())
            figures["ended_s"].append(round(time.monotonic() - job.start, 1))
            _expect(ended, "both ranks end in time", job, figures)
            job.wait(TORCHRUN)
            figures["torchruns_left"] += sum(process.poll() is None for process in job.processes)
            for host in hosts:
                told = [seconds for (name, line), seconds in job.seen.items() if name == host.name]
                whole = [line for name, line in job.seen if re.search(LOST.format(host=host.name), line)]
                figures["told_s"] += [round(seconds, 1) for seconds in told]
                _expect(len(told) == 1 and len(whole) >= 1, f"one line of {host.name}", job, figures)
            _expect(all(process.returncode != 0 for process in job.processes), "none succeeds", job, figures)
        for host in hosts:
            host.plug("up")
        figures["cuts"] += 1
        with training(hosts, config, output, "--resume") as job:
            done = job.wait(START) and not any(process.returncode for process in job.processes)
            _expect(done, "a resumed training", job, figures)
            figures["resumed"] += done
    same = done and saved(output) == saved(folder / "whole")
    figures["bitwise"] += same
    figures["wrong"] += done and not same


def saved(output: Path) -> bytes:
    """Return the adapter that a training ended with."""
    return (output / "run" / f"step{STEPS}" / "adapter_model.safetensors").read_bytes()


def _words_of(process: int) -> list[str]:
    """Return a process's words, or none if it has ended."""
    try:
        return Path(f"/proc/{process}/cmdline").read_text().split("\0")
    except OSError:
        return []


def _expect(true: bool, what: str, job: Job, figures: Figures) -> None:
    """Count what did not come true, and print it with what both hosts said."""
    if not true:
        figures["wrong"] += 1
        print(f"not so: {what}\n{job.seen}\n{job.log()}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    raise SystemExit(main("hosts", __doc__, campaign, rounds=2, lacking=lacking))
