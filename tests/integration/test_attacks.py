"""Attacks on the HTTP door of a real relay, by name: each is refused in the one shape, and leaves nothing.

Credentials, Origins, limits and slow peers have tests of their own, and the rows of PROTOCOL §8.2.
"""

import asyncio
import gzip
import json
from typing import Any

import pytest
import redis

from deltawire.redis_server import RedisServer
from tests.support.producer import REQUEST, Producer
from tests.support.readers import http_client
from tests.support.relay_process import RelayProcess

WAIT_S = 20.0
SMUGGLED = b"GET /v1/smuggled HTTP/1.1\r\nHost: localhost\r\n\r\n"
JSON = {"Content-Type": "application/json"}
#: What a server may be led by to take a request's end for somewhere else (RFC 9112 §6.3, §11.2).
SMUGGLING = {
    "a length and chunks": (b"Content-Length: 5\r\nTransfer-Encoding: chunked", b"0\r\n\r\n"),
    "chunks and a length": (b"Transfer-Encoding: chunked\r\nContent-Length: 50", b"0\r\n\r\n"),
    "two lengths": (b"Content-Length: 2\r\nContent-Length: 49", b"{}"),
    "a list of lengths": (b"Content-Length: 2, 2", b"{}"),
    "a length with a sign": (b"Content-Length: +2", b"{}"),
    "a length below 0": (b"Content-Length: -2", b"{}"),
    "a coding that nobody knows": (b"Transfer-Encoding: xchunked\r\nContent-Length: 2", b"{}"),
    "a coding behind chunks": (b"Transfer-Encoding: chunked, identity", b"0\r\n\r\n"),
    "a space before the colon": (b"Transfer-Encoding : chunked\r\nContent-Length: 2", b"{}"),
    "a vertical tab": (b"Transfer-Encoding: \x0bchunked\r\nContent-Length: 2", b"{}"),
    "a bare line end in a chunk": (b"Transfer-Encoding: chunked", b"2;\n{}\r\n0\r\n\r\n"),
    "a chunk of 2**68 bytes": (b"Transfer-Encoding: chunked", b"FFFFFFFFFFFFFFFFF\r\n{}\r\n0\r\n\r\n"),
    "a chunk size with a prefix": (b"Transfer-Encoding: chunked", b"0x2\r\n{}\r\n0\r\n\r\n"),
    "a folded header": (b"X: a\r\n Transfer-Encoding: chunked\r\nContent-Length: 2", b"{}"),
    "a zero byte in a header": (b"X: a\0b\r\nContent-Length: 2", b"{}"),
}
#: Ways out of a folder, into another key, or around a comparison.
PATHS = (
    *("/v1/jobs/..", "/v1/jobs/%2e%2e", "/v1/jobs/../../healthz", "/v1/jobs/%2e%2e/%2e%2e/healthz"),
    *("/v1/jobs/..%2f..%2fhealthz", "/v1/jobs/a%2fb", "/v1/jobs/./a", "/v1//jobs/a", "//v1/jobs/a"),
    *("/v1/jobs/a/", "/v1/jobs/%00", "/v1/jobs/a%00", "/v1/jobs/%c0%ae", "/v1/jobs/%ff", "/v1/jobs/%C3%A9"),
    *("/v1/jobs/%EF%BC%8E", "/v1/jobs/%7bjob%7d", "/v1/jobs/*", "/v1/jobs/a;b", "/v1/jobs/a%3fb"),
    *("/v1/jobs/a%0d%0aX-Evil:%201", "/v1/jobs/a%0aevents", "/v1/models/%0d%0aX-Evil:%201"),
    *("/v1/models/..%2f..%2fetc%2fpasswd", "/v1/jobs/" + "a" * 60_000, "/v1/jobs/" + "%61" * 20_000),
)
#: What is no name of this machine, however it looks.
HOSTS = (
    *("localhost@evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "evil.example:127.0.0.1"),
    *("127.1", "0x7f000001", "2130706433", "0", "localhost.", "127.0.0.1%0d%0a", "127.0.0.1\xa0", ""),
)


async def ask(relay: RelayProcess, data: bytes) -> bytes:
    """All that a relay says to these bytes, until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        writer.write(data)
        async with asyncio.timeout(WAIT_S):
            return await reader.read()
    finally:
        writer.transport.abort()


def get(path: str, host: str = "localhost") -> bytes:
    return f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n".encode("latin-1")


def error_of(answer: bytes) -> dict[str, Any]:
    """The error of the one answer."""
    assert answer.count(b"HTTP/1.1 ") == 1, answer
    error: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


@pytest.mark.parametrize("how", SMUGGLING)
async def test_request_smuggling(relay: RelayProcess, how: str) -> None:
    """Whoever may be misunderstood is not answered any more: what follows is nobody's request."""
    headers, body = SMUGGLING[how]
    begin = b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    answer = await ask(relay, begin + headers + b"\r\n\r\n" + body + SMUGGLED)
    assert answer.startswith(b"HTTP/1.1 400 ")
    assert error_of(answer)["code"] == "invalid_request"


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path[:40])
async def test_path_tricks_and_line_ends_in_ids(
    relay: RelayProcess, redis_server: RedisServer, path: str
) -> None:
    """No other route, job or key, no header of the attacker's, and no redirect to whatever Host says."""
    answer = await ask(relay, get(path))
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert head.startswith((b"http/1.1 400 ", b"http/1.1 404 "))
    assert b"\nx-evil" not in head
    assert error_of(answer)["code"] in {"invalid_job_id", "not_found", "model_not_found"}
    with redis.Redis.from_url(redis_server.url) as client:
        assert not [key for key in client.scan_iter("*") if b"evil" in key or b".." in key]
    assert "Evil" not in relay.log


@pytest.mark.parametrize("host", HOSTS)
async def test_host_tricks(relay: RelayProcess, host: str) -> None:
    """Without a key only this machine's names will do, so that a page that rebinds its own gets nothing."""
    assert error_of(await ask(relay, get("/v1/jobs/a", host)))["code"] in {
        "host_not_allowed",
        "invalid_request",
    }


async def test_line_ends_in_texts_begin_no_event(relay: RelayProcess, jobs: Producer) -> None:
    """What a canceller says is one field of one event, and not another event of the stream."""
    job = jobs.job()
    await job.submit()
    forged = 'x\n\nid: 99\ndata: {"type":"completed"}\n\n\r\r\u2028'
    async with http_client(base_url=relay.url) as client:
        await client.post(f"/v1/jobs/{job.job_id}/cancel", json={"reason": forged})
        stream = (await client.get(f"/v1/jobs/{job.job_id}/events")).text
        told = (await client.get(f"/v1/jobs/{job.job_id}")).json()
    events = [json.loads(line[6:]) for line in stream.split("\n") if line.startswith("data: ")]
    assert [event["type"] for event in events] == ["subscribed", "queued", "cancelled"]
    assert events[-1]["cancel"]["reason"] == told["cancel"]["reason"] == forged
    assert "id: 99" not in stream.split("\n")


DEEP = 100_000
BODIES = {
    "arrays in arrays": b'{"request":' + b"[" * DEEP + b"]" * DEEP + b"}",
    "objects in objects": b'{"request":' + b'{"a":' * DEEP + b"1" + b"}" * DEEP + b"}",
    "in what is not looked at": json.dumps({"request": REQUEST})[:-2].encode()
    + b',"x":'
    + b"[" * DEEP
    + b"]" * DEEP
    + b"}}",
    "a number of a million digits": b'{"request":' + b"9" * 1_000_000 + b"}",
    "half a surrogate": b'{"request":"\\ud800"}',
    "a key twice": b'{"request":1,"request":{}}',
}


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/chat/completions", "/v1/jobs/a/cancel"])
@pytest.mark.parametrize("body", BODIES)
async def test_deeply_nested_and_odd_json(relay: RelayProcess, path: str, body: str) -> None:
    """Refused by its reader, or taken for what it is, but never a failure of ours."""
    async with http_client(base_url=relay.url) as client:
        answer = await client.post(path, content=BODIES[body], headers=JSON)
        # The canceller's body has nothing that would have to be looked at.
        assert answer.status_code in ({200, 400} if path.endswith("cancel") else {400})
        assert (await client.get("/healthz")).status_code == 200
    assert "Traceback" not in relay.log


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x-whatever"])
@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/chat/completions", "/v1/jobs/a/cancel"])
async def test_decompression(relay: RelayProcess, path: str, coding: str) -> None:
    """Nothing is: a few kilobytes can stand for gigabytes."""
    bomb = gzip.compress(b" " * 10_000_000 + json.dumps({"request": REQUEST}).encode())
    async with http_client(base_url=relay.url) as client:
        answer = await client.post(path, content=bomb, headers=JSON | {"Content-Encoding": coding})
        assert (answer.status_code, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
        plain = await client.post(
            "/v1/jobs/a/cancel", content=b"{}", headers=JSON | {"Content-Encoding": "identity"}
        )
        assert plain.status_code == 200


@pytest.mark.parametrize("name", ["webhook", "webhook_url", "callback_url", "base_url", "proxy", "api_key"])
async def test_no_option_is_an_address(relay: RelayProcess, name: str) -> None:
    """Who submits a job says nothing of where anything is sent to, nor by which key (SSRF)."""
    body = {"request": REQUEST, "options": {name: "http://169.254.169.254/latest/meta-data"}}
    async with http_client(base_url=relay.url) as client:
        answer = await client.post("/v1/jobs", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "unknown_option")
