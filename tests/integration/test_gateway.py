"""The scripted gateway over real sockets on loopback: bytes, faults, closes, many streams."""

import asyncio
import contextlib
import json
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from deltawire.gateway import Gateway, RequestRecord
from deltawire.gateway.prose import HAIKU

DEADLINE_S = 60.0


def body(*, script: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": "Write a haiku about streaming."}
    request = {"model": "gpt-5.4", "messages": [message], "stream": True, **fields}
    return request if script is None else {**request, "script": script}


def raw_request(fields: dict[str, Any], *headers: str, version: str = "1.1") -> bytes:
    data = json.dumps(fields).encode()
    lines = [f"POST /v1/chat/completions HTTP/{version}", "Host: x", f"Content-Length: {len(data)}", *headers]
    return "\r\n".join([*lines, "", ""]).encode() + data


def data_of(text: str) -> list[str]:
    events = text.replace("\r\n", "\n").strip("\n").split("\n\n")
    return ["".join(line.removeprefix("data: ") for line in event.split("\n")) for event in events]


def content_of(text: str) -> str:
    chunks = [json.loads(data) for data in data_of(text) if data != "[DONE]"]
    return "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"])


async def until(is_true: Callable[[], object]) -> None:
    """Wait for a state that is bound to come; the deadline is for the test that is wrong."""
    async with asyncio.timeout(DEADLINE_S):
        while not is_true():  # noqa: ASYNC110 - the gateway, rightly, has no event for tests
            await asyncio.sleep(0.002)


class RawClient:
    """A socket and what it received, for tests of bytes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def read_until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.readuntil(mark)

    async def read_chunks(self) -> list[bytes]:
        """The chunks of a chunked body, to its end."""
        chunks = []
        while size := int(await self.read_until(b"\r\n"), 16):
            async with asyncio.timeout(DEADLINE_S):
                chunks.append((await self.reader.readexactly(size + 2))[:-2])
        assert await self.read_until(b"\r\n") == b"\r\n"
        return chunks


@pytest.fixture
async def gateway() -> AsyncIterator[Gateway]:
    async with Gateway(rate=0) as gateway:
        yield gateway


@pytest.fixture
async def client(gateway: Gateway) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=gateway.base_url, timeout=DEADLINE_S) as client:
        yield client


@contextlib.asynccontextmanager
async def connect(gateway: Gateway) -> AsyncIterator[RawClient]:
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def post(client: httpx.AsyncClient, fields: dict[str, Any], **headers: str) -> httpx.Response:
    return await client.post("/chat/completions", json=fields, headers=headers)


def root(gateway: Gateway, path: str) -> str:
    return gateway.base_url.removesuffix("/v1") + path


class TestApi:
    async def test_a_stream_is_sse_over_chunked_http(self, client: httpx.AsyncClient) -> None:
        response = await post(client, body(stream_options={"include_usage": True}))
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["transfer-encoding"] == "chunked"
        assert content_of(response.text) == HAIKU
        assert data_of(response.text)[-1] == "[DONE]"
        assert json.loads(data_of(response.text)[-2])["usage"]["total_tokens"] > 0

    async def test_the_same_text_comes_whole_without_stream(self, client: httpx.AsyncClient) -> None:
        response = await post(client, body(stream=False))
        assert response.headers["content-type"] == "application/json"
        assert response.json()["choices"][0]["message"]["content"] == HAIKU

    async def test_models_and_health(self, gateway: Gateway, client: httpx.AsyncClient) -> None:
        models = (await client.get("/models")).json()
        assert models["object"] == "list"
        assert {model["object"] for model in models["data"]} == {"model"}
        health = await client.get(root(gateway, "/healthz"))
        assert health.json() == {"status": "ok"}
        assert (await client.head(root(gateway, "/healthz"))).content == b""

    @pytest.mark.parametrize(
        ("method", "path", "content", "status", "code"),
        [
            ("POST", "/chat/completions", b"{", 400, None),
            ("POST", "/chat/completions", b"{}", 400, "missing_required_parameter"),
            ("GET", "/chat/completions", b"", 405, "method_not_supported"),
            ("POST", "/models", b"", 405, "method_not_supported"),
            ("GET", "/nothing", b"", 404, "unknown_url"),
        ],
    )
    async def test_errors_are_openai_shaped(
        self, client: httpx.AsyncClient, method: str, path: str, content: bytes, status: int, code: str | None
    ) -> None:
        response = await client.request(method, path, content=content)
        assert response.status_code == status
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert (error["type"], error["code"]) == ("invalid_request_error", code)
        assert (status == 405) == ("allow" in response.headers)

    async def test_the_api_key_is_wanted(self) -> None:
        async with Gateway(api_key="sk-right") as gateway, httpx.AsyncClient() as client:
            url = gateway.base_url + "/chat/completions"
            for header in (None, "Bearer sk-wrong", "Basic sk-right", "sk-right"):
                headers = {"Authorization": header} if header else {}
                response = await client.post(url, json=body(), headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert "sk-" not in response.text
            headers = {"Authorization": "Bearer sk-right"}
            fields = body(script={"rate": 0})
            assert (await client.post(url, json=fields, headers=headers)).status_code == 200
            assert [record.authorized for record in gateway.records] == [False] * 4 + [True]
            assert (await client.get(root(gateway, "/stats"))).status_code == 200

    async def test_browsers_may_call(self, client: httpx.AsyncClient) -> None:
        asked = {"Origin": "https://a", "Access-Control-Request-Headers": "authorization,x-y"}
        preflight = await client.options("/chat/completions", headers=asked)
        assert preflight.status_code == 204
        assert preflight.headers["access-control-allow-headers"] == "authorization,x-y"
        response = await post(client, body())
        assert response.headers["access-control-allow-origin"] == "*"

    async def test_the_rate_is_kept(self, client: httpx.AsyncClient) -> None:
        """Never faster than asked; how much slower depends on the machine."""
        started = time.monotonic()
        await post(client, body(script={"rate": 100, "deltas": 20, "first_delta_s": 0.05}))
        assert time.monotonic() - started >= 0.25 - 0.01


class TestHttp:
    async def test_a_connection_serves_many_requests_also_pipelined(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"rate": 200})) + raw_request(body(stream=False)))
            await raw.read_until(b"\r\n\r\n")
            assert (await raw.read_chunks())[-1] == b"data: [DONE]\n\n"
            assert b"Content-Length" in await raw.read_until(b"\r\n\r\n")
            await raw.read_until(b'"fp_de17a31e55"}')
            raw.writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
            assert b"Connection: close" in await raw.read_until(b"\r\n\r\n")
            assert await raw.reader.read() == b'{"status":"ok"}'

    async def test_each_event_is_a_chunk(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body()))
            await raw.read_until(b"\r\n\r\n")
            chunks = await raw.read_chunks()
        assert len(chunks) > 10
        assert all(chunk.startswith(b"data: ") and chunk.endswith(b"\n\n") for chunk in chunks)

    async def test_http_10_gets_a_body_to_the_end_of_the_connection(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(), version="1.0"))
            head = await raw.read_until(b"\r\n\r\n")
            assert b"Transfer-Encoding" not in head
            assert content_of((await raw.reader.read()).decode()) == HAIKU

    @pytest.mark.parametrize(
        ("request_bytes", "status"),
        [
            (b"\x16\x03\x01 nonsense\r\n\r\n", b" 400 "),
            (b"GET / HTTP/1.1\r\nX: " + b"y" * 70_000 + b"\r\n\r\n", b" 431 "),
            (b"POST / HTTP/1.1\r\nContent-Length: 9000000\r\n\r\n" + b"y" * 8_500_000, b" 413 "),
        ],
    )
    async def test_what_is_not_to_be_read_is_refused(
        self, gateway: Gateway, request_bytes: bytes, status: bytes
    ) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(request_bytes)
            assert status in await raw.read_until(b"\r\n\r\n")
            with contextlib.suppress(ConnectionError):
                await raw.reader.read()

    async def test_too_many_pipelined_requests_end_the_connection(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "stall"})) * 18)
            with contextlib.suppress(ConnectionError):
                await raw.reader.read()
        assert [record.closed_by for record in gateway.records] == ["server"]

    async def test_expect_continue_is_answered(self, gateway: Gateway) -> None:
        request = raw_request(body(stream=False), "Expect: 100-continue")
        head, _, data = request.partition(b"\r\n\r\n")
        async with connect(gateway) as raw:
            raw.writer.write(head + b"\r\n\r\n")
            assert await raw.read_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            raw.writer.write(data)
            assert b" 200 OK" in await raw.read_until(b"\r\n\r\n")

    async def test_a_slow_reader_gets_everything_and_holds_back_the_gateway(self, gateway: Gateway) -> None:
        script = {"deltas": 400, "delta_bytes": 65_536}
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script=script)))
            await raw.read_until(b"\r\n\r\n")
            record = gateway.records[0]
            previous = -1
            while record.sent_deltas != previous:  # until it stands still
                previous = record.sent_deltas
                await asyncio.sleep(0.1)
            assert 0 < record.sent_deltas < 400
            chunks = await raw.read_chunks()
        assert len(chunks) == 403
        await until(lambda: record.finished_at)
        assert record.sent_deltas == record.total_deltas == 400


class TestFaults:
    async def test_status(self, client: httpx.AsyncClient) -> None:
        script = {"fault": "status", "status": 429, "retry_after": "0.5"}
        response = await post(client, body(script=script))
        assert response.status_code == 429
        assert response.headers["retry-after"] == "0.5"
        assert response.json()["error"]["code"] == "rate_limit_exceeded"

    async def test_html(self, client: httpx.AsyncClient) -> None:
        response = await post(client, body(script={"fault": "html"}))
        assert response.status_code == 502
        assert response.headers["content-type"] == "text/html"
        assert response.text.startswith("<html>")

    async def test_json(self, client: httpx.AsyncClient) -> None:
        response = await post(client, body(script={"fault": "json", "first_delta_s": 0.02}))
        assert response.json()["object"] == "chat.completion"

    async def test_fail_first(self, client: httpx.AsyncClient) -> None:
        fields = body(script={"fault": "status", "status": 503, "fail_first": 2})
        for name in ("a", "b"):
            headers = {"X-Client-Request-Id": name}
            statuses = [(await post(client, fields, **headers)).status_code for _ in range(4)]
            assert statuses == [503, 503, 200, 200]

    async def test_stall(self, gateway: Gateway) -> None:
        """Silence, but not the end; a client that goes then is noticed."""
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "stall", "after": 1})))
            await raw.read_until(b'"Whisper"')
            await raw.read_until(b"\r\n")
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(raw.reader.read(1), 0.1)
            record = gateway.records[0]
            assert (record.sent_deltas, record.finished_at, record.closed_by) == (1, None, None)
        await until(lambda: record.closed_by)
        assert record.closed_by == "client"

    async def test_comments(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "comments", "after": 2, "rate": 100})))
            head = await raw.read_until(b": keep-alive\n\n")
            assert head.count(b'"content":') == 3
            for _ in range(3):
                assert (await raw.read_until(b": keep-alive\n\n")).count(b"data:") == 0

    async def test_cut(self, gateway: Gateway) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "cut", "after": 2})))
            assert b"Connection: close" in await raw.read_until(b"\r\n\r\n")
            chunks = await raw.read_chunks()
            assert await raw.reader.read() == b""
        assert len(chunks) == 3
        record = gateway.records[0]
        assert (record.closed_by, record.finished_at, record.sent_deltas) == ("server", None, 2)

    async def test_cut_before_the_first_delta_is_an_empty_body(self, client: httpx.AsyncClient) -> None:
        response = await post(client, body(script={"fault": "cut"}))
        assert (response.status_code, response.content) == (200, b"")

    async def test_reset(self, gateway: Gateway) -> None:
        """What was sent before arrives, then half a chunk, then an error."""
        received = b""
        is_reset = False
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "reset", "after": 2})))
            try:
                while data := await raw.reader.read(65_536):
                    received += data
            except ConnectionResetError:
                is_reset = True
        assert is_reset
        *_, torn = received.split(b"\r\n")
        assert received.count(b'"content":') == 3
        assert torn.startswith(b"data: {")
        assert not torn.endswith(b"\n")
        assert gateway.records[0].closed_by == "server"

    async def test_reset_is_an_error_for_httpx(self, client: httpx.AsyncClient) -> None:
        with pytest.raises(httpx.TransportError):
            await post(client, body(script={"fault": "reset", "after": 2}))

    async def test_no_done_error_and_no_finish_reason(self, client: httpx.AsyncClient) -> None:
        no_done = data_of((await post(client, body(script={"fault": "no_done"}))).text)
        assert json.loads(no_done[-1])["choices"][0]["finish_reason"] == "stop"
        error = data_of((await post(client, body(script={"fault": "error", "after": 3}))).text)
        assert json.loads(error[-1])["error"]["type"] == "server_error"
        assert len(error) == 5
        null = data_of((await post(client, body(script={"fault": "no_finish_reason"}))).text)
        assert null[-1] == "[DONE]"
        assert {json.loads(data)["choices"][0]["finish_reason"] for data in null[:-1]} == {None}


class TestVerbatim:
    async def test_chunks(self, gateway: Gateway, client: httpx.AsyncClient) -> None:
        script = {"chunks": ['{"a": 1}', {"b": 2}], "headers": {"X-Vendor": "y"}}
        response = await post(client, body(script=script))
        assert response.headers["content-type"] == "text/event-stream"
        assert response.headers["x-vendor"] == "y"
        assert response.text == 'data: {"a": 1}\n\ndata: {"b":2}\n\ndata: [DONE]\n\n'
        record = gateway.records[0]
        assert (record.sent_deltas, record.total_deltas) == (2, 2)

    async def test_a_body_is_a_stream_to_the_byte(self, client: httpx.AsyncClient) -> None:
        stream = ": PROCESSING\r\n\r\nevent: error\rdata: {}\r\r"
        response = await post(client, body(script={"body": stream, "content_type": "text/event-stream"}))
        assert response.headers["content-type"] == "text/event-stream"
        assert response.content == stream.encode()

    async def test_a_header_takes_the_place_of_the_usual_one(self, client: httpx.AsyncClient) -> None:
        headers = {"content-type": "text/plain"}
        for script in ({"chunks": ["{}"]}, {"body": "{}"}, {"text": "a"}, {"fault": "status"}):
            response = await post(client, body(script={**script, "headers": headers}))
            assert response.headers.get_list("content-type") == ["text/plain"]

    async def test_an_error_of_any_shape_and_then_an_answer(self, client: httpx.AsyncClient) -> None:
        script = {
            "fault": "status",
            "status": 429,
            "body": '[{"error": {"code": 429}}]',
            "headers": {"retry-after-ms": "5"},
            "fail_first": 1,
            "chunks": ["{}"],
        }
        failed, spared = [await post(client, body(script=script)) for _ in range(2)]
        assert (failed.status_code, failed.headers["retry-after-ms"]) == (429, "5")
        assert failed.json() == [{"error": {"code": 429}}]
        assert (spared.status_code, data_of(spared.text)) == (200, ["{}", "[DONE]"])
        assert "retry-after-ms" not in spared.headers


class TestSplits:
    async def chunks(self, gateway: Gateway, **script: Any) -> list[bytes]:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"unicode": True, "deltas": 20, **script})))
            await raw.read_until(b"\r\n\r\n")
            return await raw.read_chunks()

    @pytest.mark.parametrize("split", ["byte", "utf8", "crlf", "multiline", "coalesce"])
    async def test_every_split_says_the_same(self, gateway: Gateway, split: str) -> None:
        plain = content_of(b"".join(await self.chunks(gateway)).decode())
        assert content_of(b"".join(await self.chunks(gateway, split=split)).decode()) == plain

    async def test_byte(self, gateway: Gateway) -> None:
        assert {len(chunk) for chunk in await self.chunks(gateway, split="byte")} == {1}

    async def test_utf8(self, gateway: Gateway) -> None:
        torn = 0
        for chunk in await self.chunks(gateway, split="utf8"):
            try:
                chunk.decode()
            except UnicodeDecodeError:
                torn += 1
        assert torn >= 6

    async def test_coalesce(self, gateway: Gateway) -> None:
        counts = [chunk.count(b"data: ") for chunk in await self.chunks(gateway, split="coalesce")]
        assert counts == [8, 8, 7]


class TestRecords:
    async def test_a_request_is_recorded_without_its_prompt(
        self, gateway: Gateway, client: httpx.AsyncClient
    ) -> None:
        before = time.time()
        await post(client, body(), **{"X-Client-Request-Id": "job-1", "Authorization": "Bearer sk-secret"})
        await post(client, body())
        listed = await client.get(root(gateway, "/requests"), params={"client_request_id": "job-1"})
        (record,) = listed.json()["data"]
        assert set(record) == set(RequestRecord.__struct_fields__)
        assert record["model"] == "gpt-5.4"
        assert before <= record["received_at"] <= record["first_byte_at"] <= record["finished_at"]
        assert record["sent_deltas"] == record["total_deltas"] > 0
        assert (record["closed_by"], record["concurrent"], record["authorized"]) == (None, 1, True)
        everything = (await client.get(root(gateway, "/requests"))).text
        assert "haiku" not in everything
        assert "secret" not in everything

    async def test_records_can_be_cleared_and_totals_stay(
        self, gateway: Gateway, client: httpx.AsyncClient
    ) -> None:
        await post(client, body())
        assert (await client.delete(root(gateway, "/requests"))).json()["deleted"] == 1
        assert (await client.get(root(gateway, "/requests"))).json() == {"object": "list", "data": []}
        stats = (await client.get(root(gateway, "/stats"))).json()
        assert (stats["open_streams"], stats["requests"]) == (0, 1)
        assert stats["deltas_sent"] > 0

    @pytest.mark.parametrize(
        "script",
        [
            {"rate": 20, "deltas": 1000},
            {"fault": "stall", "after": 1},
            {"fault": "comments", "after": 1},
            {"rate": 0, "deltas": 1_000_000},
        ],
        ids=["streaming", "stalled", "comments", "full buffer"],
    )
    @pytest.mark.parametrize("manner", ["close", "half-close", "reset"])
    async def test_a_clients_close_is_seen_at_once(
        self, gateway: Gateway, script: dict[str, Any], manner: str
    ) -> None:
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script=script)))
            await raw.read_until(b"}\n\n")
            record = gateway.records[0]
            closed_at = time.time()
            if manner == "half-close":
                raw.writer.write_eof()
            elif manner == "reset":
                raw.writer.transport.abort()
            else:
                raw.writer.close()
            await until(lambda: record.closed_by)
            assert record.closed_by == "client"
            assert record.closed_at is not None
            assert closed_at <= record.closed_at + 0.05  # clocks are read on both sides
            assert record.finished_at is None

    async def test_a_close_before_a_delayed_answer_is_seen(self, gateway: Gateway) -> None:
        for fields in (body(script={"first_delta_s": 30}), body(stream=False, script={"first_delta_s": 30})):
            async with connect(gateway) as raw:
                raw.writer.write(raw_request(fields))
                await until(lambda: gateway.records and gateway.records[-1].finished_at is None)
            record = gateway.records[-1]
            await until(lambda record=record: record.closed_by)  # type: ignore[misc] # mypy: lambda default
            assert (record.closed_by, record.first_byte_at) == ("client", None)

    async def test_a_close_between_requests_is_nobodys(
        self, gateway: Gateway, client: httpx.AsyncClient
    ) -> None:
        await post(client, body())
        await client.aclose()
        assert gateway.records[0].closed_by is None


class TestLife:
    async def test_stop_ends_open_streams_and_start_listens_there_again(self) -> None:
        gateway = Gateway(rate=0)
        await gateway.start()
        url = gateway.base_url
        with pytest.raises(RuntimeError):
            await gateway.start()
        async with connect(gateway) as raw:
            raw.writer.write(raw_request(body(script={"fault": "stall", "after": 1})))
            await raw.read_until(b"}\n\n")
            await gateway.stop()
            with contextlib.suppress(ConnectionError):
                await raw.reader.read()
        await gateway.stop()
        assert gateway.records[0].closed_by == "server"
        async with gateway, httpx.AsyncClient() as client:
            assert gateway.base_url == url
            assert (await client.get(url + "/models")).status_code == 200

    async def test_an_address_that_is_taken_is_an_error(self, gateway: Gateway) -> None:
        second = Gateway(port=gateway.port)
        with pytest.raises(OSError, match="address"):
            await second.start()
        await second.stop()

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
    async def test_the_process_prints_its_address_and_stops_on_a_signal(self, number: signal.Signals) -> None:
        """Also the test on uvloop, which the process uses where it is installed."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "deltawire.gateway", "--port", "0", "--rate", "0"),
            env={**os.environ, "DELTAWIRE_GATEWAY_API_KEY": "sk-env"},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            assert process.stdout is not None
            line = (await asyncio.wait_for(process.stdout.readline(), DEADLINE_S)).decode()
            url = line.split()[-1]
            headers = {"Authorization": "Bearer sk-env"}
            async with httpx.AsyncClient(base_url=url, headers=headers, timeout=DEADLINE_S) as client:
                assert (await client.get("/models", headers={"Authorization": ""})).status_code == 401
                for split in ("byte", "utf8", "coalesce"):
                    response = await post(client, body(script={"split": split}))
                    assert content_of(response.text) == HAIKU
                with pytest.raises(httpx.TransportError):
                    await post(client, body(script={"fault": "reset", "after": 2}))
                stalled = body(script={"fault": "stall", "after": 1})
                async with client.stream("POST", "/chat/completions", json=stalled) as response:
                    chunks = response.aiter_raw()
                    await anext(chunks)
                    process.send_signal(number)
                    with contextlib.suppress(httpx.TransportError):
                        async for _ in chunks:
                            pass
            _, errors = await asyncio.wait_for(process.communicate(), DEADLINE_S)
            assert (process.returncode, errors) == (0, b"")
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()


class TestLoad:
    COUNT = 1000

    @pytest.fixture(autouse=True)
    def allow_files(self) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = 2 * self.COUNT + 500
        if soft < wanted:
            if hard != resource.RLIM_INFINITY and hard < wanted:
                pytest.skip("too few file descriptors are allowed")
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))

    async def test_a_thousand_streams_at_once_lose_nothing(self, gateway: Gateway) -> None:
        async def read_stream() -> None:
            async with connect(gateway) as raw:
                raw.writer.write(raw_request(body(script={"rate": 20, "deltas": 20})))
                await raw.read_until(b"\r\n\r\n")
                assert len(await raw.read_chunks()) == 23

        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            for _ in range(self.COUNT):
                group.create_task(read_stream())
        assert sum(record.sent_deltas for record in gateway.records) == 20 * self.COUNT
        assert all(record.finished_at for record in gateway.records)

    async def test_a_thousand_stalled_streams_are_open_at_once_and_all_closes_are_seen(
        self, gateway: Gateway
    ) -> None:
        request = raw_request(body(script={"fault": "stall", "after": 1}))
        sockets = []
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(100):
                for _ in range(self.COUNT):
                    sockets.append(raw := socket.socket())
                    raw.setblocking(False)
                    await loop.sock_connect(raw, ("127.0.0.1", gateway.port))
                    await loop.sock_sendall(raw, request)
                await until(lambda: sum(record.sent_deltas for record in gateway.records) == self.COUNT)
            assert max(record.concurrent for record in gateway.records) == self.COUNT
        finally:
            for raw in sockets:
                raw.close()
        await until(lambda: all(record.closed_by == "client" for record in gateway.records))
