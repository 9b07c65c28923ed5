"""Say what encoding captions takes on a device: a model's folder in; bytes of each network that reads them out.

The networks are built on meta from their published configs: none of their weights is read or downloaded.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from transpixeler.models.damage import naming_damage, read_config
from transpixeler.models.family import ModelFolder
from transpixeler.models.meta import on_meta
from transpixeler.models.quantize_encoder import bytes_of_linear
from transpixeler.models.resolve import resolve

BF16_BYTES = 2


def text_encoder_bytes(model: ModelFolder, quantize: str) -> dict[str, int]:
    """Return the weights' bytes on a GPU by folder, in the order of loading; those without a config are left out."""
    places = [f"{place}/config.json" for place in model.text_places]
    folder, found = resolve(model.encoders, only=places), dict[str, int]()
    for place in places:
        file = (folder.parent if folder.is_file() else folder) / place
        config = read_config(file) if file.is_file() else {}
        if names := config.get("architectures"):
            with naming_damage(file):
                found[place.split("/")[0]] = _bytes(_on_meta(names[0], config), quantize)
    return found


def _on_meta(name: str, config: dict[str, Any]) -> nn.Module:
    """Build a network of transformers by its config, without what makes words of states."""
    import transformers

    kind: Any = getattr(transformers, name)
    with on_meta():
        network = kind(kind.config_class.from_dict(config))
    return network.model if hasattr(network, "lm_head") else network


def _bytes(network: nn.Module, quantize: str) -> int:
    linears = {module for module in network.modules() if isinstance(module, nn.Linear)}
    inside = {id(linear.weight) for linear in linears}
    others = sum(BF16_BYTES * p.numel() for p in network.parameters() if id(p) not in inside)
    return others + sum(bytes_of_linear(linear.out_features, linear.in_features, quantize) for linear in linears)
