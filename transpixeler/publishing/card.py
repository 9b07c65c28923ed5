"""A saved model and its run go in; the model card, the README.md of a Hub repository, comes out.

Everything on it is read from what training left: the adapter's header, the config, metrics and samples.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

import yaml

from transpixeler.adapters.on_model import linear_scopes
from transpixeler.adapters.saved import ADAPTER_FILE
from transpixeler.config.sections import Config
from transpixeler.data.buckets import batch_sizes
from transpixeler.publishing.received import own_samples, read_manifest, read_metrics, sample_files
from transpixeler.runs.folder import SAMPLES
from transpixeler.sampling.files import STILL
from transpixeler.sampling.saves import SavedModel

SHOWN_SAMPLES = 4
MEAN_STEPS = 100  # last steps that the loss is averaged over
_PICTURES = {"image": "first.png", "last_image": "last.png"}


@dataclass(frozen=True)
class ShownSample:
    """A sample on the card, and its files by their path in the repository."""

    prompt: str
    files: Mapping[str, Path]

    @property
    def still(self) -> str:
        return next((path for path in self.files if path.endswith(STILL)), "")


@dataclass(frozen=True)
class Card:
    """Everything that the card says."""

    repo: str
    base: str  # a Hub id, or ""
    origin: str  # the Hub id of the model whose encoders the base has, where they lie elsewhere
    fused: Sequence[str]  # adapters that were added to that base
    license: str
    config: Config
    model: SavedModel
    steps: Sequence[Mapping[str, Any]]  # lines of metrics, up to the saved step
    evals: Mapping[str, Any]
    manifest: Mapping[str, Any]
    samples: Sequence[ShownSample]

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(self.config.streams)

    @property
    def experts(self) -> tuple[str, ...]:
        """Return the experts that there is an adapter for, where the model has several."""
        return tuple(name for name in self.model.adapters if name)

    @property
    def plain(self) -> bool:
        """Return whether programs that know nothing of streams can load it."""
        return len(self.streams) == 1 and (self.model.adapter is None or self.model.adapter.is_plain)

    @property
    def pictures(self) -> dict[str, str]:
        """Return a file for each picture that the base is shown, by its name in diffusers' pipeline."""
        adapter, weights, family = self.model.adapter, self.model.weights, self.model.family
        if not family.image_pipeline_class:
            return {}
        said = adapter.metadata.get("pictures", "").split(",") if adapter is not None else ()
        shown = said if weights is None else family.open(str(weights.parent)).pictures
        return {name: file for name, file in _PICTURES.items() if name in shown}

    @property
    def elsewhere(self) -> bool:
        """Return whether other programs know the model."""
        return bool(self.model.family.names.loaders.read_by)


def gather(
    model: SavedModel, run: Path | None, *, repo: str, base: str, origin: str, fused: Sequence[str], license: str
) -> Card:
    """Collect what the card says from a saved model and its run."""
    step = model.step
    records = read_metrics(run) if run else []
    lines = [line for line in records if step is None or line["step"] <= step]
    evals = [line["eval"] for line in lines if "eval" in line]
    manifest = read_manifest(run) if run else {}
    steps = [line for line in lines if "loss" in line]
    samples, measured = tuple(_samples(run, step)) if run else (), evals[-1] if evals else {}
    return Card(repo, base, origin, fused, license, model.config, model, steps, measured, manifest, samples)


def _samples(run: Path, step: int | None) -> Iterator[ShownSample]:
    """Yield the first few samples of the newest step up to the saved one."""
    made = [sample for sample in own_samples(run) if step is None or sample[0] <= step]
    newest = max((number for number, _, _ in made), default=None)
    for _, folder, facts in [sample for sample in made if sample[0] == newest][:SHOWN_SAMPLES]:
        found = sample_files(folder, facts).values()
        files = {f"{SAMPLES}/{folder.name}/{file.name}": file for file in found}
        if files:
            yield ShownSample(facts.get("prompt") or "", files)


# --- the text --------------------------------------------------------------------------------------------------------


def write(card: Card) -> str:
    """Return the card's text."""
    parts = [
        _header(card),
        f"# {card.repo.split('/')[1]}",
        _summary(card),
        *_sample_section(card),
        *_use_section(card),
        *_training_section(card),
    ]
    return "\n\n".join(parts) + "\n"


def _header(card: Card) -> str:
    """Return the YAML that the Hub reads."""
    adapter = card.model.weights is None
    fields: dict[str, Any] = {"license": card.license}
    if card.base:
        fields |= {"base_model": card.base, "base_model_relation": "adapter" if adapter else "finetune"}
    task = f"{'image' if card.pictures else 'text'}-to-{card.model.family.makes}"
    fields |= {"library_name": "diffusers" if card.plain and card.elsewhere else "transpixeler", "pipeline_tag": task}
    kind = ["lora"] if adapter else []
    fields["tags"] = [task, card.model.family.name, "transpixeler", *kind]
    if not card.plain:
        fields["tags"] += ["joint-generation", *card.streams[1:]]
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _summary(card: Card) -> str:
    base = f"a {card.model.family.title} model"
    if card.base:
        base = f"[{card.base}](https://huggingface.co/{card.base})"
    elif card.origin:
        base = f"an unpublished model with the encoders of [{card.origin}](https://huggingface.co/{card.origin})"
    adapter = card.model.adapter
    name = "DoRA" if adapter is not None and adapter.is_dora else "LoRA"
    kind = "A fine-tuned model" if card.model.weights else f"A {name} adapter{_rank(card)} for {base}"
    does = (
        f"that makes {card.model.family.makes}s from captions"
        if len(card.streams) == 1
        else f"that makes {len(card.streams)} aligned {card.model.family.makes}s from one caption: "
        f"{_inline(', '.join(card.streams))}"
    )
    averaged = ", averaged weights" if adapter is not None and adapter.metadata.get("ema") == "true" else ""
    after = "" if card.model.step is None else f" Step {card.model.step:,}{averaged}."
    return f"{kind} {does}.{after}"


def _rank(card: Card) -> str:
    adapter = card.model.adapter
    ranks = sorted({adapter.rank(target) for target in adapter.targets}) if adapter else []
    return f" of rank {'–'.join(map(str, dict.fromkeys((ranks[0], ranks[-1]))))}" if ranks else ""


def _sample_section(card: Card) -> list[str]:
    if not card.samples:
        return []
    lines = ["## Samples", "First, middle and last frame: a row for each stream, and one over a checkerboard."]
    for sample in card.samples:
        paths = [path for path in sample.files if path != sample.still]
        videos = ", ".join(f"[{_inline(Path(path).name)}]({quote(path)})" for path in paths)
        lines.append(f"![a sample]({quote(sample.still)})\n\n> {_inline(sample.prompt)}\n\n{videos}")
    return lines


def _use_section(card: Card) -> list[str]:
    base, size = card.base or "PATH_OF_THE_BASE", card.config.sample.size
    sized = f" --size {'x'.join(map(str, size))}" if size else ""
    shown = "".join(f" --{name.removesuffix('_image')} {file}" for name, file in card.pictures.items())
    ours = f'transpixeler sample {card.repo} --model {base}{sized}{shown} --prompt "…"'
    lines = ["## Use", *_fused_note(card), "### transpixeler", f"```sh\n{ours}\n```"]
    if not card.elsewhere:
        return [*lines, f"diffusers and ComfyUI do not know {card.model.family.title}: use the command above."]
    lines.append("### diffusers")
    full = card.model.weights is not None
    if card.plain:
        whole = f'{card.model.family.transformer_class}.from_pretrained("{card.repo}", subfolder="transformer")'
        lora = "\n".join(_load_line(card, name) for name in card.model.adapters)
        lines.append(_python(card, whole if full else lora, base, full=full))
        comfy = f"Put `{ADAPTER_FILE}` into `models/loras` and load it with `LoraLoaderModelOnly` on the base model."
        if len(card.experts) > 1:
            comfy = (
                f"Put {' and '.join(f'`{name}/{ADAPTER_FILE}`' for name in card.experts)} into `models/loras`, under "
                "names of their own, and load each with `LoraLoaderModelOnly` on the expert of the base that it is for."
            )
        if card.model.adapter is not None and card.model.adapter.is_dora:
            lines.append(_exported(card, "diffusers") + " The line above then reads that file.")
            comfy = _exported(card, "comfyui") + " Put that file into `models/loras`."
    else:
        lines.append(
            "diffusers generates one stream and cannot make the companions. Use the command above: it writes every "
            "stream as a video, and RGBA files with the alpha inside."
        )
        comfy = _joint_in_comfyui(card)
    return lines if full else [*lines, "### ComfyUI", comfy]


def _joint_in_comfyui(card: Card) -> str:
    """Tell how ComfyUI takes an adapter of several streams, or why it does not."""
    adapter, put = card.model.adapter, f"Put `{ADAPTER_FILE}` into `models/loras`"
    node = "the streams need the custom node of transpixeler's `tools/comfyui`"
    if adapter is not None and adapter.is_dora:
        return "No custom node reads a DoRA of several streams. Use the command above."
    if adapter is not None and adapter.own_streams:
        only = f"transpixeler export {card.repo} --format comfyui --only {card.streams[-1]} --out {card.streams[-1]}/"
        return (
            "Each stream has matrices of its own, which the custom node does not know. Write one companion by itself, "
            f"as with `{only}`. {put}; {node}."
        )
    return f"{put}; {node}."


def _load_line(card: Card, expert: str) -> str:
    """Return the line of diffusers that loads an adapter; of two experts, the second is its `transformer_2`."""
    if not expert:
        return f'pipe.load_lora_weights("{card.repo}", weight_name="{ADAPTER_FILE}")'
    place = f'subfolder="{expert}", ' if len(card.experts) > 1 else ""
    second = ", load_into_transformer_2=True" if expert in card.model.family.experts[1:] else ""
    return (
        f'pipe.load_lora_weights("{card.repo}", {place}weight_name="{ADAPTER_FILE}", adapter_name="{expert}"{second})'
    )


def _exported(card: Card, format: str) -> str:
    """Tell how another program gets the file that it reads of a DoRA."""
    return f"This is a DoRA: write it first with `transpixeler export {card.repo} --format {format} --out dora/`."


def _fused_note(card: Card) -> list[str]:
    names = ", ".join(_code(name) for name in card.fused)
    text = f"It was trained on the base with {names} added: other programs must load both."
    return [text] if names and card.model.weights is None else []


def _python(card: Card, line: str, base: str, *, full: bool) -> str:
    family, shown = card.model.family, card.pictures
    load = f"transformer = {line}\n" if full else ""
    given = ", transformer=transformer" if full else ""
    name = family.image_pipeline_class if shown else family.pipeline_class
    names = ", ".join([name, *([family.transformer_class] if full else [])])
    loader = "from diffusers.utils import load_image\n" if shown else ""
    pictures = "".join(f'{each}=load_image("{file}"), ' for each, file in shown.items())
    prompt, after = f'{pictures}prompt="…"' if shown else '"…"', "" if full else f"{line}\n"
    return (
        f"```python\nimport torch\nfrom diffusers import {names}\n{loader}\n{load}"
        f'pipe = {name}.from_pretrained("{base}"{given}, torch_dtype=torch.bfloat16).to("cuda")\n{after}'
        f"{family.makes} = pipe({prompt}).{'images' if family.makes == 'image' else 'frames'}[0]\n```"
    )


def _training_section(card: Card) -> list[str]:
    rows = [(name, value) for name, value in _figures(card).items() if value]
    table = "\n".join(["| | |", "|---|---|", *(f"| {_cell(name)} | {_cell(str(value))} |" for name, value in rows)])
    made = "Trained with transpixeler; `config.yaml` holds every setting."
    return ["## Training", table, made]


def _figures(card: Card) -> dict[str, Any]:
    config, steps = card.config, card.steps
    lora, optim = config.lora, config.optim
    targets = ", ".join(lora.targets or card.model.family.lora_targets)
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    found: dict[str, Any] = {
        "steps": f"{card.model.step:,}" if card.model.step is not None else "",
        "epochs": steps[-1]["epoch"] if steps else "",
        "clips": card.manifest.get("clips", {}).get("train", ""),
        "batch": " or ".join(map(str, batch_sizes(config))),
        "optimizer": f"{optim.name}, rate {optim.lr:g}, {optim.schedule}",
        "adapter": f"rank {lora.rank}{_each(card)}, scope {_scopes(card)}, on {targets}" if lora.enabled else "",
        "tasks": ", ".join(f"{name} {share:g}" for name, share in config.objective.tasks.items()),
        "frames a second": f"{config.data.fps:g}",
        "fill of transparent RGB": config.data.fill,
        f"loss, mean of the last {min(MEAN_STEPS, len(steps))} steps": _mean([s["loss"] for s in steps[-MEAN_STEPS:]]),
        "time": f"{seconds / 3600:.2f} h of steps" if seconds else "",
        "device": card.manifest.get("machine", {}).get("device", ""),
    }
    for name, measured in card.evals.items():
        for stream, by_time in measured.get("loss", {}).items():
            found[f"held-out loss of {stream} ({name})"] = _mean(list(by_time.values()))
        for metric, value in measured.get("metrics", {}).items():
            found[f"{metric.replace('_', ' ')} ({name})"] = f"{value:.4g}" if value is not None else ""
    return found


def _scopes(card: Card) -> str:
    """Name the adapter's scopes; where training started from another adapter, they may not be the config's."""
    adapter = card.model.adapter
    own = linear_scopes(adapter, card.streams).values() if adapter is not None else ()
    return " and ".join(scope for scope, _ in Counter(map(str, own)).most_common()) or str(card.config.lora.scope)


def _each(card: Card) -> str:
    """Name the streams that have matrices of their own, if any."""
    adapter = card.model.adapter
    return f" for each of {', '.join(adapter.own_streams)}" if adapter is not None and adapter.own_streams else ""


def _mean(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{mean(known):.4f}" if known else ""


# --- text that may hold anything -------------------------------------------------------------------------------------

# Words, numbers and marks that mean nothing to Markdown wherever they stand in a line; all else is shown as code.
_HARMLESS = re.compile(r"[^\W_](?:[^\W_]|[ ,.;()%'’/+=–…-]|(?<=[^\W_])_(?=[^\W_]))*")
_LIST_OR_LINK = re.compile(r"\d+[.)]|www\.", re.IGNORECASE)
_CONTROL = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # Unicode categories of what is no visible character


def _inline(text: str) -> str:
    """Return a text that may hold anything as words in a line of Markdown: as it is, or as code where it could act."""
    line = _line(text)
    return line if _HARMLESS.fullmatch(line) and not _LIST_OR_LINK.search(line) else _code(line)


def _cell(text: str) -> str:
    """Return a text as the cell of a table, where a bar ends the cell even within code."""
    line = _line(text)
    return (line if _HARMLESS.fullmatch(line) and "www." not in line.lower() else _code(line)).replace("|", "\\|")


def _code(text: str) -> str:
    """Return a text as a code span, which no mark in it can end."""
    line = _line(text)
    if not line:
        return ""
    fence = "`" * (1 + max(map(len, re.findall(r"`+", line)), default=0))
    space = " " if line[0] == "`" or line[-1] == "`" else ""
    return f"{fence}{space}{line}{space}{fence}"


def _line(text: str) -> str:
    """Return a text in one line, with a mark in the place of each invisible character."""
    visible = "".join("\ufffd" if unicodedata.category(c) in _CONTROL and not c.isspace() else c for c in text)
    return " ".join(visible.split())
