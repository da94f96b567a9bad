"""The site is built without a warning, and asks nothing of other hosts, when it is built or viewed."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final

import pytest
import yaml

import deltawire
from docs.site import asyncapi, openapi
from tests.support.chromium import chromium

ROOT: Final = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built as `make docs` does. A proxy that is not there stands for the network."""
    directory = tmp_path_factory.mktemp("site")
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    build = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", directory],
        cwd=ROOT,
        env={**os.environ, **nowhere, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert build.returncode == 0, build.stderr
    assert "WARNING" not in build.stderr
    return directory


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def address(built: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(built))) as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def test_every_page_is_there(built: Path) -> None:
    """Also those at the top level, and those that are made of documents."""
    for path in (ROOT / "docs").glob("**/*.md"):
        page = path.relative_to(ROOT / "docs").with_suffix(".html")
        assert (built / page.parent / page.name.replace("README", "index")).is_file(), page
    for place in ("reference/protocol", "reference/http", "explanation/architecture", "project/changelog"):
        assert (built / f"{place}.html").is_file()


def test_pages_keep_comments_to_themselves(built: Path) -> None:
    """What is written for the test of the code is in none, and links lead to pages, not to Markdown."""
    for page in built.glob("**/*.html"):
        text = re.sub(r"<pre.*?</pre>|<code.*?</code>", "", page.read_text(), flags=re.DOTALL)
        assert "<!-- code:" not in text, page
        assert not re.search(r'href="(?!https?:)[^"]*\.md["#]', text), page


def test_pictures_are_there(built: Path) -> None:
    for page in built.glob("**/*.html"):
        for source in re.findall(r'<img [^>]*src="([^"]*)"', page.read_text()):
            assert source.startswith("data:") or (page.parent / source).is_file(), (page, source)


def test_the_reference_has_every_public_name() -> None:
    text = (ROOT / "docs" / "reference" / "python.md").read_text()
    named = set(re.findall(r"^::: deltawire\.(\w+)$", text, re.MULTILINE))
    assert named == {*getattr(deltawire, "__all__", ())} - {"__version__"}


def test_the_http_reference_has_every_operation_and_schema() -> None:
    document: dict[str, Any] = yaml.safe_load(openapi.SOURCE.read_text())
    page = openapi.markdown(document)
    for path, item in document["paths"].items():
        for method in {"get", "post", "delete"} & {*item}:
            assert f"### `{method.upper()} {path}`" in page
    assert {*re.findall(r"\(#schema-([a-z]+)\)", page)} <= {*re.findall(r"\{ #schema-([a-z]+) \}", page)}


@pytest.mark.skipif(not asyncapi.SOURCE.exists(), reason="there is no such document yet")
def test_the_reference_of_messages_has_every_message() -> None:
    document: dict[str, Any] = yaml.safe_load(asyncapi.SOURCE.read_text())
    page = asyncapi.markdown(document)
    for name in document["components"]["messages"]:
        assert f"{{ #message-{name.lower()} }}" in page


@pytest.mark.parametrize("scheme", ["http", "file"])
async def test_viewing_it_asks_nobody_else(built: Path, address: str, scheme: str) -> None:
    """From a server or from the disk: no request to other hosts, no error, and the search finds things."""
    root = address if scheme == "http" else built.as_uri()
    async with chromium() as browser:
        page = await browser.new_page()
        requests: list[str] = []
        errors: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for name in ("index", "reference/http", "operations"):
            await page.goto(f"{root}/{name}.html")
        await page.evaluate("document.querySelector('[data-md-toggle=search]').click()")
        await page.locator("input[name=query]").press_sequentially("sequence_number")
        await page.wait_for_selector(".md-search-result__item")
    assert not errors
    assert {url for url in requests if not url.startswith((root, "data:", "blob:"))} == set()
