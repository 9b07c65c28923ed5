"""A sample's alpha and colour go in as values in [0,1], numbers that say how good they are come out: pure functions.

Alpha is [F,H,W] and RGB [F,H,W,3], arrays or tensors on any device. Measures against a reference follow the literature
of video matting; sums over pixels (SAD, Grad, Conn) are in thousands and per frame, as its tables give them. Where a
measure has no meaning (flicker of a still, edges of an empty matte) it is NaN, and `alpha_metrics` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
from torch import Tensor

from transpixeler.evaluation.regions import label_regions, largest_region

Values: TypeAlias = np.ndarray | Tensor

BT709_LUMA = (0.2126, 0.7152, 0.0722)
GRAD_SIGMA = 1.4  # of Grad's Gaussian derivatives
CONN_STEP = 0.1  # between Conn's thresholds
CONN_TOLERANCE = 0.15  # distance from connectedness that Conn ignores
TRANSPARENT_ALPHA = 5 / 255  # alpha up to here counts as zero: a decoded zero is never quite zero
EDGE_GRADIENT = 1 / 255  # a luma gradient up to here is no edge
PSNR_OF_EQUALS = 100.0  # instead of infinity


def alpha_metrics(
    rgb: Values,
    aux: Values,
    *,
    reference_alpha: Values | None = None,
    fill: Sequence[float] | None = None,
) -> dict[str, float]:
    """Measure one sample's RGB and aux stream [F,H,W,3], also against a reference where there is one."""
    rgb, aux = _array(rgb), _array(aux)
    alpha = aux.mean(-1)
    found = {
        "channel_spread": channel_spread(aux),
        "edge_alignment": edge_alignment(alpha, rgb),
        "fill_deviation": fill_deviation(rgb, alpha, fill),
        "holes": holes(alpha),
        "flicker": flicker(alpha),
    }
    if reference_alpha is not None:
        measures = {"mad": mad, "mse": mse, "sad": sad, "grad": grad, "conn": conn, "dtssd": dtssd, "iou": iou}
        found |= {name: measure(alpha, reference_alpha) for name, measure in measures.items()}
    return {name: value for name, value in found.items() if math.isfinite(value)}


# --- against a reference ---------------------------------------------------------------------------------------------


def mad(alpha: Values, reference: Values) -> float:
    """Return the mean absolute difference."""
    return _mean(np.abs(_difference(alpha, reference)))


def mse(alpha: Values, reference: Values) -> float:
    """Return the mean squared error."""
    return _mean(_difference(alpha, reference) ** 2)


def sad(alpha: Values, reference: Values) -> float:
    """Return the sum of absolute differences (Rhemann et al. 2009), in thousands, per frame."""
    difference = np.abs(_difference(alpha, reference))
    return float(difference.sum(dtype=np.float64)) / len(difference) / 1000


def grad(alpha: Values, reference: Values) -> float:
    """Return the gradient error (Rhemann et al. 2009), in thousands, per frame.

    It sums the squared differences of the gradients' lengths, taken with Gaussian derivatives of sigma 1.4.
    """
    pairs = zip(_array(alpha), _array(reference), strict=True)
    return _per_frame([((_gradient_length(a) - _gradient_length(b)) ** 2).sum() for a, b in pairs])


def conn(alpha: Values, reference: Values) -> float:
    """Return the connectivity error (Rhemann et al. 2009), in thousands, per frame.

    It sums how differently the two mattes are connected with the largest region that is opaque in both, over
    thresholds in steps of 0.1.
    """
    pairs = zip(_array(alpha), _array(reference), strict=True)
    return _per_frame([_connectivity_error(a, b) for a, b in pairs])


def dtssd(alpha: Values, reference: Values) -> float:
    """Return the temporal error (Erofeev et al. 2015): the root mean square difference of frame-to-frame changes.

    It is the mean over the changes.
    """
    changes = np.diff(_difference(alpha, reference).astype(np.float64), axis=0)
    return float(np.sqrt((changes**2).mean((1, 2))).mean()) if len(changes) else math.nan


def iou(alpha: Values, reference: Values) -> float:
    """Return the intersection over union of what is at least half opaque: 1 for two empty mattes."""
    ours, theirs = _array(alpha) >= 0.5, _array(reference) >= 0.5
    union = np.count_nonzero(ours | theirs)
    return np.count_nonzero(ours & theirs) / union if union else 1.0


def psnr(values: Values, reference: Values) -> float:
    """Return the peak signal-to-noise ratio in dB: 100 at most, so that equal videos have a number."""
    return min(PSNR_OF_EQUALS, -10 * math.log10(max(mse(values, reference), 1e-12)))


def rgb_drift(rgb: Values, base: Values) -> float:
    """Return the mean absolute difference from the base model's RGB of the same seed."""
    return mad(rgb, base)


# --- without a reference ---------------------------------------------------------------------------------------------


def channel_spread(aux: Values) -> float:
    """Return largest minus smallest channel, mean over pixels: 0 for a grey matte, more where it still is RGB."""
    aux = _array(aux)
    return _mean(aux.max(-1) - aux.min(-1))


def edge_alignment(alpha: Values, rgb: Values) -> float:
    """Return how well the matte's edges follow the picture's: |cosine| of their gradients, weighted by the matte's.

    An edge where the picture has none counts 0.
    """
    total = weight = 0.0
    for a, luma in zip(_array(alpha), _array(rgb) @ np.array(BT709_LUMA, np.float32), strict=True):
        (ay, ax), (ly, lx) = np.gradient(_padded(a)), np.gradient(_padded(luma))
        steep, edge = np.hypot(ay, ax), np.hypot(ly, lx)
        along = np.abs(ay * ly + ax * lx) / np.maximum(edge, EDGE_GRADIENT)  # |∇alpha| · |cos|
        total += float(np.where(edge > EDGE_GRADIENT, along, 0).sum(dtype=np.float64))
        weight += float(steep.sum(dtype=np.float64))
    return total / weight if weight else math.nan


def fill_deviation(rgb: Values, alpha: Values, fill: Sequence[float] | None = None) -> float:
    """Return the mean absolute difference from the fill colour where alpha is zero.

    Without a fill it is the difference from that region's own mean colour, which tells whether the region is flat.
    """
    hidden = _array(rgb)[_array(alpha) <= TRANSPARENT_ALPHA].astype(np.float64)
    if not len(hidden):
        return math.nan
    ground = hidden.mean(0) if fill is None else np.asarray(fill, np.float64)
    return _mean(np.abs(hidden - ground))


def holes(alpha: Values) -> float:
    """Return the share of the shapes' area that is a hole: less than half opaque, and cut off from the frame's border.

    A ring has one too, rightly: compare with the reference's value.
    """
    closed = solid = 0
    for frame in _array(alpha):
        regions = label_regions(frame < 0.5)
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        closed += np.count_nonzero((regions > 0) & ~np.isin(regions, border))
        solid += np.count_nonzero(regions == 0)
    return closed / (closed + solid) if closed + solid else 0.0


def flicker(alpha: Values) -> float:
    """Return how much comes and goes from frame to frame, mean over pixels.

    Where the changes before and after a frame have opposite signs, the lesser one counts: steady motion or fading does
    not.
    """
    changes = np.diff(_array(alpha), axis=0)
    if len(changes) < 2:
        return math.nan
    before, after = changes[:-1], changes[1:]
    return _mean(np.where(before * after < 0, np.minimum(np.abs(before), np.abs(after)), 0))


# --- the parts -------------------------------------------------------------------------------------------------------


def _array(values: Values) -> np.ndarray:
    """Convert to float32 on the host."""
    if isinstance(values, Tensor):
        values = values.detach().float().cpu().numpy()
    return np.asarray(values, np.float32)


def _difference(values: Values, reference: Values) -> np.ndarray:
    ours, theirs = _array(values), _array(reference)
    assert ours.shape == theirs.shape, f"{ours.shape} against {theirs.shape}"
    return ours - theirs


def _mean(values: np.ndarray) -> float:
    return float(values.mean(dtype=np.float64))


def _per_frame(sums: Sequence[float]) -> float:
    return float(sum(sums)) / len(sums) / 1000


def _padded(frame: np.ndarray) -> np.ndarray:
    """Add a pixel on each side, so that a line of one pixel at the border has gradients too."""
    return np.pad(frame, 1, mode="edge")


def _gradient_length(frame: np.ndarray) -> np.ndarray:
    """Return the gradient's length [H,W] under Gaussian derivatives, with the border repeated."""
    reach = math.ceil(GRAD_SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * GRAD_SIGMA * 0.01)))
    at = np.arange(-reach, reach + 1)
    gauss = np.exp(-(at**2) / (2 * GRAD_SIGMA**2)) / (GRAD_SIGMA * math.sqrt(2 * math.pi))
    slope = -at * gauss / GRAD_SIGMA**2
    norm = math.sqrt((gauss**2).sum() * (slope**2).sum())
    padded = np.pad(frame.astype(np.float64), reach, mode="edge")
    across = _filtered(_filtered(padded, slope, axis=1), gauss, axis=0)
    down = _filtered(_filtered(padded, gauss, axis=1), slope, axis=0)
    return np.hypot(across, down) / norm


def _filtered(frame: np.ndarray, kernel: np.ndarray, *, axis: int) -> np.ndarray:
    length = frame.shape[axis] - len(kernel) + 1
    parts = (np.take(frame, range(i, i + length), axis=axis) * weight for i, weight in enumerate(kernel))
    return sum(parts, np.zeros(()))


def _connectivity_error(alpha: np.ndarray, reference: np.ndarray) -> float:
    alpha, reference = alpha.astype(np.float64), reference.astype(np.float64)
    connected = np.ones(alpha.shape)  # the highest threshold at which a pixel still is in the largest region
    unknown = np.ones(alpha.shape, bool)
    lesser = np.minimum(alpha, reference)
    for number in range(1, round(1 / CONN_STEP) + 1):
        lost = unknown & ~largest_region(lesser >= number / 10)
        connected[lost] = (number - 1) / 10
        unknown &= ~lost
    return float(np.abs(_connectedness(alpha - connected) - _connectedness(reference - connected)).sum())


def _connectedness(distance: np.ndarray) -> np.ndarray:
    return 1 - np.where(distance >= CONN_TOLERANCE, distance, 0)
