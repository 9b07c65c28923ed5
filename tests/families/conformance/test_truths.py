"""Every family keeps the method's three truths, and a twin that is broken in one place is caught."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.families.cases import CASES, EVERY, Case, alike, base_of, inputs, zero
from tests.support.models import move
from transpixeler.config.sections import LoraConfig, family_names
from transpixeler.models.backbone import Backbone
from transpixeler.models.lora import inject
from transpixeler.models.streams import StreamLayout
from transpixeler.models.tokens import Tokens

every_family = pytest.mark.parametrize("case", CASES.values(), ids=CASES)  # with its streams on one sequence
really_every = pytest.mark.parametrize("case", EVERY.values(), ids=EVERY)


def test_every_family_has_a_case() -> None:
    assert set(family_names()) == set(EVERY)


def parts(velocity: Tensor, layout: StreamLayout) -> tuple[Tensor, ...]:
    return velocity.split(layout.sizes, dim=1)


def worst(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).abs().max())


# -- equal streams


def _equal_streams(case: Case, joint: Backbone, *, cut: bool) -> tuple[list[Tensor], Tensor]:
    """Return what each of several equal streams gives, and what the base gives on one."""
    base = base_of(case, joint)
    layout, single = joint.layout(case.shapes[1]), base.layout(case.shapes[1])
    if cut:
        layout, single = layout.cut([[1]] * len(layout.names)), single.cut([[1]])
    given = inputs(base, single)
    return [*parts(joint(*alike(layout, given), layout=layout), layout)], base(*given, layout=single)


@every_family
@pytest.mark.parametrize("streams", [2, 3])
@pytest.mark.parametrize("attends", [True, False], ids=["seeing", "blind"])
@torch.no_grad()
def test_equal_streams_each_give_what_the_base_gives(case: Case, streams: int, attends: bool) -> None:
    joint = case.model(streams, attends=attends)
    zero(joint, "stream_embedding")
    inject(joint, LoraConfig(rank=3))
    for cut in (False, True):
        found, expected = _equal_streams(case, joint, cut=cut)
        for velocity in found:
            torch.testing.assert_close(velocity, expected, atol=1e-5, rtol=1e-5)


@every_family
@pytest.mark.parametrize("moved", [".lora_B", "stream_embedding"])
@torch.no_grad()
def test_a_twin_that_learned_something_gives_another_output(case: Case, moved: str) -> None:
    joint = case.model(2)
    zero(joint, "stream_embedding")
    inject(joint, LoraConfig(rank=3))
    move(joint, seed=1, names=moved)
    found, expected = _equal_streams(case, joint, cut=False)
    assert all(worst(velocity, expected) > 1e-3 for velocity in found)


@every_family
@pytest.mark.parametrize("attends", [True, False], ids=["seeing", "blind"])
@torch.no_grad()
def test_a_twin_whose_text_is_outweighed_is_caught(case: Case, attends: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A text that does not share the streams' softmax needs no weight."""
    joint = case.model(2, attends=attends)
    zero(joint, "stream_embedding")
    monkeypatch.setattr(Tokens, "text_weight", 1.0)
    found, expected = _equal_streams(case, joint, cut=False)
    assert (worst(found[-1], expected) > 1e-3) == case.text_flows()
    assert (worst(found[0], expected) > 1e-3) == (case.text_flows() and attends)


# -- a blind stream 0


@every_family
@pytest.mark.parametrize("cut", [False, True], ids=["one-time", "first-frame-apart"])
@torch.no_grad()
def test_rgb_that_does_not_see_its_companions_is_the_bases_under_any_adapter(case: Case, cut: bool) -> None:
    """The twin is the same adapter where RGB sees them."""
    blind, seeing = (case.model(2, attends=attends) for attends in (False, True))
    base = base_of(case, blind)
    for model in (blind, seeing):
        inject(model, LoraConfig(rank=3, scope="aux"))
        move(model, seed=1, names=".lora_")
        move(model, seed=2, names="stream_embedding")
    layout, single = blind.layout(case.shapes[1]), base.layout(case.shapes[1])
    if cut:
        layout, single = layout.cut([[1], [1]]), single.cut([[1]])
    x, times, *fields = inputs(blind, layout)
    own = x[:, : single.elements], times[:, : len(single.groups)]
    expected = base(*own, *fields, layout=single)
    rgb, aux = parts(blind(x, times, *fields, layout=layout), layout)
    torch.testing.assert_close(rgb, expected, atol=1e-5, rtol=1e-5)
    assert worst(parts(seeing(x, times, *fields, layout=layout), layout)[0], expected) > 1e-3
    assert worst(aux, expected) > 1e-2


# -- one stream is the published model


@really_every
@pytest.mark.parametrize("bucket", [0, 1])
def test_one_stream_is_the_published_model_forward_and_backward(case: Case, bucket: int) -> None:
    model = case.model()
    reference = case.reference(model)
    layout = model.layout(case.shapes[bucket])
    given = inputs(model, layout)
    found, expected = model(*given, layout=layout), reference.run(*given, layout=layout)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    (found * weights).sum().backward()
    (expected * weights).sum().backward()
    assert reference.weights.keys() == dict(model.named_parameters()).keys()
    gradients = {name: weight.grad for name, weight in reference.weights.items()}
    largest = max(float(theirs.abs().max()) for theirs in gradients.values() if theirs is not None)
    for name, theirs in gradients.items():
        mine = model.get_parameter(name).grad
        assert mine is not None and theirs is not None and theirs.any(), name
        assert worst(mine, theirs) < 1e-5 * largest, name


@really_every
@torch.no_grad()
def test_a_twin_with_one_parameter_moved_is_caught(case: Case) -> None:
    model = case.model()
    reference = case.reference(model)
    layout = model.layout(case.shapes[1])
    given = inputs(model, layout)
    expected = reference.run(*given, layout=layout)
    unseen = []
    for name, parameter in model.named_parameters():
        before = parameter.clone()
        parameter.view(-1)[0] += 0.2
        if worst(model(*given, layout=layout), expected) < 2e-5:
            unseen.append(name)
        parameter.copy_(before)
    assert not unseen
    torch.testing.assert_close(model(*given, layout=layout), expected, atol=1e-5, rtol=1e-5)
