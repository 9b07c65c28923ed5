"""A page goes in; what a real browser makes of it, in frames of a phone's and a desk's width, comes out.

The browser runs in real time, as videos do, and posts what was found to a server here; it reaches nothing else.
"""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
needs_browser = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not on PATH")
QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)
LONGEST = 120.0  # seconds
HOST = """<!doctype html>FRAMES<script>
const found = {}, frames = [...document.querySelectorAll("iframe")];
onmessage = event => {
  found[frames.find(f => f.contentWindow === event.source).id] = event.data;
  const body = JSON.stringify(found);
  if (Object.keys(found).length === frames.length) fetch("ADDRESS", { method: "POST", mode: "no-cors", body });
};
</script>"""
WATCH = """<script>
window.faults = [];
onerror = (message, file, line) => faults.push(`${message} at ${line}`);
onunhandledrejection = event => faults.push(String(event.reason));
if (innerWidth < 500) ResizeObserver = class { observe() {} }; // as in a browser too busy to have drawn a frame
</script>"""
PROBE = """<script>{ // a block, so that the page may have these names too
const all = (selector, of = document) => [...of.querySelectorAll(selector)];
const one = selector => document.querySelector(selector);
const wait = seconds => new Promise(done => setTimeout(done, seconds * 1000));
const until = async condition => { while (!condition()) await wait(0.02); };
const scrolled = ".scroll, nav div, pre, svg, .group";
const overflowing = root => all("*", one(root)).filter(n => n.getClientRects().length && !n.closest(scrolled))
  .filter(n => n.getBoundingClientRect().right > innerWidth + 1).map(n => `${n.tagName}.${n.className}`);
onload = async () => {
  await wait(0.7);
  try {
    const found = await (async () => { LOOK })();
    if (found) parent.postMessage({ faults, ...found }, "*");
  } catch (fault) { parent.postMessage({ faults: [...faults, String(fault)] }, "*"); }
};
}</script>"""


def browse(page: Path, look: str, *, widths: tuple[int, ...] = (390, 1280)) -> dict[str, Any]:
    """Return by width (`w390`) what the JavaScript `look` returns in the page, and the faults that there were.

    A page that is loaded again is looked at again, until `look` returns something.
    """
    text = page.read_text(encoding="utf-8")
    probed = page.with_name("probed.html")
    probed.write_text(text.replace("<title>", WATCH + "<title>", 1).replace("</html>", PROBE.replace("LOOK", look)))
    frames = (f'<iframe id="w{w}" style="width:{w}px;height:900px" src="{probed.name}"></iframe>' for w in widths)
    host = page.with_name("host.html")
    with _listening() as (address, answers):
        host.write_text(HOST.replace("FRAMES", "".join(frames)).replace("ADDRESS", address))
        command = _command(host, "--window-size=1800,1000")
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            return json.loads(answers.get(timeout=LONGEST))
        except queue.Empty:
            raise AssertionError(f"{page}: nothing came back in {LONGEST:g} s") from None
        finally:
            browser.kill()
            browser.wait()


def chromium(page: Path, *arguments: str) -> str:
    """Open a page; return what the browser prints."""
    return subprocess.run(_command(page, *arguments), capture_output=True, text=True, timeout=300, check=True).stdout


def _command(page: Path, *arguments: str) -> list[str]:
    return [str(CHROMIUM), *QUIET, f"--user-data-dir={page.parent / 'profile'}", *arguments, page.as_uri()]


@contextmanager
def _listening() -> Iterator[tuple[str, queue.Queue[bytes]]]:
    """Take what is posted to an address of this machine."""
    answers: queue.Queue[bytes] = queue.Queue()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            answers.put(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(204)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/", answers
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
