"""A scorer learns the same on any number of ranks, goes on where it stopped, and finds out errors in a sample."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.support.ranks import run_ranks
from transpixeler import cli
from transpixeler.adapters.tensorfile import open_tensors, save_tensors
from transpixeler.config import loading
from transpixeler.config.sections import Config, StreamConfig, UserError
from transpixeler.data.encode import encode_missing
from transpixeler.data.loader import Loader
from transpixeler.models.family import open_model
from transpixeler.parallel.runtime import Runtime
from transpixeler.runs.metrics_file import read_records
from transpixeler.scoring import contrast as contrasting
from transpixeler.scoring import training
from transpixeler.scoring.contrast import alike, contrast
from transpixeler.scoring.file import read_scorer
from transpixeler.scoring.scores import Scores
from transpixeler.scoring.towers import Scorer, Sizes

SMALL = ("scorer.width=16", "scorer.heads=2", "scorer.layers=1", "scorer.global_batch=4", "scorer.steps=4")
CPU = torch.device("cpu")


def config(demo: Path, output: Path, *more: str) -> Config:
    return loading.load(demo / "config.yaml", [f"output_dir={output}", *SMALL, "scorer.every_steps=2", *more])


# --- the loss --------------------------------------------------------------------------------------------------------


def slowly(ones: Tensor, others: Tensor, scale: float, keys: list[int], *, hide: bool = True) -> Tensor:
    """Write the loss out: for each sample, both ways, minus the log of the right one's share."""
    total = torch.zeros(())
    for a, b in ((ones, others), (others, ones)):
        for i in range(len(a)):
            rivals = [j for j in range(len(a)) if j == i or not hide or keys[j] != keys[i]]
            powers = torch.stack([(scale * (a[i] * b[j]).sum()).exp() for j in rivals])
            total = total - (powers[rivals.index(i)] / powers.sum()).log()
    return total / (2 * len(ones))


def test_the_loss_is_its_formula_and_equal_captions_are_no_rivals() -> None:
    generator = torch.Generator().manual_seed(0)
    ones, others = (
        torch.nn.functional.normalize(torch.randn(6, 5, generator=generator), dim=-1).requires_grad_() for _ in range(2)
    )
    keys, scale = [0, 1, 2, 1, 3, 0], torch.tensor(3.0)
    parts = [contrast(ones, others, scale, own=range(n, n + 3), same=alike(keys)) for n in (0, 3)]
    expected = slowly(ones, others, 3.0, keys)
    torch.testing.assert_close(sum(parts), expected)
    found = torch.autograd.grad(sum(parts, torch.zeros(())), (ones, others))
    for ours, theirs in zip(found, torch.autograd.grad(expected, (ones, others))):
        torch.testing.assert_close(ours, theirs)
    assert abs(expected - slowly(ones, others, 3.0, keys, hide=False)) > 0.01


def _lose_what_others_found(ctx: Any, *gradients: Tensor) -> Tensor:
    return gradients[0][:, ctx.own]


def _gradients(rank: int, world_size: int, demo: Path, output: Path, twin: bool) -> list[dict[str, Tensor]]:
    """Return the losses and every gradient of three steps that change nothing, of two buckets at least."""
    if twin:
        contrasting._Gathered.backward = staticmethod(_lose_what_others_found)
    made = config(demo, output, "scorer.lr=1e-30", "scorer.weight_decay=0")
    runtime, model = Runtime(rank, world_size, rank, CPU), open_model(made.model)
    data = encode_missing(made, model, runtime)
    one = training.Training(made, runtime, model, data.train, data.eval, output)
    found, buckets = [], set()
    with Loader(one._assembler(data.train), one.order, rank=rank, ranks=world_size) as loader:
        for _ in range(3):
            batch = next(loader)
            buckets.add(batch.layout)
            losses = one.learn(batch).losses
            gradients = {name: p.grad for name, p in one.scorer.named_parameters() if p.grad is not None}
            found.append({name: torch.tensor(value) for name, value in losses.items()} | gradients)
    assert len(buckets) > 1
    return found


def furthest(ours: list[dict[str, Tensor]], theirs: list[dict[str, Tensor]]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(ours, theirs, strict=True) for name in a)


def test_losses_and_gradients_are_the_same_on_any_number_of_ranks(demo: Path, tmp_path: Path) -> None:
    """A gradient of what other ranks compare with this one's samples comes from them; the twin forgets it."""
    (alone,) = run_ranks(_gradients, 1, demo, tmp_path, False)
    for ranks in (2, 4):
        for found in run_ranks(_gradients, ranks, demo, tmp_path, False):
            assert furthest(found, alone) <= 1e-6
    (broken, _) = run_ranks(_gradients, 2, demo, tmp_path, True)
    assert furthest(broken, alone) > 1e-4


# --- training --------------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the end of the process."""


def test_a_killed_training_goes_on_to_the_same_bits(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed after the metrics of step 4 and before its state: those lines are written again, once."""
    here = Runtime(0, 1, 0, CPU)
    whole = training.train_scorer(config(demo, tmp_path / "whole"), here)
    assert "the right caption of" in capsys.readouterr().out
    stopped = config(demo, tmp_path / "stopped")
    keep, kept = training.write_state, []

    def killed(*args: Any) -> None:
        if kept:
            raise Killed
        kept.append(keep(*args))

    monkeypatch.setattr(training, "write_state", killed)
    with pytest.raises(Killed):
        training.train_scorer(stopped, here)
    monkeypatch.undo()
    with pytest.raises(UserError, match="go on with --resume"):
        training.train_scorer(stopped, here)
    changed = dataclasses.replace(stopped, scorer=dataclasses.replace(stopped.scorer, lr=0.5))
    with pytest.raises(UserError, match=r"scorer\.lr: this training has 0\.5, and .* began with 0\.001"):
        training.train_scorer(changed, here, resume=True)
    resumed = training.train_scorer(stopped, here, resume=True)
    assert resumed.read_bytes() == whole.read_bytes()
    assert [line["step"] for line in read_records(resumed.parent / "metrics.jsonl")] == [2, 4]
    assert read_records(resumed.parent / "metrics.jsonl") == read_records(whole.parent / "metrics.jsonl")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("scorer.global_batch=1", r"scorer\.global_batch: a scorer learns by comparing"),
        ("scorer.heads=3", r"scorer\.heads: 3 do not divide scorer\.width 16"),
        ("data.train=[]", r"data\.train: set it"),
    ],
)
def test_what_cannot_be_trained_is_refused_by_its_key_before_anything_is_encoded(
    demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, override: str, said: str
) -> None:
    monkeypatch.setattr(training, "encode_missing", lambda *args: pytest.fail("encoded"))
    with pytest.raises(UserError, match=said):
        training.train_scorer(config(demo, tmp_path, override), Runtime(0, 1, 0, CPU))


# --- the file --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training.train_scorer(config(demo, tmp_path_factory.mktemp("scorer")), Runtime(0, 1, 0, CPU))


def _header(change: Callable[[dict[str, Any]], object]) -> Callable[[dict[str, Tensor], dict[str, str]], object]:
    def changed(tensors: dict[str, Tensor], header: dict[str, str]) -> None:
        said = json.loads(header["scorer"])
        change(said)
        header["scorer"] = json.dumps(said)

    return changed


BAD = {
    "another format": (lambda tensors, header: header.update(format="x"), "is no scorer"),
    "no header": (lambda tensors, header: header.pop("scorer"), "cannot be read"),
    "a tensor less": (lambda tensors, header: tensors.pop("scale"), "its tensors are not those"),
    "huge": (_header(lambda said: said["sizes"].update(layers=10**9)), "sizes that no scorer has"),
    "no number": (_header(lambda said: said["sizes"].update(width="16")), "sizes that no scorer has"),
    "odd heads": (_header(lambda said: said["sizes"].update(heads=3)), "sizes that no scorer has"),
    "other sizes": (_header(lambda said: said["sizes"].update(width=32)), "its tensors are not those"),
    "more sizes": (_header(lambda said: said["sizes"].update(depth=3)), "cannot be read"),
    "streams": (_header(lambda said: said["sizes"].update(streams=[])), "sizes that no scorer has"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_is_no_scorer_is_refused(trained: Path, tmp_path: Path, name: str) -> None:
    spoil, said = BAD[name]
    tensors, header = load_file(trained), open_tensors(trained)[1]
    spoil(tensors, header)
    save_tensors(tensors, tmp_path / "bad.safetensors", header)
    with pytest.raises(UserError, match=said):
        read_scorer(tmp_path / "bad.safetensors")


def test_a_cut_or_missing_file_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.safetensors").write_bytes(trained.read_bytes()[:1000])
    for file, said in (("cut.safetensors", "not a whole safetensors"), ("none.safetensors", "no such file")):
        with pytest.raises(UserError, match=said):
            read_scorer(tmp_path / file)


def test_a_scorer_of_another_vae_or_text_is_refused(demo: Path, trained: Path, tmp_path: Path) -> None:
    made = config(demo, tmp_path)
    model = open_model(made.model)
    tensors, header = load_file(trained), open_tensors(trained)[1]
    for name, said in (("vae", "another VAE's latents"), ("text", "another text encoder's")):
        _header(lambda told, name=name: told.update({name: "x"}))(tensors, other := dict(header))
        save_tensors(tensors, tmp_path / "other.safetensors", other)
        with pytest.raises(UserError, match=said):
            Scores(str(tmp_path / "other.safetensors"), made, model, CPU)


@pytest.mark.parametrize(
    ("streams", "said"),
    [
        ({"rgb": ""}, "the stream rgb"),
        ({"rgb": "", "depth": "_depth"}, "the streams rgb, depth"),
        ({"rgb": "", "seg": "_seg", "depth": "_depth"}, "the streams rgb, seg, depth"),
        ({"rgb": "", "seg": StreamConfig("_seg", scale=2)}, r"the streams rgb, seg \(scale 2\)"),
    ],
)
def test_a_scorer_of_other_streams_is_refused(
    demo: Path, trained: Path, tmp_path: Path, streams: dict[str, str | StreamConfig], said: str
) -> None:
    """It learned what all its streams show together: of fewer of them it would say something that it never learned."""
    made = config(demo, tmp_path)
    other = dataclasses.replace(made, streams=streams)
    with pytest.raises(UserError, match=rf"eval\.scorer: .* judges the streams rgb, seg together, .* has {said};"):
        Scores(str(trained), other, open_model(made.model), CPU)


@pytest.mark.parametrize("command", [("train",), ("eval", "--base")])
def test_a_scorer_that_is_not_there_is_refused_before_anything_is_encoded(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: tuple[str, ...]
) -> None:
    places = (f"output_dir={tmp_path}", f"data.cache_dir={tmp_path / 'cache'}", "eval.scorer=none.safetensors")
    assert cli.main([command[0], str(demo / "config.yaml"), *command[1:], *places]) == 2
    assert "none.safetensors: no such file; `transpixeler scorer CONFIG` trains a scorer" in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


# --- scores ----------------------------------------------------------------------------------------------------------


def test_an_evaluation_scores_its_samples(
    run: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table and eval.json have the scores, which are those of the scorer for the sampled latents."""
    few = ("eval.samples=1", "eval.clips=1", "eval.times=[0.5]", "sample.steps=1", "objective.tasks={joint: 1}")
    command = ["eval", str(run), "--out", str(tmp_path / "out"), f"eval.scorer={trained}", *few]
    assert cli.main(command) == 0
    assert "score_caption" in capsys.readouterr().out
    found = json.loads((tmp_path / "out/eval.json").read_text())["eval"]
    measured = [one["metrics"] for one in found.values() if "metrics" in one]
    assert measured and all(-1 <= one[f"score_{name}"] <= 1 for one in measured for name in ("caption", "seg"))


def test_padding_of_a_caption_and_of_a_size_changes_nothing() -> None:
    """Captions are padded with zeros to the model's length; a side that no patch divides is padded too."""
    torch.manual_seed(0)
    scorer = Scorer(Sizes(("rgb", "seg"), (1, 2), 4, 8, patch=4, width=16, layers=2, text_layers=1, heads=2))
    text = torch.randn(2, 5, 8)
    text[1, 3:] = 0
    padded = torch.cat([text, torch.zeros(2, 7, 8)], 1)
    torch.testing.assert_close(scorer.embed_caption(padded), scorer.embed_caption(text))
    torch.testing.assert_close(scorer.embed_caption(text[1:, :3]), scorer.embed_caption(text)[1:])
    assert scorer.embed_caption(torch.zeros(1, 4, 8)).isfinite().all()
    video = torch.randn(1, 4, 2, 6, 10)
    whole = torch.nn.functional.pad(video, (0, 2, 0, 2))
    seen = scorer.embed_sample([video])
    torch.testing.assert_close(scorer.embed_sample([whole]), seen)
    assert (scorer.embed_sample([video.flip(2)]) - seen).abs().amax((1, 2)).min() > 1e-3  # the order of frames is seen


def test_a_caption_is_compared_with_what_any_stream_shows() -> None:
    """What RGB does not show, such as how transparent a thing is, its companion may; RGB's own vector stays RGB's."""
    torch.manual_seed(0)
    scorer = Scorer(Sizes(("rgb", "seg"), (1, 1), 4, 8, patch=2, width=16, layers=1, text_layers=0, heads=2))
    rgb, one, other = torch.randn(3, 1, 4, 2, 4, 4)
    first, second = scorer.embed_sample([rgb, one]), scorer.embed_sample([rgb, other])
    assert (first[0] - second[0]).abs().max() > 1e-3
    torch.testing.assert_close(first[1], second[1])
    torch.testing.assert_close(first.norm(dim=-1), torch.ones(3, 1))
    torch.testing.assert_close(scorer.embed_sample([one], [1])[1], first[2])
