"""Tokens at the doors of two relays that share a Redis, and an issuer's key set over HTTP (PROTOCOL §5.1)."""

import asyncio
import hashlib
import json
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any

import httpx
import jwt
import pytest
import redis
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

from deltawire.redis_server import RedisServer
from deltawire.tokens import MAX_LIFE_S, mint
from deltawire_relay import admissions as admissions_module
from deltawire_relay import verifier as verifier_module
from tests.support.producer import REQUEST, Producer
from tests.support.readers import (
    WebSocketReader,
    event_stream,
    http_client,
    numbers,
    websocket,
)
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process
from tests.unit.test_tokens import jwk, jwks, private_pem

SECRET = "0123456789abcdef0123456789abcdef"
OLD_SECRET = "old-secret-old-secret-old-secret"
ORIGIN = "https://app.example"
REVOKE = "/v1/tokens/revoke"
KEYS = Keyring(
    acme=("acme", ["read", "cancel", "submit", "tokens"]),
    narrow=("acme", ["read", "tokens"]),
    plain=("acme", ["read", "cancel", "submit"]),
    submitter=("acme", ["submit"]),
    umbrella=("umbrella", ["read", "tokens"]),
)
SETTINGS = {
    "DELTAWIRE_API_KEYS": KEYS.text,
    "DELTAWIRE_JWT_SECRET": f"{SECRET} {OLD_SECRET}",
    "DELTAWIRE_ALLOWED_ORIGINS": ORIGIN,
    "DELTAWIRE_LOG_LEVEL": "debug",
}


@pytest.fixture(scope="module")
def relays(redis_server: RedisServer) -> Iterator[tuple[RelayProcess, RelayProcess]]:
    with RelayProcess(redis_server.url, SETTINGS) as one, RelayProcess(redis_server.url, SETTINGS) as other:
        yield one, other


@pytest.fixture
def relay(relays: tuple[RelayProcess, RelayProcess]) -> RelayProcess:
    return relays[0]


def token(
    *jobs: str, subject: str = "user-1", tenant: str = "acme", cap: Any = ("read",), ttl_s: int = 600
) -> str:
    return mint(SECRET, subject=subject, jobs=jobs, tenant=tenant, capabilities=cap, ttl_s=ttl_s)


def bearer(text: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {text}"}


async def ask(
    relay: RelayProcess, method: str, path: str, credential: str | None = None, **options: Any
) -> httpx.Response:
    headers = {**(bearer(credential) if credential else {}), **options.pop("headers", {})}
    async with http_client(base_url=relay.url) as client:
        return await client.request(method, path, headers=headers, **options)


def code(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["error"]["code"]


async def end_of(reader: WebSocketReader) -> tuple[str | None, int]:
    messages, close_code = await reader.until_closed()
    errors = [message["error"]["code"] for message in messages if message["type"] == "error"]
    return (errors[-1] if errors else None), close_code


# Another job's token, at each door.


async def test_another_jobs_token(relay: RelayProcess, jobs: Producer) -> None:
    """It is told what one of another tenant is told: there is no such job."""
    mine, other = await jobs.ended("a", tenant="acme"), await jobs.running("b", tenant="acme")
    credential = token(mine.job_id, cap=["read", "cancel"])
    base = f"/v1/jobs/{other.job_id}"
    assert (await ask(relay, "GET", f"/v1/jobs/{mine.job_id}", credential)).status_code == 200
    assert code(await ask(relay, "GET", base, credential)) == (404, "unknown_job")
    assert code(await ask(relay, "GET", f"{base}/events", credential)) == (404, "unknown_job")
    assert (await ask(relay, "HEAD", f"{base}/events", credential)).status_code == 404
    assert (await ask(relay, "HEAD", f"/v1/jobs/{mine.job_id}/events", credential)).status_code == 200
    answer = (await ask(relay, "POST", f"{base}/cancel", credential)).json()
    assert answer == {"status": "unknown", "cancelled_from": None, "delivered": False}
    async with websocket(f"{relay.websocket_url}{base}/ws", token=credential) as reader:
        assert await end_of(reader) == ("unknown_job", 4507)
    async with websocket(f"{relay.websocket_url}/v1/ws", token=credential) as reader:
        await reader.send("subscribe", job_id=other.job_id)
        assert (await reader.receive_type("error"))["error"]["code"] == "unknown_job"
        await reader.send("cancel", job_id=other.job_id)
        assert (await reader.receive_type("cancel_result"))["status"] == "unknown"
        await reader.send("subscribe", job_id=mine.job_id)
        assert numbers(await reader.until_terminal())
    assert (await ask(relay, "GET", base, KEYS["acme"])).json()["status"] == "in_progress"


async def test_another_tenants_token(relay: RelayProcess, jobs: Producer) -> None:
    """A token for all jobs is for all of its tenant's."""
    job = await jobs.ended("a", tenant="acme")
    credential = token("*", tenant="umbrella")
    assert code(await ask(relay, "GET", f"/v1/jobs/{job.job_id}", credential)) == (404, "unknown_job")


async def test_a_token_may_do_what_its_cap_says(relay: RelayProcess, jobs: Producer) -> None:
    """Nothing else, and nothing that is for keys alone: lists of models, tokens, revocations."""
    job = await jobs.running("a", tenant="acme")
    path = f"/v1/jobs/{job.job_id}"
    reads, cancels = token(job.job_id), token(job.job_id, cap=["cancel"])
    assert code(await ask(relay, "POST", f"{path}/cancel", reads)) == (403, "forbidden")
    assert code(await ask(relay, "GET", path, cancels)) == (403, "forbidden")
    assert code(await ask(relay, "POST", "/v1/jobs", reads, json={"request": REQUEST})) == (403, "forbidden")
    everything = token("*", cap=["read", "cancel", "submit"])
    assert code(await ask(relay, "POST", f"{path}/tokens", everything)) == (403, "forbidden")
    assert code(await ask(relay, "POST", REVOKE, everything, json={"sub": "user-2"})) == (
        403,
        "forbidden",
    )
    assert code(await ask(relay, "GET", "/v1/models", reads)) == (403, "forbidden")
    assert (await ask(relay, "GET", "/v1/models", everything)).status_code == 200


async def test_a_token_in_a_wrong_place(relay: RelayProcess, jobs: Producer) -> None:
    """Tickets are for a job's events and its own socket; tokens that may do more never stand in a URL."""
    job = await jobs.ended("a", tenant="acme")
    ticket, path = token(job.job_id), f"/v1/jobs/{job.job_id}"
    for wrong in (f"{path}?ticket={ticket}", f"/v1/models?ticket={ticket}", f"{path}/events?token={ticket}"):
        assert code(await ask(relay, "GET", wrong)) == (401, "missing_credentials")
    assert code(await ask(relay, "POST", f"{path}/cancel?ticket={ticket}")) == (401, "missing_credentials")
    cookie = {"Cookie": f"ticket={ticket}; token={ticket}"}
    assert code(await ask(relay, "GET", path, headers=cookie)) == (401, "missing_credentials")
    for bad in (
        KEYS["acme"],
        token("*"),
        token(job.job_id, cap=["read", "cancel"]),
        token(job.job_id, ttl_s=901),
    ):
        assert code(await ask(relay, "GET", f"{path}/events?ticket={bad}")) == (401, "invalid_credentials")
        url = f"{relay.websocket_url}{path}/ws?ticket={bad}"
        async with websocket(url, headers={"Origin": ORIGIN}) as reader:
            assert await end_of(reader) == ("invalid_credentials", 4500)
    twice = f"{path}/events?ticket={ticket}&ticket={ticket}"
    assert code(await ask(relay, "GET", twice)) == (401, "invalid_credentials")
    url = f"{relay.websocket_url}/v1/ws?ticket={ticket}"
    async with websocket(url, headers={"Origin": ORIGIN}) as reader:
        await reader.send("subscribe", job_id=job.job_id)
        assert await end_of(reader) == ("missing_credentials", 4502)


async def test_a_ticket_is_for_its_job_as_often_as_one_comes(relay: RelayProcess, jobs: Producer) -> None:
    """An EventSource comes back to the same URL; another job is not in it."""
    job, other = await jobs.ended("a", tenant="acme"), await jobs.ended("b", tenant="acme")
    ticket = token(job.job_id, ttl_s=900)
    for _ in range(3):
        answer = await ask(relay, "GET", f"/v1/jobs/{job.job_id}/events?ticket={ticket}")
        assert answer.status_code == 200
        assert '"completed"' in answer.text
    wrong = f"/v1/jobs/{other.job_id}/events?ticket={ticket}"
    assert code(await ask(relay, "GET", wrong)) == (404, "unknown_job")
    url = f"{relay.websocket_url}/v1/jobs/{job.job_id}/ws?ticket={ticket}&starting_after=2"
    async with websocket(url, headers={"Origin": ORIGIN}) as reader:
        messages, close_code = await reader.until_closed()
    assert (numbers(messages)[0], close_code) == (3, 1000)


async def test_origin_tricks(relay: RelayProcess, jobs: Producer) -> None:
    """No Origin only with a header token; a ticket in another site's image gets nothing."""
    job = await jobs.ended("a", tenant="acme")
    ticket, path = token(job.job_id), f"/v1/jobs/{job.job_id}"
    for where in ("/v1/ws", f"{path}/ws?ticket={ticket}"):
        async with websocket(relay.websocket_url + where) as reader:
            assert await end_of(reader) == ("origin_not_allowed", 4503)
    for headers in (
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
        {"Origin": "null"},
        {"Origin": "https://app.example.evil"},
        {"Origin": f"{ORIGIN}, {ORIGIN}"},
    ):
        answer = await ask(relay, "GET", f"{path}/events?ticket={ticket}", headers=headers)
        assert code(answer) == (403, "origin_not_allowed")
    for headers in ({"Sec-Fetch-Site": "same-origin"}, {"Origin": ORIGIN, "Sec-Fetch-Site": "cross-site"}):
        answer = await ask(relay, "GET", f"{path}/events?ticket={ticket}", headers=headers)
        assert answer.status_code == 200


# What the relay makes.


async def test_a_job_comes_with_a_token_for_it(relay: RelayProcess) -> None:
    """It reads and cancels this job, for as long as the job may take, and no other."""
    answer = await ask(relay, "POST", "/v1/jobs", KEYS["acme"], json={"request": REQUEST})
    made = answer.json()
    claims = jwt.decode(made["token"], SECRET, ["HS256"], audience="deltawire")
    assert (claims["job"], claims["cap"], claims["tenant"]) == ([made["id"]], ["read", "cancel"], "acme")
    assert 4_190 < claims["exp"] - claims["iat"] <= 4_200
    assert answer.headers["Cache-Control"] == "no-store"
    assert (await ask(relay, "GET", f"/v1/jobs/{made['id']}", made["token"])).json()["status"] == "queued"
    long = {"request": REQUEST, "options": {"queue_timeout_s": 86_400}}
    made = (await ask(relay, "POST", "/v1/jobs", KEYS["acme"], json=long)).json()
    claims = jwt.decode(made["token"], SECRET, ["HS256"], audience="deltawire")
    assert claims["exp"] - claims["iat"] <= MAX_LIFE_S
    made = (await ask(relay, "POST", "/v1/jobs", KEYS["submitter"], json={"request": REQUEST})).json()
    assert made["token"] is None


async def test_a_token_makes_a_job_and_reads_it(relay: RelayProcess) -> None:
    """By the token that comes with it, which may no more than the first, and not for longer."""
    credential = token(cap=["submit", "read"], ttl_s=300)
    key = {"Idempotency-Key": "first"}
    made = (await ask(relay, "POST", "/v1/jobs", credential, json={"request": REQUEST}, headers=key)).json()
    assert code(await ask(relay, "GET", f"/v1/jobs/{made['id']}", credential)) == (404, "unknown_job")
    claims = jwt.decode(made["token"], SECRET, ["HS256"], audience="deltawire")
    assert (claims["cap"], claims["sub"], claims["tenant"]) == (["read"], "user-1", "acme")
    assert claims["exp"] <= jwt.decode(credential, SECRET, ["HS256"], audience="deltawire")["exp"]
    assert (await ask(relay, "GET", f"/v1/jobs/{made['id']}", made["token"])).status_code == 200
    # Another subject's key of the same name is another key.
    for other in (token(cap=["submit", "read"], subject="user-2"), KEYS["acme"]):
        again = await ask(relay, "POST", "/v1/jobs", other, json={"request": REQUEST}, headers=key)
        assert again.json()["id"] != made["id"]


async def test_tokens_for_a_job(relay: RelayProcess, jobs: Producer) -> None:
    """Of one that may not even exist yet: a backend with plain Celery knows the id before."""
    job, foreign = await jobs.ended("a", tenant="acme"), await jobs.ended("b", tenant="umbrella")
    path = f"/v1/jobs/{job.job_id}/tokens"
    made = await ask(relay, "POST", path, KEYS["acme"], json={"cap": ["read"], "ttl_s": 900, "sub": "user-9"})
    assert made.status_code == 201
    answer = made.json()
    claims = jwt.decode(answer["token"], SECRET, ["HS256"], audience="deltawire")
    assert (answer["object"], answer["job_id"], answer["cap"]) == ("token", job.job_id, ["read"])
    assert (answer["token_id"], answer["expires_at"]) == (claims["jti"], claims["exp"])
    assert (claims["sub"], claims["job"]) == ("user-9", [job.job_id])
    events = await ask(relay, "GET", f"/v1/jobs/{job.job_id}/events?ticket={answer['token']}")
    assert events.status_code == 200
    bare = (await ask(relay, "POST", "/v1/jobs/not-yet/tokens", KEYS["acme"])).json()
    claims = jwt.decode(bare["token"], SECRET, ["HS256"], audience="deltawire")
    assert (claims["sub"], claims["cap"]) == ("acme", ["read"])
    assert code(await ask(relay, "POST", path, KEYS["plain"])) == (403, "forbidden")
    assert code(await ask(relay, "POST", path, KEYS["narrow"], json={"cap": ["cancel"]})) == (
        403,
        "forbidden",
    )
    foreign_path = f"/v1/jobs/{foreign.job_id}/tokens"
    useless = (
        await ask(relay, "POST", foreign_path, KEYS["acme"])
    ).json()  # as for a job that does not exist
    assert code(await ask(relay, "GET", f"/v1/jobs/{foreign.job_id}", useless["token"])) == (
        404,
        "unknown_job",
    )
    wrong: dict[str, Any]
    for wrong in (
        {"cap": ["list"]},
        {"cap": []},
        {"cap": ["read", "read"]},
        {"ttl_s": 0},
        {"ttl_s": 86_401},
        {"ttl_s": "1"},
        {"sub": "a\r\nb"},
        {"sub": ""},
        {"tenant": "umbrella"},
        {"job": "*"},
    ):
        assert code(await ask(relay, "POST", path, KEYS["acme"], json=wrong)) == (400, "invalid_request")


# The end of a token.


async def test_reauthentication(relay: RelayProcess, jobs: Producer) -> None:
    """The same subject goes on with another token; what that one does not cover ends, by name."""
    one, other = await jobs.running("a", tenant="acme"), await jobs.running("b", tenant="acme")
    async with websocket(f"{relay.websocket_url}/v1/ws", token=token(one.job_id, other.job_id)) as reader:
        for job in (one, other):
            await reader.send("subscribe", job_id=job.job_id)
            await reader.until(job.top)
        await reader.send("authenticate", token=token(one.job_id), request_id="again")
        said = await reader.receive_type("authenticated")
        assert said["request_id"] == "again"
        assert said["expires_at"] > time.time()
        refused = await reader.receive_type("error")
        assert (refused["error"]["code"], refused["job_id"]) == ("unknown_job", other.job_id)
        await other.deltas("unseen")
        await one.deltas("seen")
        assert (await reader.receive_type("delta"))["job_id"] == one.job_id
        await reader.send("authenticate", token=token(one.job_id, subject="user-2"))
        assert await end_of(reader) == ("forbidden", 4503)
    for wrong, expected in (
        (token("*", tenant="umbrella"), ("forbidden", 4503)),
        (KEYS["acme"], ("forbidden", 4503)),
        (token(one.job_id, ttl_s=600)[:-4] + "AAAA", ("invalid_credentials", 4500)),
    ):
        async with websocket(f"{relay.websocket_url}/v1/ws", token=token(one.job_id)) as reader:
            await reader.send("authenticate", token=wrong)
            assert await end_of(reader) == expected


async def test_revoked_in_mid_stream(
    relays: tuple[RelayProcess, RelayProcess], redis_server: RedisServer, jobs: Producer
) -> None:
    """On the other relay, too, and for good: sockets close with 4500, streams say why and end."""
    one, other = relays
    job = await jobs.running("a", tenant="acme")
    first, second = token(job.job_id), token(job.job_id, subject="user-7")
    path, bystander = f"/v1/jobs/{job.job_id}", token(job.job_id, subject="user-3")
    async with (
        websocket(f"{other.websocket_url}{path}/ws", token=first) as socket,
        event_stream(one.url, job.job_id, ticket=first) as stream,
        event_stream(other.url, job.job_id, ticket=second) as subjects_stream,
        websocket(f"{one.websocket_url}/v1/ws", token=second) as subjects_socket,
        websocket(f"{other.websocket_url}{path}/ws", token=bystander) as unconcerned,
    ):
        for reader in (socket, stream, subjects_stream, unconcerned):
            await reader.until(job.top)
        said = (await ask(one, "POST", REVOKE, KEYS["acme"], json={"token": first})).json()
        claims = jwt.decode(first, SECRET, ["HS256"], audience="deltawire")
        assert (said["object"], said["token_id"], said["expires_at"]) == (
            "revocation",
            claims["jti"],
            claims["exp"],
        )
        assert await end_of(socket) == ("token_revoked", 4500)
        last = [message.data for message in await stream.rest()][-1]
        assert last["error"]["code"] == "token_revoked"
        await ask(one, "POST", REVOKE, KEYS["acme"], json={"sub": "user-7"})
        assert await end_of(subjects_socket) == ("token_revoked", 4500)
        last = [message.data for message in await subjects_stream.rest()][-1]
        assert last["error"]["code"] == "token_revoked"
        await job.deltas("on")
        await unconcerned.until(job.top)
    # Token replay: on no relay, at no door, nor after it starts anew.
    with RelayProcess(redis_server.url, SETTINGS) as third:
        for relay in (one, other, third):
            for text in (first, second):
                assert code(await ask(relay, "GET", path, text)) == (401, "token_revoked")
                assert code(await ask(relay, "GET", f"{path}/events?ticket={text}")) == (401, "token_revoked")
                async with websocket(f"{relay.websocket_url}/v1/ws", headers={"Origin": ORIGIN}) as reader:
                    await reader.send("authenticate", token=text)
                    assert await end_of(reader) == ("token_revoked", 4500)
    with redis.Redis.from_url(redis_server.url) as client:
        assert 86_000 < client.ttl("dw:revoked:log") <= 86_430


async def test_revoked_while_a_completion_streams(relay: RelayProcess, jobs: Producer) -> None:
    """The answer ends with an error and without [DONE]; its end by expiry it may outlive (§9)."""
    text = token("*", cap=["submit", "read"], subject="user-6")
    job = jobs.job(hashlib.sha256(b"acme\0user-6\0chat").hexdigest())
    headers = {**bearer(text), "Idempotency-Key": "chat"}
    body = {**REQUEST, "stream": True}
    async with http_client(base_url=relay.url) as client:
        stream = client.stream("POST", "/v1/chat/completions", headers=headers, json=body)
        opening = asyncio.create_task(stream.__aenter__())
        await job.adopt()
        await job.deltas("a")
        answer = await opening
        lines = answer.aiter_lines()
        while "chunk" not in await anext(lines):
            pass
        await ask(relay, "POST", REVOKE, KEYS["acme"], json={"token": text})
        rest = [line async for line in lines if line]
        await stream.__aexit__(None, None, None)
    assert "token_revoked" in rest[-1]
    assert not any("[DONE]" in line for line in rest)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/jobs", "/v1/jobs/j1/cancel"])
async def test_revoked_while_a_body_is_on_its_way(relay: RelayProcess, path: str) -> None:
    """Whoever was let in before that does nothing after it: the body may take half a minute."""
    text = token("*", cap=["submit", "read", "cancel"], subject="user-7")
    is_read = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield b"{"
        await is_read.wait()
        yield b"}"

    headers = {"Content-Type": "application/json", **bearer(text)}
    async with http_client(base_url=relay.url) as client:
        asking = asyncio.create_task(client.post(path, headers=headers, content=body()))
        await asyncio.sleep(0.2)  # until it is let in; were it too soon, it would be refused all the same
        await ask(relay, "POST", REVOKE, KEYS["acme"], json={"token": text})
        is_read.set()
        assert code(await asking) == (401, "token_revoked")


async def test_revocations_that_are_refused(relay: RelayProcess) -> None:
    """One tenant revokes nothing of another's, and what is no token is said to be none."""
    path = REVOKE
    mine = token("j1", subject="user-4")
    for body in (
        {},
        {"token": mine, "sub": "user-4"},
        {"token": "x"},
        {"token": token("j1", tenant="acme", subject="u")[:-3]},
        {"token_id": ""},
        {"sub": "a\nb"},
        {"sub": 7},
        {"subject": "user-4"},
    ):
        assert code(await ask(relay, "POST", path, KEYS["acme"], json=body)) == (400, "invalid_request")
    assert code(await ask(relay, "POST", path, KEYS["umbrella"], json={"token": mine})) == (
        400,
        "invalid_request",
    )
    claims = jwt.decode(mine, SECRET, ["HS256"], audience="deltawire")
    for body in ({"token_id": claims["jti"]}, {"sub": "user-4"}):
        assert (await ask(relay, "POST", path, KEYS["umbrella"], json=body)).status_code == 200
    assert code(await ask(relay, "GET", "/v1/jobs/j1", mine)) == (404, "unknown_job")
    assert (await ask(relay, "POST", path, KEYS["acme"], json={"token_id": claims["jti"]})).status_code == 200
    assert code(await ask(relay, "GET", "/v1/jobs/j1", mine)) == (401, "token_revoked")


async def test_a_revocation_whose_message_is_lost(
    relays: tuple[RelayProcess, RelayProcess], redis_server: RedisServer, jobs: Producer
) -> None:
    """Relays look once a second in any case; here nobody publishes anything."""
    job = await jobs.running("a", tenant="acme")
    text = token(job.job_id, subject="user-5")
    async with websocket(f"{relays[0].websocket_url}/v1/jobs/{job.job_id}/ws", token=text) as reader:
        await reader.until(job.top)
        with redis.Redis.from_url(redis_server.url) as client:
            entry = json.dumps(["acme", "sub", "user-5", time.time() + 1, time.time() + 86_400])
            client.xadd("dw:revoked:log", {"r": "not what a relay writes"})
            client.xadd("dw:revoked:log", {"r": entry})
        assert await end_of(reader) == ("token_revoked", 4500)


async def test_a_token_that_expires_ends_what_it_opened(
    redis_server: RedisServer, jobs: Producer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4005 after a goodbye on a socket, an error on a stream; who has authenticated again stays."""
    monkeypatch.setattr(admissions_module, "LOOK_INTERVAL_S", 0.05)
    job = await jobs.running("a", tenant="acme")
    async with relay_in_process(redis_server.url, monkeypatch, jwt_secrets=(SECRET,)) as address:
        short, long = token(job.job_id, ttl_s=900), token(job.job_id, ttl_s=7_200)
        url = f"ws://{address}/v1/ws"
        async with (
            websocket(url, token=short) as reader,
            websocket(url, token=short) as renewed,
            event_stream(f"http://{address}", job.job_id, ticket=short) as stream,
        ):
            await renewed.send("authenticate", token=long)
            await renewed.receive_type("authenticated")
            await stream.until(job.top)
            an_hour_on = SimpleNamespace(time=lambda: time.time() + 3_600)
            monkeypatch.setattr(admissions_module, "time", an_hour_on)
            messages, close_code = await reader.until_closed()
            assert close_code == 4005
            assert [message["type"] for message in messages[-2:]] == ["goodbye", "error"]
            assert messages[-2]["code"] == 4005
            assert messages[-1]["error"]["code"] == "token_expired"
            last = [message.data for message in await stream.rest()][-1]
            assert last["error"]["code"] == "token_expired"
            await renewed.send("subscribe", job_id=job.job_id)
            await renewed.until(job.top)


async def test_nothing_of_a_credential_is_in_the_log(relays: tuple[RelayProcess, RelayProcess]) -> None:
    """At the level debug, and after all that the tests before have sent: tickets, tokens, keys, URLs."""
    ticket = token("j1")
    for path in ("/nowhere", "/v1/jobs/j2/events", "/v1/jobs/{}/events", "/v1/jobs/j1/ws"):
        answer = await ask(relays[0], "GET", f"{path}?ticket={ticket}", headers={"X": ticket})
        assert ticket not in answer.text
    answer = await ask(relays[0], "GET", "/v1/jobs/j1", f"{ticket}x")
    assert ticket not in answer.text
    reader, writer = await asyncio.open_connection("127.0.0.1", relays[0].port)
    writer.write(f"GET /v1/jobs/j1/ws?ticket={ticket} HTTP/1.1\r\nUpgrade: websocket\r\n".encode())
    writer.write(b"Host: 127.0.0.1\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 1\r\n\r\n")
    await reader.read()
    writer.close()
    for relay in relays:
        said = relay.log
        assert said
        assert "ticket=" not in said
        assert "eyJ" not in said  # as any token begins
        assert SECRET not in said
        assert "dw_" not in said


# Key sets.


class Issuer:
    """Serves a key set that tests change; with none it answers 500."""

    def __init__(self) -> None:
        self.keys: bytes | None = None
        self.asked = 0
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.asked += 1
                if self.path == "/elsewhere":
                    self.send_response(302)
                    self.send_header("Location", "/jwks")
                    self.end_headers()
                    return
                self.send_response(200 if issuer.keys is not None else 500)
                self.end_headers()
                self.wfile.write(issuer.keys or b"")

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.01,))
        self._thread.start()

    def close(self) -> None:
        self.server.shutdown()
        self._thread.join()
        self.server.server_close()


@pytest.fixture
def issuer(monkeypatch: pytest.MonkeyPatch) -> Iterator[Issuer]:
    monkeypatch.setenv("no_proxy", "*")
    made = Issuer()
    yield made
    made.close()


@asynccontextmanager
async def relay_of(
    issuer: Issuer, redis_url: str, monkeypatch: pytest.MonkeyPatch, path: str = "/jwks"
) -> AsyncIterator[str]:
    async with relay_in_process(redis_url, monkeypatch, jwt_jwks_url=issuer.url + path) as address:
        yield address


async def test_key_rotation(
    redis_server: RedisServer, issuer: Issuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new key is fetched when it is first named, the old one goes when it is withdrawn, and what is there
    stays while the issuer is away; made-up names of keys make nobody ask more often."""
    old, new = rsa.generate_private_key(65537, 2048), ed25519.Ed25519PrivateKey.generate()

    def signed(key: Any, kid: str) -> str:
        algorithm = "EdDSA" if key is new else "RS256"
        return mint(private_pem(key), subject="u", jobs=["j1"], algorithm=algorithm, key_id=kid)

    async def status(address: str, text: str) -> int:
        async with http_client() as client:
            answer = await client.get(f"http://{address}/v1/jobs/j1", headers=bearer(text))
        return answer.status_code

    issuer.keys = jwks(jwk(old, "old"))
    monkeypatch.setattr(verifier_module, "RETRY_INTERVAL_S", 0.0)
    async with relay_of(issuer, redis_server.url, monkeypatch) as address:
        assert await status(address, signed(old, "old")) == 404  # let in: there is no such job
        assert await status(address, signed(new, "new")) == 401
        issuer.keys = jwks(jwk(old, "old"), jwk(new, "new"))
        async with websocket(f"ws://{address}/v1/ws", token=signed(new, "new")) as reader:
            await reader.send("subscribe", job_id="j1")  # before the keys are there
            assert (await reader.receive())["status"] == "unknown"
        assert await status(address, signed(old, "old")) == 404
        issuer.keys = None
        assert await status(address, signed(new, "made-up")) == 401
        assert await status(address, signed(old, "old")) == 404
        issuer.keys = jwks(jwk(new, "new"))
        assert await status(address, signed(new, "made-up")) == 401
        assert await status(address, signed(old, "old")) == 401
        asked, issuer.keys = issuer.asked, None
        monkeypatch.setattr(verifier_module, "RETRY_INTERVAL_S", 60.0)
        for number in range(20):
            assert await status(address, signed(new, f"made-up-{number}")) == 401
        assert issuer.asked == asked


async def test_key_set_that_was_never_there(
    redis_server: RedisServer,
    issuer: Issuer,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Whoever comes may come back: it is our fault, not the token's. Redirects are not followed."""
    key = ed25519.Ed25519PrivateKey.generate()
    issuer.keys = jwks(jwk(key, "k"))
    text = mint(private_pem(key), subject="u", jobs=["j1"], algorithm="EdDSA", key_id="k")
    async with relay_of(issuer, redis_server.url, monkeypatch, "/elsewhere") as address:
        async with http_client() as client:
            answer = await client.get(f"http://{address}/v1/jobs/j1", headers=bearer(text))
        assert code(answer) == (500, "internal_error")
        assert answer.json()["error"]["retryable"]
        async with websocket(f"ws://{address}/v1/ws", token=text) as reader:
            assert await end_of(reader) == ("internal_error", 4003)
