"""The console's files as a relay serves them, and what processes say of themselves (PROTOCOL §5.12)."""

import asyncio
import os
import re
from collections.abc import AsyncIterator
from importlib.resources import files
from typing import Final

import httpx
import msgspec
import pytest
import redis.asyncio

from deltawire.api_keys import parse_api_keys
from deltawire.keys import Keys
from deltawire.vitals import Vitals, listening
from deltawire_relay import processes
from tests.support.producer import WAIT_S, Producer
from tests.support.readers import http_client, websocket
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process

FILES: Final = {
    file.name: file.read_text() for file in files("deltawire_relay.console").iterdir() if file.is_file()
}
KEYS: Final = Keyring(operator=("acme", ["metrics"]), reader=("acme", ["read"]))


@pytest.fixture
async def client(relay: RelayProcess) -> AsyncIterator[httpx.AsyncClient]:
    async with http_client(base_url=relay.url) as client:
        yield client


async def test_the_page_may_do_next_to_nothing(client: httpx.AsyncClient) -> None:
    """Its own scripts and nothing inline; no frame around it; no text becomes markup."""
    answer = await client.get("/")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8")
    policy = answer.headers["content-security-policy"]
    for rule in ("default-src 'none'", "script-src 'self'", "frame-ancestors 'none'", "trusted-types 'none'"):
        assert rule in policy
    assert "unsafe" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


async def test_all_that_it_names_is_there(client: httpx.AsyncClient) -> None:
    """And each file has the same headers, its own type, and a tag by which it is not sent again."""
    named = set(re.findall(r'"(?:console|\.)/([\w.]+)"', "".join(FILES.values())))
    assert named == {name for name in FILES if not name.endswith((".py", ".html", ".pyc"))}
    for path in ("/", *(f"/console/{name}" for name in named)):
        answer = await client.get(path)
        assert answer.status_code == 200, path
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["cache-control"] == "no-cache"
        tag = answer.headers["etag"]
        for known in (tag, f"W/{tag}", f'"other", {tag}'):
            again = await client.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"")
        assert (await client.get(path, headers={"If-None-Match": '"other"'})).status_code == 200


def test_nothing_comes_from_elsewhere() -> None:
    """Nor is anything inline, or made of text as markup."""
    namespaces = {"http://www.w3.org/2000/svg"}
    for name, text in FILES.items():
        assert set(re.findall(r"https?://[^\s\"'`)]+", text)) <= namespaces, name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b", text), name
        assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:", text), name


async def test_what_is_not_there_is_404(client: httpx.AsyncClient) -> None:
    for path in ("/console/", "/console/nothing.js", "/console/__init__.py", "/console/..%2fauth.py"):
        assert (await client.get(path)).status_code == 404


async def test_a_foreign_name_gets_no_page(client: httpx.AsyncClient) -> None:
    """Without keys, as everything else."""
    assert (await client.get("/", headers={"Host": "evil.example"})).status_code == 421


async def test_it_can_be_left_out(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        relay_in_process(redis_url, monkeypatch, has_console=False) as address,
        http_client(base_url=f"http://{address}") as client,
    ):
        for path in ("/", "/console/main.js"):
            assert (await client.get(path)).status_code == 404


# -- Processes


async def test_processes_need_a_scope_and_no_tenant(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"api_keys": parse_api_keys(KEYS.text)}
    async with (
        relay_in_process(redis_url, monkeypatch, **settings) as address,
        http_client(base_url=f"http://{address}") as client,
    ):
        assert (await client.get("/v1/processes")).status_code == 401
        assert (await client.get("/v1/processes", headers=KEYS.headers("reader"))).status_code == 403
        answer = (await client.get("/v1/processes", headers=KEYS.headers("operator"))).json()
        (here,) = (each for each in answer["data"] if each["pid"] == os.getpid())
        assert (answer["object"], here["kind"], here["counts"]["readers"]) == ("list", "relay", 0)


async def test_processes_are_heard_while_somebody_asks(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first to ask, and those who ask meanwhile, get all of them; then nobody listens any more."""
    monkeypatch.setattr(processes, "LISTEN_S", 4.0)
    async with (
        relay_in_process(redis_url, monkeypatch) as address,
        http_client(base_url=f"http://{address}") as client,
        redis.asyncio.Redis.from_url(redis_url) as server,
    ):

        async def listeners() -> int:
            ((_, count),) = await server.pubsub_numsub("dw:vitals")
            return int(count)

        assert await listeners() == 0
        answers = await asyncio.gather(*(client.get("/v1/processes") for _ in range(3)))
        for answer in answers:
            assert os.getpid() in {each["pid"] for each in answer.json()["data"]}
        assert await listeners() == 1
        async with asyncio.timeout(WAIT_S):
            while await listeners():  # noqa: ASYNC110 - Redis has no event of ours
                await asyncio.sleep(0.05)
        assert (await client.get("/v1/processes")).json()["data"]


async def test_what_is_no_vitals_is_skipped(redis_url: str) -> None:
    """Whoever says it: what comes after it is heard, on the same connection."""
    odd = [b"", b"[]", b'{"name": "\xff"}', b'{"x": ' + b"[" * 100_000, b'{"kind": "relay"}']
    named = Vitals(kind="relay", name="n", host="h", pid=1, version="1", started_at=1, at=2, counts={})
    heard: asyncio.Queue[Vitals] = asyncio.Queue()
    async with (
        listening(redis_url, Keys("odd"), heard.put_nowait),
        redis.asyncio.Redis.from_url(redis_url) as server,
        asyncio.timeout(WAIT_S),
    ):
        for payload in [*odd, msgspec.json.encode(named)]:
            await server.publish("odd:vitals", payload)
        assert await heard.get() == named


async def test_without_redis_it_says_so(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who asks does not wait for ever."""
    monkeypatch.setattr(processes, "FIRST_LOOK_S", 60)
    monkeypatch.setattr(processes, "WAIT_S", 0.1)
    async with (
        relay_in_process(redis_url, monkeypatch) as address,
        http_client(base_url=f"http://{address}") as client,
    ):
        answer = await client.get("/v1/processes")
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "redis_unavailable")


async def test_relays_tell_how_late_deltas_are_written(
    relay: RelayProcess, client: httpx.AsyncClient, jobs: Producer
) -> None:
    """As a count and a sum, which only grow."""

    async def delays() -> tuple[float, float]:
        async with asyncio.timeout(WAIT_S):
            while True:  # the relay may have had no time yet to speak of itself
                data = (await client.get("/v1/processes")).json()["data"]
                for counts in (each["counts"] for each in data if each["pid"] != os.getpid()):
                    return counts["delays_total"], counts["delays_s_total"]

    count, total = await delays()
    job = await jobs.running("a")
    async with websocket(f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws") as reader:
        await reader.until(job.top)
        async with asyncio.timeout(WAIT_S):
            while (await delays())[0] == count:
                await job.deltas("b")
                await asyncio.sleep(0.2)
    assert (await delays())[1] >= total
