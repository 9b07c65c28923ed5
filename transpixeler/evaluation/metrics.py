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

LUMA = (0.2126, 0.7152, 0.0722)  # BT.709
SIGMA = 1.4  # of Grad's Gaussian derivatives
STEP = 0.1  # between Conn's thresholds
TOLERANCE = 0.15  # distance from connectedness that Conn forgives
HIDDEN = 5 / 255  # alpha up to here shows nothing: a decoded zero is never quite zero
FLAT = 1 / 255  # a luma gradient up to here is no edge
BEST_PSNR = 100.0


def alpha_metrics(
    rgb: Values,
    aux: Values,
    *,
    reference_alpha: Values | None = None,
    fill: Sequence[float] | None = None,
) -> dict[str, float]:
    """All that is known of one sample, of its RGB and its aux stream [F,H,W,3]; more with a reference."""
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
    """Mean absolute difference."""
    return _mean(np.abs(_difference(alpha, reference)))


def mse(alpha: Values, reference: Values) -> float:
    """Mean squared error."""
    return _mean(_difference(alpha, reference) ** 2)


def sad(alpha: Values, reference: Values) -> float:
    """Sum of absolute differences (Rhemann et al. 2009), in thousands, per frame."""
    difference = np.abs(_difference(alpha, reference))
    return float(difference.sum(dtype=np.float64)) / len(difference) / 1000


def grad(alpha: Values, reference: Values) -> float:
    """Gradient error (Rhemann et al. 2009): squared difference of the gradients' lengths, taken with Gaussian
    derivatives of sigma 1.4, summed, in thousands, per frame."""
    pairs = zip(_array(alpha), _array(reference), strict=True)
    return _per_frame([((_steepness(a) - _steepness(b)) ** 2).sum() for a, b in pairs])


def conn(alpha: Values, reference: Values) -> float:
    """Connectivity error (Rhemann et al. 2009): how much further the alpha is from being connected with the largest
    region that both mattes hold opaque, over thresholds in steps of 0.1, summed, in thousands, per frame."""
    pairs = zip(_array(alpha), _array(reference), strict=True)
    return _per_frame([_connectivity_error(a, b) for a, b in pairs])


def dtssd(alpha: Values, reference: Values) -> float:
    """Temporal error (Erofeev et al. 2015): root mean square of the difference of the frame-to-frame changes, mean over
    the changes."""
    changes = np.diff(_difference(alpha, reference).astype(np.float64), axis=0)
    return float(np.sqrt((changes**2).mean((1, 2))).mean()) if len(changes) else math.nan


def iou(alpha: Values, reference: Values) -> float:
    """Intersection over union of what is at least half opaque; two empty mattes agree."""
    ours, theirs = _array(alpha) >= 0.5, _array(reference) >= 0.5
    union = np.count_nonzero(ours | theirs)
    return np.count_nonzero(ours & theirs) / union if union else 1.0


def psnr(values: Values, reference: Values) -> float:
    """Peak signal-to-noise ratio in dB; 100 at most, so that equal videos have a number."""
    return min(BEST_PSNR, -10 * math.log10(max(mse(values, reference), 1e-12)))


def rgb_drift(rgb: Values, base: Values) -> float:
    """Mean absolute difference from the base model's RGB of the same seed."""
    return mad(rgb, base)


# --- without a reference ---------------------------------------------------------------------------------------------


def channel_spread(aux: Values) -> float:
    """Largest minus smallest channel, mean over pixels: 0 for a grey matte, more where the stream still is RGB."""
    aux = _array(aux)
    return _mean(aux.max(-1) - aux.min(-1))


def edge_alignment(alpha: Values, rgb: Values) -> float:
    """How far the matte's edges run along the picture's: |cosine| between their gradients, weighted by the matte's;
    an edge where the picture has none counts 0."""
    total = weight = 0.0
    for a, luma in zip(_array(alpha), _array(rgb) @ np.array(LUMA, np.float32), strict=True):
        (ay, ax), (ly, lx) = np.gradient(_padded(a)), np.gradient(_padded(luma))
        steep, edge = np.hypot(ay, ax), np.hypot(ly, lx)
        along = np.abs(ay * ly + ax * lx) / np.maximum(edge, FLAT)  # |∇alpha| · |cos|
        total += float(np.where(edge > FLAT, along, 0).sum(dtype=np.float64))
        weight += float(steep.sum(dtype=np.float64))
    return total / weight if weight else math.nan


def fill_deviation(rgb: Values, alpha: Values, fill: Sequence[float] | None = None) -> float:
    """Mean absolute difference from the fill colour where nothing is shown; from that region's own mean colour where
    no fill is given, which says whether it is flat."""
    hidden = _array(rgb)[_array(alpha) <= HIDDEN].astype(np.float64)
    if not len(hidden):
        return math.nan
    ground = hidden.mean(0) if fill is None else np.asarray(fill, np.float64)
    return _mean(np.abs(hidden - ground))


def holes(alpha: Values) -> float:
    """Share of the shapes' area that is see-through yet closed in: less than half opaque, and not connected with the
    frame's border. A ring has a hole by right: compare with the reference's."""
    closed = solid = 0
    for frame in _array(alpha):
        regions = label_regions(frame < 0.5)
        border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
        closed += np.count_nonzero((regions > 0) & ~np.isin(regions, border))
        solid += np.count_nonzero(regions == 0)
    return closed / (closed + solid) if closed + solid else 0.0


def flicker(alpha: Values) -> float:
    """What comes and goes from one frame to the next: the lesser of the changes before and after a frame where they
    have opposite signs, mean over pixels. What moves or fades steadily does not flicker."""
    changes = np.diff(_array(alpha), axis=0)
    if len(changes) < 2:
        return math.nan
    before, after = changes[:-1], changes[1:]
    return _mean(np.where(before * after < 0, np.minimum(np.abs(before), np.abs(after)), 0))


# --- the parts -------------------------------------------------------------------------------------------------------


def _array(values: Values) -> np.ndarray:
    """float32, on the host."""
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
    """One pixel more on each side, so that a line of one pixel at the border has gradients too."""
    return np.pad(frame, 1, mode="edge")


def _steepness(frame: np.ndarray) -> np.ndarray:
    """[H,W]: length of the gradient under Gaussian derivatives, the border repeated."""
    reach = math.ceil(SIGMA * math.sqrt(-2 * math.log(math.sqrt(2 * math.pi) * SIGMA * 0.01)))
    at = np.arange(-reach, reach + 1)
    gauss = np.exp(-(at**2) / (2 * SIGMA**2)) / (SIGMA * math.sqrt(2 * math.pi))
    slope = -at * gauss / SIGMA**2
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
    connected = np.ones(alpha.shape)  # the highest threshold up to which a pixel hangs together with the largest region
    unknown = np.ones(alpha.shape, bool)
    lesser = np.minimum(alpha, reference)
    for number in range(1, round(1 / STEP) + 1):
        lost = unknown & ~largest_region(lesser >= number / 10)
        connected[lost] = (number - 1) / 10
        unknown &= ~lost
    return float(np.abs(_connectedness(alpha - connected) - _connectedness(reference - connected)).sum())


def _connectedness(distance: np.ndarray) -> np.ndarray:
    return 1 - np.where(distance >= TOLERANCE, distance, 0)
