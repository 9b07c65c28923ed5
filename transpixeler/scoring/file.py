"""Write a scorer as one safetensors file, and read one back, whoever wrote it.

The header says which streams it knows, and by which VAE and text encoder its inputs were made. A file with a training's
state goes beside it: the optimizer's moments and the step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transpixeler.adapters.tensorfile import open_tensors, save_tensors
from transpixeler.config.sections import Config, UserError
from transpixeler.data.cache.fingerprints import FileHashes
from transpixeler.data.catalog import cache_folders
from transpixeler.data.keying import Fingerprints
from transpixeler.files import whole
from transpixeler.models.family import Field, ModelFolder, caption_fields
from transpixeler.models.meta import on_meta
from transpixeler.scoring.towers import Scorer, Sizes

FORMAT = "transpixeler-scorer-2"
SCORER_FILE = "scorer.safetensors"
STATE_FILE = "state.safetensors"
LARGEST = {
    "width": 1 << 14,
    "layers": 256,
    "text_layers": 256,
    "heads": 1 << 10,
    "patch": 64,
    "channels": 1 << 12,
    "text_width": 1 << 16,
}
MOST_STREAMS = 64


@dataclass(frozen=True)
class Facts:
    """All that the header of a scorer says."""

    sizes: Sizes
    field: str  # of captions
    vae: str  # fingerprints
    text: str
    step: int

    @classmethod
    def of(cls, config: Config, model: ModelFolder, sizes: Sizes, step: int = 0) -> Facts:
        made_with = fingerprints(config, model)
        return cls(sizes, text_field(model).name, made_with["clip"], made_with["caption"], step)

    def header(self) -> dict[str, str]:
        said = {"field": self.field, "vae": self.vae, "text": self.text, "step": self.step}
        return {"format": FORMAT, "scorer": json.dumps({**said, "sizes": self.sizes.plain()})}


def text_field(model: ModelFolder) -> Field:
    """Return the field with a caption's tokens."""
    found = next((field for field in caption_fields(model.fields) if field.length), None)
    if found is None:
        raise UserError(f"model.path: {model.family.title} has no text of tokens that a scorer could read")
    return found


def write_scorer(path: Path, scorer: Scorer, facts: Facts) -> None:
    """Write the file, or leave the one that is there."""
    tensors = {name: value.detach().cpu() for name, value in scorer.state_dict().items()}
    with whole(path, synced=True) as draft:
        save_tensors(tensors, draft, facts.header())


def read_scorer(path: Path) -> tuple[Scorer, Facts]:
    """Read a scorer; a file that is none, or says what its tensors do not, is refused."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; `transpixeler scorer CONFIG` trains a scorer and names its file")
    handle, header = open_tensors(path)
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: is no scorer of this version of transpixeler (its format: {header.get('format')})")
    facts = _facts(path, header.get("scorer", ""))
    with on_meta():
        scorer = Scorer(facts.sizes)
    wanted = {name: tuple(value.shape) for name, value in scorer.state_dict().items()}
    found = {name: tuple(handle.get_slice(name).get_shape()) for name in handle.keys()}  # noqa: SIM118  no mapping
    if wanted != found:
        raise UserError(f"{path}: its tensors are not those that its header describes; train or copy it again")
    scorer.load_state_dict({name: handle.get_tensor(name).float() for name in wanted}, assign=True)
    return scorer, facts


def _facts(path: Path, text: str) -> Facts:
    try:
        said = json.loads(text)
        sizes = dict(said.pop("sizes"))
        sizes["streams"], sizes["scales"] = (tuple(sizes[name]) for name in ("streams", "scales"))
        facts = Facts(sizes=Sizes(**sizes), **said)
    except (ValueError, TypeError, KeyError, AttributeError) as fault:
        raise UserError(f"{path}: its header cannot be read ({fault}); train or copy it again") from fault
    fewest = dict.fromkeys(LARGEST, 1) | {"text_layers": 0}
    within = all(type(sizes[name]) is int and fewest[name] <= sizes[name] <= most for name, most in LARGEST.items())
    names, scales = facts.sizes.streams, facts.sizes.scales
    streams = 0 < len(names) <= MOST_STREAMS and all(isinstance(name, str) for name in names)
    scaled = len(scales) == len(names) and all(scale in (1, 2) for scale in scales)
    if not (within and streams and scaled) or facts.sizes.width % facts.sizes.heads:
        raise UserError(f"{path}: its header asks for sizes that no scorer has; train or copy it again")
    return facts


def fingerprints(config: Config, model: ModelFolder) -> Fingerprints:
    """Return what a config's records are made with; encoders that the cache has hashed are not read again."""
    return Fingerprints(config, model, FileHashes(cache_folders(config)[0]).digest)


def check_made_for(path: Path, facts: Facts, config: Config, model: ModelFolder) -> None:
    """Refuse a scorer whose latents or texts another VAE or text encoder made."""
    made_with = fingerprints(config, model)
    if facts.vae != made_with["clip"]:
        raise UserError(f"{path}: was trained on another VAE's latents than {model.path} has; train one with it")
    if facts.field != text_field(model).name or facts.text != made_with["caption"]:
        raise UserError(f"{path}: was trained on another text encoder's texts than {model.path} has; train one with it")


def check_scorer(config: Config) -> None:
    """Refuse an `eval.scorer` that is none or judges other streams, before anything is encoded."""
    if config.eval.scorer:
        file = Path(config.eval.scorer).expanduser()
        check_streams(file, read_scorer(file)[1], config)


def check_streams(path: Path, facts: Facts, config: Config) -> None:
    """Refuse a scorer of more, fewer or other streams: captions are compared with what all of them show together."""
    known = dict(zip(facts.sizes.streams, facts.sizes.scales, strict=True))
    asked = dict(zip(config.streams, config.scales, strict=True))
    if asked != known:
        raise UserError(
            f"eval.scorer: {path} judges {_listed(known)} together, and this config has {_listed(asked)}; train one "
            "with these streams (`transpixeler scorer CONFIG`), or score none (eval.scorer='')"
        )


def _listed(scales: Mapping[str, int]) -> str:
    names = [f"{name} (scale {scale})" if scale > 1 else name for name, scale in scales.items()]
    return f"the stream{'s' * (len(names) > 1)} {', '.join(names)}"


def write_state(path: Path, optimizer: torch.optim.Optimizer, scorer: Scorer, told: Mapping[str, Any]) -> None:
    """Write all that a training goes on from."""
    tensors = {f"model.{name}": value.detach().cpu() for name, value in scorer.state_dict().items()}
    for name, parameter in scorer.named_parameters():
        for kind in ("exp_avg", "exp_avg_sq"):
            tensors[f"{kind}.{name}"] = optimizer.state[parameter][kind].cpu()
    with whole(path, synced=True) as draft:
        save_tensors(tensors, draft, {"format": f"{FORMAT}-state", "told": json.dumps(told, sort_keys=True)})


def read_state(path: Path, optimizer: torch.optim.Optimizer, scorer: Scorer) -> dict[str, Any]:
    """Put a state back where it was; return what was told with it."""
    handle, header = open_tensors(path)
    if header.get("format") != f"{FORMAT}-state":
        raise UserError(f"{path}: is no state of a scorer's training; remove it to begin anew")
    told = json.loads(header["told"])
    try:
        scorer.load_state_dict({name: handle.get_tensor(f"model.{name}") for name in scorer.state_dict()})
        for name, parameter in scorer.named_parameters():
            optimizer.state[parameter] = {
                "step": torch.tensor(float(told["step"])),
                **{kind: handle.get_tensor(f"{kind}.{name}").to(parameter) for kind in ("exp_avg", "exp_avg_sq")},
            }
    except Exception as fault:
        raise UserError(f"{path}: does not go with these settings of `scorer` ({str(fault)[:200]})") from fault
    return told
