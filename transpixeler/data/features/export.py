"""Write what a cache holds as features: both sets of a config in; manifests and safetensors, for other machines, out.

A cache made from them holds the same latents and texts, bit for bit, and needs no encoder.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from torch import Tensor

from transpixeler.config import Config, UserError
from transpixeler.data.dataset import Dataset, Datasets, Item
from transpixeler.data.features.files import LAST, header, row_of
from transpixeler.data.sources.candidate import TEXT_COLUMN, latent_column
from transpixeler.files import check_place, whole, writing_to
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import ModelFolder, caption_fields

OPTION = "--export"


class Exported(NamedTuple):
    """One manifest that was written, and the source that it stands for."""

    path: Path
    key: str  # of the config: train or eval
    rows: int
    repeats: int


def check_export(folder: Path, config: Config, model: ModelFolder) -> None:
    """Refuse before there is work to lose."""
    if config.data.draw == "epoch":
        raise UserError(
            f"{OPTION}: a row of features is of one bucket, and data.draw=epoch draws among several; set "
            "data.draw=once, or take the cache's folder itself to the other machine"
        )
    if shown := shown_fields(model.fields):
        names = " and ".join(field.name for field in shown)
        raise UserError(
            f"{OPTION}: this model is shown given frames ({names}), which manifests of features cannot hold; take the "
            "cache's folder itself to the other machine"
        )
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{OPTION}: {folder} is there already; name a folder that is new or empty")
    check_place(folder, OPTION)


def export(datasets: Datasets, model: ModelFolder, folder: Path) -> list[Exported]:
    """Write the features of all clips, of their captions, and of the texts that evaluations sample from."""
    writer, made = _Writer(folder, model), []
    with writing_to(folder, OPTION):
        for dataset in (datasets.train, datasets.eval):
            for group, items in _by_source(dataset.items).items():
                several = len(_by_source(dataset.items)) > 1
                path = folder / f"{dataset.key}{f'-{_plain(group)}' * several}.jsonl"
                with _rows(path) as file:
                    for number, item in enumerate(items):
                        file.write(row_of(**writer.clip(dataset, item, f"{path.stem}/{number:06}-{_name(item)}")))
                    if not made:
                        file.writelines(writer.texts_alone(dataset))
                made.append(Exported(path, dataset.key, len(items), items[0].repeats))
    return made


@contextmanager
def _rows(path: Path) -> Iterator[TextIO]:
    with ExitStack() as stack:
        unfinished = stack.enter_context(whole(path, synced=True))
        yield stack.enter_context(unfinished.open("w", encoding="utf-8"))


class _Writer:
    """Write one file for each clip and each text."""

    def __init__(self, folder: Path, model: ModelFolder) -> None:
        self.folder, self.facts = folder, header(model.family.name)
        self.fields = [field.name for field in caption_fields(model.fields)]

    def clip(self, dataset: Dataset, item: Item, name: str) -> dict[str, str]:
        """Write a clip's latents and caption; return its row."""
        columns = [latent_column(stream, dataset.streams[0]) for stream in dataset.streams]
        lasts = dataset.lasts if item.bucket[0] > 1 else ()
        names = [name for number, one in enumerate(columns) for name in [one] + [one + LAST] * (number in lasts)]
        tensors = {name: _value(dataset, key) for name, key in zip(names, item.latent_keys, strict=True)}
        path = self._write(f"{name}.safetensors", tensors)
        return dict.fromkeys(columns, path) | self._text(dataset, item.caption, item.text_keys)

    def texts_alone(self, dataset: Dataset) -> list[str]:
        """Write the texts that no clip need have; return their lines."""
        texts = {"": dataset.empty_text_keys} | dict(dataset.prompts)
        return [row_of(**self._text(dataset, text, keys)) for text, keys in texts.items()]

    def _text(self, dataset: Dataset, text: str, keys: Sequence[bytes]) -> dict[str, str]:
        name = f"texts/{keys[0].hex()}.safetensors"
        if not (self.folder / name).exists():
            self._write(name, {field: _value(dataset, key) for field, key in zip(self.fields, keys, strict=True)})
        return {"text": text, TEXT_COLUMN: name}

    def _write(self, name: str, tensors: Mapping[str, Tensor]) -> str:
        from safetensors.torch import save_file

        with whole(self.folder / name) as unfinished:
            save_file(dict(tensors), unfinished, metadata=self.facts)
        return name


def _value(dataset: Dataset, key: bytes) -> Tensor:
    found = dataset.cache.get(key)
    assert found is not None, key.hex()
    return found.clone()


def _by_source(items: Sequence[Item]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(item.source, []).append(item)
    return found


def _name(item: Item) -> str:
    """Return the end of a clip's id, as any file system takes it."""
    return _plain(item.id.rpartition("/")[2])[-80:]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9@+-]", "_", name)
