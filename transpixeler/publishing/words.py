"""Say what each measure means, for the pages and the model card."""

from __future__ import annotations

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Measure:
    """One measure of a video, as people read it."""

    title: str
    about: str
    more: bool = False  # more is better
    alone: bool = False  # needs no reference


MEASURES = {
    "mad": Measure("MAD", "mean absolute difference"),
    "mse": Measure("MSE", "mean squared error"),
    "sad": Measure("SAD", "sum of absolute differences"),
    "grad": Measure("Grad", "gradient error"),
    "conn": Measure("Conn", "connectivity error"),
    "dtssd": Measure("dtSSD", "temporal error"),
    "iou": Measure("IoU", "overlap at one half", more=True),
    "psnr": Measure("PSNR", "of colour, in dB", more=True),
    "rgb_drift": Measure("RGB drift", "RGB against the base's"),
    "vae_psnr": Measure("VAE PSNR", "the VAE's own round trip", more=True),
    "channel_spread": Measure("channel spread", "colour left in the matte", alone=True),
    "edge_alignment": Measure("edge alignment", "matte edges on picture edges", more=True, alone=True),
    "fill_deviation": Measure("fill deviation", "colour under zero alpha", alone=True),
    "holes": Measure("holes", "see-through inside shapes", alone=True),
    "flicker": Measure("flicker", "comes and goes", alone=True),
}


def plain() -> dict[str, dict[str, str | bool]]:
    """Return the measures as JSON has them."""
    return {name: asdict(measure) for name, measure in MEASURES.items()}


def in_words(name: str) -> str:
    """Return a measure's name with its meaning, and an arrow to its better end."""
    known = MEASURES.get(name)
    if known is None:
        return name.replace("_", " ")
    return f"{known.title} {'↑' if known.more else '↓'}, {known.about}"
