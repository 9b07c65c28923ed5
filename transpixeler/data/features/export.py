"""Write what a cache holds as features: both sets of a config in; manifests and safetensors, for other machines, out.

A cache made from them holds the same latents and texts, bit for bit, and needs no encoder.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

from torch import Tensor

from transpixeler.config.sections import Config, UserError
from transpixeler.data.dataset import Dataset, Datasets
from transpixeler.data.features.files import header, row_of
from transpixeler.data.items import Item
from transpixeler.data.sources.candidate import TEXT_COLUMN, latent_column
from transpixeler.files import check_place, whole, writing_to
from transpixeler.models.conditions import fields_from_frames
from transpixeler.models.family import ModelFolder, caption_fields

OPTION = "--export"
EXPORTED = re.compile(r"\d{6,}-([A-Za-z0-9@+_-]{1,80})@0\+\d+:\d+x\d+")  # the end of the id of a clip from our files


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
    if shown := fields_from_frames(model.fields):
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
            groups = _by_source(dataset.items)
            for stem, items in zip(_stems(dataset.key, list(groups)), groups.values()):
                path = folder / f"{stem}.jsonl"
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
        self._texts: dict[tuple[bytes, ...], str] = {}  # files by the keys of what they hold

    def clip(self, dataset: Dataset, item: Item, name: str) -> dict[str, str]:
        """Write a clip's latents and caption; return its row."""
        columns = [latent_column(stream, dataset.streams[0]) for stream in dataset.streams]
        names = [latent_column(part.stream, dataset.streams[0]) + part.suffix for part in dataset.parts(item)]
        tensors = {name: _value(dataset, key) for name, key in zip(names, item.latent_keys, strict=True)}
        path = self._write(f"{name}.safetensors", self._bytes(tensors))
        return dict.fromkeys(columns, path) | self._text(dataset, item.caption, item.text_keys)

    def texts_alone(self, dataset: Dataset) -> list[str]:
        """Write the texts that no clip need have; return their lines."""
        texts = {"": dataset.empty_text_keys} | dict(dataset.prompts)
        return [row_of(**self._text(dataset, text, keys)) for text, keys in texts.items()]

    def _text(self, dataset: Dataset, text: str, keys: tuple[bytes, ...]) -> dict[str, str]:
        if keys not in self._texts:
            data = self._bytes({name: _value(dataset, key) for name, key in zip(self.fields, keys, strict=True)})
            name = f"texts/{hashlib.blake2b(data, digest_size=16).hexdigest()}.safetensors"
            self._texts[keys] = self._write(name, data)
        return {"text": text, TEXT_COLUMN: self._texts[keys]}

    def _bytes(self, tensors: Mapping[str, Tensor]) -> bytes:
        """Return a file's content: the same for the same tensors, as its hash is their key in a cache."""
        from safetensors.torch import save

        data = save(dict(tensors), metadata=self.facts)
        size = int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8 : 8 + size]), sort_keys=True, separators=(",", ":")).encode()
        return data[:8] + header.ljust(size) + data[8 + size :]  # facts come in any order

    def _write(self, name: str, data: bytes) -> str:
        with whole(self.folder / name) as unfinished:
            unfinished.write_bytes(data)
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


def _stems(key: str, groups: Sequence[str]) -> list[str]:
    """Name a manifest for each source; of manifests that were exported once, as they are named."""
    if len(groups) == 1:
        return [key]
    plain = [_plain(group) for group in groups]
    short = [name if name.startswith(f"{key}-") else f"{key}-{name}" for name in plain]
    return short if len(set(short)) == len(short) else [f"{key}-{name}" for name in plain]


def _name(item: Item) -> str:
    """Return the end of a clip's id, as any file system takes it; of a clip that was exported once, the same again."""
    last = item.id.rpartition("/")[2]
    before = EXPORTED.fullmatch(last)
    return before[1] if before else _plain(last)[-80:]


def _plain(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9@+-]", "_", name)
