"""The worker's own port answers probes, and shows its metrics to whoever may see them (PROTOCOL §5.5)."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

import httpx
import pytest

from deltawire.api_keys import digest, parse_api_keys
from deltawire.redis_server import free_port
from deltawire_worker.probes import Probes

# Not made anew each time: tests that run in several processes must have the same names.
SCRAPER, READER = "dw_scraper", "dw_reader"
SCRAPER_ENTRY = f"prometheus:ops:metrics:{digest(SCRAPER).hex()}"
READER_ENTRY = f"reader:ops:read+submit+cancel:{digest(READER).hex()}"
KEYS = parse_api_keys(f"{SCRAPER_ENTRY},{READER_ENTRY}")
TEXT = b"deltawire_jobs_running 0.0\n"


@asynccontextmanager
async def probed(
    *, has_keys: bool = False, host: str = "127.0.0.1", is_ready: Callable[[], bool] = lambda: True
) -> AsyncIterator[httpx.AsyncClient]:
    """Listens on loopback only, wherever it believes to."""
    port = free_port()
    probes = Probes(
        "127.0.0.1", port, is_ready=is_ready, metrics=lambda: TEXT, api_keys=KEYS if has_keys else ()
    )
    await probes.start()
    probes._host = host
    try:
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
            yield client
    finally:
        await probes.close()


@pytest.mark.parametrize(
    ("path", "is_ready", "status"),
    [("/healthz", False, 200), ("/readyz", True, 200), ("/readyz", False, 503), ("/nope", True, 404)],
)
async def test_probes_answer_everybody(path: str, is_ready: bool, status: int) -> None:
    """With or without keys; a query changes nothing, and HEAD is answered as GET, without a body."""
    async with probed(has_keys=True, is_ready=lambda: is_ready) as client:
        assert (await client.get(f"{path}?now")).status_code == status
        response = await client.head(path)
        assert (response.status_code, response.content) == (status, b"")


@pytest.mark.parametrize("path", ["/healthz", "/metrics", "/nope"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
async def test_other_methods_are_refused(method: str, path: str) -> None:
    """In the one error shape, and it says which ones are not."""
    async with probed() as client:
        response = await client.request(method, path)
        assert (response.status_code, response.headers["Allow"]) == (405, "GET, HEAD")
        assert response.json()["error"]["code"] == "method_not_allowed"


@pytest.mark.parametrize(
    ("authorization", "status", "code"),
    [
        (None, 401, "missing_credentials"),
        ("Basic dXNlcjpwYXNz", 401, "missing_credentials"),
        ("Bearer", 401, "missing_credentials"),
        ("Bearer dw_wrong", 401, "invalid_credentials"),
        (f"Bearer {READER}", 403, "forbidden"),
    ],
    ids=["none", "Basic", "empty", "unknown", "no scope"],
)
async def test_metrics_want_a_key_of_their_scope(authorization: str | None, status: int, code: str) -> None:
    """A key without the scope, a wrong one and none are told apart, and told nothing."""
    async with probed(has_keys=True) as client:
        response = await client.get("/metrics", headers={"Authorization": authorization or ""})
        assert (response.status_code, response.json()["error"]["code"]) == (status, code)
        assert ("WWW-Authenticate" in response.headers) is (status == 401)
        assert TEXT not in response.content


async def test_metrics_are_shown_to_their_key() -> None:
    """By whatever name the worker is called."""
    async with probed(has_keys=True) as client:
        headers = {"Authorization": f"bearer {SCRAPER}", "Host": "worker:8081"}
        response = await client.get("/metrics", headers=headers)
        assert (response.status_code, response.content) == (200, TEXT)
        assert response.headers["Content-Type"].startswith("text/plain; version=0.0.4")
        assert (await client.head("/metrics", headers=headers)).headers["Content-Length"] == str(len(TEXT))


@pytest.mark.parametrize(
    ("listens", "called", "status"),
    [
        ("127.0.0.1", "localhost:8081", 200),
        ("localhost", "127.0.0.1", 200),
        ("127.0.0.1", "[::1]:8081", 200),
        ("127.0.0.1", "evil.example:8081", 403),
        ("127.0.0.1", "[evil", 403),
        ("127.0.0.1", "", 403),
        ("0.0.0.0", "127.0.0.1:8081", 403),
        ("", "127.0.0.1:8081", 403),
    ],
)
async def test_without_keys_metrics_are_for_this_machine(listens: str, called: str, status: int) -> None:
    """Not for its network, nor for a page that has bound a name of its own to it; who asks is told why."""
    async with probed(host=listens) as client:
        response = await client.get("/metrics", headers={"Host": called})
        assert response.status_code == status
        if status == 403:
            assert "DELTAWIRE_API_KEYS" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "text", [b"GET\r\n\r\n", b"x" * 20_000, b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1_000 + b"\r\n", b""]
)
async def test_what_is_no_request_is_dropped(text: bytes) -> None:
    """Lines without an end, headers without number, and words that are none; and the next one is answered."""
    async with probed() as client:
        reader, writer = await asyncio.open_connection("127.0.0.1", client.base_url.port)
        writer.write(text)
        writer.write_eof()
        with suppress(ConnectionResetError):  # what was not read resets
            assert await reader.read() == b""
        writer.close()
        assert (await client.get("/healthz")).status_code == 200
