"""Several streams through one model: the two truths, a slow reference, timesteps of their own."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.models import NAMES, TINY, base_of, inputs, move, tiny, wan_model, without_embeddings
from tests.support.reference import Reference
from transpixeler.config.sections import LoraConfig, UserError
from transpixeler.families.wan import model as wan
from transpixeler.families.wan.model import WanModel
from transpixeler.models import backbone
from transpixeler.models.attention import attention
from transpixeler.models.lora import inject
from transpixeler.models.streams import LAST, Segment, StreamLayout, scope_span, span_slice
from transpixeler.models.tokens import Tokens

SHAPE = (4, 2, 4, 6)
UNEQUAL = ((4, 2, 4, 6), (4, 2, 2, 4), (4, 1, 4, 6))


def adapted(streams: int, *, attends: bool = True, scope: str = "aux", zero_b: bool = False) -> WanModel:
    """A joint model whose adapter and stream embeddings are all moved, or B alone left at zero."""
    model = tiny(streams, attends=attends)
    scope = "all" if streams == 1 else scope
    inject(model, LoraConfig(rank=3, alpha=6.0, scope=scope))
    move(model, seed=7, names=".lora_A" if zero_b else ".lora_")
    if zero_b:
        without_embeddings(model)
    else:
        move(model, seed=8, names="stream_embedding")
    return model


def one_stream(model: WanModel, x: Tensor, timesteps: Tensor, text: Tensor) -> Tensor:
    """The base model on one stream's latents [B, C, F, H, W]."""
    single = base_of(model)
    return single(x.flatten(1), timesteps[:, None], text, layout=single.layout(x.shape[1:]))


def same_in_every_stream(model: WanModel, streams: int) -> tuple[Tensor, Tensor, Tensor, StreamLayout]:
    layout = model.layout(SHAPE)
    x, timesteps, text = inputs(layout)
    alike = layout.unpack(x)[0].flatten(1).repeat(1, streams)
    return alike, timesteps[:, :1].repeat(1, streams), text, layout


@pytest.mark.parametrize("name", ["keys", "forward", "training"])
def test_a_name_that_torch_has_for_something_else_is_refused(name: str) -> None:
    with pytest.raises(UserError, match=f"streams: '{name}' is torch's"):
        wan_model(TINY, streams=("rgb", name))
    assert wan_model(TINY, streams=("forward", "backward"))


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("streams", [1, 2, 3])
@torch.no_grad()
def test_truth_one_alike_streams_give_the_base_models_output(streams: int, attends: bool) -> None:
    model = adapted(streams, attends=attends, zero_b=True)
    x, timesteps, text, layout = same_in_every_stream(model, streams)
    expected = one_stream(model, layout.unpack(x)[0], timesteps[:, 0], text)
    for velocity in layout.unpack(model(x, timesteps, text, layout=layout)):
        torch.testing.assert_close(velocity.flatten(1), expected, atol=1e-5, rtol=1e-5)


def move_embedding(model: WanModel) -> None:
    torch.nn.init.normal_(model.embed.stream_embedding["seg"])


def move_b(model: WanModel) -> None:
    move(model, seed=1, names="lora_B")


def continue_positions(model: WanModel) -> None:
    shared = model.positions

    def positions(layout: StreamLayout, device: torch.device) -> wan.Tokens:
        f, h, w = layout.grids[0]
        places = [torch.arange(n, dtype=torch.float64) for n in (2 * f, h, w)]
        longer = wan.rope_table(places, TINY["attention_head_dim"])
        return shared(layout, device)._replace(rope=longer)

    model.positions = positions


@pytest.mark.parametrize("break_it", [move_embedding, move_b, continue_positions])
@torch.no_grad()
def test_truth_one_sees_what_is_broken(break_it) -> None:
    model = adapted(2, zero_b=True)
    x, timesteps, text, layout = same_in_every_stream(model, 2)
    break_it(model)
    expected = one_stream(model, layout.unpack(x)[0], timesteps[:, 0], text)
    found = layout.unpack(model(x, timesteps, text, layout=layout))[1].flatten(1)
    assert (found - expected).abs().max() > 1e-3


def first_stream(model: WanModel) -> tuple[Tensor, Tensor]:
    """Stream 0's output and the base model's, with other latents and other timesteps in the other streams."""
    layout = model.layout(SHAPE)
    x, timesteps, text = inputs(layout)
    found = layout.unpack(model(x, timesteps, text, layout=layout))[0].flatten(1)
    return found, one_stream(model, layout.unpack(x)[0], timesteps[:, 0], text)


@pytest.mark.parametrize("streams", [2, 3])
@torch.no_grad()
def test_truth_two_rgb_is_the_base_models_whatever_the_adapter(streams: int) -> None:
    torch.testing.assert_close(*first_stream(adapted(streams, attends=False)), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("broken", [{"attends": True}, {"attends": False, "scope": "all"}])
@torch.no_grad()
def test_truth_two_sees_what_is_broken(broken: dict) -> None:
    found, expected = first_stream(adapted(2, **broken))
    assert (found - expected).abs().max() > 1e-3


def slow(model: WanModel, layout: StreamLayout, *, attends: bool, scope: tuple[int, ...]) -> Reference:
    weights = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    targets = {name.removesuffix(".lora_A").split(".", 2)[2] for name in weights if name.endswith("lora_A")}
    heads, freq = TINY["num_attention_heads"], TINY["freq_dim"]
    return Reference(
        weights,
        layout,
        heads=heads,
        freq_dim=freq,
        attends=attends,
        scopes=dict.fromkeys(targets, scope),
        lora_scale=2.0,
    )


def compare(model: WanModel, reference: Reference, layout: StreamLayout) -> None:
    """Outputs and every gradient, of the input as well, but of RGB's where RGB runs forward only."""
    x, timesteps, text = inputs(layout)
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    found = layout.unpack(model(ours, timesteps, text, layout=layout))
    expected = reference(layout.unpack(theirs), timesteps, text)
    generator = torch.Generator().manual_seed(5)
    weights = [torch.randn(part.shape, generator=generator) / part.numel() ** 0.5 for part in found]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)
    sum((part * weight).sum() for part, weight in zip(found, weights, strict=True)).backward()
    sum((part * weight).sum() for part, weight in zip(expected, weights, strict=True)).backward()
    unasked = layout.sizes[0] if model.rgb_forward_only else 0
    torch.testing.assert_close(ours.grad[:, unasked:], theirs.grad[:, unasked:], atol=1e-5, rtol=1e-5)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.grad, reference.w[name].grad, atol=1e-5, rtol=1e-4, msg=name)
        else:
            assert parameter.grad is None, name


@pytest.mark.parametrize("attends", [True, False])
@pytest.mark.parametrize("shapes", [(SHAPE,), (SHAPE,) * 2, (SHAPE,) * 3, UNEQUAL], ids=["1", "2", "3", "unequal"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_outputs_and_all_gradients_equal_the_slow_reference(shapes, attends: bool, lora: bool) -> None:
    streams = len(shapes)
    layout = StreamLayout(NAMES[:streams], tuple(shapes), (1, 2, 2))
    model = adapted(streams, attends=attends) if lora else tiny(streams, attends=attends)
    scope = tuple(range(1, streams)) or (0,)
    compare(model, slow(model, layout, attends=attends, scope=scope), layout)


SCALED = StreamLayout(NAMES[:2], ((4, 3, 8, 4), (4, 3, 4, 2)), (1, 2, 2), scales=(1, 2))
SEGMENTED = SCALED.with_lasts((0, 1))
BETWEEN = SCALED.with_beside([(0, 3), (1, LAST)], 9)  # frames 3 and 6 of 9, at the latent times 0.75 and 1.5


@pytest.mark.parametrize("layout", [SEGMENTED, BETWEEN], ids=["lasts", "between"])
@pytest.mark.parametrize("attends", [True, False])
def test_a_companion_at_another_scale_and_frames_beside_equal_the_slow_reference(
    attends: bool, layout: StreamLayout
) -> None:
    model = adapted(2, attends=attends)
    compare(model, slow(model, layout, attends=attends, scope=(1,)), layout)


def test_frames_beside_stand_at_their_own_times_among_latent_frames() -> None:
    assert [one.times for one in BETWEEN.beside] == [(0.75, 1.5), (2.0,)]
    assert [segment.shape for segment in BETWEEN.segments] == [(4, 3, 8, 4), (4, 2, 8, 4), (4, 3, 4, 2), (4, 1, 4, 2)]
    assert SCALED.with_beside([(0, 9)], 9) == SCALED, "frame 9 is not there"


@pytest.mark.parametrize("broken", ["scale", "beside"])
def test_the_slow_reference_sees_a_segment_in_another_place(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, positions = adapted(2), Segment.positions
    right, usual = slow(model, SEGMENTED, attends=True, scope=(1,)), {"scale": 1, "beside": None}[broken]
    monkeypatch.setattr(Segment, "positions", lambda segment: positions(segment._replace(**{broken: usual})))
    with pytest.raises(AssertionError):
        compare(model, right, SEGMENTED)


@pytest.mark.parametrize("broken", ["attention", "scope"])
def test_the_slow_reference_sees_what_is_broken(broken: str) -> None:
    layout = StreamLayout(NAMES[:2], (SHAPE,) * 2, (1, 2, 2))
    model = adapted(2)
    wrong = slow(model, layout, attends=broken != "attention", scope=(0, 1) if broken == "scope" else (1,))
    with pytest.raises(AssertionError):
        compare(model, wrong, layout)


def cut_between_streams(monkeypatch, lengths: tuple[int, ...]) -> None:
    def cut(q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, _: Tensor | None) -> Tensor:
        parts = zip(*(x.split(lengths, dim=1) for x in (q, k, v)), strict=True)
        return torch.cat([attention(*part, tokens.kernel) for part in parts], dim=1)

    monkeypatch.setattr(backbone, "self_attention", cut)


@pytest.mark.parametrize("shapes", [(SHAPE,) * 2, UNEQUAL], ids=["equal", "unequal"])
@torch.no_grad()
def test_each_stream_has_its_own_timestep(monkeypatch, shapes) -> None:
    streams = len(shapes)
    model = without_embeddings(tiny(streams))
    layout = StreamLayout(NAMES[:streams], tuple(shapes), model.patch)
    x, timesteps, text = inputs(layout)
    expected = [one_stream(model, part, timesteps[:, s], text) for s, part in enumerate(layout.unpack(x))]
    joined = layout.unpack(model(x, timesteps, text, layout=layout))
    assert (joined[0].flatten(1) - expected[0]).abs().max() > 1e-3, "the streams saw nothing of each other"
    cut_between_streams(monkeypatch, layout.lengths)
    for velocity, alone in zip(layout.unpack(model(x, timesteps, text, layout=layout)), expected, strict=True):
        torch.testing.assert_close(velocity.flatten(1), alone, atol=1e-5, rtol=1e-5)


def test_modulation_is_never_made_per_token() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.untyped_storage().nbytes() // 4 >= 6 * tokens * 48:
                large.append((func, out.shape))
            return out

    large: list = []
    model = tiny(2, ffn_dim=48)
    layout = model.layout((4, 4, 16, 16))
    tokens = layout.tokens
    with Sizes(), torch.no_grad():
        model(*inputs(layout, batch=1), layout=layout)
    assert large == []


# -- the layout itself


def test_pack_and_unpack_are_views_of_one_tensor() -> None:
    layout = StreamLayout(NAMES, UNEQUAL, (1, 2, 2))
    packed = torch.randn(2, layout.elements)
    parts = layout.unpack(packed)
    assert [tuple(part.shape[1:]) for part in parts] == list(UNEQUAL)
    assert torch.equal(layout.pack(parts), packed)
    parts[1].zero_()
    assert packed[:, layout.element_slice(1)].abs().sum() == 0
    assert packed[:, layout.element_slice(2)].abs().sum() > 0


def test_slices_cover_the_sequence_in_order() -> None:
    layout = StreamLayout(NAMES, UNEQUAL, (1, 2, 2))
    assert layout.lengths == (12, 4, 6)
    scopes = [*NAMES, "aux", "all", ("rgb", "seg")]
    found = [span_slice(layout.lengths, scope_span(scope, NAMES)) for scope in scopes]
    assert [(part.start, part.stop) for part in found] == [(0, 12), (12, 16), (16, 22), (12, 22), (0, 22), (0, 16)]
    assert layout.grids[2] == (1, 2, 3)


def test_spread_puts_a_streams_number_on_its_elements() -> None:
    layout = StreamLayout(NAMES, UNEQUAL, (1, 2, 2))
    spread = layout.spread(torch.tensor([[1.0, 2.0, 3.0]]))
    assert spread.shape == (1, layout.elements)
    assert [part.unique().item() for part in layout.unpack(spread)] == [1, 2, 3]


def test_segments_and_their_groups_stand_in_the_order_of_the_sequence() -> None:
    layout = SEGMENTED.cut([[1], []])
    assert layout.lengths == (24 + 8, 6 + 2) and layout.segment_lengths == (24, 8, 6, 2)
    groups = [(group.stream, group.start, group.end, group.alone) for group in layout.groups]
    assert groups == [(0, 0, 1, False), (0, 1, 3, False), (0, 0, 1, True), (1, 0, 3, False), (1, 0, 1, True)]
    assert layout.group_lengths == (8, 16, 8, 6, 2) and layout.group_sizes == (128, 256, 128, 96, 32)
    packed = layout.spread(torch.arange(5.0)[None])
    assert [part.unique().tolist() for part in layout.split_groups(packed)] == [[n] for n in range(5)]
    assert [tuple(video.shape[1:]) for video in layout.videos(packed)] == [*layout.shapes]
    assert torch.equal(layout.pack(layout.unpack(packed)), packed)
    ones = StreamLayout(NAMES[:2], (SHAPE,) * 2, (1, 2, 2), scales=(1, 1))
    assert ones == StreamLayout.equal(NAMES[:2], SHAPE, (1, 2, 2))


def test_layouts_are_equal_and_hash_by_value() -> None:
    one, other = (StreamLayout.equal(["rgb", "seg"], [4, 2, 4, 6], [1, 2, 2]) for _ in range(2))
    assert one.lengths == (12, 12)
    assert one == other
    assert {one: 1}[other] == 1


@pytest.mark.parametrize(
    ("scope", "words"),
    [
        (("rgb", "depth"), "next to each other"),
        (("alpha",), "no stream 'alpha'; there are rgb, seg, depth"),
        ((), "next to each other"),
    ],
)
def test_a_scope_that_cannot_be_is_named(scope: tuple[str, ...], words: str) -> None:
    with pytest.raises(UserError, match=words):
        scope_span(scope, NAMES)


def test_aux_of_one_stream_is_refused() -> None:
    with pytest.raises(UserError, match="use `all`"):
        scope_span("aux", ["rgb"])
