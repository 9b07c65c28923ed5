"""Load what `transpixeler export` writes in a real ComfyUI, and compare its weights and its velocity with ours.

In: the folder of a ComfyUI; nothing of it is installed or changed. Out: a line of JSON for each family and export, of
tiny models with random weights. The exit code is 1 where ComfyUI does anything but what the exports say of it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from clients.tiny import HUNYUAN, LTX, WAN, Tiny, original_weights, trained, write_base
from tooling import run

from transpixeler.config.sections import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from transpixeler.adapters.adapter import Adapter
    from transpixeler.models.backbone import Backbone
    from transpixeler.models.family import Family

NAME = "ComfyUI"
PARTS = ("comfy/sd.py", "comfy/lora.py", "comfy/model_detection.py")
TOLERANCE = 1e-5
NODES = Path(__file__).parents[1] / "comfyui/transpixeler"
KINDS = {"plain": ("rgb",), "joint": ("rgb", "seg")}


@dataclass(frozen=True)
class Read:
    """Say how ComfyUI reads a tiny model."""

    tiny: Tiny
    found: str  # the class that ComfyUI should take it for
    loader: str  # ComfyUI's function that reads a merged file
    velocity: Callable[..., Tensor]  # ComfyUI's model, latents, t, fields without lengths → velocity


def _wan_velocity(model: Any, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
    return model(latents, 1000 * time, text, transformer_options={})


def _ltx_velocity(model: Any, latents: Tensor, time: Tensor, text: Tensor) -> Tensor:
    import torch

    mask = torch.ones(text.shape[:2], dtype=torch.long)
    return model(latents, time, text, mask, frame_rate=24, transformer_options={})


def _hunyuan_velocity(model: Any, latents: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    import torch

    mask = torch.ones(text.shape[:2], dtype=torch.long)
    guidance = torch.tensor([6.0])  # as ComfyUI has it where no node says otherwise
    return model(latents, 1000 * time, text, pooled, None, guidance, mask, transformer_options={})


def flux_velocity(model: Any, latents: Tensor, time: Tensor, text: Tensor, pooled: Tensor) -> Tensor:
    """Run ComfyUI's FLUX.1, which is of images."""
    import torch

    guidance = torch.tensor([3.5])
    return model(latents[:, :, 0], time, text, pooled, guidance, transformer_options={})[:, :, None]


MODELS = (
    Read(WAN, "WAN21_T2V", "load_diffusion_model", _wan_velocity),
    Read(LTX, "LTXV", "load_checkpoint_guess_config", _ltx_velocity),
    Read(HUNYUAN, "HunyuanVideo", "load_diffusion_model", _hunyuan_velocity),
)


def comfyui(argv: Sequence[str]) -> None:
    """Print a line for every family and export; raise SystemExit(1) where one is not read as it says."""
    client = imported(_parser().parse_args(argv).comfyui)
    good = True
    with tempfile.TemporaryDirectory() as folder:
        for line in _lines(client, Path(folder)):
            print(json.dumps(line), flush=True)
            good &= line["as_said"]
    if not good:
        raise SystemExit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="comfyui", description=__doc__)
    parser.add_argument("--comfyui", required=True, type=Path, metavar="FOLDER", help="the folder of a ComfyUI")
    return parser


def imported(folder: Path) -> ModuleType:
    """Import the `comfy` of a folder, on the CPU."""
    absent = [part for part in PARTS if not (folder / part).is_file()]
    if absent:
        raise UserError(f"--comfyui: {folder} is no ComfyUI: it has no {absent[0]}; give the folder that holds main.py")
    logging.getLogger().setLevel(logging.ERROR)
    sys.path.insert(0, str(folder.resolve()))
    sys.argv = [sys.argv[0], "--cpu"]  # ComfyUI reads its options from here
    try:
        import comfy.options  # pyright: ignore[reportMissingImports]  lies in the folder that the user gives

        comfy.options.enable_args_parsing()
        import comfy.lora  # pyright: ignore[reportMissingImports]
        import comfy.sd  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as fault:
        raise UserError(
            f"--comfyui: {folder} needs the package {fault.name}; run this with a Python that has the packages of "
            "ComfyUI's requirements.txt and this project's"
        ) from fault
    return comfy


def _lines(client: ModuleType, folder: Path) -> Iterator[dict[str, Any]]:
    from transpixeler.adapters.spelling import FORMATS

    for read in MODELS:
        base = write_base(read.tiny, folder / read.tiny.family)
        for kind, streams in KINDS.items():
            model, adapter = trained(read.tiny, base, streams)
            told = {"family": read.tiny.family, "adapter": kind}
            for format in FORMATS:
                yield told | _patched(client, base, adapter, format)
            if kind == "plain":
                yield told | _merged(client, read, base, model, adapter)
            else:
                for format in adapter.family.names.loaders.joint_read_by:
                    yield told | _through_nodes(client, read, base, model, adapter, format)


# -- ComfyUI's


def _loaded(client: ModuleType, base: Path, family: Family) -> tuple[dict[str, Tensor], Any]:
    """Return a base's weights under their original names, and ComfyUI's model of them."""
    import torch

    state = original_weights(base, family)
    return state, client.sd.load_diffusion_model_state_dict(dict(state), model_options={"dtype": torch.float32})


def _own_names(model: Any, stored: Iterable[str]) -> dict[str, str]:
    """Map the names of a file to those that ComfyUI gives its weights."""
    rename = model.model.model_config.process_unet_state_dict
    return {name: own for name in stored for own in rename({name: None})}


def _patched(client: ModuleType, base: Path, adapter: Adapter, format: str) -> dict[str, Any]:
    """Load an adapter file as ComfyUI's LoRA node does; compare the patched weights with W + scale·B·A."""
    from safetensors.torch import load_file

    from transpixeler.adapters.files import write_adapter
    from transpixeler.adapters.readers import readers

    file = write_adapter(adapter, base / f"{format}.safetensors", format=format)
    state, model = _loaded(client, base, adapter.family)
    names = _own_names(model, state)
    patcher, _ = client.sd.load_lora_for_models(model, None, load_file(file), 1.0, 0.0)
    errors = []
    for target in adapter.targets:
        name = adapter.family.names.module(target, source="internal", to="original") + ".weight"
        if patches := patcher.patches.get(f"diffusion_model.{names[name]}"):
            found = client.lora.calculate_weight(patches, state[name].clone(), name)
            wanted = state[name] + adapter.scale(target) * adapter.up(target) @ adapter.down(target)
            errors.append((found - wanted).abs().max().item())
    read = NAME in readers(adapter, format)
    if read:
        good = len(errors) == len(adapter.targets)
    else:  # a plain file may share some names with what ComfyUI knows, and a joint one none
        good = len(patcher.patches) < (len(adapter.targets) if adapter.is_plain else 1)
    told = {"format": format, "weights": len(adapter.targets), "patched": len(patcher.patches)}
    return told | {"error": max(errors, default=None), "as_said": good and max(errors, default=0.0) < TOLERANCE}


def _through_nodes(
    client: ModuleType, read: Read, base: Path, model: Backbone, adapter: Adapter, format: str
) -> dict[str, Any]:
    """Load a joint adapter as our own node does; compare the velocity of all streams with ours."""
    from transpixeler.adapters.files import write_adapter

    nodes = our_nodes()
    file = write_adapter(adapter, base / f"{format}.safetensors", format=format)
    patcher, _ = nodes.put_on(_loaded(client, base, adapter.family)[1], nodes.read_adapter(file), 1.0, "")
    patcher.patch_model()
    error = velocity_error(read, patcher.model.diffusion_model, model)
    return {"format": format, "by": "our nodes", "error": error, "as_said": error < TOLERANCE}


def our_nodes() -> ModuleType:
    """Import the nodes as ComfyUI does: a folder, under any name."""
    spec = importlib.util.spec_from_file_location("custom_nodes.transpixeler", NODES / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = package
    spec.loader.exec_module(package)
    return package.nodes


def velocity_error(read: Read, theirs: Any, model: Backbone) -> float:
    """Return the largest difference of two velocities, by the largest value; streams lie along ComfyUI's frames."""
    import torch

    tiny, layout, time = read.tiny, model.layout(read.tiny.shape), torch.tensor([0.4])
    x, text = torch.randn(1, layout.elements), torch.randn(1, *tiny.text)
    lengths = [torch.tensor(tiny.text[:1])] if model.fields[0].masked else []
    vectors = [torch.randn(1, field.width) for field in model.fields[1:]]
    with torch.no_grad():
        ours = model(x, time.expand(1, len(layout.groups)), text, *lengths, *vectors, layout=layout)
        latents, wanted = (torch.cat(layout.unpack(values), dim=2) for values in (x, ours))
        found = read.velocity(theirs, latents, time, text, *vectors)
    return ((found - wanted).abs().max() / wanted.abs().max()).item()


def _merged(client: ModuleType, read: Read, base: Path, model: Backbone, adapter: Adapter) -> dict[str, Any]:
    """Load a merged file as ComfyUI's node for it does; compare its velocity with ours."""
    import torch

    from transpixeler.adapters.merge import merge_adapter

    file = merge_adapter(adapter.family.open(str(base)), [adapter], base / "merged.safetensors")
    told: dict[str, Any] = {"format": "merged"}
    try:
        loaded = getattr(client.sd, read.loader)(str(file), model_options={"dtype": torch.float32})
        patcher = loaded[0] if isinstance(loaded, tuple) else loaded
    except RuntimeError as fault:
        return told | {"fault": str(fault).splitlines()[0], "as_said": False}
    stored = client.utils.load_torch_file(str(file))
    stored = {name.removeprefix("model.diffusion_model."): value for name, value in stored.items()}
    found, stored = patcher.model, set(_own_names(patcher, stored).values())
    there = found.diffusion_model.state_dict()
    told |= {"class": type(found.model_config).__name__}
    told |= {"missing": len(there.keys() - stored), "left_over": len(stored - there.keys())}
    error = velocity_error(read, found.diffusion_model, model)
    good = told["class"] == read.found and not told["missing"] and not told["left_over"] and error < TOLERANCE
    return told | {"error": error, "as_said": good}


if __name__ == "__main__":
    sys.exit(run("comfyui", comfyui))
