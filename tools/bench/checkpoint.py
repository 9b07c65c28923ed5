"""Time a checkpoint and the metrics of a step: the asynchronous save against `torch.save` of the same state.

The state is that of an adapter on Wan 1.3B under AdamW: parameters and two moments in fp32, as the trainer names them.
`stall` is how long a save keeps the training thread; the writing goes on beside it, synced and hashed. `cost` adds what
the writing takes from a thread that launches small operators meanwhile. The rival writes the same tensors with one
`torch.save` while training stands, neither synced nor hashed. Shares are of the largest state and of the interval
between two checkpoints at the given step time.

The second part is what a step's line costs: the record, `metrics.jsonl` flushed, and TensorBoard.
"""

from __future__ import annotations

import shutil
import tempfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from harness import alternate, finish, parser, seconds
from rounds import COARSE, Times, ratio
from torch import Tensor, nn

from transpixeler.config import loading
from transpixeler.config.sections import CheckpointConfig, Config
from transpixeler.data.loader import Batch
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.models.costs import Costs
from transpixeler.models.streams import StreamLayout
from transpixeler.parallel import mesh as meshes
from transpixeler.parallel import runtime
from transpixeler.parallel.build import shape
from transpixeler.runs import checkpointer, telemetry, training_state
from transpixeler.training import optim
from transpixeler.training.agreement import Due, Facts
from transpixeler.training.step_record import Recorder, StepTimes

WAN = {"num_attention_heads": 12, "attention_head_dim": 128, "ffn_dim": 8960, "num_layers": 30}
LATENTS = (16, 9, 60, 104)  # a batch whose metrics are told: 33 frames of 480×832
STEPS_TOLD = 200  # metrics lines in a round
WORK_OVER_SAVE = 1.3  # how much longer than a save the work beside it lasts
STEPS_BETWEEN = 500  # checkpoints: the default of checkpoint.every_steps


def make(config: Config, blocks: int) -> WanModel:
    return WanModel(WanConfig.read(WAN | {"num_layers": blocks}), streams=tuple(config.streams))


def adapter_state(config: Config, blocks: int) -> dict[str, Tensor]:
    """Return parameters and optimizer state after a first step, in the trainer's names."""
    model = shape(config, partial(make, config, blocks), torch.float32)
    trained = {
        name: nn.Parameter(torch.randn(p.shape) / 100) for name, p in model.named_parameters() if p.requires_grad
    }
    optimizer = optim.build(trained, config.optim)
    training_state.materialize(optimizer)
    parameters = {f"model.{name}": p.detach() for name, p in trained.items()}
    return parameters | training_state.optimizer_tensors(trained, optimizer)


class Saves:
    """Both ways to save one state beside a training thread that launches small operators."""

    def __init__(self, folder: Path, here: runtime.Runtime, state: dict[str, Tensor]) -> None:
        self.folder, self.state, self.step = folder, state, 0
        self.ours = checkpointer.Checkpointer(folder / "checkpoints", CheckpointConfig(keep=1), here)
        self.stalls: list[float] = []
        self._small, self._count = torch.ones(16), 0
        self.written = seconds(self.asynchronous)
        self._count = 20_000
        self._count = round(
            self._count * WORK_OVER_SAVE * self.written / seconds(self.work)
        )  # lasts longer than a save

    def work(self) -> None:
        for _ in range(self._count):
            self._small.add_(1.0)

    def asynchronous(self) -> None:
        self.step += 1
        self.ours.save(self.step, self.state, {"step": self.step})
        self.stalls.append(self.ours.take_stall())
        self.work()
        fault = self.ours.wait()
        assert not fault, fault

    def rival(self) -> None:
        torch.save(self.state, self.folder / "rival.pt")


def saving(folder: Path, here: runtime.Runtime, *, rank: int, blocks: int, repeats: int) -> dict[str, Any]:
    config = loading.from_overrides([f"lora.rank={rank}"])
    state = adapter_state(config, blocks)
    size = sum(tensor.nbytes for tensor in state.values())
    parameters = sum(tensor.numel() for name, tensor in state.items() if name.startswith("model."))
    print(f"adapter of rank {rank}: {parameters / 1e6:.1f} M parameters, {size / 1e6:.0f} MB of state", flush=True)
    saves = Saves(folder / f"rank{rank}", here, state)
    ways = {"work": saves.work, "work, saving": saves.asynchronous, "torch.save": saves.rival}
    taken = alternate(ways, repeats=repeats)
    stall = Times(tuple(saves.stalls[-repeats:]))
    rival = Times(tuple(each["torch.save"].wall for each in taken.readings))
    cost = taken["work, saving"].median - taken["work"].median
    shutil.rmtree(saves.folder)
    print(f"stall {stall}, with what the writing slows down {cost:.4g} s", flush=True)
    return {
        "parameters": parameters,
        "bytes": size,
        "stall_ms": round(1e3 * stall.median, 1),
        "spread": round(stall.spread, 3),
        "cost_ms": round(1e3 * cost, 1),
        "written_ms": round(1e3 * saves.written, 1),
        "rival_ms": round(1e3 * rival.median, 1),
        "x_rival": ratio(rival.seconds, stall.seconds, rounds=repeats, precision=COARSE).figure,
    }


# --- telling ---------------------------------------------------------------------------------------------------------


def telling(folder: Path, here: runtime.Runtime, *, repeats: int) -> dict[str, Times]:
    """Time a step's line of metrics, with TensorBoard and without, through what the trainer calls."""
    config = loading.from_overrides(["train.global_batch=8"])
    batch, facts, recorder = told_things(config, here)
    writers = {
        name: telemetry.Telemetry(_folder(folder / name), told.log, step=0, total=10**9, name=name)
        for name, told in (
            ("tensorboard", config),
            ("metrics alone", loading.from_overrides(["log.tensorboard=false"])),
        )
    }
    steps = dict.fromkeys(writers, 0)

    def tell(name: str) -> None:
        for _ in range(STEPS_TOLD):
            steps[name] += 1
            times = StepTimes(1.0, 0.0, 0.0)
            record = recorder.record(batch, [(batch.layout, len(batch.slots))], facts, times, lr=1e-4, micro_batch=1)
            writers[name].step(record | {"step": steps[name]})

    found = alternate({name: partial(tell, name) for name in writers}, repeats=repeats)
    for writer in writers.values():
        writer.close()
    return {name: Times(tuple(seconds / STEPS_TOLD for seconds in times.seconds)) for name, times in found.items()}


def told_things(config: Config, here: runtime.Runtime) -> tuple[Batch, Facts, Recorder]:
    """Make a step's batch, facts and recorder; of the engine only what the recorder asks of it."""
    names, nothing = tuple(config.streams), torch.empty(0)
    layout = StreamLayout.equal(names, LATENTS, (1, 2, 2))
    ids = tuple(f"clip{n:05d}" for n in range(config.train.global_batch))
    batch = Batch(0, 0, 0, layout, nothing, {}, {}, ids, range(len(ids)))
    facts = Facts(0.1, 0.2, dict.fromkeys(names, 0.05), (0.1,) * 5, True, Due())
    with torch.device("meta"):
        costs = Costs.of(make(config, WAN["num_layers"]))
    alone: Any = None  # no group: nothing is exchanged
    mesh = meshes.Mesh(meshes.Layout(1, 1, 1), here.device, 0, 0, alone, alone, alone)
    engine: Any = SimpleNamespace(mesh=mesh, costs=costs)
    return batch, facts, Recorder(config, engine, here.world_size)


def _folder(path: Path) -> Path:
    path.mkdir(parents=True)
    return path


# --- both ------------------------------------------------------------------------------------------------------------


def figures(options: Any, folder: Path, here: runtime.Runtime) -> dict[str, Any]:
    saved = partial(saving, folder, here, blocks=options.blocks, repeats=options.repeats)
    sizes = [saved(rank=rank) for rank in options.ranks]
    interval = STEPS_BETWEEN * options.step
    lines = telling(folder / "telling", here, repeats=options.repeats)
    whole = lines["tensorboard"].median
    print(f"a step's line takes {1e3 * whole:.2f} ms, {whole / options.step:.2%} of a step of {options.step:g} s")
    return {
        **{f"{cost}_share": round(sizes[-1][f"{cost}_ms"] / 1e3 / interval, 6) for cost in ("stall", "cost", "rival")},
        "interval_seconds": interval,
        "sizes": sizes,
        "tell_ms": round(1e3 * whole, 3),
        "tell_without_tensorboard_ms": round(1e3 * lines["metrics alone"].median, 3),
        "tell_share": round(whole / options.step, 6),
        "step_seconds": options.step,
    }


def main() -> None:
    given = parser(__doc__)
    given.add_argument("--ranks", type=int, nargs="+", default=(8, 32, 128), help="of the adapter, one a size")
    given.add_argument("--blocks", type=int, default=WAN["num_layers"])
    given.add_argument("--step", type=float, default=1.0, help="seconds, for the shares")
    options = given.parse_args()
    with tempfile.TemporaryDirectory() as name, runtime.running(device="cpu") as here:
        found = figures(options, Path(name), here)
    finish("checkpoint", found, record=not options.no_record)


if __name__ == "__main__":
    main()
