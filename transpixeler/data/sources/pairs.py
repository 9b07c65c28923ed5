"""Scan sources: folders and manifests in; a sample for each pair, and a reason for everything that is not used, out.

A sample holds all its streams, which are never zipped from separate lists. Samples are sorted by id.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np

from transpixeler.config.sections import DataConfig, SourceConfig, UserError
from transpixeler.data.columns import Texts, TextWriter
from transpixeler.data.features.files import old_formats
from transpixeler.data.features.needs import Needs
from transpixeler.data.media.clip import Clip, Media, exact_rate
from transpixeler.data.media.decode import frame_numbers, probe, read_frames, read_rgba
from transpixeler.data.media.errors import BadMedia
from transpixeler.data.media.files import ending_of, spans_files
from transpixeler.data.media.fill import KEEP, Fill
from transpixeler.data.media.light import DATA
from transpixeler.data.media.probe import Probes
from transpixeler.data.names import is_utf8, printable
from transpixeler.data.sources.candidate import BadSample, Candidate, Note, TextRow, counted
from transpixeler.data.sources.captions import caption_of
from transpixeler.data.sources.folder import folder_candidates
from transpixeler.data.sources.manifest import MANIFEST_ENDINGS, manifest_candidates, shards_of
from transpixeler.data.sources.plain import ONE_VIDEO, PlainRow, known_media
from transpixeler.data.sources.samples import Sample, SampleWriter, in_order
from transpixeler.data.sources.twins import check_claims, check_numbers, check_twin

Probe = Callable[[Path], Media]
Offer = Candidate | PlainRow | TextRow | BadSample | Note
Found = Sample | Media | TextRow | BadSample | Note  # a plain row that is taken as it is: its first file
WINDOW = 4096  # candidates examined at a time: manifests are streamed
AT_ONCE = 32  # of them by one thread, which costs less than a thread for each


@dataclass(frozen=True, slots=True)
class Scan:
    """All that the sources hold, in the order of ids."""

    samples: Sequence[Sample]
    bad: tuple[BadSample, ...]
    texts: tuple[TextRow, ...] = ()  # in the order of their rows
    notes: tuple[Note, ...] = ()  # one of each text
    others: Texts = field(default_factory=lambda: Texts.of(()))  # files that rows name which make no sample


def scan(
    sources: Sequence[SourceConfig],
    streams: Mapping[str, str],
    data: DataConfig,
    *,
    probe: Probe = probe,
    needs: Needs | None = None,
) -> Scan:
    """Open every file once; drop nothing without a reason. needs: of features, where sources may hold some."""
    gathered, names = _Gathered(exact_rate(data.fps)), source_names(sources)
    threads = min(32, 4 * (os.cpu_count() or 1))
    with old_formats(), ThreadPoolExecutor(max_workers=threads) as pool:
        for index, source in enumerate(sources):
            fps = exact_rate(source.sequence_fps or data.sequence_fps or 0)
            look = partial(examined, source=index, rgba=source.rgba, probe=probe, needs=needs, fps=fps)
            offered = _offered(source, names[index], streams, data.columns)
            probes = probe if isinstance(probe, Probes) else None
            while window := list(itertools.islice(offered, WINDOW)):
                plain = known_media(window, probes and probes.known, pool, rgba=source.rgba)
                if probes is not None:
                    probes.look_ahead(_unknown_files(window, plain), threads)
                    probes.save(now=False)
                for candidate, found in zip(window, _all_looked_at(window, plain, look, pool), strict=True):
                    gathered.add(candidate, found, data, source=index, rgba=source.rgba)
    return gathered.scan(data)


def _unknown_files(window: Sequence[Offer], plain: Sequence[Media | None]) -> Iterator[Path]:
    """Yield the videos of candidates that take a longer look."""
    for candidate, media in zip(window, plain, strict=True):
        if media is None and isinstance(candidate, (PlainRow, Candidate)):
            one = _told_by(candidate)
            yield from (path for _, path in one.paths if not one.features.latents and is_utf8(str(path)))


def _told_by(offered: Candidate | PlainRow) -> Candidate:
    """Return the candidate that a row is, if it is still plain."""
    return offered.candidate if isinstance(offered, PlainRow) else offered


def _all_looked_at(
    window: Sequence[Offer], plain: Sequence[Media | None], look: Callable[[Offer], Found], pool: Executor
) -> list[Found]:
    """Look at the candidates that are not plain. plain: what is known of the others."""
    left = [place for place, media in enumerate(plain) if media is None]
    pieces = [left[start : start + AT_ONCE] for start in range(0, len(left), AT_ONCE)]
    looked = pool.map(lambda piece: [look(window[place]) for place in piece], pieces)
    others = iter(found for some in looked for found in some)
    return [next(others) if media is None else media for media in plain]


class _Gathered:
    """Gather what is found, good and bad."""

    def __init__(self, fps: Fraction) -> None:
        self.samples = SampleWriter(fps)
        self.named: list[BadSample] = []  # of which a candidate's name is kept
        self.bad: list[BadSample] = []
        self.texts: list[TextRow] = []
        self.notes: dict[str, Note] = {}
        self.others = TextWriter(filed=True)

    def add(self, candidate: Offer, found: Found, data: DataConfig, *, source: int, rgba: bool) -> None:
        if isinstance(found, Media):
            assert isinstance(candidate, PlainRow), "other candidates make samples"
            self.samples.append_plain(candidate, found, source, rgba=rgba)
        elif isinstance(found, Sample):
            self.samples.append(found)
            if not all(str(path).endswith(ONE_VIDEO) for _, path in found.paths):
                for note in (*_sequence_notes(found, data), *_light_notes(found, data)):
                    self.notes[note.text] = counted(note, self.notes.get(note.text))
        elif isinstance(found, TextRow):
            self.texts.append(found)
            self.others.append(str(found.features.text))
        elif isinstance(found, Note):
            self.notes[found.text] = counted(found, self.notes.get(found.text))
        elif isinstance(candidate, (Candidate, PlainRow)):
            self.samples.append_bad(candidate.id)
            self.named.append(found)
            self._name_files(candidate)
        else:
            self.bad.append(found)
            if isinstance(candidate, TextRow):
                self.others.append(str(candidate.features.text))

    def _name_files(self, candidate: Candidate | PlainRow) -> None:
        """Note the files of a row, which may be better at another start."""
        one = _told_by(candidate)
        for path in (*(path for _, path in one.paths), *([one.features.text] if one.features.text else [])):
            self.others.append(str(path))

    def scan(self, data: DataConfig) -> Scan:
        """Return all in order; refuse bad samples where that is asked."""
        samples, names = in_order(self.samples)
        bad = [*self.bad, *(replace(one, id=name) for one, name in zip(self.named, names, strict=True))]
        bad.sort(key=lambda sample: (sample.id, sample.path))
        if bad and data.on_bad == "error":
            first = f"{bad[0].id} ({bad[0].path}): {bad[0].reason}"
            raise UserError(
                f"{len(bad)} of {len(bad) + len(samples)} samples cannot be used, the first is {first}; "
                "mend them or set data.on_bad=skip"
            )
        notes = tuple(self.notes[text] for text in sorted(self.notes))
        return Scan(samples, tuple(bad), tuple(self.texts), notes, self.others.done())


def _sequence_notes(sample: Sample, data: DataConfig) -> Iterator[Note]:
    """Say of an image sequence at which rate it is taken."""
    path, media = sample.paths[0][1], sample.media
    if media.image or sample.features.latents or not spans_files(path):
        return
    if media.fps:
        yield Note(f"image sequence, taken at {float(media.fps):.5g} fps", str(path))
    else:
        rate = f"taken image by image as {data.fps:g} fps (data.fps)"
        yield Note(f"image sequence without a rate, {rate}; data.sequence_fps gives one", str(path))


def _light_notes(sample: Sample, data: DataConfig) -> Iterator[Note]:
    """Say how OpenEXR files are taken: as a picture, by which curve, and with what alpha."""
    for number, (_, path) in enumerate(() if sample.features.latents else sample.paths):
        if ending_of(path) != ".exr" or (sample.rgba and number):
            continue
        if number:
            yield Note("OpenEXR file or sequence, a companion: its values from 0 to 1 as they are", str(path))
        else:
            stored = "as each file says, else premultiplied" if data.alpha == "auto" else data.alpha
            alpha = f"; alpha: {stored} (data.alpha)" if sample.rgba else ""
            curve = f"by the curve of {data.transfer} (data.transfer), cut at white"
            yield Note(f"OpenEXR file or sequence, linear light: shown {curve}{alpha}", str(path))


def source_names(sources: Iterable[SourceConfig]) -> tuple[str, ...]:
    """Return a unique name for each source, which begins the ids of its samples: as given, or the folder's."""
    names: list[str] = []
    for source in sources:
        name = wanted = source.name or _stem(Path(source.path))
        for count in itertools.count(2):
            if name not in names:
                break
            name = f"{wanted}-{count}"
        names.append(name)
    return tuple(names)


def _stem(path: Path) -> str:
    try:
        return path.resolve().stem
    except (OSError, ValueError, RuntimeError):  # no name of a file, which `_offered` says
        return path.stem


def _offered(
    source: SourceConfig, name: str, streams: Mapping[str, str], columns: Mapping[str, str]
) -> Iterator[Offer]:
    path = Path(source.path)
    try:
        path.stat()
    except FileNotFoundError:
        where = printable(str(path))
        raise UserError(f"{where}: the source does not exist; give a folder of pairs or a manifest") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{printable(str(path))}: the source cannot be read: {error}") from None
    if source.rgba and len(streams) > 2:
        raise UserError(f"{path}: rgba gives two streams, but streams names {', '.join(streams)}")
    if not reads_manifest(source):
        return folder_candidates(path, name, streams, rgba=source.rgba)
    if not path.is_dir() and path.suffix.lower() not in MANIFEST_ENDINGS:
        raise UserError(f"{path}: a source is a folder or a manifest ({', '.join(MANIFEST_ENDINGS)})")
    return manifest_candidates(path, name, streams, rgba=source.rgba, columns=columns)


def reads_manifest(source: SourceConfig) -> bool:
    """Tell whether a source is a manifest or a folder of its shards, and no folder of pairs."""
    path = Path(source.path)
    return not path.is_dir() or _holds_shards(path)


def _holds_shards(folder: Path) -> bool:
    try:
        return bool(shards_of(folder))
    except OSError:  # listing it says why
        return False


def examined(
    candidate: Offer,
    source: int,
    rgba: bool,
    probe: Probe = probe,
    needs: Needs | None = None,
    fps: Fraction = Fraction(0),
) -> Found:
    """Open a candidate's files and compare them with each other and with the manifest's claims.

    fps: of image sequences, where the manifest gives none; 0 takes them image by image.
    """
    if isinstance(candidate, (BadSample, Note)):
        return candidate
    if isinstance(candidate, TextRow):
        return _examined_text(candidate, needs)
    candidate = _told_by(candidate)
    files = [path for _, path in candidate.paths] + [candidate.caption] * isinstance(candidate.caption, Path)
    for path in (*files, *([candidate.features.text] if candidate.features.text else [])):
        if not is_utf8(str(path)):
            return BadSample(candidate.id, str(path), "its name is not UTF-8; rename it")
    given = bool(candidate.features.latents)
    path = candidate.paths[0][1]
    try:
        media = _known(needs).media(candidate.features) if given else probe(path)
        check_claims(candidate.declared, media)
        media = media if given else media.at_rate(candidate.declared.get("fps", fps))
        for path in () if given else [path for _, path in candidate.paths]:
            _check_stream(candidate, path, media, probe=probe, rgba=rgba)
        path = candidate.features.text or path
        if candidate.features.text:
            _known(needs).check_text(candidate.features)
        path = candidate.caption if isinstance(candidate.caption, Path) else candidate.paths[0][1]
        caption = caption_of(candidate.caption)
    except BadMedia as error:
        return BadSample(candidate.id, str(path), str(error))
    return Sample(candidate.id, candidate.paths, caption, source, rgba and not given, media, candidate.features)


def _examined_text(row: TextRow, needs: Needs | None) -> TextRow | BadSample:
    assert row.features.text is not None, row
    path = row.features.text
    try:
        if not is_utf8(row.text + str(path)):
            raise BadMedia("its text or path is not UTF-8")
        _known(needs).check_text(row.features)
    except BadMedia as error:
        return BadSample(row.id, str(path), str(error))
    return replace(row, text=row.text.strip())


def _known(needs: Needs | None) -> Needs:
    """Return what features must be like; tools that look at files alone have no model to compare them with."""
    if needs is None:
        raise BadMedia("gives features, which are read for training alone")
    return needs


def _check_stream(candidate: Candidate, path: Path, media: Media, *, probe: Probe, rgba: bool) -> None:
    """Compare one stream's file with the first stream's."""
    first, primary = candidate.paths[0]
    if rgba and not media.alpha and len(candidate.paths) > 1:
        raise BadMedia("has no alpha channel, but its source is rgba")
    if not rgba and path is not primary:
        twin = probe(path)
        check_twin(first, media, twin)
        if not twin.fps:  # no file has none, but for stills
            check_numbers(first, primary, path)


def decode_pair(sample: Sample, clip: Clip, *, fill: Fill = KEEP, threads: int = 0) -> dict[str, np.ndarray]:
    """Return uint8 [F,H,W,3] for each stream, all at the frame numbers that the first stream's times give.

    Linear light of the first stream becomes a picture, that of a companion is data. `fill` is for the RGB of rgba
    samples, and says the curve; `threads` is the number of decoder threads, 0 for all cores.
    Raises BadMedia where a file breaks off inside the clip.
    """
    first, path = sample.paths[0]
    height, width = clip.height, clip.width
    with _blamed_on(first, path):
        numbers = frame_numbers(path, clip, rate=sample.media.fps)
        if sample.rgba:
            both = read_rgba(path, numbers, height=height, width=width, fill=fill, threads=threads)
            return dict(zip(dict(sample.paths), both))
    decoded = {}
    for stream, path in sample.paths:
        with _blamed_on(stream, path):
            light = DATA if decoded else fill.light
            decoded[stream] = read_frames(path, numbers, height=height, width=width, threads=threads, light=light)
    return decoded


@contextmanager
def _blamed_on(stream: str, path: Path) -> Iterator[None]:
    try:
        yield
    except BadMedia as error:
        raise BadMedia(f"its {stream} file {printable(str(path))}: {error}") from error
