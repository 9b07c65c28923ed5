"""The command `transpixeler export`: an adapter or a whole model goes in, and comes out as another program reads it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from transpixeler.adapters.adapter import Adapter
from transpixeler.adapters.bases import on_trained_base
from transpixeler.adapters.companion import only
from transpixeler.adapters.files import read_adapter, write_adapter
from transpixeler.adapters.merge import merge_adapter, read_fused, save_file, with_norms_of_base
from transpixeler.adapters.readers import DIFFUSERS, OTHER_WEIGHTS, is_one_file, listing, model_readers, readers
from transpixeler.adapters.saved import ADAPTER_FILE, MODEL_FOLDER, config_of, expert_folders
from transpixeler.adapters.spelling import FORMATS
from transpixeler.config import loading
from transpixeler.config.sections import Config, ModelConfig, UserError
from transpixeler.models.family import MODEL_CONFIGS, ModelFolder, recognised
from transpixeler.models.resolve import resolve
from transpixeler.models.weights import WeightSource

logger = logging.getLogger("transpixeler")

MERGED, COMFYUI = "merged", "comfyui"


def export_command(
    path: str | Path,
    *,
    format: str,
    out: str | Path,
    base: str | Path = "",
    alpha: float | None = None,
    stream: str = "seg",
    companion: str = "",
) -> list[Path]:
    """`transpixeler export`: an adapter, or a run's newest save, in another spelling or merged into its base.

    companion: the one that is kept of several.

    Of a save of several experts, each is written: to FILE_NAME.safetensors, or into OUT/NAME.
    """
    if format not in (*FORMATS, MERGED):
        raise UserError(f"--format: {format} is unknown; there are {', '.join(FORMATS)}, {MERGED}")
    if Path(out).suffix.lower() in OTHER_WEIGHTS:
        raise UserError(f"--out: {out}: weights are written as .safetensors; give such a name, or a folder")
    export = partial(_export_one, format=format, base=base, alpha=alpha, stream=stream, companion=companion)
    parts, out = expert_folders(Path(path)), Path(out)
    if not parts:
        return [export(path, out=out)]
    one_file = is_one_file(out)
    return [
        export(part, out=out.with_name(f"{out.stem}_{name}{out.suffix}") if one_file else out / name)
        for name, part in parts.items()
    ]


def _export_one(
    path: str | Path, *, format: str, out: Path, base: str | Path, alpha: float | None, stream: str, companion: str
) -> Path:
    if (Path(path) / MODEL_FOLDER).is_dir():
        if companion:
            raise UserError(f"--only: {path} holds a whole model, whose streams share their weights; leave it out")
        return _export_model(Path(path), format=format, out=Path(out), base=str(base))
    adapter = read_adapter(path, alpha=alpha, stream=stream)
    adapter = only(adapter, companion) if companion else adapter
    over_base = format == COMFYUI and adapter.is_dora and adapter.is_plain and not adapter.must_fuse
    if over_base or format == MERGED:
        base = base or adapter.metadata.get("base_model", "")
        if not base:
            raise UserError(f"{path} does not say which base it was trained on; give one with `--base`")
    if over_base:
        adapter = with_norms_of_base(adapter, _base(adapter, str(base)))
    if format == MERGED:
        made = merge_adapter(_base(adapter, str(base)), [*read_fused(adapter.fused, adapter.expert), adapter], out)
        print(listing(model_readers(adapter.family, made)))
        return made
    programs = readers(adapter, format)
    _warn(adapter, format, programs)
    made = write_adapter(adapter, out, format=format)
    print(listing(programs))
    return made


def _base(adapter: Adapter, path: str) -> ModelFolder:
    """Open the base that an adapter is merged into; names of another family's linears may be the same by chance."""
    found = recognised(resolve(path, only=MODEL_CONFIGS, key="--base"))
    if found and adapter.family not in found:
        raise UserError(
            f"--base: {path} is of the family {found[0].name}, and the adapter of the family {adapter.family.name}; "
            "give the model that it was trained on"
        )
    model = on_trained_base(Config(model=ModelConfig(path=path))).model
    if model.fuse:
        raise UserError(f"--base: {path} holds an adapter; give a whole model, such as {model.path}")
    return adapter.family.open(model.path, model.encoders)


def _warn(adapter: Adapter, format: str, programs: tuple[str, ...]) -> None:
    """Say what the user may not expect of an adapter in a format."""
    if format != "transpixeler" and not adapter.is_plain:
        logger.warning(
            "this adapter acts on some streams only: programs that know no streams refuse it, or find nothing of "
            "theirs in it"
        )
    if adapter.is_dora and adapter.is_plain and not programs:
        logger.warning(
            "a DoRA as other programs read it needs a format of its own: for diffusers, use --format diffusers; for "
            "ComfyUI, --format comfyui"
        )
    elif (
        adapter.is_plain
        and not adapter.is_dora
        and DIFFUSERS not in programs
        and DIFFUSERS in adapter.family.names.loaders.read_by.get(format, ())
    ):
        logger.warning(
            "diffusers reads %s's names of whole blocks only, which this adapter cannot be made to fill: "
            "for diffusers, use --format diffusers",
            format,
        )
    if names := [f"{one.path} at {one.strength:g}" if one.strength != 1 else one.path for one in adapter.fused]:
        logger.warning("this adapter was trained with %s in its base: it is right beside them only", names)


def _export_model(save: Path, *, format: str, out: Path, base: str) -> Path:
    """Write a model that was trained in full as one file in its family's original names."""
    if format != MERGED or not is_one_file(out):
        raise UserError(
            f"{save} holds a whole model, not an adapter; its {MODEL_FOLDER}/ is in diffusers' layout already, and "
            f"`--format {MERGED} --out FILE.safetensors` writes it as one file for other programs"
        )
    if (save / ADAPTER_FILE).is_file():
        raise UserError(
            f"{save} holds a model of several streams, which no other program knows: a file of its weights alone "
            "would give something else; use it with `transpixeler sample`"
        )
    model = _trained_from(save, base)
    made = save_file(WeightSource(save, model.family.internal_names), out, model=model)
    print(listing(model_readers(model.family, made)))
    return made


def _trained_from(save: Path, base: str) -> ModelFolder:
    """Open the model that a save was trained from: what a transformer's own config does not say is told by its VAE."""
    family = next(iter(recognised(save)), None)
    if family is None:
        raise UserError(f"{save / MODEL_FOLDER} is of no family that we know; update transpixeler")
    config = config_of(save)
    if not base and not config.is_file():
        raise UserError(f"{save} does not say which base it was trained from; give one with `--base`")
    if base:
        return family.open(base)
    model = loading.load(config).model
    return family.open(model.path, model.encoders)
