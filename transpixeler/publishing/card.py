"""A saved model and its run go in; the model card, the README.md of a Hub repository, comes out.

Everything on it is read from what training left: the adapter's header, the config, metrics and samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any
from urllib.parse import quote

import yaml

from transpixeler.adapters.on_model import linear_scopes
from transpixeler.data.buckets import batch_sizes
from transpixeler.models.family import UNKNOWN, License
from transpixeler.publishing import markdown
from transpixeler.publishing.card_facts import Card
from transpixeler.publishing.card_use import use_section
from transpixeler.publishing.words import in_words

MEAN_STEPS = 100  # last steps that the loss is averaged over
GALLERY = "<Gallery />"  # which the Hub replaces by the samples that the header names


# --- the text --------------------------------------------------------------------------------------------------------


def write(card: Card) -> str:
    """Return the card's text."""
    parts = [
        _header(card),
        f"# {card.repo.split('/')[1]}",
        _summary(card),
        *([GALLERY] if _gallery(card) else []),
        *_sample_section(card),
        *use_section(card),
        *_training_section(card),
        *_measures_section(card),
        *_license_section(card),
    ]
    return "\n\n".join(parts) + "\n"


def _header(card: Card) -> str:
    """Return the YAML that the Hub reads."""
    adapter = card.model.weights is None
    fields: dict[str, Any] = {"license": card.license.id}
    fields |= {"license_name": card.license.name} if card.license.name else {}
    fields |= {"license_link": card.license.link} if card.license.link else {}
    if card.base:
        fields |= {"base_model": card.base, "base_model_relation": "adapter" if adapter else "finetune"}
    task = f"{'image' if card.pictures else 'text'}-to-{card.model.family.makes}"
    fields |= {"library_name": "diffusers" if card.plain and card.elsewhere else "transpixeler", "pipeline_tag": task}
    kind = ["lora"] if adapter else []
    fields["tags"] = [task, card.model.family.name, "transpixeler", *kind]
    if not card.plain:
        fields["tags"] += ["joint-generation", *card.streams[1:]]
    if shown := _gallery(card):
        fields["widget"] = shown
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---"


def _gallery(card: Card) -> list[dict[str, Any]]:
    """Return the prompts and samples that the Hub shows as a gallery."""
    image = card.model.family.makes == "image"
    shown = [(sample, sample.still if image and card.plain else sample.shown) for sample in card.samples]
    return [{"text": markdown.line(one.said), "output": {"url": url}} for one, url in shown if url]


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
        f"{markdown.inline(', '.join(card.streams))}"
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
        videos = ", ".join(f"[{markdown.inline(Path(path).name)}]({quote(path)})" for path in paths)
        lines.append(f"![a sample]({quote(sample.still)})\n\n> {markdown.inline(sample.said)}\n\n{videos}")
    return lines


def _training_section(card: Card) -> list[str]:
    rows = [(name, value) for name, value in _figures(card).items() if value]
    table = "\n".join(
        [
            "| setting | value |",
            "|---|---|",
            *(f"| {markdown.cell(name)} | {markdown.cell(str(value))} |" for name, value in rows),
        ]
    )
    made = "Trained with transpixeler; `config.yaml` holds every setting."
    return ["## Training", table, made]


def _measures_section(card: Card) -> list[str]:
    """Tell what was measured: a row for each measure, a column for each set of clips."""
    rows: dict[str, dict[str, str]] = {}
    for name, measured in card.evals.items():
        for stream, by_time in measured.get("loss", {}).items():
            rows.setdefault(f"held-out loss of {stream}", {})[name] = _mean(list(by_time.values()))
        for metric, value in measured.get("metrics", {}).items():
            rows.setdefault(in_words(metric), {})[name] = f"{value:.4g}" if value is not None else ""
    if not rows:
        return []
    cells = [[title, *(found.get(name, "") for name in card.evals)] for title, found in rows.items()]
    head, *body = (f"| {' | '.join(map(markdown.cell, line))} |" for line in (["", *card.evals], *cells))
    table = "\n".join([head, f"|{'---|' * (1 + len(card.evals))}", *body])
    about = (
        "By sets of clips that it was not trained on, and each task by itself; `prompts` are captions alone. "
        "↑: more is better, ↓: less is better."
    )
    return ["## Measures", about, table]


def _time(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h of steps" if seconds >= 3600 else f"{max(1, round(seconds / 60))} min of steps"


def _figures(card: Card) -> dict[str, Any]:
    config, steps = card.config, card.steps
    lora, optim = config.lora, config.optim
    targets = ", ".join(lora.targets or card.model.family.lora_targets)
    seconds = sum(line.get("seconds", 0.0) for line in steps)
    return {
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
        "time": _time(seconds) if seconds else "",
        "device": card.manifest.get("machine", {}).get("device", ""),
    }


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


def _license_section(card: Card) -> list[str]:
    told = [f"Base: {_license(card.base_license)}."]
    if card.license != card.base_license:
        told.append(f"This {'adapter' if card.model.weights is None else 'model'}: {_license(card.license)}.")
    else:
        told.append(f"This {'adapter' if card.model.weights is None else 'model'} is under the same.")
    return ["## Licence", " ".join(told)]


def _license(license: License) -> str:
    if license == UNKNOWN:
        return "its licence is not known here; look at its own card"
    return f"[{license.title}]({license.link})" if license.link else f"`{license.title}`"
