"""What was trained goes to the Hub: weights, config, samples and a card, in one commit of only what has changed.

In: a run, a save or an adapter file, and the terms. Out: the repository's address. The token is the Hub client's own
affair: it is never read into a value that is kept, written or logged here.
"""

from __future__ import annotations

import json
import logging
import queue
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass, replace
from pathlib import Path
from typing import Any, get_args, get_type_hints

from transpixeler import configfile
from transpixeler.adapters.files import ADAPTER_FILE, CONFIG_FILE
from transpixeler.config import REPO, Config, Fault, PathKind, UserError
from transpixeler.files import read_json
from transpixeler.publishing import card
from transpixeler.runs.folder import CONFIG
from transpixeler.sampling import trained
from transpixeler.sampling.trained import MODEL, Trained

logger = logging.getLogger("transpixeler")

CARD = "README.md"
PATIENCE = 600.0  # seconds that the end of training waits for a push under way
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class Terms:
    """Where it goes and what the card says that no file does."""

    repo: str
    private: bool = True
    base: str = ""
    license: str = "apache-2.0"


@dataclass(frozen=True)
class Parcel:
    """Everything that goes, by its path there."""

    terms: Terms
    files: Mapping[str, Path | bytes]
    message: str


def pack(source: str, terms: Terms, *, ema: bool | None = None) -> Parcel:
    """Reads what is to go, so that what is damaged does not."""
    if not REPO.fullmatch(terms.repo):
        raise UserError(f"--repo: {terms.repo!r} is no Hub id; write it as user/name")
    if terms.base and not REPO.fullmatch(terms.base):
        raise UserError(f"--base: {terms.base!r} is no Hub id; write it as user/name")
    found = trained.find(source, ema=ema)
    save = _save_of(found)
    base = terms.base or _base_of(found.config.model.path)
    fused = _without_folders(list(found.config.model.fuse))
    told = card.gather(found, trained.run_of(save), repo=terms.repo, base=base, fused=fused, license=terms.license)
    files: dict[str, Path | bytes] = {**_weights(found, save, base), CONFIG: _config(found.config, base)}
    files |= {path: file for sample in told.samples for path, file in sample.files.items()}
    files[CARD] = card.write(told).encode()
    return Parcel(terms, dict(sorted(files.items())), f"Step {found.step}" if found.step is not None else "Upload")


def listing(parcel: Parcel) -> str:
    """What would go, for people."""
    kind = "private" if parcel.terms.private else "public"
    lines = [f"to {parcel.terms.repo} (made as a {kind} repo if it does not exist):"]
    for path, what in parcel.files.items():
        size = len(what) if isinstance(what, bytes) else what.stat().st_size
        lines.append(f"  {size:>13,}  {path}")
    written = parcel.files[CARD]
    assert isinstance(written, bytes)
    return "\n".join([*lines, "", f"{CARD}:", written.decode()])


def push(parcel: Parcel) -> str:
    """One commit, or none where nothing has changed; after a break only what had not arrived is sent again."""
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    terms = parcel.terms
    if not get_token():
        raise UserError("push: there is no Hub token here; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="transpixeler")
    with _plainly(terms.repo):
        url = api.create_repo(terms.repo, private=terms.private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, what if isinstance(what, bytes) else str(what))
            for path, what in parcel.files.items()
        ]
        api.create_commit(terms.repo, operations, commit_message=parcel.message)
    return str(url)


@contextmanager
def _plainly(repo: str) -> Iterator[None]:
    """Whatever the client throws as one line: what the user can mend, or a fault."""
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, RuntimeError, ValueError, *HfHubHTTPError.__bases__) as error:
        code = _status(error)
        if code == 401:
            raise UserError(
                "push: the Hub does not take the token; log in with `hf auth login`, or set HF_TOKEN"
            ) from error
        if code == 403:
            raise UserError(
                f"push: the token may not write to {repo}; take one with write access to it, or name another --repo"
            ) from error
        if code == 400:
            raise UserError(f"push: the Hub refuses {repo}: {_line(error)}") from error
        again = "run push again: what has arrived is not sent twice"
        if code is not None:
            raise Fault(f"push: the Hub answered {code} for {repo}; {again}") from error
        raise Fault(f"push: {repo} did not arrive ({type(error).__name__}: {_line(error)}); {again}") from error


def _status(error: BaseException | None) -> int | None:
    """Of the answer behind an error, which may be wrapped."""
    while error is not None:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code is not None:
            return int(code)
        error = error.__cause__
    return None


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# --- what goes -------------------------------------------------------------------------------------------------------


def _save_of(found: Trained) -> Path:
    path = Path(found.name).expanduser()
    if not path.exists():
        raise UserError(f"push: {found.name} is not here; give a run's folder, a save or an adapter file")
    return path


def _weights(found: Trained, save: Path, base: str) -> dict[str, Path | bytes]:
    """Byte for byte as they were saved, but for folders of this machine in what an adapter says of itself."""
    files: dict[str, Path | bytes] = {}
    if found.weights is not None:
        files |= {f"{MODEL}/{file.name}": file for file in sorted(found.weights.iterdir()) if file.is_file()}
    adapter, config = (save, None) if save.is_file() else (save / ADAPTER_FILE, save / CONFIG_FILE)
    if adapter.is_file():
        files[ADAPTER_FILE] = _adapter(adapter, base)
    if config and config.is_file():
        told = read_json(config)
        files[CONFIG_FILE] = (json.dumps(_told(told, base), indent=2) + "\n").encode()
    return files


def _adapter(file: Path, base: str) -> Path | bytes:
    """The file, or where its header must not go as it is, its bytes under another."""
    with file.open("rb") as stored:
        header = json.loads(stored.read(int.from_bytes(stored.read(8), "little")))
        said = header.get("__metadata__", {})
        told = _told(said, base)
        if told == said:
            return file
        text = json.dumps(header | {"__metadata__": told}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of their numbers' size
        return len(text).to_bytes(8, "little") + text + stored.read()


def _told(said: dict[str, Any], base: str) -> dict[str, Any]:
    """What an adapter says of itself, with its base and what is fused into that by their names on the Hub."""
    told = _without_folders(said)
    for key, value in told.items():
        if isinstance(value, dict):
            told[key] = _told(value, base)
        elif base and key.endswith(("base_model", "base_model_name_or_path")):
            told[key] = base
        elif key.endswith("fuse"):
            told[key] = json.dumps(_without_folders(json.loads(value)))
    return told


def _base_of(path: str) -> str:
    """A Hub id where a path says it: itself, or a folder of the Hub client's cache."""
    if REPO.fullmatch(path) and not Path(path).exists():
        return path
    cached = next((match for part in Path(path).parts if (match := _CACHED.fullmatch(part))), None)
    return f"{cached[1]}/{cached[2]}" if cached else ""


def _config(config: Config, base: str) -> bytes:
    """Its paths alone are changed: a prompt may begin as one does."""
    told = _by_last_parts(Config, config)
    if base:
        told = replace(told, model=replace(told.model, path=base))
    return configfile.dump(told).encode()


def _by_last_parts(hint: Any, value: Any) -> Any:
    """What a config's type says is a path, without its folder."""
    if any(isinstance(mark, PathKind) for mark in getattr(hint, "__metadata__", ())):
        return _last_part(value)
    if is_dataclass(value):
        hints = get_type_hints(type(value), include_extras=True)
        return replace(value, **{name: _by_last_parts(hint, getattr(value, name)) for name, hint in hints.items()})
    if isinstance(value, tuple) and get_args(hint)[1:] == (...,):
        return tuple(_by_last_parts(get_args(hint)[0], part) for part in value)
    return value


def _without_folders(value: Any) -> Any:
    """Every text that is a path, where no type says which ones are."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    """Folders of this machine say nothing to others, and may say too much."""
    return _base_of(path) or Path(path).name if Path(path).is_absolute() else path


# --- while training --------------------------------------------------------------------------------------------------


class Pusher:
    """Sends saves in the background; a failure is told and stops nothing. Of saves that wait, the newest goes."""

    def __init__(self, config: Config) -> None:
        self.terms = Terms(config.hub.repo, private=config.hub.private)
        self.every = config.hub.every_saves
        self._saves = 0
        self._left: Path | None = None  # the newest save, where it is not sent yet
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def saved(self, folder: Path) -> None:
        self._saves += 1
        self._left = folder
        if self._saves % self.every == 0:
            self._send_left()

    def _send_left(self) -> None:
        self._waiting.put(self._left)
        self._left = None

    def close(self) -> None:
        """What is on the Hub in the end is the newest save."""
        if self._left is not None:
            self._send_left()
        self._waiting.put(None)
        self._thread.join(PATIENCE)
        if self._thread.is_alive():
            logger.warning("hub: %s: a push is still under way and is given up", self.terms.repo)

    def _work(self) -> None:
        ended = False
        while not ended:
            saves = [self._waiting.get()]
            while not self._waiting.empty():
                saves.append(self._waiting.get())
            ended = saves[-1] is None
            for folder in [save for save in saves if save is not None][-1:]:
                self._push(folder)

    def _push(self, folder: Path) -> None:
        try:
            logger.info("hub: %s is at %s", folder.name, push(pack(str(folder), self.terms)))
        except Exception as fault:  # training is worth more than a push, whatever went wrong with it
            logger.warning("hub: %s was not pushed; training goes on: %s", folder, _line(fault))


def pusher(config: Config) -> Pusher | None:
    return Pusher(config) if config.hub.repo else None
