"""Keep the light of a given OpenEXR clip: a request's files in; the frames that EXR files show as they were out."""

from __future__ import annotations

import logging
from fractions import Fraction
from pathlib import Path

from transpixeler.config.sections import Config
from transpixeler.data.media import exr
from transpixeler.data.media.clip import Clip, exact_rate
from transpixeler.data.media.decode import frame_numbers, probe
from transpixeler.data.media.files import ending_of, files_of
from transpixeler.data.prompts import GivenFiles
from transpixeler.data.sampled import frame_rate
from transpixeler.sampling.files import Plate

logger = logging.getLogger("transpixeler")


def given_light(given: GivenFiles, config: Config, size: tuple[int, int, int]) -> Plate | None:
    """Return the light of RGB that is OpenEXR of the size (F, H, W) that is sampled: EXR files keep it as it is."""
    path, (frames, height, width) = Path(given.rgb), size
    if "exr" not in config.sample.formats or not given.rgb or ending_of(path) != ".exr":
        return None
    media = probe(path).at_rate(exact_rate(config.data.sequence_fps or 0))
    if (media.height, media.width) != (height, width):
        logger.info(
            "%s: %s: has another size than --size, so EXR files hold its light in 8 bits", given.label("rgb"), path
        )
        return None
    clip = Clip(given.rgb, Fraction(0), frames, frame_rate(config), height, width)
    files, numbers = files_of(path), frame_numbers(path, clip, rate=media.fps)
    return lambda: (exr.read(files[number]).rgb for number in numbers)
