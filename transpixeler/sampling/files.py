"""A generated sample goes in as one array a stream; files that players, editors and browsers open come out.

Always: an mp4 a stream, a still grid, and sample.json with the settings that made it. By choice: files with the alpha
inside, or laid over a background. The folder appears under its name only when all of it is whole.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from transpixeler.config.sections import UserError
from transpixeler.data.media import decode
from transpixeler.data.media.clip import Clip
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.exr import write_exr_sequence
from transpixeler.data.media.light import decoded
from transpixeler.data.media.write import (
    write_browser_mp4,
    write_png,
    write_png_sequence,
    write_prores4444,
    write_webm_alpha,
)
from transpixeler.files import whole

FACTS = "sample.json"
STILL = "still.png"
Plate = Callable[[], Iterator[np.ndarray]]  # yields float32 [H,W,3] of linear light, a frame at a time
CHECKER_SIDE = 8  # pixels
CHECKER_LIGHT, CHECKER_DARK = 204, 153
HISTOGRAM_BINS = 64  # four levels each: the first is transparent, the last opaque
GRID_GAP = 4  # white pixels between the pictures of a grid


def write_sample(
    folder: Path,
    streams: Mapping[str, np.ndarray],
    *,
    fps: Fraction,
    formats: Sequence[str],
    alpha_mode: str,
    background: str = "",
    transfer: str = "srgb",
    plate: Plate | None = None,
    facts: Mapping[str, Any],
) -> dict[str, Path]:
    """Write uint8 [F,H,W,3] streams in place of a sample that was there; returns paths by stream or format.

    transfer: the curve between pictures and linear light. plate: the first stream's light, where it was given as such.
    The first stream is RGB and the second its alpha. Without a second one, formats that show alpha are left out.
    """
    sample = _Sample(streams, fps, alpha_mode, background, transfer, plate)
    with whole(folder) as unfinished:
        unfinished.mkdir()
        files = {name: f"{name}.mp4" for name in streams}
        for name, frames in streams.items():
            write_browser_mp4(unfinished / files[name], frames, fps=fps, exact=True, facts={"stream": name})
        write_png(unfinished / STILL, sample.still())
        for name in formats if sample.alpha is not None else ():
            file, write = _FORMATS[name]
            write(sample, unfinished / file)
            files[name] = file
        files["still"] = STILL
        sizes = {file: bytes_of(unfinished / file) for file in files.values()}
        said = {**facts, **sample.facts(), "files": files, "bytes": sizes}
        (unfinished / FACTS).write_text(json.dumps(said, indent=1, ensure_ascii=False), encoding="utf-8")
    return {name: folder / file for name, file in files.items()} | {"facts": folder / FACTS}


def bytes_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    return sum(file.stat().st_size for file in path.iterdir()) if path.is_dir() else path.stat().st_size


def picked_frames(count: int) -> list[int]:
    """Return the numbers of the frames that a still shows: the first, the middle and the last."""
    return sorted({0, count // 2, count - 1})


def alpha_of(aux: np.ndarray) -> np.ndarray:
    """Return alpha uint8 [F,H,W]: the mean of an aux stream's channels, which are equal once a matte is learned."""
    return np.rint(aux.mean(-1, dtype=np.float32)).astype(np.uint8)


def histogram(alpha: np.ndarray) -> list[float]:
    """Return the share of pixels of alpha uint8 [F,H,W] in each bin."""
    counts = sum(np.bincount(frame.ravel() >> 2, minlength=HISTOGRAM_BINS) for frame in alpha)
    return [float(f"{count / alpha.size:.4g}") for count in np.asarray(counts)]


def over(rgb: np.ndarray, alpha: np.ndarray, ground: np.ndarray) -> np.ndarray:
    """Lay straight colour over a ground: uint8 [...,H,W,3]."""
    share = alpha[..., None].astype(np.float32) / 255
    return np.rint(rgb * share + ground * (1 - share)).astype(np.uint8)


def checkerboard(height: int, width: int) -> np.ndarray:
    """Draw the ground uint8 [H,W,3] that everyone reads as transparent."""
    y, x = np.mgrid[0:height, 0:width] // CHECKER_SIDE
    return np.where((x + y) % 2, CHECKER_DARK, CHECKER_LIGHT).astype(np.uint8)[..., None].repeat(3, axis=2)


@dataclass(frozen=True)
class _Sample:
    """Everything that the formats are made from."""

    streams: Mapping[str, np.ndarray]
    fps: Fraction
    alpha_mode: str
    background: str
    transfer: str = "srgb"
    plate: Plate | None = None

    @property
    def rgb(self) -> np.ndarray:
        return next(iter(self.streams.values()))

    @property
    def aux(self) -> np.ndarray | None:
        return next(iter([*self.streams.values()][1:]), None)

    @property
    def alpha(self) -> np.ndarray | None:
        return None if self.aux is None else alpha_of(self.aux)

    @property
    def matte(self) -> np.ndarray:
        """Return the aux stream, for formats that are written only where there is one."""
        assert self.aux is not None
        return self.aux

    @property
    def tags(self) -> dict[str, str]:
        """Name the alpha mode in a tag, as formats have no field for it that readers agree on."""
        return {"alpha": self.alpha_mode}

    def facts(self) -> dict[str, Any]:
        frames, height, width, _ = self.rgb.shape
        size = {"width": width, "height": height, "frames": frames, "fps": str(self.fps)}
        found = {"streams": list(self.streams), **size, "alpha_mode": None if self.aux is None else self.alpha_mode}
        return found if self.alpha is None else {**found, "alpha_histogram": histogram(self.alpha)}

    def frames(self, *, deep: bool = False) -> Iterator[np.ndarray]:
        """Yield frames [H,W,4] in the alpha mode, uint8 or, `deep`, uint16."""
        kind, top = (np.uint16, 65535) if deep else (np.uint8, 255)
        for rgb, aux in zip(self.rgb, self.matte, strict=True):
            alpha = aux.mean(-1, dtype=np.float32) if deep else alpha_of(aux)
            share = alpha[..., None] / 255 if self.alpha_mode == "premultiplied" else 1.0
            color = rgb * np.asarray(share, np.float32)
            yield np.rint(np.concatenate([color, alpha[..., None]], axis=2) * (top / 255)).astype(kind)

    def linear_frames(self) -> Iterator[np.ndarray]:
        """Yield float32 frames [H,W,4] of linear light in the alpha mode."""
        for light, aux in zip(self._light(), self.matte, strict=True):
            alpha = aux.mean(-1, dtype=np.float32)[..., None] / 255
            color = light * alpha if self.alpha_mode == "premultiplied" else light
            yield np.concatenate([color, alpha], axis=2)

    def _light(self) -> Iterator[np.ndarray]:
        if self.plate is not None:
            return self.plate()
        return (decoded(rgb / np.float32(255), self.transfer) for rgb in self.rgb)

    def laid_over(self, grounds: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
        return (over(rgb, alpha_of(aux), ground) for rgb, aux, ground in zip(self.rgb, self.matte, grounds))

    def still(self) -> np.ndarray:
        """Lay out the first, middle and last frame: a row for each stream, and one over a checkerboard."""
        count, height, width, _ = self.rgb.shape
        picked = picked_frames(count)
        rows = [frames[picked] for frames in self.streams.values()]
        if self.alpha is not None:
            rows.append(over(self.rgb[picked], self.alpha[picked], checkerboard(height, width)))
        return _grid(rows)


def _grid(rows: Sequence[np.ndarray]) -> np.ndarray:
    columns, height, width, _ = rows[0].shape
    tall, wide = height + GRID_GAP, width + GRID_GAP
    grid = np.full((len(rows) * tall - GRID_GAP, columns * wide - GRID_GAP, 3), 255, np.uint8)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            grid[y * tall : y * tall + height, x * wide : x * wide + width] = picture
    return grid


# --- the formats by choice -------------------------------------------------------------------------------------------


def _write_mov(sample: _Sample, path: Path) -> None:
    write_prores4444(path, sample.frames(), fps=sample.fps, facts=sample.tags)


def _write_webm(sample: _Sample, path: Path) -> None:
    write_webm_alpha(path, sample.frames(), fps=sample.fps, facts=sample.tags)


def _write_png(sample: _Sample, path: Path) -> None:
    write_png_sequence(path, sample.frames(), facts=sample.tags)


def _write_png16(sample: _Sample, path: Path) -> None:
    write_png_sequence(path, sample.frames(deep=True), facts=sample.tags)


def _write_exr(sample: _Sample, path: Path) -> None:
    origin = "the given files" if sample.plate else f"pictures by the curve of {sample.transfer}"
    facts = {"comments": f"linear light, from {origin}"}
    write_exr_sequence(path, sample.linear_frames(), fps=sample.fps, alpha_mode=sample.alpha_mode, facts=facts)


def _write_checkerboard(sample: _Sample, path: Path) -> None:
    count, height, width, _ = sample.rgb.shape
    grounds = iter([checkerboard(height, width)] * count)
    write_browser_mp4(path, sample.laid_over(grounds), fps=sample.fps, exact=False, facts={"ground": "checkerboard"})


def _write_composite(sample: _Sample, path: Path) -> None:
    ground = Path(sample.background).name
    write_browser_mp4(path, sample.laid_over(_plate(sample)), fps=sample.fps, exact=False, facts={"ground": ground})


_FORMATS: dict[str, tuple[str, Callable[[_Sample, Path], None]]] = {
    "mov": ("rgba.mov", _write_mov),
    "webm": ("rgba.webm", _write_webm),
    "png": ("png", _write_png),
    "png16": ("png16", _write_png16),
    "exr": ("exr", _write_exr),
    "checkerboard": ("checkerboard.mp4", _write_checkerboard),
    "composite": ("composite.mp4", _write_composite),
}


def _plate(sample: _Sample) -> Iterator[np.ndarray]:
    """Yield the background at the sample's size and rate, from the start again when it ends."""
    count, height, width, _ = sample.rgb.shape
    plate = read_background(sample.background, fps=sample.fps, frames=count, height=height, width=width)
    return (plate[number % len(plate)] for number in range(count))


def read_background(background: str, *, fps: Fraction, frames: int, height: int, width: int) -> np.ndarray:
    """Read a background's first frames, at most `frames`: uint8 [n,H,W,3]."""
    path = Path(background)
    try:
        length = min(frames, decode.probe(path).frames_at(fps))
        clip = Clip(path.name, Fraction(0), length, fps, height, width)
        return decode.read_frames(path, decode.frame_numbers(path, clip), height=height, width=width)
    except BadMedia as fault:
        raise UserError(f"sample.background: {path} {fault}; give a picture or video that can be read") from None
