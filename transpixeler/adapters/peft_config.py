"""An adapter in PEFT's terms: the config that lies beside a file, and the one that diffusers reads in its header."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from transpixeler.adapters.adapter import Adapter, linear_of
from transpixeler.config.sections import UserError
from transpixeler.files import read_json
from transpixeler.models.names import pieces

CONFIG_FILE = "adapter_config.json"
IN_HEADER = "lora_adapter_metadata"


def most(values: Iterable[Any], default: Any) -> Any:
    return next((value for value, _ in Counter(values).most_common(1)), default)


# -- out


def beside(adapter: Adapter, ours: Mapping[str, str]) -> str:
    """Make the config of an adapter's folder, with our header in it, for whoever looks there.

    Where the scale is in the weights already, the alpha is the rank: whoever reads it does not scale again.
    """
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.metadata.get("base_model", ""),
        "r": int(ours["rank"]),
        "lora_alpha": float(ours["rank" if "folded" in ours else "alpha"]),
        "target_modules": sorted({linear_of(target).split(".", 2)[-1] for target in adapter.targets}),
    }
    if adapter.is_dora:
        config["use_dora"] = True
    return json.dumps(config | {"transpixeler": dict(ours)}, indent=2) + "\n"


def in_header(adapter: Adapter) -> dict[str, str]:
    """Ranks that differ, said to diffusers, which before its fix guesses one strength for all from the first.

    It folds every scale into the weights before, so that each alpha is its rank.
    """
    if not adapter.is_plain:
        return {}
    names = adapter.family.names
    ranks = {
        part.name: adapter.rank(target)
        for target in adapter.targets
        for part in pieces(names.module(target, source="internal", to="diffusers"))
    }
    if len(set(ranks.values())) < 2:
        return {}
    rank = most(ranks.values(), 0)
    odd = {module: own for module, own in ranks.items() if own != rank}
    config = {"r": rank, "lora_alpha": rank, "rank_pattern": odd, "alpha_pattern": odd, "target_modules": list(ranks)}
    if adapter.is_dora:
        config["use_dora"] = True
    return {IN_HEADER: json.dumps({f"transformer.{key}": value for key, value in config.items()})}


# -- in


def read(file: Path, header: Mapping[str, str]) -> dict[str, Any]:
    """Read the config that PEFT leaves beside a file, or diffusers in its header."""
    config = file.with_name(CONFIG_FILE)
    if config.exists():
        return read_json(config)
    try:
        stored = json.loads(header.get(IN_HEADER, "{}"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: damaged, the config in its header cannot be read: {error}") from None
    if not isinstance(stored, dict):
        raise UserError(f"{file}: damaged, the config in its header is no JSON object")
    return {key.removeprefix("transformer."): value for key, value in stored.items()}


def way_out(file: Path) -> str:
    """For every command: but one of them takes an alpha."""
    return (
        "write it anew with the alpha that it was trained with, as in "
        f"`transpixeler export {file} --format transpixeler --alpha 1 --out NEW.safetensors`, and use that"
    )


def alpha_of(file: Path, config: Mapping[str, Any], rank: int) -> float:
    if config.get("alpha_pattern"):
        raise UserError(f"{file}: its config gives alphas by pattern, which we do not read; {way_out(file)}")
    alpha = config["lora_alpha"]
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 1e30:
        raise UserError(f"{file}: damaged, its config's lora_alpha is no number; {way_out(file)}")
    return float(alpha) * (math.sqrt(rank) if config.get("use_rslora") else 1.0)
