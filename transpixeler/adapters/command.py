"""The command `transpixeler export`: an adapter goes in, and comes out in another spelling or merged into its base."""

from __future__ import annotations

import logging
from pathlib import Path

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.files import read_adapter, with_whole_blocks, write_adapter
from transpixeler.adapters.merge import merge_adapter, read_fused
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config import UserError
from transpixeler.models.family import ModelFolder

logger = logging.getLogger("transpixeler")

MERGED = "merged"


def export_command(
    path: str | Path,
    *,
    format: str,
    out: str | Path,
    base: str | Path = "",
    alpha: float | None = None,
    stream: str = "seg",
) -> Path:
    """`transpixeler export`: an adapter, or a run's newest, in another spelling or merged into its base."""
    if format not in (*FORMATS, MERGED):
        raise UserError(f"--format: {format} is unknown; there are {', '.join(FORMATS)}, {MERGED}")
    if (Path(path) / "transformer").is_dir():
        raise UserError(f"{path} holds a whole model, not an adapter; its transformer/ is in diffusers' layout already")
    adapter = read_adapter(path, alpha=alpha, stream=stream)
    if format == MERGED:
        base = base or adapter.metadata.get("base_model", "")
        if not base:
            raise UserError(f"{path} does not say which base it was trained on; give one with `--base`")
        return merge_adapter(_base(adapter, base), [*read_fused(adapter.fused), adapter], out)
    if format != "transpixeler" and not adapter.is_plain:
        logger.warning(
            "this adapter acts on some streams only: a program that knows no streams will refuse it or apply it wrongly"
        )
    elif FORMATS[format].whole_blocks and with_whole_blocks(adapter) is None:
        logger.warning(
            "diffusers reads %s's names of whole blocks only, which this adapter cannot be made to fill: "
            "for diffusers, use --format diffusers",
            format,
        )
    if adapter.fused:
        logger.warning("this adapter was trained with %s in its base: it is right beside them only", adapter.fused)
    return write_adapter(adapter, out, format=format)


def _base(adapter: Adapter, path: str | Path) -> ModelFolder:
    return adapter.family.open(str(path))
