"""A seed goes in; captioned scenes come out, and from each its true RGBA frames: pairs whose every pixel is known.

One shape, anti-aliased and opaque or half transparent, drifts over nothing. Colours are straight: every pixel with any
alpha has the shape's own colour, which darkens within the last two pixels of its edge, and `FILL` stands under zero
alpha. So RGB over black, cut at half of the shape's brightness, is the same silhouette as alpha cut at half of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

FILL = (0, 0, 0)
# The mean of the channels, which is what alpha is read from, is below one half: a picture of a shape is not its alpha.
# White alone has a strength of one, so that a model of RGB can draw what looks like a matte, as large models can.
COLORS = {
    "red": (225, 35, 35),
    "green": (35, 190, 55),
    "blue": (45, 60, 230),
    "yellow": (190, 150, 10),
    "purple": (185, 20, 150),
    "cyan": (10, 165, 175),
    "white": (255, 255, 255),
}
DIRECTIONS = {"left": (-1.0, 0.0), "right": (1.0, 0.0), "up": (0.0, -1.0), "down": (0.0, 1.0)}
# Half transparent stays well above one half, so that a matte cut at 0.5 still holds the shape.
OPACITIES = {"opaque": 1.0, "half transparent": 0.7}


@dataclass(frozen=True)
class Attributes:
    """Everything that a caption says."""

    shape: str
    color: str
    direction: str
    opacity: str

    @property
    def caption(self) -> str:
        return f"a {self.color} {self.shape} drifts {self.direction}, {self.opacity}"

    @property
    def held_out(self) -> bool:
        """Keep one combination in six for eval; each pair of its values is still seen in training."""
        places = (
            list(SHAPES).index(self.shape),
            list(COLORS).index(self.color),
            list(DIRECTIONS).index(self.direction),
        )
        return sum(places) % 6 == 0


@dataclass(frozen=True)
class Format:
    """A clip's size and rate; one frame is an image."""

    width: int
    height: int
    frames: int
    fps: Fraction


@dataclass(frozen=True)
class Scene:
    """Everything that one clip is drawn from: lengths in pixels, speed in pixels a second."""

    attributes: Attributes
    format: Format
    radius: float
    start: tuple[float, float]
    speed: float
    tint: float


def all_attributes() -> tuple[Attributes, ...]:
    return tuple(Attributes(*values) for values in itertools.product(SHAPES, COLORS, DIRECTIONS, OPACITIES))


def scenes(count: int, *, formats: Sequence[Format], held_out: bool, seed: int) -> tuple[Scene, ...]:
    """Draw scenes that cover the training or the held-out combinations, and the formats, evenly."""
    rng = np.random.default_rng([seed, held_out])
    choices = [attributes for attributes in all_attributes() if attributes.held_out == held_out]
    order = [i for _ in range(0, count, len(choices)) for i in rng.permutation(len(choices))]
    return tuple(_scene(choices[order[i]], formats[i % len(formats)], rng) for i in range(count))


def render(scene: Scene) -> Iterator[np.ndarray]:
    """Yield the scene's frames, uint8 [H, W, 4] with straight alpha."""
    color = np.array(COLORS[scene.attributes.color]) * scene.tint
    opacity = OPACITIES[scene.attributes.opacity]
    for distance in _distances(scene):
        coverage, light = np.clip(0.5 - distance, 0, 1), np.clip(0.5 - 0.5 * distance, 0.25, 1)
        frame = np.empty((*distance.shape, 4), np.uint8)
        frame[..., 3] = np.rint(255 * opacity * coverage)
        frame[..., :3] = np.where(frame[..., 3:] > 0, np.rint(light[..., None] * color), FILL)
        yield frame


def heights(scene: Scene) -> Iterator[np.ndarray]:
    """Yield frames like depth, uint8 [H, W, 1]: how far each pixel rises; a dome over the shape, nothing beside it."""
    for distance in _distances(scene):
        dome = np.clip(0.35 - 1.3 * distance / scene.radius, 0, 1)
        yield np.rint(255 * dome * np.clip(0.5 - distance, 0, 1)).astype(np.uint8)[..., None]


def _distances(scene: Scene) -> Iterator[np.ndarray]:
    """Yield, for each frame, the distance [H, W] to the shape's edge in pixels, negative inside."""
    y, x = np.mgrid[0 : scene.format.height, 0 : scene.format.width] + 0.5
    for number in range(scene.format.frames):
        center_x, center_y = center(scene, number)
        yield SHAPES[scene.attributes.shape]((x - center_x) + 1j * (y - center_y), scene.radius)


def center(scene: Scene, number: int) -> tuple[float, float]:
    """Return where the shape is in one frame."""
    way = scene.speed * float(number / scene.format.fps)
    dx, dy = DIRECTIONS[scene.attributes.direction]
    return scene.start[0] + way * dx, scene.start[1] + way * dy


def _scene(attributes: Attributes, format: Format, rng: np.random.Generator) -> Scene:
    """Draw a start from which the shape crosses part of the frame and never leaves it."""
    side = min(format.width, format.height)
    radius = side * rng.uniform(0.3, 0.36)
    direction = DIRECTIONS[attributes.direction]
    duration = float((format.frames - 1) / format.fps)
    sizes, start = (format.width, format.height), [0.0, 0.0]
    speed = side * rng.uniform(0.3, 0.45)
    for axis, (size, sign) in enumerate(zip(sizes, direction)):
        room = size - 2 * radius
        if sign and speed * duration > room:
            speed = room / duration
        way = speed * duration * sign
        start[axis] = radius + max(0.0, -way) + rng.uniform(0, 1) * (room - abs(way))
    return Scene(attributes, format, radius, (start[0], start[1]), speed, tint=rng.uniform(0.7, 1.0))


# --- shapes: signed distance in pixels, negative inside, of points as complex numbers --------------------------------


def _circle(points: np.ndarray, radius: float) -> np.ndarray:
    return np.abs(points) - radius


def _ring(points: np.ndarray, radius: float) -> np.ndarray:
    return np.abs(np.abs(points) - 0.7 * radius) - 0.3 * radius


def _polygon(*corners: complex) -> Callable[[np.ndarray, float], np.ndarray]:
    """Return the distance to a polygon whose corners are at radius 1."""

    def distance(points: np.ndarray, radius: float) -> np.ndarray:
        x, y = np.real(points), np.imag(points)
        nearest = np.full(points.shape, np.inf)
        inside = np.zeros(points.shape, bool)
        for a, b in itertools.pairwise((*corners, corners[0])):
            a, edge = a * radius, (b - a) * radius
            along = np.clip(((points - a) * np.conj(edge)).real / abs(edge) ** 2, 0, 1)
            nearest = np.minimum(nearest, np.abs(points - a - along * edge))
            if edge.imag:
                crossing = a.real + (y - a.imag) * edge.real / edge.imag
                spans = (y < a.imag) != (y < a.imag + edge.imag)
                inside ^= spans & (x < crossing)
        return np.where(inside, -nearest, nearest)

    return distance


def _spokes(*lengths: float) -> tuple[complex, ...]:
    """Return corners at equal angles round the centre, the first straight up."""
    step = 2 * math.pi / len(lengths)
    return tuple(length * complex(math.sin(i * step), -math.cos(i * step)) for i, length in enumerate(lengths))


# Each is about as wide and as high as the others.
SHAPES: dict[str, Callable[[np.ndarray, float], np.ndarray]] = {
    "circle": _circle,
    "square": _polygon(*(0.8 * corner for corner in (-1 - 1j, 1 - 1j, 1 + 1j, -1 + 1j))),
    "triangle": _polygon(-1j, 1 + 1j, -1 + 1j),
    "ring": _ring,
    "star": _polygon(*(corner + 0.05j for corner in _spokes(*(1.05, 0.65) * 5))),
}
