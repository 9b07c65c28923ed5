"""A run, a save or an adapter file goes in; its weights, config, samples and card are pushed to the Hub.

A push is one commit of what has changed. Only the Hub client reads the token: it is never kept, written or logged here.
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

from transpixeler.adapters.files import CONFIG_FILE
from transpixeler.adapters.saved import ADAPTER_FILE, CONFIG, MODEL_FOLDER, expert_folders
from transpixeler.config import loading
from transpixeler.config.sections import REPO, Config, Fault, PathKind, UserError
from transpixeler.publishing import card, card_facts
from transpixeler.publishing.card_use import NODE_FOLDER
from transpixeler.publishing.received import check_within, read_table, read_yaml
from transpixeler.sampling.saves import Save, SavedModel, find_save, read_save

logger = logging.getLogger("transpixeler")

CARD = "README.md"
LAST_PUSH_SECONDS = 600.0  # that the end of training waits for a push that is under way
_CACHE_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)")


@dataclass(frozen=True)
class Terms:
    """The repository that a model is pushed to, and what its card says that no file does."""

    repo: str
    private: bool = True
    base: str = ""
    license: str = ""  # that of the base


@dataclass(frozen=True)
class Parcel:
    """Everything that is pushed, by its path in the repository."""

    terms: Terms
    files: Mapping[str, Path | bytes]
    message: str


def pack(source: str, terms: Terms, *, ema: bool | None = None) -> Parcel:
    """Read everything that would be pushed, so that nothing damaged is."""
    if not REPO.fullmatch(terms.repo):
        raise UserError(f"--repo: {terms.repo!r} is no Hub id; write it as user/name")
    if terms.base and not REPO.fullmatch(terms.base):
        raise UserError(f"--base: {terms.base!r} is no Hub id; write it as user/name")
    save = find_save(source, ema=ema)
    _check_own(save, source)
    found = read_save(save, source)
    base = terms.base or _base_of(found.config.model.path)
    origin = _base_of(found.config.model.encoders)  # of a base that was trained here, and is on no Hub
    base = base or (origin if found.weights else "")
    fused = _without_folders(list(found.config.model.fused_paths))
    made = card_facts.gather(
        found, found.run, repo=terms.repo, base=base, origin=origin, fused=fused, license=terms.license
    )
    files: dict[str, Path | bytes] = {**_weights(found, save.path, base), CONFIG: _config(found.config, base)}
    files |= {path: file for sample in made.samples for path, file in sample.files.items()}
    if made.node is not None:
        parts = [file for file in made.node.rglob("*") if file.suffix in (".py", ".md", ".json")]
        files |= {f"{NODE_FOLDER}/{file.relative_to(made.node.parent).as_posix()}": file for file in parts}
    files[CARD] = card.write(made).encode()
    return Parcel(terms, dict(sorted(files.items())), f"Step {found.step}" if found.step is not None else "Upload")


def listing(parcel: Parcel) -> str:
    """Return what would be pushed, for people."""
    kind = "private" if parcel.terms.private else "public"
    lines = [f"to {parcel.terms.repo} (created as a {kind} repository if it does not exist):"]
    for path, content in parcel.files.items():
        size = len(content) if isinstance(content, bytes) else content.stat().st_size
        lines.append(f"  {size:>13,}  {path}")
    text = parcel.files[CARD]
    assert isinstance(text, bytes)
    if b"\nbase_model:" not in text:
        lines.append("the card names no base_model, as its Hub id is not known: give it with --base USER/NAME")
    return "\n".join([*lines, "", f"{CARD}:", text.decode()])


def push(parcel: Parcel) -> str:
    """Push in one commit, or none where nothing has changed, and return the repository's address.

    After an interruption only what had not arrived is sent again.
    """
    from huggingface_hub import CommitOperationAdd, HfApi, get_token

    terms = parcel.terms
    if not get_token():
        raise UserError("push: there is no Hub token here; log in with `hf auth login`, or set HF_TOKEN")
    api = HfApi(library_name="transpixeler")
    with _one_line_errors(terms.repo):
        url = api.create_repo(terms.repo, private=terms.private, exist_ok=True)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in parcel.files.items()
        ]
        api.create_commit(terms.repo, operations, commit_message=parcel.message)
    return str(url)


@contextmanager
def _one_line_errors(repo: str) -> Iterator[None]:
    """Turn whatever the client raises into one line: a mistake that the user can mend, or a fault."""
    from huggingface_hub.errors import HfHubHTTPError

    # Its bases are the errors of the HTTP library that the client uses, which has changed between versions.
    of_http = tuple(base for base in HfHubHTTPError.__bases__ if issubclass(base, Exception))
    try:
        yield
    except (OSError, RuntimeError, ValueError, *of_http) as error:
        code = _status(error)
        if code == 401:
            raise UserError("push: the Hub rejects the token; log in with `hf auth login`, or set HF_TOKEN") from error
        if code == 403:
            raise UserError(f"push: the token may not write to {repo}; use one that may, or another --repo") from error
        if code == 400:
            raise UserError(f"push: the Hub refuses {repo}: {_line(error)}") from error
        again = "run push again: what has arrived is not sent twice"
        if code is not None:
            raise Fault(f"push: the Hub answered {code} for {repo}; {again}") from error
        raise Fault(f"push: {repo} did not arrive ({type(error).__name__}: {_line(error)}); {again}") from error


def _status(error: BaseException | None) -> int | None:
    """Return the HTTP status behind an error, which may be wrapped."""
    while error is not None:
        code = getattr(getattr(error, "response", None), "status_code", None)
        if code is not None:
            return int(code)
        error = error.__cause__
    return None


def _line(error: BaseException) -> str:
    return (" ".join(str(error).split()) or type(error).__name__)[:200]


# --- what goes -------------------------------------------------------------------------------------------------------


def _check_own(save: Save, source: str) -> None:
    """Refuse a save with files that links lead elsewhere: whoever made it chose what would be pushed."""
    if not Path(source).expanduser().exists():
        raise UserError(f"push: {source} is not on this machine; give a run's folder, a save or an adapter file")
    root = save.run or save.folder.resolve()
    path = save.path if save.run else save.path.resolve()
    weights = sorted(save.weights.iterdir()) if save.weights else ()
    parts = [path, *expert_folders(path).values()]
    files = [path] if path.is_file() else [part / name for part in parts for name in (ADAPTER_FILE, CONFIG_FILE)]
    for file in (path, *files, *weights, save.config):
        check_within(file, root)
    if save.config.is_file() and "base" in read_yaml(save.config):
        raise UserError(f"{save.config}: base: a run's config builds on no other file; put its keys into it instead")


def _weights(found: SavedModel, save: Path, base: str) -> dict[str, Path | bytes]:
    """Return the weights byte for byte as they were saved, but without this machine's folders in their headers."""
    files: dict[str, Path | bytes] = {}
    if found.weights is not None:
        files |= {f"{MODEL_FOLDER}/{file.name}": file for file in sorted(found.weights.iterdir()) if file.is_file()}
    if save.is_file():
        return files | {ADAPTER_FILE: _adapter(save, base)}
    parts = {f"{name}/": part for name, part in expert_folders(save).items()} or {"": save}
    for place, part in parts.items():
        if (part / ADAPTER_FILE).is_file():
            files[place + ADAPTER_FILE] = _adapter(part / ADAPTER_FILE, base)
        if (part / CONFIG_FILE).is_file():
            said = read_table(part / CONFIG_FILE, {})
            files[place + CONFIG_FILE] = (json.dumps(_public_header(said, base), indent=2) + "\n").encode()
    return files


def _adapter(file: Path, base: str) -> Path | bytes:
    """Return the file, or its bytes under another header where the header holds folders of this machine."""
    with file.open("rb") as stored:
        header = json.loads(stored.read(int.from_bytes(stored.read(8), "little")))
        said = header.get("__metadata__", {})
        public = _public_header(said, base)
        if public == said:
            return file
        text = json.dumps(header | {"__metadata__": public}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors begin at a multiple of their numbers' size
        return len(text).to_bytes(8, "little") + text + stored.read()


def _public_header(said: dict[str, Any], base: str) -> dict[str, Any]:
    """Return an adapter's header with its base and fused adapters under their names on the Hub."""
    public = _without_folders(said)
    for key, value in public.items():
        if isinstance(value, dict):
            public[key] = _public_header(value, base)
        elif base and key.endswith(("base_model", "base_model_name_or_path")):
            public[key] = base
        elif key.endswith("fuse") and isinstance(value, str):
            public[key] = _public_paths(value)
    return public


def _public_paths(text: str) -> str:
    """Return a JSON list of paths without this machine's folders; nothing can be told of what is no list."""
    try:
        return json.dumps(_without_folders(json.loads(text)))
    except (ValueError, RecursionError):
        return "[]"


def _base_of(path: str) -> str:
    """Return the Hub id that a path is, or whose folder in the Hub client's cache it is in; else ""."""
    if REPO.fullmatch(path) and not Path(path).exists():
        return path
    cached = next((match for part in Path(path).parts if (match := _CACHE_FOLDER.fullmatch(part))), None)
    return f"{cached[1]}/{cached[2]}" if cached else ""


def _config(config: Config, base: str) -> bytes:
    """Return config.yaml without this machine's folders: only paths change, as a prompt may look like one."""
    public = _paths_shortened(Config, config)
    if base:
        public = replace(public, model=replace(public.model, path=base))
    return loading.dump(public).encode()


def _paths_shortened(hint: Any, value: Any) -> Any:
    """Return a config's value with the last part of each path, where its type says that it is one."""
    either = (hint, *get_args(hint)) if isinstance(value, str) else ()  # or one type of several
    if any(isinstance(mark, PathKind) for one in either for mark in getattr(one, "__metadata__", ())):
        return _last_part(value)
    if is_dataclass(value) and not isinstance(value, type):
        hints = get_type_hints(type(value), include_extras=True)
        return replace(value, **{name: _paths_shortened(hint, getattr(value, name)) for name, hint in hints.items()})
    if isinstance(value, tuple) and get_args(hint)[1:] == (...,):
        return tuple(_paths_shortened(get_args(hint)[0], part) for part in value)
    return value


def _without_folders(value: Any) -> Any:
    """Return a value with the last part of each text that is an absolute path, where no type says what is one."""
    if isinstance(value, dict):
        return {key: _without_folders(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_without_folders(part) for part in value]
    return _last_part(value) if isinstance(value, str) else value


def _last_part(path: str) -> str:
    """Return a path without this machine's folders, which are of no use to others and may be private."""
    return _base_of(path) or Path(path).name if Path(path).is_absolute() else path


# --- while training --------------------------------------------------------------------------------------------------


class Pusher:
    """Pushes saves in the background: the newest that waits. A failure is logged and stops nothing."""

    def __init__(self, config: Config) -> None:
        self.terms = Terms(config.hub.repo, private=config.hub.private)
        self.every = config.hub.every_saves
        self._saves = 0
        self._unsent: Path | None = None  # the newest save, if it is not sent yet
        self._waiting: queue.Queue[Path | None] = queue.Queue()
        self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
        self._thread.start()

    def saved(self, folder: Path) -> None:
        """Take note of a save, and push it if it is its turn."""
        self._saves += 1
        self._unsent = folder
        if self._saves % self.every == 0:
            self._send_newest()

    def _send_newest(self) -> None:
        self._waiting.put(self._unsent)
        self._unsent = None

    def close(self) -> None:
        """Push the newest save if it is not on the Hub yet, and wait for that."""
        if self._unsent is not None:
            self._send_newest()
        self._waiting.put(None)
        self._thread.join(LAST_PUSH_SECONDS)
        if self._thread.is_alive():
            logger.warning("hub: %s: a push was still under way and was given up", self.terms.repo)

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
        except Exception as fault:  # whatever went wrong, a push is not worth the training
            logger.warning("hub: %s was not pushed; training goes on: %s", folder, _line(fault))


def pusher(config: Config) -> Pusher | None:
    """Start pushing in the background, if `hub.repo` is set."""
    return Pusher(config) if config.hub.repo else None
