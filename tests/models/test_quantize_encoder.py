"""Text encoders in few bits: what is left of their numbers, how near their embeddings stay, and one at a time."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from transpixeler import cli
from transpixeler.config import loading
from transpixeler.data.catalog import catalog
from transpixeler.models import text_parts
from transpixeler.models.family import open_model
from transpixeler.models.quantize_encoder import (
    QuantizedLinear,
    bytes_of_linear,
    from_nf4,
    nf4_levels,
    quantize_linears,
    to_nf4,
)
from transpixeler.models.text_parts import open_text_part

CPU = torch.device("cpu")
KINDS = ("int8", "fp8", "nf4")
FURTHEST = {"int8": 0.01, "fp8": 0.05, "nf4": 0.2}  # relative error of one linear's output


def test_the_levels_are_those_published_for_normal_float_4() -> None:
    levels = nf4_levels()
    assert len(levels) == 16 and levels[0] == -1 and levels[7] == 0 and levels[15] == 1
    known = torch.tensor([-0.6961928, -0.0910500, 0.0795803, 0.7229568])
    torch.testing.assert_close(levels[[1, 6, 8, 14]], known, atol=1e-5, rtol=0)


def test_four_bits_give_the_nearest_level_of_each_block() -> None:
    weight = torch.randn(6, 50, generator=torch.Generator().manual_seed(0))  # whose last block is not full
    data, scale = to_nf4(weight)
    assert data.dtype == torch.uint8 and data.numel() == 160 and scale.shape == (5, 1)
    found = from_nf4(data, scale, weight.shape, torch.float32)
    blocks = nn.functional.pad(weight.flatten(), (0, 20)).unflatten(0, (5, 64))
    nearest = (blocks[..., None] / scale[..., None] - nf4_levels()).abs().argmin(-1)
    expected = (nf4_levels()[nearest] * scale).flatten()[:300].view(6, 50)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_a_linear_multiplies_as_before_nearly(kind: str) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(128, 96), nn.GELU(), nn.Linear(96, 32, bias=False))
    x = torch.randn(8, 128)
    one, other = (layer(torch.randn(8, layer.in_features)) for layer in (network[0], network[2]))
    expected, weights = network[0](x), [p.numel() for p in network.parameters() if p.ndim == 2]
    quantize_linears(network, kind)
    assert (
        all(isinstance(network[n], QuantizedLinear) for n in (0, 2)) and one.shape == (8, 96) and other.shape[1] == 32
    )
    error = (network[0](x) - expected).norm() / expected.norm()
    assert 0 < error < FURTHEST[kind]
    held = sum(b.nbytes for name, b in network.named_buffers() if "bias" not in name)
    assert held == sum(bytes_of_linear(*shape, kind) for shape in ((96, 128), (32, 96)))
    assert held < (0.6 if kind == "nf4" else 1.1) * sum(weights) and not list(network.parameters())


# -- a pipeline with two text encoders


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from fractions import Fraction

    from tests.families.flux.pipeline import write_pipeline
    from transpixeler.demo.scenes import Format, scenes
    from transpixeler.demo.write import write_pairs

    place = tmp_path_factory.mktemp("world")
    write_pipeline(place / "model")
    write_pairs(place / "data", scenes(2, formats=[Format(64, 64, 1, Fraction(16))], held_out=False, seed=0))
    data = "{train: data, cache_dir: cache, resolutions: [64], frames: [1]}"
    (place / "config.yaml").write_text(
        f"model: {{path: {place / 'model'}}}\ndata: {data}\ntrain: {{global_batch: 1, max_steps: 1}}\n"
    )
    return place / "config.yaml"


@pytest.mark.parametrize("kind", KINDS)
def test_quantized_embeddings_are_near(world: Path, kind: str) -> None:
    model = open_model(loading.load(world).model)
    assert model.text_parts == ("text", "pooled")
    for part in model.text_parts:
        whole, few = (open_text_part(model, part, device=CPU, quantize=how) for how in ("none", kind))
        assert not [m for n in few.networks for m in n.modules() if isinstance(m, nn.Linear)]
        (there,), (here,) = (one.encode(["a red circle drifts left"]) for one in (whole, few))
        assert there.keys() == here.keys() == {part}
        error = (here[part] - there[part]).norm() / there[part].norm()
        assert 0 < error < 2 * FURTHEST[kind]


def test_one_network_is_there_at_a_time_and_a_change_encodes_texts_alone(
    world: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[Any] = []
    real = text_parts.open_text_part

    def watched(*args: Any, **kwargs: Any) -> Any:
        assert not [one for one in opened if one() is not None], "the one before is still there"
        found = real(*args, **kwargs)
        opened.append(weakref.ref(found))
        return found

    monkeypatch.setattr("transpixeler.data.texts.open_text_part", watched)
    assert cli.main(["cache", str(world)]) == 0 and len(opened) == 2
    sizes = {file.name: file.stat().st_size for file in world.parent.rglob("*.seg")}
    before = catalog(loading.load(world), open_model(loading.load(world).model))
    few = loading.load(world, ["model.quantize_encoders=int8"])
    after = catalog(few, open_model(few.model))
    assert {job.latent_keys for job in after.clips} == {job.latent_keys for job in before.clips}
    assert not {key for job in after.texts for key in job.all_keys} & {k for job in before.texts for k in job.all_keys}
    capsys.readouterr()
    assert cli.main(["cache", str(world), "model.quantize_encoders=int8"]) == 0 and len(opened) == 4
    grown = {file.name for file in world.parent.rglob("*.seg") if file.stat().st_size != sizes.get(file.name)}
    assert grown and not [name for name in grown if ".latent." in name]
    assert cli.main(["plan", str(world), "model.quantize_encoders=nf4", "--device", "a100"]) == 0
    assert (
        "of text_encoder_2, then" in (told := capsys.readouterr().out) and "in nf4, one at a time on the device" in told
    )
