"""A run is exact: stopped and resumed anywhere, on another layout, it trains the same samples to the same numbers."""

from __future__ import annotations

import math
import shutil
import signal
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support.ranks import RanksFailed
from tests.training.trainings import (
    as_killed,
    difference,
    exact,
    layout,
    metrics,
    run,
    start,
    tensors,
    wait_for_step,
)
from transpixeler.config import loading
from transpixeler.runs import checkpoint

SHORT = ("train.max_steps=4", "checkpoint.every_steps=2")


@pytest.mark.parametrize("killed_after", [2, 6])
def test_a_killed_run_resumes_bit_for_bit(demo: Path, straight: Path, tmp_path: Path, killed_after: int) -> None:
    process = start(demo, tmp_path)
    wait_for_step(process, tmp_path, killed_after)
    process.send_signal(signal.SIGKILL)
    process.wait()
    folder = run(demo, tmp_path, resume="")
    assert exact(folder) == exact(straight)
    assert difference(tensors(folder, 8, tmp_path), tensors(straight, 8, tmp_path)) == 0.0
    for name in ("step8", "step8/ema"):
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (folder, straight))
        assert difference(ours, theirs) == 0.0


def test_the_eighth_step_is_not_the_fourth(straight: Path, tmp_path: Path) -> None:
    assert difference(tensors(straight, 8, tmp_path), tensors(straight, 4, tmp_path)) > 1e-4


@pytest.fixture(scope="module")
def halfway(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of stages and shards. Nobody goes on in this folder, only in copies of it."""
    return run(demo, tmp_path_factory.mktemp("halfway"), *SHORT, *layout(2, 1, 2), "train.max_steps=2", ranks=4)


@pytest.mark.parametrize("after", [(1, 1, 1), (1, 4, 1), (2, 2, 1), (1, 1, 1, 2), (2, 1, 1, 2), (1, 1, 2, 2)])
def test_a_run_goes_on_on_another_layout(
    demo: Path, straight: Path, halfway: Path, tmp_path: Path, after: tuple
) -> None:
    first = shutil.copytree(halfway, tmp_path / halfway.name, symlinks=True)
    folder = run(demo, tmp_path, *SHORT, *layout(*after), resume=str(first), ranks=math.prod(after))
    assert folder == first
    ours, theirs = exact(folder), exact(straight)[:4]
    assert [line["samples"] for line in ours] == [line["samples"] for line in theirs]
    assert max(abs(a["loss"] - b["loss"]) for a, b in zip(ours, theirs, strict=True)) < 1e-5
    assert difference(tensors(folder, 4, tmp_path), tensors(straight, 4, tmp_path)) < 1e-4


@pytest.mark.parametrize("before", [(1, 1, 1, 2), (1, 1, 2, 2)])
def test_a_run_whose_ranks_share_samples_goes_on_bit_for_bit_and_on_another_layout(
    demo: Path, straight: Path, tmp_path: Path, before: tuple
) -> None:
    ranks = math.prod(before)
    whole = run(demo, tmp_path / "whole", *SHORT, *layout(*before), ranks=ranks)
    first, other = (as_killed(whole, 2, tmp_path / place) for place in ("part", "other"))
    folder = run(demo, tmp_path / "part", *SHORT, *layout(*before), resume=str(first), ranks=ranks)
    assert exact(folder) == exact(whole)
    assert difference(tensors(folder, 4, tmp_path), tensors(whole, 4, tmp_path)) == 0.0
    run(demo, tmp_path / "other", *SHORT, *layout(2, 1, 1), resume=str(other), ranks=2)
    for found in (whole, other):
        pairs = zip(exact(found), exact(straight)[:4], strict=True)
        assert max(abs(a["loss"] - b["loss"]) for a, b in pairs) < 1e-5
        assert difference(tensors(found, 4, tmp_path), tensors(straight, 4, tmp_path)) < 1e-4
        for name in ("step4", "step4/ema"):
            ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (found, straight))
            assert difference(ours, theirs) < 1e-4


def test_eight_bit_moments_resume_bit_for_bit(demo: Path, tmp_path: Path) -> None:
    options = (*SHORT, "optim.name=adamw8bit", "lora.rank=64", "optim.ema=0")
    whole = run(demo, tmp_path / "whole", *options)
    folder = run(demo, tmp_path / "part", *options, resume=str(as_killed(whole, 2, tmp_path / "part")))
    assert exact(folder) == exact(whole)
    ours, theirs = tensors(folder, 4, tmp_path), tensors(whole, 4, tmp_path)
    assert difference(ours, theirs) == 0.0
    assert any(name.endswith(".codes.0") for name in ours), "nothing was quantized"


def test_a_dora_over_a_quantized_base_resumes_bit_for_bit_and_on_shards(demo: Path, tmp_path: Path) -> None:
    options = (*SHORT, "lora.kind=dora", "model.quantize=int8")
    whole = run(demo, tmp_path / "whole", *options)
    part, shards = (as_killed(whole, 2, tmp_path / place) for place in ("part", "shards"))
    folder = run(demo, tmp_path / "part", *options, resume=str(part))
    assert exact(folder) == exact(whole)
    assert difference(tensors(folder, 4, tmp_path), tensors(whole, 4, tmp_path)) == 0.0
    run(demo, tmp_path / "shards", *options, *layout(1, 1, 2), resume=str(shards), ranks=2)
    assert difference(tensors(shards, 4, tmp_path), tensors(whole, 4, tmp_path)) < 1e-4
    for name in ("step4", "step4/ema"):
        ours, theirs = (load_file(f / name / "adapter_model.safetensors") for f in (folder, whole))
        assert difference(ours, theirs) == 0.0 and any(key.endswith(".dora_scale") for key in ours)
    with pytest.raises(RanksFailed, match=r"UserError: --resume: .*lora.kind: 'dora' there, 'lora' here"):
        run(demo, tmp_path / "part", "model.quantize=int8", "train.max_steps=5", resume=str(folder))


def test_another_rate_may_resume_and_another_model_may_not(demo: Path, tmp_path: Path) -> None:
    folder = run(demo, tmp_path, "train.max_steps=4")
    with pytest.raises(RanksFailed, match=r"UserError: --resume: .*lora.rank: 32 there, 4 here"):
        run(demo, tmp_path, "lora.rank=4", resume="")
    run(demo, tmp_path, "optim.force_lr=1e-5", resume="")
    own = loading.load(demo / "config.yaml").optim.lr
    assert [line["lr"] for line in metrics(folder)] == [own] * 4 + [1e-5] * 4
    assert "optim.force_lr was None, is 1e-05" in (folder / "log.txt").read_text()


def test_a_damaged_checkpoint_is_passed_over_with_the_reason(demo: Path, tmp_path: Path) -> None:
    folder = run(demo, tmp_path)
    newest = folder / "checkpoints" / checkpoint.folder_name(8)
    file = next(newest.glob("*.distcp"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    run(demo, tmp_path, "train.max_steps=9", resume="")
    log = (folder / "log.txt").read_text()
    assert "resumed" in log and "at step 4" in log
