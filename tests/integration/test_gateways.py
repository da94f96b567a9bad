"""Gateways as they are: each stream of tests/support/gateway_streams.py through the worker's real code."""

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import msgspec
import pytest
import pytest_asyncio

from deltawire.environment import Environment
from deltawire.redis_server import RedisServer
from deltawire_worker.upstreams import read_upstreams
from tests.integration.test_generate import Bench, open_bench, request
from tests.support.gateway_streams import QUIRKS, STOP, TEXT, Quirk, sse
from tests.support.recorded_streams import RECORDED

PAGE: Final = (Path(__file__).parents[2] / "docs" / "gateways.md").read_text()
CONFIGURATION: Final = PAGE.partition('```toml title="upstreams.toml"\n')[2].partition("```")[0]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(redis_server: RedisServer) -> AsyncIterator[Bench]:
    """One worker and one gateway for all; each quirk is a job of its own."""
    async with open_bench(redis_server.url) as bench:
        yield bench


def check(actual: Any, expected: Any, where: str = "event") -> None:
    """`actual` is `expected`; objects may have more fields than those expected."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict), f"{where} is {actual!r}"
        for key, value in expected.items():
            assert key in actual or value is None, f"{where} has no {key}: {actual!r}"
            check(actual.get(key), value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), f"{where} is {actual!r}"
        assert len(actual) == len(expected), f"{where} is {actual!r}"
        for i, value in enumerate(expected):
            check(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where} is {actual!r}"


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda quirk: quirk.name)
async def test_a_gateway_is_understood(bench: Bench, quirk: Quirk) -> None:
    """Its chunks are published byte for byte, and the terminal event says how it ended and what it said."""
    options = {"max_retries": quirk.asks.get("max_retries", 0)}
    fields = {name: value for name, value in quirk.asks.items() if name != "max_retries"}
    await bench.run(quirk.name, {**request(fields=fields), "script": quirk.script}, options)
    lines = await bench.lines(quirk.name)
    events = [json.loads(line) for line in lines]
    chunks = quirk.script.get("chunks", [])
    count = len(chunks) if quirk.deltas is None else quirk.deltas
    published = [line.partition(b'"chunk":')[2][:-1] for line in lines if b'"chunk":' in line]
    assert len(published) == count, events[-1]
    for sent, line in zip(chunks, published, strict=False):
        assert line == json.dumps(sent, ensure_ascii=False, separators=(",", ":")).encode()
    check(events[-1], quirk.ends)
    assert not set(quirk.lacks) & set(events[-1]["completion"] or ())
    assert not quirk.hides or quirk.hides.encode() not in b"".join(lines)
    assert bench.requests(quirk.name) == quirk.requests


@pytest.mark.parametrize(
    ("status", "fails", "requests"),
    [(429, 3, 4), (500, 1, 2), (502, 1, 2), (503, 1, 2), (504, 2, 3), (504, 9, 3), (400, 1, 1)],
)
async def test_infinityblue_is_asked_again(bench: Bench, status: int, fails: int, requests: int) -> None:
    """Where its status says that this may help, when it says; after a 504, which takes long, only twice."""
    job_id = f"again-{status}-{fails}"
    script: dict[str, Any] = {
        "fault": "status",
        "status": status,
        "retry_after": 0,
        "fail_first": fails,
        "text": "Whisper",
    }
    await bench.run(job_id, request(**script), {"max_retries": 5})
    events = await bench.ended(job_id)
    retries = [event for event in events if event["type"] == "retrying"]
    assert [event["try"] for event in retries] == list(range(2, requests + 1))
    assert bench.requests(job_id) == requests
    assert events[-1]["type"] == ("completed" if requests > fails else "failed")


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
async def test_a_recorded_stream_is_understood(bench: Bench, path: Path) -> None:
    """What OpenAI has really sent: published byte for byte, and ended as it says."""
    stream = path.read_text()
    sent = [line.removeprefix("data: ") for line in stream.splitlines() if line.startswith("data: {")]
    await bench.run(f"recorded-{path.stem}", {**request(), "script": sse(*stream.strip().split("\n\n"))})
    lines = await bench.lines(f"recorded-{path.stem}")
    assert [line.partition(b'"chunk":')[2][:-1].decode() for line in lines[2:-1]] == sent
    last = json.loads(lines[-1])
    reasons = {choice["finish_reason"] for choice in last["completion"]["choices"]}
    assert (last["type"], last.get("incomplete_details")) == (
        ("incomplete", {"reason": "length"}) if "length" in reasons else ("completed", None)
    )


class Desk:
    """Answers each request with a short stream, and keeps what it was asked."""

    def __init__(self) -> None:
        self.target = ""
        self.headers: dict[str, str] = {}
        self.body: dict[str, Any] = {}

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        first, *lines = head.strip().split("\r\n")
        self.target = first.split()[1]
        self.headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        self.body = json.loads(await reader.readexactly(int(self.headers["content-length"])))
        stream: str = sse(*TEXT, STOP, "data: [DONE]")["body"]
        writer.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n"
            + stream.encode()
        )
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("name", "model", "target", "headers", "fields"),
    [
        (
            "azure",
            "gpt-5.4",
            "/openai/deployments/gpt/chat/completions?api-version=2024-10-21",
            {"api-key": "sk-azure-1", "authorization": None},
            {"model": "gpt-5.4", "stream_options": {"include_usage": True}},
        ),
        (
            "mistral",
            "mistral-small-latest",
            "/v1/chat/completions",
            {"authorization": "Bearer sk-mistral-1"},
            {"model": "mistral-small-latest", "stream_options": None},
        ),
        (
            "gemini",
            "fast",
            "/v1beta/openai/chat/completions",
            {"authorization": "Bearer sk-gemini-1"},
            {"model": "gemini-3.8-flash"},
        ),
        ("local", "anything", "/v1/chat/completions", {"authorization": None}, {"model": "anything"}),
    ],
    ids=["azure", "mistral", "gemini", "local"],
)
async def test_what_a_gateway_is_asked(
    redis_server: RedisServer,
    tmp_path: Path,
    name: str,
    model: str,
    target: str,
    headers: dict[str, Any],
    fields: dict[str, Any],
) -> None:
    """The page's configuration, but for hosts: address, key, model and fields are as each wants them."""
    (tmp_path / "mistral").write_text("sk-mistral-1\n")
    (tmp_path / "upstreams.toml").write_text(
        CONFIGURATION.replace("/run/secrets/mistral", str(tmp_path / "mistral"))
    )
    configured = read_upstreams(
        Environment(
            {
                "DELTAWIRE_UPSTREAMS_FILE": str(tmp_path / "upstreams.toml"),
                "AZURE_KEY": "sk-azure-1",
                "GEMINI_KEY": "sk-gemini-1",
            }
        )
    )
    desk = Desk()
    async with await asyncio.start_server(desk.answer, "127.0.0.1", 0) as server:
        port = server.sockets[0].getsockname()[1]
        here = [
            msgspec.structs.replace(each, base_url=f"http://127.0.0.1:{port}{urlsplit(each.base_url).path}")
            for each in configured
        ]
        async with open_bench(redis_server.url, upstreams=here) as bench:
            await bench.run(f"asked-{name}", request(fields={"model": model}))
            events = await bench.events(f"asked-{name}")
    assert (events[1]["upstream"], events[-1]["type"]) == (name, "completed")
    assert desk.target == target
    assert {header: desk.headers.get(header) for header in headers} == headers
    assert {field: desk.body.get(field) for field in fields} == fields
