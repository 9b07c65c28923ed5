"""Read and write OpenEXR: a file in; its colour and alpha as floats of linear light, in the display window, out.

Needs the package OpenEXR (the extra `exr`). Half and float, any compression, several parts or layers; no deep data.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from transpixeler.config.sections import UserError
from transpixeler.data.media.errors import MAX_PIXELS, BadMedia, as_bad_media, check_size
from transpixeler.data.media.light import REC709, Light, encoded, straightened, to_bytes, to_rec709
from transpixeler.files import whole

INSTALL = "needs the package OpenEXR; pip install 'transpixeler[exr]'"
ALPHA_MODE = "alphaMode"  # our attribute: straight or premultiplied; without it a file is premultiplied
COLOR_LAYERS = ("rgba", "rgb", "beauty", "combined", "color", "colour", "c")  # of several, the one to take
ALPHA_LAYERS = ("alpha", "matte", "mask", "a")  # parts, layers or channels with the alpha of another one
SQUARE = 0.01  # by which pixels may be wider or taller and count as square


class Layer(NamedTuple):
    """Channels of one part under one name: letter or name → the channel's full name."""

    part: int
    name: str  # of the layer or, without one, of the part
    channels: dict[str, str]


@dataclass(frozen=True)
class Linear:
    """One picture in linear light."""

    rgb: np.ndarray  # float32 [H,W,3], in BT.709's primaries
    alpha: np.ndarray | None  # float32 [H,W]
    premultiplied: bool

    def picture(self, light: Light, *, alpha: bool) -> np.ndarray:
        """Return uint8 [H,W,4], straight, where alpha is asked for and there; else the colour as it is stored."""
        if self.alpha is None or not alpha:
            return to_bytes(encoded(self.rgb, light.curve))
        multiplied = self.premultiplied if light.alpha == "auto" else light.alpha == "premultiplied"
        rgb = straightened(self.rgb, self.alpha) if multiplied else self.rgb
        planes = [encoded(rgb, light.curve), encoded(self.alpha, "data")[..., None]]
        return to_bytes(np.concatenate(planes, axis=2))


def library() -> Any:
    """Return the module OpenEXR, which has no types."""
    try:
        import OpenEXR
    except ImportError:
        return None
    return OpenEXR


def look(path: Path) -> tuple[int, int, bool]:
    """Return height, width and whether there is alpha, from the header alone."""
    with as_bad_media():
        parts = _opened(path, header_only=True).parts
        _, alpha = _layers(parts)
        left, top, right, bottom = _window(parts[0].header["displayWindow"])
        for part in parts:
            x, y, x_end, y_end = _window(part.header["dataWindow"])
            if (x_end - x) * (y_end - y) > MAX_PIXELS:  # all of it is unpacked
                raise BadMedia(f"holds {x_end - x}×{y_end - y} pixels, more than {MAX_PIXELS >> 20} Mpixel")
    check_size(right - left, bottom - top)
    return bottom - top, right - left, alpha is not None


def read(path: Path) -> Linear:
    """Return a file's picture; what its data window leaves out is 0."""
    look(path)
    with as_bad_media():
        parts = _opened(path, separate_channels=True).parts
        if len(parts) < len(_opened(path, header_only=True).parts):  # the library leaves out what it cannot decode
            raise BadMedia("is damaged: its pixels cannot be decoded; copy or render the file again")
        color, alpha = _layers(parts)
        names = color.channels
        picked = [names[letter] for letter in ("RGB" if "R" in names else "YYY")]
        rgb = np.stack([_plane(parts, color.part, name) for name in picked], axis=2)
        header = parts[color.part].header
        multiplied = header.get(ALPHA_MODE, parts[0].header.get(ALPHA_MODE)) != "straight"
        plane = None if alpha is None else _plane(parts, *alpha)
        return Linear(to_rec709(rgb, header.get("chromaticities")), plane, multiplied)


def picture(path: Path, light: Light, *, alpha: bool) -> np.ndarray:
    """Return uint8 [H,W,3 or 4]."""
    return read(path).picture(light, alpha=alpha)


def _opened(path: Path, **how: bool) -> Any:
    exr = library()
    if exr is None:
        raise BadMedia(f"is OpenEXR, which {INSTALL}")
    try:
        return exr.File(str(path), **how)
    except RuntimeError as error:
        raise BadMedia(f"cannot be read as OpenEXR: {' '.join(str(error).split())[-120:]}") from error


def _layers(parts: Any) -> tuple[Layer, tuple[int, str] | None]:
    """Return the layer of colour, and the part and name of the channel of its alpha."""
    exr = library()
    deep = (exr.deepscanline, exr.deeptile)
    layers = [layer for n, part in enumerate(parts) if part.header["type"] not in deep for layer in _of_part(n, part)]
    if not layers:
        raise BadMedia("holds deep data, which is not read; flatten it")
    color = _color(layers)
    own = color.channels.get("A") or next((color.channels[n] for n in color.channels if n.lower() in ALPHA_LAYERS), "")
    if own:
        return color, (color.part, own)
    for layer in layers:
        if layer.name.lower() in ALPHA_LAYERS and layer is not color:
            picked = layer.channels.get("A") or layer.channels.get("Y") or next(iter(layer.channels.values()))
            return color, (layer.part, picked)
    return color, None


def _of_part(number: int, part: Any) -> Iterator[Layer]:
    found: dict[str, dict[str, str]] = {}
    for channel in part.header["channels"]:
        if (channel.xSampling, channel.ySampling) == (1, 1):
            layer, _, last = channel.name.rpartition(".")
            found.setdefault(layer, {})[last.upper() if len(last) == 1 else last] = channel.name
    for layer, channels in found.items():
        yield Layer(number, layer.rpartition(".")[2] or part.name() or "", channels)


def _color(layers: list[Layer]) -> Layer:
    """Choose the layer of colour: the one without a name, or of a name that stands for it, or the only one."""
    found = [one for one in layers if {"R", "G", "B"} <= set(one.channels)]
    found = found or [one for one in layers if "Y" in one.channels]
    plain = [one for one in found if not one.name]
    named = [one for name in COLOR_LAYERS for one in found if one.name.lower() == name]
    if not found:
        names = ", ".join(name for one in layers for name in one.channels.values())
        raise BadMedia(f"has no channels R, G and B, nor Y, at full size; it has {names[:120]}")
    if not plain and not named and len(found) > 1:
        names = ", ".join(one.name for one in found)
        raise BadMedia(f"has several layers of colour ({names[:120]}), of which none is named rgba, beauty or Combined")
    return (plain or named or found)[0]


def _plane(parts: Any, number: int, name: str) -> np.ndarray:
    """Return one channel float32 [H,W] in the first part's display window."""
    part, first = parts[number], parts[0].header
    if abs(first["pixelAspectRatio"] - 1) > SQUARE:
        raise BadMedia(f"has pixels of {first['pixelAspectRatio']:g}:1; scale it to square ones")
    pixels = part.channels[name].pixels
    if pixels.dtype.kind != "f":
        raise BadMedia(f"has whole numbers in its channel {name}; write it as half or float")
    left, top, right, bottom = _window(first["displayWindow"])
    x, y, x_end, y_end = _window(part.header["dataWindow"])
    out = np.zeros((bottom - top, right - left), np.float32)
    x_from, y_from, x_to, y_to = max(x, left), max(y, top), min(x_end, right), min(y_end, bottom)
    if x_from < x_to and y_from < y_to:
        shown = pixels[y_from - y : y_to - y, x_from - x : x_to - x]
        out[y_from - top : y_to - top, x_from - left : x_to - left] = shown
    return out


def _window(corners: Any) -> tuple[int, int, int, int]:
    """Return left, top, right and bottom; the last two are the first that lie outside."""
    (left, top), (right, bottom) = ([int(value) for value in corner] for corner in corners)
    return left, top, right + 1, bottom + 1


def check_library(key: str) -> None:
    """Refuse to begin what cannot be written."""
    if library() is None:
        raise UserError(f"{key}: exr {INSTALL}")


def write_exr_sequence(
    folder: Path,
    frames: Iterable[np.ndarray],
    *,
    fps: Fraction,
    alpha_mode: str,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write numbered files of half floats, linear light in BT.709's primaries, into a new folder.

    Frames are floats [H,W,3 or 4], alpha last; alpha_mode says whether their colour is multiplied by it.
    """
    check_library(str(folder))
    if folder.exists():
        raise UserError(f"{folder}: already exists; an EXR sequence needs a folder of its own")
    exr = library()
    with whole(folder) as unfinished:
        unfinished.mkdir(parents=True)
        for number, frame in enumerate(frames):
            header = {
                "type": exr.scanlineimage,
                "compression": exr.ZIP_COMPRESSION,
                "chromaticities": REC709,
                "framesPerSecond": fps,
                ALPHA_MODE: alpha_mode,
                **(facts or {}),
            }
            name = "RGBA" if frame.shape[2] == 4 else "RGB"
            planes = {letter: np.ascontiguousarray(frame[..., n], np.float16) for n, letter in enumerate(name)}
            exr.File(header, planes).write(str(unfinished / f"{number:05d}.exr"))
