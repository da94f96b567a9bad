"""A real Chromium, the one that the machine has, and pages for it on an origin of their own."""

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from types import TracebackType
from typing import Final, Self

from playwright.async_api import Browser, async_playwright

from tests.support.absent import lack

PROGRAM: Final = shutil.which("chromium")


@asynccontextmanager
async def chromium() -> AsyncIterator[Browser]:
    """Starts it, which takes a second or two; nothing is ever downloaded."""
    if PROGRAM is None:
        lack("Chromium is not installed: apt-get install chromium")
    async with async_playwright() as playwright:
        # Its own sandbox does not work in containers, for root least of all.
        browser = await playwright.chromium.launch(executable_path=PROGRAM, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            await browser.close()


class Pages:
    """A web site on a free port of loopback: it answers with `pages[path]`. Blocking; a context manager."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self.pages))
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
    def __init__(self, pages: dict[str, str], *args: object) -> None:
        self._pages = pages
        super().__init__(*args)  # type: ignore[arg-type] # what the server gives

    def do_GET(self) -> None:
        page = self._pages.get(self.path)
        body = (page or "").encode()
        self.send_response(404 if page is None else 200)
        self.send_header("Content-Type", "text/html; charset=utf-8")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass
