"""Spellings of adapter files, ours and those of ComfyUI, diffusers and kohya: names go in, keys come out, and back.

A format is a prefix, one of the family's spellings of modules, and the endings of the three tensors. A joint adapter,
which acts on some streams only, is kept from programs that know no streams by a prefix of its own: they refuse it, or
find nothing of theirs in it, instead of patching weights that all streams share. Where streams have matrices of their
own, that prefix says whose they are: `transpixeler.stream.seg.diffusion_model.blocks.0.…`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from transpixeler.adapters.adapter import MAGNITUDE, linear_of, stream_of, target_of
from transpixeler.models.names import Names, UnknownName

OURS = "transpixeler."  # of header keys, of a joint adapter's keys, and of what is no LoRA weight
EMBEDDING = f"{OURS}stream_embedding."
_MARK = re.compile(r"transpixeler\.(?:stream\.([\w-]+)\.)?")  # of a joint adapter's keys; of a stream's own matrices
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "base_model.model.")
_FLAT_PREFIX = "lora_unet_"
DORA_SCALE = ".dora_scale"
CHANGE, BIAS_CHANGE = "change", "bias change"  # kinds of keys beside those of `Adapter.tensors`, and alpha
SCALED_BIAS_CHANGE = "scaled bias"  # PEFT multiplies it by alpha / rank, as the matrices
_ENDINGS = {
    ".lora_A.weight": "lora_A",
    ".lora_B.weight": "lora_B",
    ".lora_down.weight": "lora_A",
    ".lora_up.weight": "lora_B",
    ".lora_A.default.weight": "lora_A",
    ".lora_B.default.weight": "lora_B",
    ".lora.down.weight": "lora_A",
    ".lora.up.weight": "lora_B",
    ".alpha": "alpha",
    DORA_SCALE: MAGNITUDE,
    ".lora_magnitude_vector": MAGNITUDE,
    ".lora_magnitude_vector.weight": MAGNITUDE,
    ".diff": CHANGE,
    ".w_norm": CHANGE,
    ".diff_m": CHANGE,  # of a table named `modulation`, which the key leaves out
    ".diff_b": BIAS_CHANGE,
    ".b_norm": BIAS_CHANGE,
    ".lora_B.bias": SCALED_BIAS_CHANGE,
}
_TABLE_OF = {".diff_m": "modulation"}


class Spelling(NamedTuple):
    """A format's names of a target's tensors; without an alpha key the scale is folded into `up`."""

    prefix: str
    modules: str  # the family's spelling of modules: original, diffusers or flat
    down: str
    up: str
    alpha: str | None
    magnitude: str = DORA_SCALE

    def module(self, target: str, names: Names) -> str:
        """Return the stored name of the module that a target names internally."""
        return self.prefix + names.module(linear_of(target), source="internal", to=self.modules)


def mark(target: str) -> str:
    """Return what keeps a joint adapter's keys from other programs, with the stream whose own matrices they are of."""
    stream = stream_of(target)
    return f"{OURS}stream.{stream}." if stream else OURS


FORMATS = {
    "transpixeler": Spelling("diffusion_model.", "original", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "comfyui": Spelling("diffusion_model.", "original", ".lora_A.weight", ".lora_B.weight", ".alpha"),
    "diffusers": Spelling(
        "transformer.", "diffusers", ".lora_A.weight", ".lora_B.weight", None, ".lora_magnitude_vector"
    ),
    "kohya": Spelling(_FLAT_PREFIX, "flat", ".lora_down.weight", ".lora_up.weight", ".alpha"),
}


class Key(NamedTuple):
    """The key of a tensor in its parts."""

    before: str  # the prefixes, ours first
    stream: str  # whose own matrices they are of, where it says so
    module: str  # in the family's spelling
    ending: str
    flat: bool

    @property
    def kind(self) -> str:
        return _ENDINGS[self.ending]


def split_key(key: str) -> Key:
    """`transformer.blocks.0.ffn.0.lora_A.weight` → (`transformer.`, ``, `blocks.0.ffn.0`, `.lora_A.weight`, False)."""
    ending = next((ending for ending in _ENDINGS if key.endswith(ending)), None)
    if ending is None:
        raise UnknownName(key)
    marked = _MARK.match(key)
    ours, stream = (marked[0], marked[1] or "") if marked else ("", "")
    module = key.removesuffix(ending).removeprefix(ours)
    flat = module.startswith(_FLAT_PREFIX)
    if ending in _TABLE_OF:
        module += ("_" if flat else ".") + _TABLE_OF[ending]
    prefix = _FLAT_PREFIX if flat else next((prefix for prefix in _PREFIXES if module.startswith(prefix)), "")
    return Key(ours + prefix, stream, module.removeprefix(prefix), ending, flat)


def parse(key: str, names: Names) -> tuple[str, str]:
    """`lora_unet_blocks_0_ffn_0.lora_down.weight` → (`blocks.0.ffn.0`, `lora_A`), in any spelling of the family."""
    parts = split_key(key)
    flat = parts.flat and names.module(parts.module, source="flat", to="internal")
    return target_of(flat or names.read_module(parts.module), parts.stream), parts.kind


def is_known(key: str, names: Names) -> bool:
    try:
        return bool(parse(key, names))
    except UnknownName:
        return False
