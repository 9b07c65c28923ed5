"""Read adapters that transpixeler wrote: a file goes in; its streams, embeddings and low-rank weights come out."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from .streams import Streams

HEADER = "transpixeler."
EMBEDDING = "transpixeler.stream_embedding."
PREFIX = "diffusion_model."
DOWN, UP, ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
DORA = (".dora_scale", ".lora_magnitude_vector")
TEXT = ("cross_attn.k", "cross_attn.v", "cross_attn.k_img", "cross_attn.v_img")  # linears that see no stream's tokens
Span = tuple[int, int]  # first stream, and one past the last


@dataclass
class Target:
    """The low-rank weights of one linear."""

    down: Tensor  # [r, in]
    up: Tensor  # [out, r], times alpha / r
    span: Span
    text: bool = False  # its input is text or an image's tokens


@dataclass
class AdapterFile:
    """Hold what an adapter's file does."""

    streams: Streams
    attends: bool = True  # whether RGB tokens see the other streams
    embeddings: dict[str, Tensor] = field(default_factory=dict)  # by stream, [D]
    targets: dict[str, Target] = field(default_factory=dict)  # "blocks.0.self_attn.q"
    expert: str = ""  # the one of the model's transformers that it is for


def read_adapter(path: str | Path) -> AdapterFile:
    """Read an adapter that `transpixeler` wrote."""
    with safe_open(path, framework="pt", device="cpu") as file:
        header = file.metadata() or {}
        stored = {_unmarked(key): file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if f"{HEADER}scope" not in header:
        raise ValueError(f"{path}: not an adapter of transpixeler; `transpixeler export --format comfyui` makes one")
    if own := header.get(f"{HEADER}per_stream"):
        raise ValueError(
            f"{path}: {own} have matrices of their own, which these nodes do not know; `transpixeler export --only "
            f"{own.split(',')[-1]}` writes a file of one that they read"
        )
    if any(key.endswith(DORA) for key in stored):
        raise ValueError(f"{path}: is a DoRA, which these nodes do not know; sample it with `transpixeler sample`")
    if other := [key for key in stored if not _is_own(key)]:
        raise ValueError(f"{path}: {other[0]} is no name of ours; `transpixeler export --format comfyui` gives those")
    embeddings = {key.removeprefix(EMBEDDING): value for key, value in stored.items() if key.startswith(EMBEDDING)}
    streams = _streams(path, header, embeddings)
    scopes = json.loads(header.get(f"{HEADER}scopes", "{}"))
    names = [key.removesuffix(DOWN).removeprefix(PREFIX) for key in stored if key.endswith(DOWN)]
    targets = {
        name: _target(stored, name, _span(scopes.get(name, header[f"{HEADER}scope"]), streams.names)) for name in names
    }
    attends = header.get(f"{HEADER}rgb_attends_aux", "true") != "false"
    return AdapterFile(streams, attends, embeddings, targets, header.get(f"{HEADER}expert", ""))


def _streams(path: str | Path, header: Mapping[str, str], embeddings: Mapping[str, Tensor]) -> Streams:
    names = tuple(name.strip() for name in header.get(f"{HEADER}streams", "").split(",") if name.strip())
    names = names or ("rgb", *embeddings)
    scales = header.get(f"{HEADER}scales", ",".join("1" for _ in names)).split(",")
    if len(scales) != len(names) or scales[0] != "1" or not all(scale.isdigit() and int(scale) for scale in scales):
        raise ValueError(f"{path}: damaged: the scales in its header, {scales}, are not those of {', '.join(names)}")
    return Streams(names, tuple(map(int, scales)))


def _unmarked(key: str) -> str:
    """Return a key without the mark that keeps a joint adapter from programs that know no streams."""
    return key.removeprefix(HEADER) if key.startswith(HEADER + PREFIX) else key


def _is_own(key: str) -> bool:
    return key.startswith(EMBEDDING) or (key.startswith(PREFIX) and key.endswith((DOWN, UP, ALPHA)))


def _target(stored: Mapping[str, Tensor], name: str, span: Span) -> Target:
    down, up = stored[PREFIX + name + DOWN].float(), stored[PREFIX + name + UP].float()
    alpha = stored.get(PREFIX + name + ALPHA)
    scale = 1.0 if alpha is None else float(alpha) / down.shape[0]
    return Target(down, up * scale, span, name.endswith(TEXT))


def _span(scope: str, streams: tuple[str, ...]) -> Span:
    if scope in ("all", "aux"):
        return (int(scope == "aux"), len(streams))
    places = sorted(streams.index(name) for name in json.loads(scope))
    return places[0], places[-1] + 1


def stream_strengths(text: str, streams: Streams) -> tuple[float, ...]:
    """Return how strong an adapter is on each stream, from text such as "seg=0.5"; 1 where nothing is said."""
    said = {}
    for part in filter(None, (part.strip() for part in text.replace("\n", ",").split(","))):
        name, _, value = (piece.strip() for piece in part.partition("="))
        if name not in streams.names:
            raise ValueError(f"stream_strengths: no stream {name!r}; there are {', '.join(streams.names)}")
        try:
            said[name] = float(value)
        except ValueError:
            raise ValueError(f"stream_strengths: {part!r} is not NAME=NUMBER, such as {name}=0.5") from None
    return tuple(said.get(name, 1.0) for name in streams.names)
