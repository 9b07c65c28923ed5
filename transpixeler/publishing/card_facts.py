"""Everything that a model card says: a saved model and its run go in, values come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transpixeler.config.sections import Config
from transpixeler.models.family import License
from transpixeler.publishing import markdown
from transpixeler.publishing.licenses import license_of
from transpixeler.publishing.received import own_samples, read_manifest, read_metrics, sample_files
from transpixeler.runs.folder import SAMPLES
from transpixeler.sampling.files import STILL
from transpixeler.sampling.saves import SavedModel

SHOWN_SAMPLES = 4
_PICTURES = {"image": "first.png", "last_image": "last.png"}
NODES = Path(__file__).parents[2] / "tools" / "comfyui" / "transpixeler"  # of a checkout; an installed package has none


@dataclass(frozen=True)
class ShownSample:
    """A sample on the card, and its files by their path in the repository."""

    prompt: str
    files: Mapping[str, Path]
    size: tuple[int, int, int] | None = None  # width, height, frames
    given: tuple[str, ...] = ()  # streams that it was made from

    @property
    def said(self) -> str:
        """Return the prompt, and what was given besides."""
        return ", given ".join([self.prompt or "-", *([", ".join(self.given)] if self.given else [])])

    @property
    def shown(self) -> str:
        """Return the file that a gallery shows: over a background where there is alpha, else the first stream."""
        videos = [path for path in self.files if path.endswith(".mp4")]
        over = [path for end in ("/composite.mp4", "/checkerboard.mp4") for path in videos if path.endswith(end)]
        return next(iter([*over, *videos, self.still]), "")

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
    license: License
    base_license: License
    config: Config
    model: SavedModel
    steps: Sequence[Mapping[str, Any]]  # lines of metrics, up to the saved step
    evals: Mapping[str, Any]
    manifest: Mapping[str, Any]
    samples: Sequence[ShownSample]
    node: Path | None = None  # of ComfyUI, for a joint adapter of this family

    @property
    def size(self) -> tuple[int, int, int] | None:
        """Return the width, height and frames to make: those of `sample.size`, or of a sample."""
        return self.config.sample.size or next((one.size for one in self.samples if one.size), None)

    @property
    def prompt(self) -> str:
        """Return a prompt to try: a sample's, if it is but words."""
        plain = (one.prompt for one in self.samples if one.prompt and markdown.inline(one.prompt) == one.prompt)
        return next(plain, "…")

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
    """Collect what the card says from a saved model and its run. license: an id, or "" for that of the base."""
    step = model.step
    records = read_metrics(run) if run else []
    lines = [line for line in records if step is None or line["step"] <= step]
    evals = [line["eval"] for line in lines if "eval" in line]
    manifest = read_manifest(run) if run else {}
    steps = [line for line in lines if "loss" in line]
    samples, measured = tuple(_samples(run, step)) if run else (), evals[-1] if evals else {}
    of_base = license_of(model.config.model.path, base or origin, model.family)
    terms = License(license) if license else of_base
    return Card(
        repo, base, origin, fused, terms, of_base, model.config, model, steps, measured, manifest, samples, _node(model)
    )


def _node(model: SavedModel) -> Path | None:
    """Return the folder of ComfyUI's nodes, if they are here, the model needs them and they read it."""
    adapter = model.adapter
    if adapter is not None and (adapter.is_dora or adapter.own_streams):  # which the nodes do not know
        return None
    joint = model.weights is None and len(model.config.streams) > 1 and model.family.names.loaders.joint_read_by
    return NODES if joint and NODES.is_dir() else None


def _samples(run: Path, step: int | None) -> Iterator[ShownSample]:
    """Yield the first few samples of the newest step up to the saved one."""
    made = [sample for sample in own_samples(run) if step is None or sample[0] <= step]
    newest = max((number for number, _, _ in made), default=None)
    for _, folder, facts in [sample for sample in made if sample[0] == newest][:SHOWN_SAMPLES]:
        found = sample_files(folder, facts).values()
        files = {f"{SAMPLES}/{folder.name}/{file.name}": file for file in found}
        if files:
            width, height, frames = (facts.get(key) or 0 for key in ("width", "height", "frames"))
            size = (width, height, frames) if width and height and frames else None
            yield ShownSample(facts.get("prompt") or "", files, size, tuple(facts.get("given") or ()))
