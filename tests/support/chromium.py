"""A real Chromium, the one that the machine has, and pages for it on an origin of their own."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import TracebackType
from typing import Any, Final, Self

from playwright.async_api import Browser, async_playwright

from tests.support.absent import lack

PROGRAM: Final = shutil.which("chromium")
START_TIMEOUT_MS: Final = 100_000


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Starts it, which takes a second or two; nothing is ever downloaded."""
    if PROGRAM is None:
        lack("Chromium is not installed: apt-get install chromium")
    async with async_playwright() as playwright:
        # Its own sandbox does not work in containers, for root least of all.
        browser = await playwright.chromium.launch(
            executable_path=PROGRAM, args=["--no-sandbox"], timeout=START_TIMEOUT_MS
        )
        try:
            yield browser
        finally:
            await browser.close()


class Pages:
    """A web site on a free port of loopback, with the pages that are put in. Blocking; a context manager.

    A path under `/modules/` is a JavaScript module in the directory `modules`.
    """

    def __init__(self, modules: Path) -> None:
        self.pages: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.pages, modules))
        self._thread = Thread(target=self._server.serve_forever, name="pages", daemon=True)

    @property
    def origin(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def other_origin(self) -> str:
        """The same pages, by another name: to a browser another site."""
        return f"http://localhost:{self._server.server_port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, pages: dict[str, str], modules: Path, *args: Any) -> None:  # args: the base class's
        self._pages = pages
        self._modules = modules
        super().__init__(*args)

    def do_GET(self) -> None:
        content_type, body = "text/html", self._pages.get(self.path)
        module = self._modules / self.path.removeprefix("/modules/")
        if body is None and self.path.startswith("/modules/") and module.is_file():
            content_type, body = "text/javascript", module.read_text()
        data = (body or "").encode()
        self.send_response(404 if body is None else 200)
        self.send_header("Content-Type", f"{content_type}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass
