"""The JavaScript client's own tests (clients/js/test): vitest, a whole deltawire, a real Chromium."""

import asyncio
import copy
import json
import os
import random
import signal
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from deltawire.fold import Fold
from deltawire.redis_server import free_port
from deltawire.sse_decoder import SseDecoder
from tests.fuzz.streams import CHUNKS, EVENTS
from tests.support import chromium
from tests.support.absent import lack
from tests.support.node import NODE
from tests.support.recorded_streams import RECORDED
from tests.support.relay_process import Keyring
from tests.support.system import System

Json = dict[str, Any]
PACKAGE: Final = Path(__file__).parents[2] / "clients" / "js"
VITEST: Final = PACKAGE / "node_modules" / "vitest" / "vitest.mjs"
KEYS: Final = Keyring(app=("acme", ("submit", "read", "cancel", "tokens")))
#: Some 85 s, most of which pages spend asleep, where nothing else runs.
TIMEOUT_S: Final = 500


@pytest.fixture(scope="module")
def site_port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def system(site_port: int) -> Iterator[System]:
    """A deltawire with keys and tokens, which knows the origin of the tests' web site."""
    if not VITEST.exists():
        lack("what the JavaScript client is tested with is not installed: make node")
    environment = {
        "DELTAWIRE_API_KEYS": KEYS.text,
        "DELTAWIRE_JWT_SECRET": "secret-of-the-tests-" * 2,
        "DELTAWIRE_ALLOWED_ORIGINS": f"http://127.0.0.1:{site_port}",
    }
    with System(relay_environment=environment) as system:
        yield system


def folded(chunks: list[Json]) -> Json:
    """A stream, and what the fold says after each of its chunks."""
    fold = Fold()
    completions = []
    for chunk in copy.deepcopy(chunks):
        fold.add(chunk)
        completions.append(copy.deepcopy(fold.completion()))
    return {"chunks": chunks, "completions": completions}


def folds() -> Json:
    """Streams as gateways send them, some of them recorded, and such as nobody has ever sent."""
    recorded = [SseDecoder().feed(path.read_bytes()) for path in RECORDED]
    streams = [
        *CHUNKS.values(),
        *([json.loads(payload) for payload in payloads if payload != b"[DONE]"] for payloads in recorded),
    ]
    dice = random.Random(7)  # the same ones each time
    odd = [dice.choices(EVENTS, k=dice.randint(1, 12)) for _ in range(500)]
    return {"streams": [*map(folded, streams)], "odd": [*map(folded, odd)]}


def test_both_packages_have_one_version() -> None:
    """A client's version says which protocol it was tested with."""
    ours = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text())["project"]["version"]
    assert json.loads((PACKAGE / "package.json").read_text())["version"] == ours


@pytest.mark.timeout(TIMEOUT_S + 30)
async def test_the_javascript_client_is_whole(system: System, site_port: int, tmp_path: Path) -> None:
    """Units, Node on this deltawire, pages that sleep, the React example, the README's code, types."""
    if chromium.PROGRAM is None:
        lack("Chromium is not installed: apt-get install chromium")
    (tmp_path / "folds.json").write_text(json.dumps(folds()))
    environment = {
        "DELTAWIRE_URL": system.relay_url,
        "DELTAWIRE_API_KEY": KEYS["app"],
        "DELTAWIRE_SITE_PORT": str(site_port),
        "DELTAWIRE_FOLDS": str(tmp_path / "folds.json"),
        "CHROMIUM": chromium.PROGRAM,
        "NO_COLOR": "1",
    }
    process = await asyncio.create_subprocess_exec(
        *(NODE, str(VITEST), "run"),
        cwd=PACKAGE,
        env={**os.environ, **environment},
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            os.killpg(process.pid, signal.SIGKILL)  # Chromium is in its group
            await process.wait()
    print(output.decode())
    assert process.returncode == 0
