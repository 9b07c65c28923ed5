"""Read DPX through PyAV: a file in; its picture as uint8 out. Video and linear ones; film's logarithmic are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from transpixeler.data.media.errors import BadMedia, as_bad_media, check_size
from transpixeler.data.media.light import Light, encoded, to_bytes

TRANSFER, CREATOR = 801, slice(160, 260)  # where they lie in the header
LINEAR, LOGARITHMIC = 2, (1, 3)  # transfer characteristics
CARELESS = b"Lavc"  # older FFmpegs say `linear` of any picture


def look(path: Path) -> tuple[int, int, bool]:
    """Return height, width and whether there is alpha."""
    pixels, _ = _read(path)
    return pixels.shape[0], pixels.shape[1], pixels.shape[2] == 4


def picture(path: Path, light: Light, *, alpha: bool) -> np.ndarray:
    """Return uint8 [H,W,3], or [H,W,4] where alpha is asked for and there."""
    pixels, linear = _read(path)
    values = pixels.astype(np.float32) / 65535
    if linear:
        values[..., :3] = encoded(values[..., :3], light.curve)
    return to_bytes(values if alpha else values[..., :3])


def _read(path: Path) -> tuple[np.ndarray, bool]:
    """Return uint16 [H,W,3 or 4], and whether it is linear light."""
    import av

    with as_bad_media():
        with path.open("rb") as file:
            header = file.read(2048)
        if len(header) < 2048:
            raise BadMedia("is no DPX file: its header is cut off")
        if header[TRANSFER] in LOGARITHMIC:
            raise BadMedia("is logarithmic, as film is scanned; convert it to Rec. 709, or to linear light as EXR")
        with av.open(f"file:{path}", format="dpx_pipe", options={"protocol_whitelist": "file"}) as container:
            context = container.streams.video[0].codec_context
            check_size(context.width, context.height)
            frame = next(container.decode(video=0), None)
        if frame is None:
            raise BadMedia("has no picture that can be decoded")
        alpha = any(part.is_alpha for part in frame.format.components)
        pixels = frame.to_ndarray(format="rgba64le" if alpha else "rgb48le")
    return pixels, header[TRANSFER] == LINEAR and not header[CREATOR].startswith(CARELESS)
