"""The page of examples/web, in headless Chromium, from another origin than Envoy's."""

import asyncio
import json
import os
import queue
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from steer_client import AsyncSteerClient, tls_credentials
from tests.deploy.conftest import Issue
from tests.deploy.fleet import envoy, own_addresses, own_host, replicas, until

ROOT = Path(__file__).parents[2]
PAGE = "/examples/web/index.html"
CHROMIUM = shutil.which("chromium")
BOUND_S = 60.0

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="there is no `chromium`, as of Debian's package of that name"),
    pytest.mark.skipif(
        not (ROOT / "examples" / "web" / "node_modules").is_dir(),
        reason="the packages of examples/web are missing; `make setup` brings them where npm's registry can be reached",
    ),
]


OBSERVER = b"""<script type="module">
const state = document.querySelector('#state');
new MutationObserver(() => {
  if (!/^(done|failed)/.test(state.textContent)) return;
  fetch('/seen', { method: 'POST', body: JSON.stringify([document.querySelector('output').value, state.textContent]) });
}).observe(state, { childList: true });
</script>"""
"""Sends what the page shows, once it has ended. Chromium itself cannot tell when that is."""


class Site(ThreadingHTTPServer):
    """The files of the project, as `python -m http.server` serves them, and what the page showed at its end."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), partial(Files, directory=str(ROOT)))
        self.seen: queue.Queue[list[str]] = queue.Queue()

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Files(SimpleHTTPRequestHandler):
    server: Site

    def do_GET(self) -> None:
        if not self.path.startswith(PAGE):
            super().do_GET()
            return
        body = (ROOT / PAGE.lstrip("/")).read_bytes() + OBSERVER
        self.send_response(200)
        self.send_header("content-type", "text/html")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.send_response(204)
        self.end_headers()
        self.server.seen.put(json.loads(body))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site() -> Iterator[Site]:
    server = Site()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def shown_by_chromium(site: Site, query: str, folder: Path) -> list[str]:
    """The tokens and the state that the page shows at its end."""
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--ignore-certificate-errors")
    url = f"{site.origin}{PAGE}?{query}"
    process = subprocess.Popen(
        [str(CHROMIUM), *flags, f"--user-data-dir={folder}/profile", url],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,
    )
    try:
        return site.seen.get(timeout=BOUND_S)
    finally:
        os.killpg(process.pid, signal.SIGKILL)  # with the processes that it has started
        process.wait()


async def test_a_page_of_another_origin_shows_the_tokens(site: Site, issue: Issue, tmp_path: Path) -> None:
    host, [address] = own_host(), own_addresses(1)
    tls = issue(host)
    with replicas(address), envoy(tmp_path, [address], tls, host=host, origin=site.origin) as proxy:
        until(proxy.healthy)
        query = f"server=https://{proxy.address}&prompt=one%20two&tokens=5"
        shown = await asyncio.to_thread(shown_by_chromium, site, query, tmp_path)
        async with AsyncSteerClient(proxy.address, credentials=tls_credentials(ca=tls.ca)) as client:
            [text], _ = await client.generate(["one two"], max_tokens=5)
    assert shown == [text, "done: 5 tokens"]


async def test_a_page_of_an_origin_that_is_not_allowed_gets_nothing(site: Site, issue: Issue, tmp_path: Path) -> None:
    host, [address] = own_host(), own_addresses(1)
    with replicas(address), envoy(tmp_path, [address], issue(host), host=host) as proxy:
        until(proxy.healthy)
        query = f"server=https://{proxy.address}&prompt=one%20two&tokens=5"
        shown = await asyncio.to_thread(shown_by_chromium, site, query, tmp_path)
    assert shown[0] == ""
    assert shown[1].startswith("failed")
