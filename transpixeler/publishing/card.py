"""A model card: what was trained goes in, the README.md of its Hub repository comes out.

Everything it says is read from what training left: the adapter's header, the config, metrics and samples.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

import yaml

from transpixeler.config import Config
from transpixeler.runs.folder import MANIFEST, METRICS, SAMPLES, sampled
from transpixeler.runs.metrics_file import read_records
from transpixeler.sampling.files import FACTS, STILL
from transpixeler.sampling.trained import Trained

SHOWN = 4  # samples
RECENT = 100  # steps that the loss is a mean of
WEIGHT = "adapter_model.safetensors"


@dataclass(frozen=True)
class Shown:
    """One sample, and its files by their path in the repository."""

    prompt: str
    files: Mapping[str, Path]

    @property
    def still(self) -> str:
        return next((path for path in self.files if path.endswith(STILL)), "")


@dataclass(frozen=True)
class Told:
    """All that the card says."""

    repo: str
    base: str  # a Hub id, or nothing
    fused: Sequence[str]  # adapters in that base
    license: str
    config: Config
    trained: Trained
    steps: Sequence[Mapping[str, Any]]  # lines of metrics, up to the saved step
    evals: Mapping[str, Any]
    manifest: Mapping[str, Any]
    samples: Sequence[Shown]

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.streams)

    @property
    def plain(self) -> bool:
        """Whether other programs need to know nothing of streams."""
        return len(self.streams) == 1 and (self.trained.adapter is None or self.trained.adapter.is_plain)


def gather(trained: Trained, run: Path | None, *, repo: str, base: str, fused: Sequence[str], license: str) -> Told:
    step = trained.step
    records = read_records(run / METRICS) if run else []
    lines = [line for line in records if step is None or line["step"] <= step]
    evals = [line["eval"] for line in lines if "eval" in line]
    manifest = _json(run / MANIFEST) if run else {}
    steps = [line for line in lines if "loss" in line]
    samples, measured = tuple(_samples(run, step)) if run else (), evals[-1] if evals else {}
    return Told(repo, base, fused, license, trained.config, trained, steps, measured, manifest, samples)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _samples(run: Path, step: int | None) -> Iterator[Shown]:
    """The first few of the newest step that is not beyond the saved one."""
    steps = sampled(run)
    newest = max((number for number in steps if step is None or number <= step), default=None)
    for folder in sorted(steps[newest].iterdir())[:SHOWN] if newest is not None else ():
        facts = _json(folder / FACTS)
        named = [folder / name for name in facts.get("files", {}).values()]
        files = {f"{SAMPLES}/{folder.name}/{file.name}": file for file in named if file.is_file()}
        if files:
            yield Shown(facts.get("prompt", ""), files)


# --- the text --------------------------------------------------------------------------------------------------------


def write(told: Told) -> str:
    parts = [_header(told), f"# {told.repo.split('/')[1]}", _what(told), *_shown(told), *_use(told), *_training(told)]
    return "\n\n".join(parts) + "\n"


def _header(told: Told) -> str:
    """What the Hub reads."""
    adapter = told.trained.weights is None
    fields: dict[str, Any] = {"license": told.license}
    if told.base:
        fields |= {"base_model": told.base, "base_model_relation": "adapter" if adapter else "finetune"}
    fields |= {"library_name": "diffusers" if told.plain else "transpixeler", "pipeline_tag": "text-to-video"}
    kind = ["lora"] if adapter else []
    fields["tags"] = ["text-to-video", told.config.model.family, "transpixeler", *kind]
    if not told.plain:
        fields["tags"] += ["joint-generation", *told.streams[1:]]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _what(told: Told) -> str:
    base = f"[{told.base}](https://huggingface.co/{told.base})" if told.base else "a Wan text-to-video model"
    adapter = told.trained.adapter
    kind = "A fine-tuned model" if told.trained.weights else f"A LoRA adapter{_rank(told)} for {base}"
    does = (
        "that makes videos from captions"
        if len(told.streams) == 1
        else f"that makes {len(told.streams)} aligned videos from one caption: {', '.join(told.streams)}"
    )
    averaged = ", averaged weights" if adapter is not None and adapter.metadata.get("ema") == "true" else ""
    after = "" if told.trained.step is None else f" Step {told.trained.step:,}{averaged}."
    return f"{kind} {does}.{after}"


def _rank(told: Told) -> str:
    adapter = told.trained.adapter
    ranks = sorted({adapter.rank(target) for target in adapter.targets}) if adapter else []
    return f" of rank {'–'.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}" if ranks else ""


def _shown(told: Told) -> list[str]:
    if not told.samples:
        return []
    lines = ["## Samples", "First, middle and last frame; a row for each stream, and one over a checkerboard."]
    for sample in told.samples:
        videos = ", ".join(f"[{Path(path).name}]({path})" for path in sample.files if path != sample.still)
        lines.append(f"![a sample]({sample.still})\n\n> {_inline(sample.prompt)}\n\n{videos}")
    return lines


def _use(told: Told) -> list[str]:
    base, size = told.base or "PATH_OF_THE_BASE", told.config.sample.size
    sized = f" --size {'x'.join(map(str, size))}" if size else ""
    ours = f'transpixeler sample {told.repo} --model {base}{sized} --prompt "…"'
    lines = ["## Use", *_beside(told), "### transpixeler", f"```sh\n{ours}\n```", "### diffusers"]
    full = told.trained.weights is not None
    if told.plain:
        whole = f'WanTransformer3DModel.from_pretrained("{told.repo}", subfolder="transformer")'
        lora = f'pipe.load_lora_weights("{told.repo}", weight_name="{WEIGHT}")'
        lines.append(_python(whole if full else lora, base, full=full))
        comfy = f"Put `{WEIGHT}` into `models/loras` and load it with `LoraLoaderModelOnly` on the base model."
    else:
        lines.append(
            "diffusers knows one stream: it cannot make the companions. Use the command above, which writes them as "
            "videos of their own and with their alpha inside."
        )
        comfy = (
            f"Put `{WEIGHT}` into `models/loras`; the streams need the custom node of transpixeler's `tools/comfyui`."
        )
    return lines if full else [*lines, "### ComfyUI", comfy]


def _beside(told: Told) -> list[str]:
    names = ", ".join(f"`{_inline(name)}`" for name in told.fused)
    text = f"It was trained on the base with {names} added to it, and belongs on that: other programs must load both."
    return [text] if names and told.trained.weights is None else []


def _python(line: str, base: str, *, full: bool) -> str:
    load = f"transformer = {line}\n" if full else ""
    given = ", transformer=transformer" if full else ""
    names = "WanPipeline, WanTransformer3DModel" if full else "WanPipeline"
    after = "" if full else f"{line}\n"
    return (
        f"```python\nimport torch\nfrom diffusers import {names}\n\n{load}"
        f'pipe = WanPipeline.from_pretrained("{base}"{given}, torch_dtype=torch.bfloat16).to("cuda")\n{after}'
        'video = pipe("…").frames[0]\n```'
    )


def _training(told: Told) -> list[str]:
    rows = [(name, value) for name, value in _figures(told).items() if value]
    table = "\n".join(["| | |", "|---|---|", *(f"| {name} | {_inline(str(value))} |" for name, value in rows)])
    made = "Made with transpixeler; `config.yaml` holds every setting."
    return ["## Training", table, made]


def _figures(told: Told) -> dict[str, Any]:
    config, steps = told.config, told.steps
    lora, optim = config.lora, config.optim
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    found: dict[str, Any] = {
        "steps": f"{told.trained.step:,}" if told.trained.step is not None else "",
        "epochs": steps[-1]["epoch"] if steps else "",
        "clips": told.manifest.get("clips", {}).get("train", ""),
        "batch": config.train.global_batch,
        "optimizer": f"{optim.name}, rate {optim.lr:g}, {optim.schedule}",
        "adapter": f"rank {lora.rank}, scope {_scopes(told)}, on {', '.join(lora.targets)}" if lora.enabled else "",
        "tasks": ", ".join(f"{name} {share:g}" for name, share in config.objective.tasks.items()),
        "frames a second": f"{config.data.fps:g}",
        "fill of transparent RGB": config.data.fill,
        f"loss, mean of the last {min(RECENT, len(steps))} steps": _mean([s["loss"] for s in steps[-RECENT:]]),
        "time": f"{seconds / 3600:.2f} h of steps" if seconds else "",
        "device": told.manifest.get("machine", {}).get("device", ""),
    }
    for name, measured in told.evals.items():
        for stream, by_time in measured.get("loss", {}).items():
            found[f"held-out loss of {stream} ({_inline(name)})"] = _mean(list(by_time.values()))
        for metric, value in measured.get("metrics", {}).items():
            found[f"{metric.replace('_', ' ')} ({_inline(name)})"] = f"{value:.4g}" if value is not None else ""
    return found


def _scopes(told: Told) -> str:
    """Where training started from an adapter, they may be other than the config's."""
    adapter = told.trained.adapter
    own = adapter.scopes.values() if adapter is not None else ()
    return " and ".join(scope for scope, _ in Counter(map(str, own)).most_common()) or str(told.config.lora.scope)


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.4f}" if known else ""


def _inline(text: str) -> str:
    """A caption may hold anything; here it is words in a line."""
    line = " ".join(text.split())
    for mark, harmless in (
        ("&", "&amp;"),
        ("<", "&lt;"),
        (">", "&gt;"),
        ("|", "\\|"),
        ("`", "'"),
        ("[", "\\["),
        ("]", "\\]"),
    ):
        line = line.replace(mark, harmless)
    return line
