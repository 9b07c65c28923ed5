"""A Hub on 127.0.0.1 that speaks what the real client asks for: repos, preupload, LFS and commits, trees and files."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml

CLIENT = tuple(int(part) for part in importlib.metadata.version("huggingface-hub").split(".")[:2])
TOKEN = "hf_thisIsTheSecretOfTheTest"
READER = "hf_thisOneMayOnlyRead"
LARGE = 1_000  # bytes from which on a file goes by LFS


@dataclass
class Hub:
    """What the server holds, and how it behaves."""

    endpoint: str = ""
    repos: dict[str, dict[str, bytes]] = field(default_factory=dict)
    private: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)  # by sha256
    commits: list[list[str]] = field(default_factory=list)  # paths of each
    requests: list[str] = field(default_factory=list)
    uploads: list[str] = field(default_factory=list)  # sha256 of each that arrived
    uploads_left: int = 10**6  # before uploads break off half-way
    lock: Any = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._allowed():
            self._read()

    do_HEAD = do_GET

    def _read(self) -> None:
        path, commit = self.path.split("?")[0], f"{len(self.hub.commits):040x}"
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(self.hub.repos.get(found[1], {}).get(found[2]), commit)
            return
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(/.*)?", path)
        files = self.hub.repos.get(found[1]) if found else None
        if files is None:
            self._answer(404, {})
        elif (found[2] or "").startswith("/tree/"):
            listed = {name: {"size": len(content), "oid": _oid(content, "regular")} for name, content in files.items()}
            self._answer(200, [{"type": "file", "path": name, **facts} for name, facts in listed.items()])
        else:
            siblings = [{"rfilename": name} for name in files]
            self._answer(200, {"id": found[1], "sha": commit, "siblings": siblings})

    def _file(self, content: bytes | None, commit: str) -> None:
        if content is None:
            self._answer(404, {})
            return
        headers = {"ETag": f'"{_oid(content, "regular")}"', "X-Repo-Commit": commit}
        self._send(200, content, {"Content-Type": "application/octet-stream", **headers})

    def do_PUT(self) -> None:
        length = int(self.headers["Content-Length"])
        with self.hub.lock:
            breaks = not self.hub.uploads_left
            self.hub.uploads_left -= not breaks
        if breaks:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        content, name = self.rfile.read(length), self.path.split("/")[-1]
        assert hashlib.sha256(content).hexdigest() == name
        self.hub.large[name] = content
        self.hub.uploads.append(name)
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunked()
        if not self._allowed(writes=True):
            return
        for pattern, answer in (
            (r"/api/repos/create", self._create),
            (r"/api/validate-yaml", self._validate),
            (r"/api/models/(.+)/preupload/main", self._preupload),
            (r"/(.+)\.git/info/lfs/objects/batch", self._batch),
            (r"/api/models/(.+)/commit/main", self._commit),
        ):
            if found := re.fullmatch(pattern, self.path.split("?")[0]):
                self._answer(*answer(body, *found.groups()))
                return
        self._answer(404, {"error": self.path})

    def _chunked(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _allowed(self, *, writes: bool = False) -> bool:
        self.hub.requests.append(f"{self.command} {self.path.split('?')[0]}")
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token == TOKEN or (token == READER and not writes):
            return True
        self._answer(403 if token == READER else 401, {"error": "no"})
        return False

    def _answer(self, code: int, value: Any) -> None:
        self._send(code, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, code: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(code)
        for name, text in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, text)
        self.end_headers()
        self.wfile.write(content if self.command != "HEAD" else b"")

    def _create(self, body: bytes) -> tuple[int, Any]:
        said = json.loads(body)
        repo = f"{said.get('organization') or 'me'}/{said['name']}"
        url = {"url": f"{self.hub.endpoint}/{repo}"}
        if repo in self.hub.repos:
            return 409, url
        self.hub.repos[repo], self.hub.private[repo] = {}, said.get("private") or said.get("visibility") == "private"
        return 200, url

    def _validate(self, body: bytes) -> tuple[int, Any]:
        header = yaml.safe_load(json.loads(body)["content"].split("---")[1])
        known = re.fullmatch(r"[a-z0-9.+-]+", str(header.get("license")))
        errors = [] if known else [{"message": '"license" must be one of the known ids'}]
        errors += [
            {"message": '"widget" needs an output'} for one in header.get("widget", ()) if not one["output"]["url"]
        ]
        return 400 if errors else 200, {"errors": errors, "warnings": []}

    def _preupload(self, body: bytes, repo: str) -> tuple[int, Any]:
        files = []
        for file in json.loads(body)["files"]:
            mode, there = "lfs" if file["size"] >= LARGE else "regular", self.hub.repos[repo].get(file["path"])
            oid = None if there is None else _oid(there, mode)
            files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}

    def _batch(self, body: bytes, repo: str) -> tuple[int, Any]:
        objects = []
        for wanted in json.loads(body)["objects"]:
            upload = {"upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"}}
            there = wanted["oid"] in self.hub.large
            objects.append({**wanted, **({} if there else {"actions": upload})})
        return 200, {"transfer": "basic", "objects": objects}

    def _commit(self, body: bytes, repo: str) -> tuple[int, Any]:
        paths = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                self.hub.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.hub.repos[repo][value["path"]] = self.hub.large[value["oid"]]
            paths += [value["path"]] if line["key"] != "header" else []
        self.hub.commits.append(sorted(paths))
        return 200, {"commitUrl": f"{self.hub.endpoint}/{repo}/commit/{'1' * 40}", "commitOid": "1" * 40}


def _oid(content: bytes, mode: str) -> str:
    if mode == "lfs":
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def serving_here(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Iterator[Hub]:
    """Serve a Hub that the client in this process asks, with its cache in a folder."""
    from huggingface_hub import constants, file_download

    with serving() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
        files = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for module in (constants, file_download):  # clients before 1.0 have a copy of it
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", files, raising=module is constants)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(folder / "token"))
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
