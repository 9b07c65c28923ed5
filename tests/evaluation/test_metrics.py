"""Each measure against values worked out by hand, its formula spelled out slowly, and what must hold of it."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from transpixeler.evaluation import metrics, regions

AGAINST = [metrics.mad, metrics.mse, metrics.sad, metrics.grad, metrics.conn, metrics.dtssd]
IN_BYTES = st.integers(0, 255).map(lambda byte: np.float32(byte / 255))
SHAPES = st.tuples(st.integers(2, 3), st.integers(1, 7), st.integers(1, 7))


@st.composite
def pairs(draw) -> tuple[np.ndarray, np.ndarray]:
    """Two mattes [F,H,W]; steep ones and blank ones are common."""
    shape = draw(SHAPES)
    element = draw(st.sampled_from([IN_BYTES, st.sampled_from([np.float32(v) for v in (0, 0.1, 0.3, 0.55, 1)])]))
    a, b = (draw(arrays.arrays(np.float32, shape, elements=element)) for _ in range(2))
    return a, b


def frames(*rows: list[list[float]]) -> np.ndarray:
    return np.array(rows, np.float32)


def drawn(*lines: str) -> np.ndarray:
    """One frame [1,H,W]: # is opaque, + half, . nothing."""
    return frames([[{"#": 1.0, "+": 0.5, ".": 0.0}[c] for c in line] for line in lines])


# --- worked out by hand ----------------------------------------------------------------------------------------------


def test_differences_of_two_small_mattes() -> None:
    alpha, truth = frames([[1, 0.5], [0, 0]]), frames([[1, 0], [0.25, 0]])
    assert metrics.mad(alpha, truth) == pytest.approx(0.75 / 4)
    assert metrics.mse(alpha, truth) == pytest.approx((0.25 + 0.0625) / 4)
    assert metrics.sad(alpha, truth) == pytest.approx(0.75 / 1000)
    assert metrics.iou(alpha, truth) == 0.5  # two pixels are half opaque, one of them in the truth


def test_sums_are_per_frame() -> None:
    once, truth = frames([[1, 0.5], [0, 0]]), frames([[1, 0], [0.25, 0]])
    for measure in (metrics.sad, metrics.grad, metrics.conn):
        assert measure(once.repeat(3, 0), truth.repeat(3, 0)) == pytest.approx(measure(once, truth))


def test_dtssd_of_a_matte_that_jumps_where_the_truth_stands() -> None:
    truth = np.zeros((3, 2, 2), np.float32)
    alpha = truth.copy()
    alpha[1, 0, 0] = 0.8  # one pixel of four comes, and goes again
    assert metrics.dtssd(alpha, truth) == pytest.approx(math.sqrt(0.64 / 4))
    assert metrics.dtssd(truth + 0.3, truth) == pytest.approx(0, abs=1e-6)  # a constant error does not flicker
    assert math.isnan(metrics.dtssd(alpha[:1], truth[:1]))


def test_an_island_that_the_truth_has_not_costs_what_it_is_opaque() -> None:
    truth = drawn("##...", "##...", ".....")
    alpha = truth.copy()
    alpha[0, 2, 4] = 0.8
    # the island never hangs together with the square: its distance is 0.8 there, and 0 in the truth
    assert metrics.conn(alpha, truth) == pytest.approx(0.8 / 1000)
    alpha[0, 2, 4] = 0.1  # and what is this close to nothing is forgiven
    assert metrics.conn(alpha, truth) == 0


def test_iou_of_what_touches_nothing() -> None:
    assert metrics.iou(drawn("##.."), drawn("..##")) == 0
    assert metrics.iou(drawn("...."), drawn("....")) == 1
    assert metrics.iou(drawn("###."), drawn("#...")) == pytest.approx(1 / 3)


def test_psnr_and_drift() -> None:
    truth = np.full((2, 3, 3, 3), 0.5)
    assert metrics.psnr(truth + 0.1, truth) == pytest.approx(20, abs=1e-4)
    assert metrics.psnr(truth, truth) == 100
    assert metrics.rgb_drift(truth + 0.1, truth) == pytest.approx(0.1)


# --- without a reference ---------------------------------------------------------------------------------------------


def test_a_grey_matte_has_no_spread_and_a_red_one_has_all() -> None:
    grey, red = np.full((1, 2, 2, 3), 0.4), np.zeros((1, 2, 2, 3))
    red[..., 0] = 1
    assert (metrics.channel_spread(grey), metrics.channel_spread(red)) == (0, 1)


def test_edges_align_with_a_picture_that_has_the_same_edges() -> None:
    matte = np.zeros((1, 16, 16), np.float32)
    matte[:, 4:12, 4:12] = 1
    picture = np.repeat(1 - 0.5 * matte[..., None], 3, axis=3)
    assert metrics.edge_alignment(matte, picture) == pytest.approx(1, abs=1e-5)
    assert metrics.edge_alignment(matte, np.ones_like(picture)) == 0
    assert metrics.edge_alignment(matte, np.roll(picture, 6, axis=2)) < 0.4


def test_edges_at_right_angles_do_not_align() -> None:
    ramp = np.linspace(0, 1, 16, dtype=np.float32)
    across = np.broadcast_to(ramp, (1, 16, 16))
    down = np.repeat(np.broadcast_to(ramp[:, None], (1, 16, 16))[..., None], 3, axis=3)
    assert metrics.edge_alignment(across, down) == pytest.approx(0, abs=1e-6)
    assert math.isnan(metrics.edge_alignment(np.ones((1, 4, 4)), np.ones((1, 4, 4, 3))))


def test_the_fill_counts_only_under_zero_alpha() -> None:
    rgb = np.array([[[[0.1, 0.1, 0.1], [1, 1, 1], [0.3, 0.3, 0.3]]]])
    alpha = frames([[0, 1, 2 / 255]])  # the last is what a VAE makes of zero
    assert metrics.fill_deviation(rgb, alpha, (0, 0, 0)) == pytest.approx(0.2)
    assert metrics.fill_deviation(rgb, alpha) == pytest.approx(0.1)
    assert math.isnan(metrics.fill_deviation(rgb, np.ones((1, 1, 3))))


def test_a_ring_has_a_hole_and_a_horseshoe_has_none() -> None:
    ring = drawn(".......", ".#####.", ".#...#.", ".#...#.", ".#...#.", ".#####.", ".......")
    assert metrics.holes(ring) == pytest.approx(9 / 25)
    ring[0, 1, 3] = 0
    assert metrics.holes(ring) == 0
    assert metrics.holes(np.zeros((1, 3, 3))) == 0


def test_what_moves_or_fades_does_not_flicker_and_what_blinks_does() -> None:
    fade = np.linspace(0, 1, 5)[:, None, None] * np.ones((5, 4, 4))
    walk = np.stack([np.arange(8) < 2 + k for k in range(5)])[:, None, :].astype(float)
    blink = np.zeros((5, 4, 4))
    blink[2] = 0.6
    assert metrics.flicker(fade) == 0 and metrics.flicker(walk) == 0
    assert metrics.flicker(blink) == pytest.approx(0.6 / 3)
    assert math.isnan(metrics.flicker(blink[:2]))


# --- the formulas, spelled out ---------------------------------------------------------------------------------------


def slow_regions(mask: np.ndarray, *, corners: bool = False) -> np.ndarray:
    """Flood fill from each pixel in reading order."""
    steps = [(0, 1), (1, 0), (0, -1), (-1, 0)] + ([(1, 1), (1, -1), (-1, 1), (-1, -1)] if corners else [])
    labels = np.zeros(mask.shape, int)
    for y, x in np.argwhere(mask):
        stack = [] if labels[y, x] else [(y, x)]
        name = labels.max() + 1
        while stack:
            at = stack.pop()
            inside = all(0 <= c < n for c, n in zip(at, mask.shape))
            if inside and mask[at] and not labels[at]:
                labels[at] = name
                stack += [(at[0] + dy, at[1] + dx) for dy, dx in steps]
    return labels


def slow_conn(alpha: np.ndarray, truth: np.ndarray, *, corners: bool = False) -> float:
    total = 0.0
    for a, b in zip(alpha.astype(float), truth.astype(float)):
        level = np.full(a.shape, -1.0)
        for i in range(1, 11):
            labels = slow_regions((a >= i / 10) & (b >= i / 10), corners=corners)
            sizes = [np.sum(labels == name) for name in range(1, labels.max() + 1)]
            omega = labels == 1 + int(np.argmax(sizes)) if sizes else np.zeros(a.shape, bool)
            level[(level == -1) & ~omega] = (i - 1) / 10
        level[level == -1] = 1
        phi = [1 - (v - level) * ((v - level) >= 0.15) for v in (a, b)]
        total += np.abs(phi[0] - phi[1]).sum()
    return total / len(alpha) / 1000


def slow_grad(alpha: np.ndarray, truth: np.ndarray, *, sigma: float = 1.4) -> float:
    half = math.ceil(sigma * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * sigma * 0.01)))

    def gauss(x: float) -> float:
        return math.exp(-(x**2) / (2 * sigma**2)) / (sigma * math.sqrt(2 * math.pi))

    span = range(-half, half + 1)
    kernel = np.array([[gauss(i) * -j * gauss(j) / sigma**2 for j in span] for i in span])
    kernel /= math.sqrt((kernel**2).sum())

    def amplitude(frame: np.ndarray) -> np.ndarray:
        height, width = frame.shape
        out = np.zeros(frame.shape)
        for y in range(height):
            for x in range(width):
                rows = [min(max(y + i, 0), height - 1) for i in span]
                columns = [min(max(x + j, 0), width - 1) for j in span]
                window = frame[np.ix_(rows, columns)]
                out[y, x] = math.hypot((window * kernel).sum(), (window * kernel.T).sum())
        return out

    both = zip(alpha.astype(float), truth.astype(float))
    return sum(((amplitude(a) - amplitude(b)) ** 2).sum() for a, b in both) / len(alpha) / 1000


def slow_dtssd(alpha: np.ndarray, truth: np.ndarray) -> float:
    found = []
    for t in range(1, len(alpha)):
        squares = [
            (float(alpha[t][p]) - float(alpha[t - 1][p]) - float(truth[t][p]) + float(truth[t - 1][p])) ** 2
            for p in np.ndindex(alpha.shape[1:])
        ]
        found.append(math.sqrt(sum(squares) / len(squares)))
    return sum(found) / len(found)


@pytest.mark.parametrize(
    ("fast", "slow"), [(metrics.conn, slow_conn), (metrics.grad, slow_grad), (metrics.dtssd, slow_dtssd)]
)
@settings(max_examples=25, deadline=None)
@given(pairs())
def test_the_fast_way_is_the_formula(fast: Callable, slow: Callable, pair: tuple[np.ndarray, np.ndarray]) -> None:
    assert fast(*pair) == pytest.approx(slow(*pair), rel=1e-4, abs=1e-7)


def test_another_formula_would_be_noticed() -> None:
    diagonal, truth = drawn("##...", "##...", "..#..", "....."), drawn("##...", "##...", "..#..", ".....")
    diagonal[0, 2, 2], truth[0, 2, 2] = 0.22, 0.33  # it touches the square by a corner
    assert metrics.conn(diagonal, truth) == pytest.approx(slow_conn(diagonal, truth))
    assert slow_conn(diagonal, truth, corners=True) != pytest.approx(slow_conn(diagonal, truth))
    assert slow_grad(diagonal, truth, sigma=1.0) != pytest.approx(metrics.grad(diagonal, truth), rel=1e-2)


@settings(max_examples=150, deadline=None)
@given(arrays.arrays(bool, st.tuples(st.integers(1, 12), st.integers(1, 12))))
def test_regions_by_runs_are_those_of_a_flood_fill(mask: np.ndarray) -> None:
    labels = slow_regions(mask)
    assert (regions.label_regions(mask) == labels).all()
    if mask.any():
        assert (regions.largest_region(mask) == (labels == 1 + np.bincount(labels[labels > 0] - 1).argmax())).all()


def test_a_spiral_is_one_region_and_a_chessboard_has_one_for_each_square() -> None:
    spiral = drawn("#######", "......#", "#####.#", "#...#.#", "#.###.#", "#.....#", "#######")[0] > 0
    assert regions.label_regions(spiral).max() == 1
    board = np.indices((6, 6)).sum(0) % 2 == 0
    assert regions.label_regions(board).max() == 18
    assert not regions.largest_region(np.zeros((3, 3), bool)).any()


# --- what must hold --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("measure", AGAINST)
@settings(max_examples=25, deadline=None)
@given(pairs())
def test_a_measure_is_zero_for_equal_symmetric_and_never_negative(measure: Callable, pair: tuple) -> None:
    alpha, truth = pair
    assert measure(alpha, alpha) == 0
    assert measure(alpha, truth) == pytest.approx(measure(truth, alpha), abs=1e-9)
    assert measure(alpha, truth) >= 0


@settings(max_examples=50, deadline=None)
@given(pairs(), st.integers(1, 5))
def test_empty_margins_change_no_sum_and_dilute_each_mean(pair: tuple, margin: int) -> None:
    ring = ((0, 0), (8, 8), (8, 8))  # within reach of Grad's filter, a margin is not yet empty
    alpha, truth = (np.pad(matte, ring) for matte in pair)
    wide = [np.pad(matte, ((0, 0), (margin, 2), (0, margin))) for matte in (alpha, truth)]
    for measure in (metrics.sad, metrics.grad, metrics.conn, metrics.iou):
        assert measure(*wide) == pytest.approx(measure(alpha, truth), rel=1e-6, abs=1e-9)
    area = alpha[0].size / wide[0][0].size
    assert metrics.mad(*wide) == pytest.approx(metrics.mad(alpha, truth) * area, rel=1e-5, abs=1e-9)
    assert metrics.mse(*wide) == pytest.approx(metrics.mse(alpha, truth) * area, rel=1e-5, abs=1e-9)
    assert metrics.dtssd(*wide) == pytest.approx(metrics.dtssd(alpha, truth) * math.sqrt(area), rel=1e-5, abs=1e-9)


def test_all_that_is_known_of_a_sample_in_one_table() -> None:
    generator = torch.Generator().manual_seed(0)
    rgb, aux = (torch.rand(4, 12, 10, 3, generator=generator) for _ in range(2))
    alone = {"channel_spread", "edge_alignment", "fill_deviation", "holes", "flicker"}
    against = {"mad", "mse", "sad", "grad", "conn", "dtssd", "iou"}
    alpha = torch.rand(4, 12, 10, generator=generator)
    aux[:, 0] = 0  # somewhere nothing is shown
    assert set(metrics.alpha_metrics(rgb, aux)) == alone
    full = metrics.alpha_metrics(rgb, aux, reference_alpha=alpha)
    assert set(full) == alone | against
    assert full["mad"] == metrics.mad(aux.mean(-1), alpha)
    same = metrics.alpha_metrics(rgb.numpy(), aux.numpy(), reference_alpha=alpha.double())
    assert same == pytest.approx(full, rel=1e-5)


def test_what_has_no_meaning_is_left_out() -> None:
    still = metrics.alpha_metrics(np.ones((1, 8, 8, 3)), np.ones((1, 8, 8, 3)), reference_alpha=np.ones((1, 8, 8)))
    assert set(still) == {"channel_spread", "holes", "mad", "mse", "sad", "grad", "conn", "iou"}


def test_half_precision_from_a_device_is_measured_in_full() -> None:
    alpha = torch.linspace(0, 1, 64).reshape(1, 8, 8).to(torch.bfloat16).requires_grad_()
    assert metrics.mad(alpha, alpha.detach().float()) == 0
