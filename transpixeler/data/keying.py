"""Find the keys of a set's records: its clips and the hashes of their files in; the same clips with their keys out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from transpixeler.config.sections import Config, SourceConfig, UserError
from transpixeler.data.buckets import Clips, SampleClip
from transpixeler.data.cache.fingerprints import FileHashes
from transpixeler.data.cache.index import KEY
from transpixeler.data.given import GivenPicture
from transpixeler.data.items import Items, Run, ShownKeys
from transpixeler.data.jobs import Jobs, TextJob
from transpixeler.data.kept import KeptFile
from transpixeler.data.keys import (
    first_frame,
    given_part_keys,
    given_text_keys,
    keys_of_shown,
    latent_keys,
    part_keys,
    text_keys,
)
from transpixeler.data.media.files import files_of
from transpixeler.data.media.fill import Fill
from transpixeler.data.sources.candidate import NOT_GIVEN, TEXT_COLUMN, Features, TextRow
from transpixeler.data.sources.pairs import source_names
from transpixeler.data.sources.samples import Sample
from transpixeler.data.survey import Survey
from transpixeler.flow.tasks import all_beside, views
from transpixeler.models.conditions import shown_fields
from transpixeler.models.family import Digest, ModelFolder, caption_fields, sees_frames

WINDOW = 4096  # clips whose files are hashed together
HASHING_THREADS = 8


class Fingerprints(dict[str, str]):
    """Hold hashes of what records are made with, by the source of the fields that they are for; latents as "clip".

    Each is found when it is asked for: where all features are given, no encoder needs to be here.
    """

    def __init__(self, config: Config, model: ModelFolder, digest: Digest) -> None:
        super().__init__()
        self.model, self.digest = model, digest
        kind = config.model.quantize_encoders
        self.quantized = "" if kind == "none" else f" {kind}"  # of text encoders

    def __missing__(self, source: str) -> str:
        found = {
            "clip": self.model.vae_fingerprint,
            "image": self.model.image_fingerprint,
            "caption": self.model.text_fingerprint,
        }
        self[source] = found[source](self.digest) + (self.quantized if source == "caption" else "")
        return self[source]


class TextKeys:
    """Make the keys of texts: from a row's own features, from a row that gives a text's alone, or to be encoded."""

    def __init__(
        self,
        config: Config,
        model: ModelFolder,
        made_with: Mapping[str, str],
        hashes: FileHashes,
        rows: Sequence[TextRow],
    ) -> None:
        self.config, self.model, self.made_with, self.hashes = config, model, made_with, hashes
        self.alone = {row.text: row.features for row in rows}

    def job(self, text: str, folder: Path, picture: GivenPicture | None = None) -> TextJob:
        """Return the job of a text that is no clip's. picture: that it is read beside; None: a black one."""
        own = self.alone.get(text, NOT_GIVEN)
        keys, given = self.keys(text, NOT_GIVEN, picture.key if picture else None), own.text is not None
        return TextJob(keys, text, folder, own, alone=given, picture=None if given else picture)

    def keys(self, text: str, features: Features, picture: bytes | None = None) -> dict[str, bytes]:
        """Return the keys of a text's fields. features: its clip's. picture: that it is read beside; None: black."""
        own = features if features.text else self.alone.get(text, NOT_GIVEN)
        if own.text is not None:
            return given_text_keys(self.hashes.digest(own.text), self.model.fields)
        return text_keys(self.model.clean_caption(text), self._encoder(text), self.model.fields, picture=picture)

    def _encoder(self, text: str) -> str:
        try:
            return self.made_with["caption"]
        except UserError as fault:
            row = json.dumps({"text": text, TEXT_COLUMN: "FILE"}, ensure_ascii=False)
            raise UserError(f"{fault}; or give the features of this text in a manifest's row: {row}") from fault


class Keying:
    """Finds the keys of clips, a window at a time: digests of all files would be larger than the keys."""

    def __init__(
        self,
        config: Config,
        model: ModelFolder,
        hashes: Mapping[Path, FileHashes],
        made_with: Mapping[str, str],
        texts: TextKeys,
    ) -> None:
        self.config, self.model, self.hashes, self.made_with, self.texts = config, model, hashes, made_with, texts
        self.streams, self.fill = tuple(config.streams), Fill.of(config.data)
        self.beside = all_beside(config.objective, self.streams, model.fields)
        self.shown, self.sees = shown_fields(model.fields), sees_frames(model.fields)

    def jobs(
        self, found: Survey, sources: Sequence[SourceConfig], folders: Sequence[Path], *, traced: bool, path: Path
    ) -> Jobs:
        """Return the jobs of a set's clips. folders: the cache of each source. traced: items say their files.

        path: where keys are kept from one start to the next, as the survey is.
        """
        clips, (keys, runs) = found.clips, self._kept_keys(found, folders, path)
        sizes = np.array([run.size for run in runs], np.int64)[clips.numbers] if runs else np.zeros(0, np.int64)
        items = Items(
            clips,
            source_names(sources),
            [source.repeats for source in sources],
            keys=keys,
            starts=np.cumsum(sizes) - sizes,
            runs=runs,
            traced=traced,
        )
        fields = tuple(field.name for field in caption_fields(self.model.fields))
        return Jobs(items, tuple(folders), self.streams, self.beside, fields, self.fill, self.texts.alone)

    def _kept_keys(self, found: Survey, folders: Sequence[Path], path: Path) -> tuple[np.ndarray, Sequence[Run]]:
        """Return the keys that a file holds, where survey and encoders are those that they are of; else make them."""
        asked = found.mark, [views(self.config.objective, self.streams, video=video) for video in (False, True)]
        file = KeptFile(path, hashlib.sha256(repr(asked).encode()).hexdigest())
        held = file.read() if found.mark else None
        if held is not None and all(self.made_with[name] == one for name, one in held.told["made_with"].items()):
            return held.columns["keys"], [Run.of(told) for told in held.told["runs"]]
        keys, runs = self._make_keys(found.clips, folders)
        if found.mark:
            file.write({"made_with": dict(self.made_with), "runs": [run.told for run in runs]}, {"keys": keys})
        return keys, runs

    def _make_keys(self, clips: Clips, folders: Sequence[Path]) -> tuple[np.ndarray, Sequence[Run]]:
        """Return the keys of each clip after the one before it, and how many there are, by the number of its bucket."""
        keys, runs = bytearray(), [Run()] * len(clips.offered)
        for start in range(0, len(clips), WINDOW):
            window = clips[start : start + WINDOW]
            digests = self._digests([sample for sample, _, _ in window], folders)
            for number, found in zip(clips.numbers[start : start + WINDOW].tolist(), window):
                run, some = self._run(found, digests)
                assert runs[number] in (Run(), run), "clips of one bucket have as many keys"
                runs[number] = run
                keys += some
        return np.frombuffer(keys, KEY), runs

    def _run(self, found: SampleClip, digests: Mapping[Path, str]) -> tuple[Run, bytes]:
        """Return the keys of a clip, and how many there are of each kind."""
        sample, clip, _ = found
        if sample.features.latents:
            latents = given_part_keys(sample, clip, digests=digests, beside=self.beside)
        else:
            how = {"digests": digests, "fill": self.fill, "vae": self.made_with["clip"], "beside": self.beside}
            latents = part_keys(self.config, sample, clip, **how)
        shown = self._shown(found, digests)
        picture = first_frame(sample, clip, digests=digests, fill=self.fill) if self.sees else None
        seen, unseen = views(self.config.objective, self.streams, video=clip.frames > 1) if picture else (False, True)
        beside = [*[picture] * seen, *[None] * unseen]
        texts = [[*self.texts.keys(sample.caption, sample.features, one).values()] for one in beside]
        run = Run(
            len(latents),
            len(texts[0]),
            sum(map(len, texts[1:])),
            tuple((name, len(own)) for name, own in shown.own.items()),
            int(self.sees),
            tuple(shown.blank.items()),
            sees=beside[0] is not None,
        )
        every = [latents.values(), *texts, *shown.own.values(), [picture] if picture else ()]
        return run, b"".join(key for some in every for key in some)

    def _shown(self, found: SampleClip, digests: Mapping[Path, str]) -> ShownKeys:
        """Return the keys of what a clip's frames can be shown by; none, where the model is shown nothing."""
        if not self.shown:
            return ShownKeys({}, {})
        content = latent_keys(found.sample, found.clip, digests=digests, fill=self.fill, vae="")
        return keys_of_shown(self.shown, tuple(content.values()), found.bucket, self.made_with)

    def _digests(self, samples: Iterable[Sample], folders: Sequence[Path]) -> dict[Path, str]:
        """Hash the content of each stream's file, or of all images in its folder."""
        found: dict[Path, str] = {}
        for folder, memory in self.hashes.items():
            paths = {path for sample in samples if folders[sample.source] == folder for _, path in sample.paths}
            files = {path: files_of(path) for path in sorted(paths)}
            each = memory.digests([file for some in files.values() for file in some], HASHING_THREADS)
            for path, some in files.items():
                whole = [each[file] for file in some]
                found[path] = whole[0] if len(whole) == 1 else hashlib.sha256("".join(whole).encode()).hexdigest()
        return found
