"""A companion in the channels of RGB's tokens leaves RGB as it was at the start, and learns.

A widened base computes what it did. How well a companion learns is a matter of longer trainings.
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from tooling import run

import tests.support.toolbox  # noqa: F401 - the tools are found from here on
from transpixeler.demo.model import ASSETS, trained_parts
from transpixeler.demo.scenes import Format
from transpixeler.families.wan.config import WanConfig
from transpixeler.families.wan.model import WanModel
from transpixeler.models.streams import StreamLayout

SMALL = Format(64, 64, 5, Fraction(16))
TINY = WanConfig(2, 12, text_dim=8, freq_dim=16, ffn_dim=32, num_layers=2)
PAIR = StreamLayout.equal(("rgb", "seg"), (16, 2, 4, 4), (1, 2, 2))
READINGS = ("linear", "mlp", "gated")


def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return noisy latents of both streams, one time for both, and a caption."""
    draws = torch.Generator().manual_seed(3)
    noisy, text = torch.randn(2, PAIR.elements, generator=draws), torch.randn(2, 512, 8, generator=draws)
    return noisy, torch.tensor([[0.3, 0.3], [0.8, 0.8]]), text


def base() -> WanModel:
    torch.manual_seed(1)
    return WanModel(TINY, streams=("rgb",))


@torch.no_grad()
def rgb_of(model: Any, alone: WanModel) -> tuple[torch.Tensor, torch.Tensor]:
    """Return RGB's velocity by a model of pairs, and by the base alone."""
    noisy, times, text = inputs()
    pair = model(noisy, times, text, layout=PAIR)
    rgb, layout = noisy[:, : PAIR.sizes[0]], PAIR.only(0, 1)
    return pair[:, : PAIR.sizes[0]], alone(rgb, times[:, :1], text, layout=layout)


@pytest.mark.parametrize("reading", READINGS)
def test_rgb_is_bit_equal_at_the_start(reading: Any) -> None:
    from demo_joined import JoinedWan

    alone = base()
    model = JoinedWan.of(alone, reading)
    found, wanted = rgb_of(model, alone)
    assert torch.equal(found, wanted)
    entering = model.get_parameter("embed.companion.weight")
    assert entering.shape == (24, 64)
    torch.nn.init.normal_(entering, std=1e-3)  # the broken twin: rows that are not zero
    found, wanted = rgb_of(model, alone)
    assert not torch.equal(found, wanted)


@pytest.mark.parametrize("reading", READINGS)
def test_the_companion_s_loss_falls_in_a_few_steps(reading: Any) -> None:
    from demo_joined import JoinedWan

    def learned(*, new: bool) -> list[float]:
        model, (noisy, times, text) = JoinedWan.of(base(), reading), inputs()
        target = torch.randn(noisy.shape, generator=torch.Generator().manual_seed(4))[:, PAIR.sizes[0] :]
        trained = [p for name, p in model.named_parameters() if ("companion" in name) is new]
        optimizer, losses = torch.optim.AdamW(trained, lr=1e-2), []
        for _ in range(12):
            loss = (model(noisy, times, text, layout=PAIR)[:, PAIR.sizes[0] :] - target).square().mean()
            losses.append(loss.item())
            loss.backward()
            optimizer.step()
            model.zero_grad()
        return losses

    losses, others = learned(new=True), learned(new=False)
    assert losses[0] == others[0] and losses[-1] < 0.8 * losses[0]
    assert others[-1] == others[0]  # the broken twin: all trains but the new linears, which stay zero


def test_a_base_of_twice_the_width_computes_the_same() -> None:
    from demo_joined import apart, widened

    narrow = trained_parts(ASSETS).transformer
    wide = widened(narrow)
    assert wide.config["num_attention_heads"] == 2 * narrow.config["num_attention_heads"]
    assert apart(narrow, wide) < 1e-5
    assert apart(narrow, widened(narrow, noise=0.03)) > 1e-3
    with torch.no_grad():  # the broken twin: what reads the features is not halved
        wide.get_parameter("blocks.0.ffn.net.2.weight").mul_(2)
    assert apart(narrow, wide) > 1e-3


def test_the_whole_way_in_a_few_steps(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch) -> None:
    import demo_channels as tool

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(tool, "FORMAT", SMALL)
    monkeypatch.setattr(tool, "WIDTHS", ("narrow",))
    monkeypatch.setattr(tool, "RATES", (1.0, 5.0))
    monkeypatch.setattr(tool, "KINDS", {name: tool.KINDS[name] for name in ("channels", "channels_whole")})
    words = [str(tmp_path), "--clips", "4", "--held-out", "1", "--captions", "2", "--base-steps", "1"]
    keys = ["--steps", "2", "--rate-steps", "1", "--every", "1", "sample.steps=1", "train.global_batch=2"]
    said = []
    for _ in range(2):  # the second time nothing is trained or measured again
        assert run("demo_channels", tool.main, [*words, *keys, "train.micro_batch=2"]) == 0
        out, log = capsys.readouterr()
        said.append((json.loads(out.splitlines()[-1]), "learns until" in log, "held out:" in log))
    (first, *done), (again, *anew) = said
    assert done == [True, True] and anew == [False, False] and first == again
    assert first["widening_off"] < 1e-5 and {"narrow_rate_1", "narrow_rate_5"} <= {*first}
    for name in ("tokens", "channels", "channels_whole"):
        assert first[f"narrow_{name}_step_cpu_seconds"] > 0 and first[f"narrow_{name}_loss_seg_end"] > 0
    assert first["narrow_channels_loss_rgb_base"] == first["narrow_channels_whole_loss_rgb_base"]
    assert (tmp_path / "beside.png").read_bytes().startswith(b"\x89PNG")
