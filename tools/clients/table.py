"""Print a table of programs and export formats: how far a plain adapter's velocity there is from ours, by the largest.

In: where ComfyUI and musubi-tuner lie; diffusers is there always. Tiny models of random weights are made for each
family, and each program loads each file as its users do. A program that is not given is told as not tried.

    python tools/clients/table.py --comfyui /path/to/ComfyUI --musubi /path/to/musubi-tuner

ComfyUI takes the width of FLUX.1 for granted, so that here it is told the tiny model's.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients.comfyui import MODELS, Read, flux_velocity, imported, velocity_error
from clients.other import NotApplied, diffusers_error, musubi_error
from clients.tiny import FLUX, LTX, Tiny, original_weights, trained, write_base
from tooling import run

from transpixeler.config.sections import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from transpixeler.adapters.adapter import Adapter
    from transpixeler.models.backbone import Backbone

EQUAL, BF16 = 1e-4, 2**-8  # that differ by less are the same velocity: in fp32, and where attention is in bf16
READS = {
    read.tiny.family: read if read.tiny is not LTX else replace(read, tiny=replace(LTX, more={})) for read in MODELS
} | {"flux": Read(FLUX, "Flux", "load_diffusion_model", flux_velocity)}


@dataclass(frozen=True)
class Trial:
    """One adapter: the base's folder, our model with it, and what models are given."""

    tiny: Tiny
    base: Path
    model: Backbone
    adapter: Adapter


Cell = Callable[[Trial, Path], str]  # an adapter and its file → what the table says of it


def table(argv: Sequence[str]) -> None:
    """Print the table and the versions that it is of."""
    options = _parser().parse_args(argv)
    logging.disable(logging.WARNING)  # programs tell of keys that they do not know; the cells say what came of it
    clients = dict(_clients(options))
    families = options.family or [*READS]
    print(_row(["family", "`--format`", *clients]), _row(["---"] * (2 + len(clients))), sep="\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for family in families:
            for line in _lines(family, Path(folder), clients):
                print(_row(line), flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="table", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--comfyui", type=Path, metavar="FOLDER", help="the folder of a ComfyUI")
    parser.add_argument("--musubi", type=Path, metavar="FOLDER", help="the folder of a musubi-tuner")
    parser.add_argument("--family", action="append", choices=sorted(READS), help="one family; may be given again")
    return parser


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


# -- programs


def _clients(options: argparse.Namespace) -> Iterator[tuple[str, Cell]]:
    import diffusers

    if options.comfyui:
        client = imported(options.comfyui)
        import comfyui_version  # pyright: ignore[reportMissingImports]  lies in the folder that the user gives

        yield f"ComfyUI {comfyui_version.__version__}{_commit(options.comfyui)}", _comfyui(client)
    else:
        yield "ComfyUI: not given", lambda trial, file: "not tried"
    yield f"diffusers {diffusers.__version__}", _measured(diffusers_error)
    if options.musubi:
        if not (options.musubi / "src/musubi_tuner").is_dir():
            raise UserError(f"--musubi: {options.musubi} is no musubi-tuner: it has no src/musubi_tuner")
        sys.path.insert(0, str(options.musubi.resolve() / "src"))
        yield f"musubi-tuner{_commit(options.musubi)}", _measured(musubi_error, bf16=True)
    else:
        yield "musubi-tuner: not given", lambda trial, file: "not tried"


def _commit(folder: Path) -> str:
    """Return the commit of a checkout, or nothing of another folder."""
    command = ["git", "-C", str(folder), "log", "-1", "--format=%h, %cs"]
    done = subprocess.run(command, capture_output=True, text=True)
    return f" ({done.stdout.strip()})" if not done.returncode else ""


def _comfyui(client: Any) -> Cell:
    """Load a file by ComfyUI's LoRA node, and run ComfyUI's model."""

    def cell(trial: Trial, file: Path) -> str:
        import torch
        from safetensors.torch import load_file

        state = original_weights(trial.base, trial.adapter.family)
        if trial.tiny is FLUX:
            model = _small_flux(client, state)
        else:
            model = client.sd.load_diffusion_model_state_dict(state, model_options={"dtype": torch.float32})
        patcher, _ = client.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
        if not patcher.patches:
            return "applies nothing"
        patcher.patch_model()
        return _told(velocity_error(READS[trial.tiny.family], patcher.model.diffusion_model, trial.model))

    return cell


def _small_flux(client: Any, state: dict[str, Tensor]) -> Any:
    """Return ComfyUI's FLUX.1 with the weights of a tiny one, built as its loader does after it has looked at them."""
    import torch

    heads = FLUX.config["num_attention_heads"]
    found = client.model_detection.detect_unet_config(state, "") | {"hidden_size": 128 * heads, "num_heads": heads}
    config = client.model_detection.model_config_from_unet_config(found, state)
    config.set_inference_dtype(torch.float32, None)
    model, cpu = config.get_model(state, ""), torch.device("cpu")
    model.load_model_weights(state, "")
    return client.model_patcher.ModelPatcher(model, load_device=cpu, offload_device=cpu)


def _measured(error: Callable[..., float], *, bf16: bool = False) -> Cell:
    """Return what the table says of what a program makes of a file."""

    def cell(trial: Trial, file: Path) -> str:
        try:
            return _told(error(trial.tiny, trial.base, trial.model, trial.adapter, file), bf16=bf16)
        except NotApplied as told:
            return str(told)

    return cell


def _told(error: float, *, bf16: bool = False) -> str:
    said = f"{error:.0e}, in bf16" if bf16 else f"{error:.0e}"
    return said if error < (BF16 if bf16 else EQUAL) else f"**another velocity**: {said}"


# -- families


def _lines(family: str, folder: Path, clients: Mapping[str, Cell]) -> Iterator[list[str]]:
    from transpixeler.adapters.files import write_adapter
    from transpixeler.adapters.spelling import FORMATS

    tiny = READS[family].tiny
    base = write_base(tiny, folder / family)
    trial = Trial(tiny, base, *trained(tiny, base, ("rgb",)))
    for format in FORMATS:
        file = write_adapter(trial.adapter, base / f"{format}.safetensors", format=format)
        yield [family, f"`{format}`", *(cell(trial, file) for cell in clients.values())]


if __name__ == "__main__":
    sys.exit(run("table", table))
