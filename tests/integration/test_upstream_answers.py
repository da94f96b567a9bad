"""Whatever a gateway answers, byte for byte over a socket, the job ends as PROTOCOL §2.3 says."""

import asyncio
import gzip
import json
import zlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any, Final

import httpx
import pytest

from deltawire_worker import upstream as upstream_module
from deltawire_worker.upstreams import Upstream
from tests.integration.test_generate import Bench, content, open_bench, request, text_of, types
from tests.support.sample_events import text_chunk

NUMBERS: Final = count()
KEY: Final = "sk-live-0123456789abcdef"
PAGE: Final = f"<html><body>internal-host-17 {KEY}</body></html>".encode()
STOP: Final = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
USAGE: Final = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
COMPLETION: Final[dict[str, Any]] = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1_750_000_000,
    "model": "gpt-5.4",
    "choices": [
        {
            "index": 0,
            "message": {
                "role": "assistant",
                "content": "Whole",
                "refusal": None,
                "tool_calls": [
                    {"id": f"call_{n}", "type": "function", "function": {"name": "f", "arguments": "{}"}}
                    for n in range(2)
                ],
            },
            "logprobs": None,
            "finish_reason": "tool_calls",
        },
        {
            "index": 1,
            "message": {"role": "assistant", "content": "Other"},
            "logprobs": None,
            "finish_reason": "stop",
        },
    ],
    "usage": USAGE,
    "vendor": {"kept": True},
}


def data(*chunks: Any, end: bytes = b"data: [DONE]\n\n") -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks) + end


def answer(
    body: bytes, content_type: str = "text/event-stream", *, status: str = "200 OK", headers: str = ""
) -> bytes:
    kind = f"Content-Type: {content_type}\r\n" if content_type else ""
    return f"HTTP/1.1 {status}\r\n{kind}{headers}Connection: close\r\n\r\n".encode() + body


def whole(value: Any, content_type: str = "application/json", **kwargs: str) -> bytes:
    return answer(value if isinstance(value, bytes) else json.dumps(value).encode(), content_type, **kwargs)


class Scripted:
    """A gateway that answers each connection with the next of its answers, the last one again and again.

    None: it accepts, reads and never says anything. What ends in HOLD stays open.
    """

    def __init__(self, *answers: bytes | None) -> None:
        self._answers = list(answers)
        self.requests: list[bytes] = []
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
            length = next((line for line in head.lower().split(b"\r\n") if b"content-length" in line), b":0")
            self.requests.append(head + await reader.readexactly(int(length.partition(b":")[2])))
            said = self._answers.pop(0) if len(self._answers) > 1 else self._answers[0]
            if said is not None:
                for piece in said.removesuffix(HOLD).split(CUT):
                    writer.write(piece)
                    await writer.drain()
                    await asyncio.sleep(0)
            if said is None or said.endswith(HOLD):
                await reader.read()  # until the client goes
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


HOLD: Final = b"<hold>"
CUT: Final = b"<cut>"


@asynccontextmanager
async def asking(
    redis_url: str, *answers: bytes | None, **settings: Any
) -> AsyncIterator[tuple[Bench, Scripted]]:
    """A worker and such a gateway, with further settings of the upstream."""
    scripted = Scripted(*answers)
    server = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    upstream = Upstream(name="default", base_url=scripted.url, api_key=KEY, **settings)
    async with server, open_bench(redis_url, upstreams=[upstream]) as bench:
        yield bench, scripted


async def ends(
    redis_url: str, *answers: bytes | None, options: dict[str, Any] | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """The events of a new job with this answer."""
    job_id = f"job-{next(NUMBERS)}"
    async with asking(redis_url, *answers, **settings) as (bench, _):
        await bench.run(job_id, request(), {"max_retries": 0, **(options or {})})
        events = await bench.ended(job_id)
    assert KEY not in json.dumps(events)
    assert "internal-host" not in json.dumps(events)
    return events


GOOD: Final = data(text_chunk("Good"), STOP)


@pytest.mark.parametrize(
    "said",
    {
        "no content type": answer(GOOD, ""),
        "misspelt": answer(GOOD, "text/eventstream"),
        "text": answer(GOOD, "text/plain; charset=utf-8"),
        "json": answer(GOOD, "application/json"),
        "upper case": answer(GOOD, "TEXT/EVENT-STREAM; charset=UTF-8"),
        "a BOM": answer(b"\xef\xbb\xbf" + GOOD, ""),
        "blank lines first": answer(b"\r\n\r\n" + GOOD, ""),
        "a comment first": answer(b": OPENROUTER PROCESSING\n\n" + GOOD, ""),
        "an event first": answer(b"event: message\n" + GOOD, ""),
        "an id first": answer(b"id: 1\nretry: 5\n" + GOOD, ""),
        "an unknown field first": answer(b"vendor: 1\n\n" + GOOD),
        "cut in the first field": answer(b"da" + CUT + b"ta: {}\n\n" + GOOD, ""),
        "cut in the BOM": answer(b"\xef" + CUT + b"\xbb\xbf" + GOOD, ""),
        "created": answer(GOOD, status="201 Created"),
        "gzip": answer(gzip.compress(GOOD), headers="Content-Encoding: gzip\r\n"),
        "deflate": answer(zlib.compress(GOOD), headers="Content-Encoding: deflate\r\n"),
        "100 Continue": b"HTTP/1.1 100 Continue\r\n\r\n" + answer(GOOD),
        "103 Early Hints": b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + answer(GOOD),
        "white space around [DONE]": answer(data(text_chunk("Good"), STOP, end=b"data:  [DONE] \t\r\n\r\n")),
        "no [DONE]": answer(data(text_chunk("Good"), STOP, end=b"")),
        "more after [DONE]": answer(GOOD + data(text_chunk("more"))),
    }.items(),
    ids=lambda case: case[0],
)
async def test_a_stream_is_a_stream_by_its_bytes(redis_url: str, said: tuple[str, bytes]) -> None:
    """Whatever the headers call it."""
    events = await ends(redis_url, said[1])
    assert types(events)[-1] == "completed"
    assert content(events[-1]) == "Good"


async def test_an_answer_in_one_piece_is_one_delta(redis_url: str) -> None:
    """A gateway that does not stream: its completion is the job's, and the delta is a chunk."""
    for said in (whole(COMPLETION), whole(COMPLETION, "text/event-stream"), whole(COMPLETION, "")):
        events = await ends(redis_url, said)
        assert types(events) == ["queued", "in_progress", "delta", "completed"]
        assert events[-1]["completion"] == COMPLETION
        assert (events[-1]["usage"], events[-1]["usage_source"]) == (USAGE, "provider")
        chunk = events[2]["chunk"]
        assert chunk["object"] == "chat.completion.chunk"
        assert [call["index"] for call in chunk["choices"][0]["delta"]["tool_calls"]] == [0, 1]


async def test_an_answer_in_one_piece_may_stop_short_too(redis_url: str) -> None:
    """By its finish_reason."""
    choice = {"index": 0, "message": {"role": "assistant", "content": "Ha"}, "finish_reason": "length"}
    events = await ends(redis_url, whole({**COMPLETION, "choices": [choice]}))
    assert events[-1]["incomplete_details"] == {"reason": "length"}


REFUSED: Final[dict[str, tuple[bytes | None, str, int | None]]] = {
    "HTML": (answer(PAGE, "text/html"), "upstream_not_streaming", 200),
    "HTML as a stream": (answer(PAGE), "upstream_not_streaming", 200),
    "text": (answer(b"internal-host-17", "text/plain"), "upstream_not_streaming", 200),
    "JSON that is no answer": (whole({"internal-host": KEY}), "upstream_not_streaming", 200),
    "JSON without choices": (whole({**COMPLETION, "choices": []}), "upstream_not_streaming", 200),
    "half of JSON": (whole(b'{"choices": ['), "upstream_not_streaming", 200),
    "an array": (whole([1, KEY]), "upstream_not_streaming", 200),
    "endless white space": (whole(b" " * 400_000), "upstream_event_too_large", None),
    "endless JSON": (whole(b'{"a":"' + b"x" * 400_000), "upstream_event_too_large", None),
    "nothing": (answer(b""), "upstream_eof", None),
    "204": (b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n", "upstream_eof", None),
    "[DONE] alone": (answer(b"data: [DONE]\n\n"), "upstream_eof", None),
    "a comment alone": (answer(b": hello\n\n"), "upstream_eof", None),
    "a redirect": (
        answer(PAGE, status="302 Found", headers=f"Location: http://internal-host/?{KEY}\r\n"),
        "upstream_not_streaming",
        302,
    ),
    "another protocol": (
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\nConnection: upgrade\r\n\r\n",
        "upstream_not_streaming",
        101,
    ),
    "no HTTP": (b"SSH-2.0-OpenSSH_9.9\r\n", "upstream_unreachable", None),
    "a close without a word": (b"", "upstream_unreachable", None),
    "broken gzip": (answer(b"\x00" * 99, headers="Content-Encoding: gzip\r\n"), "upstream_eof", None),
    "an error": (
        whole({"error": {"message": PAGE.decode(), "type": "server_error"}}),
        "upstream_error_event",
        None,
    ),
    "an error with a status": (whole({"error": {"code": 429}}), "upstream_rate_limit", 429),
    "an error with digits": (whole({"error": {"code": "401"}}), "upstream_authentication", 401),
    "an error as an event": (answer(data({"error": {"code": 503}})), "upstream_server_error", 503),
    "an error text": (answer(data({"error": "internal-host-17"})), "upstream_error_event", None),
    "an event of type error": (
        answer(b"event: error\ndata: internal-host-17\n\n"),
        "upstream_error_event",
        None,
    ),
    "a field error": (
        answer(b'error: {"code":400,"message":"Too long."}\n\n'),
        "upstream_invalid_request",
        400,
    ),
    "no JSON": (answer(b"data: internal-host-17\n\n"), "upstream_malformed", None),
    "413": (whole({}, status="413 Too Large"), "upstream_invalid_request", 413),
    "500 without a body": (answer(b"", status="500 X"), "upstream_server_error", 500),
    "a long error page": (answer(PAGE * 9_999, "text/html", status="503 X"), "upstream_server_error", 503),
}


@pytest.mark.parametrize(("said", "code", "status"), REFUSED.values(), ids=REFUSED.keys())
async def test_what_is_no_answer_is_a_failure_that_tells_nothing_of_it(
    redis_url: str, said: bytes | None, code: str, status: int | None
) -> None:
    """Nothing of a page, a header or a text: a code, and the status where there is one."""
    [*_, last] = await ends(redis_url, said)
    assert (last["type"], last["source"], last["error"]["code"]) == ("failed", "upstream", code)
    assert last["status_code"] == status
    assert last["completion"] is None


async def test_an_error_page_that_does_not_end_is_left(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its status has said it, and what came of the page."""
    monkeypatch.setattr("deltawire_worker.upstream.PAGE_TIMEOUT_S", 0.3)
    page = b'{"error":{"code":"too_long","message":"Too long."}}' + HOLD
    [*_, last] = await ends(redis_url, answer(page, status="400 Bad"), options={"first_delta_timeout_s": 60})
    assert (last["error"]["code"], last["status_code"]) == ("upstream_invalid_request", 400)
    assert last["upstream_error"]["code"] == "too_long"


async def test_a_coding_that_was_not_asked_for_fills_no_memory() -> None:
    """A few bytes may stand for gigabytes; one coding within another is taken for what it is."""
    comments = b": nothing\n" * 3_200_000
    for body, kind in ((gzip.compress(comments), "gzip"), (zlib.compress(comments), "deflate")):
        response = httpx.Response(200, headers={"Content-Encoding": kind}, stream=Raw(body))
        pieces = [piece async for piece in upstream_module._body(response)]
        assert max(map(len, pieces)) <= upstream_module.INFLATED_BYTES
        assert b"".join(pieces) == comments
    twice = gzip.compress(gzip.compress(comments))
    response = httpx.Response(200, headers={"Content-Encoding": "gzip, gzip"}, stream=Raw(twice))
    assert [piece async for piece in upstream_module._body(response)] == [twice]


class Raw(httpx.AsyncByteStream):
    def __init__(self, body: bytes) -> None:
        self._body = body

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._body


async def test_a_cookie_is_not_taken(redis_url: str) -> None:
    """It would go with the requests of everybody else."""
    said = answer(GOOD, headers="Set-Cookie: session=1; Path=/\r\n")
    async with asking(redis_url, said) as (bench, scripted):
        for job_id in ("one", "two"):
            await bench.run(job_id, request())
    assert len(scripted.requests) == 2
    assert not any(b"\r\ncookie:" in sent.lower() for sent in scripted.requests)


IN_STREAM: Final = {
    "OpenAI's": b'data: {"error":{"message":"internal-host-17","code":"overloaded"}}\n\n',
    "an event of type error": b'event: error\ndata: {"code":"overloaded","message":"internal-host-17"}\n\n',
    "the error itself": b'data: {"object":"error","code":"overloaded"}\n\n',
    "OpenRouter's": b'data: {"error":{"code":"overloaded"},"choices":[{"index":0,"delta":{"content":""},'
    b'"finish_reason":"error"}]}\n\n',
    "in the choice": b'data: {"choices":[{"index":0,"delta":{"content":""},"finish_reason":"error",'
    b'"error":{"code":"overloaded","message":"internal-host-17"}}]}\n\ndata: [DONE]\n\n',
}


@pytest.mark.parametrize("event", IN_STREAM.values(), ids=IN_STREAM.keys())
async def test_an_error_after_deltas_ends_the_job_with_what_it_had(redis_url: str, event: bytes) -> None:
    """In all shapes that are known; it is never tried again."""
    async with asking(redis_url, answer(data(text_chunk("Ha"), end=event))) as (bench, scripted):
        await bench.run("job", request())
        [*_, last] = events = await bench.ended("job")
    assert "internal-host" not in json.dumps(events)
    assert (last["type"], last["error"]["code"]) == ("failed", "upstream_error_event")
    assert last["upstream_error"]["code"] == "overloaded"
    assert content(last) == text_of(events) == "Ha"
    assert len(scripted.requests) == 1


# -- gateways that do not end


async def test_a_gateway_that_never_answers_is_given_up(redis_url: str) -> None:
    """It accepts, and its headers never come."""
    [*_, last] = await ends(redis_url, None, options={"first_delta_timeout_s": 0.3})
    assert (last["error"]["code"], last["error"]["retryable"]) == ("first_delta_timeout", True)


async def test_a_gateway_that_sends_headers_and_nothing_more_is_given_up(redis_url: str) -> None:
    """Whether or not it says that it streams."""
    for kind in ("text/event-stream", "application/json"):
        [*_, last] = await ends(redis_url, answer(HOLD, kind), options={"first_delta_timeout_s": 0.3})
        assert last["error"]["code"] == "first_delta_timeout"


async def test_a_gateway_that_stays_when_all_is_said_is_left(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the finish_reason and usage all is said; no [DONE] comes and nobody closes."""
    monkeypatch.setattr("deltawire_worker.run.LINGER_S", 0.2)
    said = data(text_chunk("Ha"), STOP, {"choices": [], "usage": USAGE}, end=HOLD)
    [*_, last] = await ends(redis_url, answer(said), options={"idle_timeout_s": 60})
    assert (last["type"], last["usage"]) == ("completed", USAGE)
    assert last["timings"]["total_s"] < 30


async def test_a_choice_that_comes_late_is_waited_for(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All that has come has ended, and has its usage; but two choices were asked for."""
    monkeypatch.setattr("deltawire_worker.run.LINGER_S", 0.05)
    said = data(text_chunk("Ha"), {**STOP, "usage": USAGE}, end=HOLD)
    async with asking(redis_url, answer(said)) as (bench, _):
        job_id = f"job-{next(NUMBERS)}"
        await bench.run(job_id, {**request(), "n": 2}, {"idle_timeout_s": 0.6})
        [*_, last] = await bench.ended(job_id)
    assert last["timings"]["total_s"] - last["timings"]["first_delta_s"] > 0.5


async def test_a_gateway_that_falls_silent_after_its_finish_reason_has_completed(redis_url: str) -> None:
    """Its usage never came; the idle deadline is the end of the stream."""
    said = data(text_chunk("Ha"), STOP, end=HOLD)
    [*_, last] = await ends(redis_url, answer(said), options={"idle_timeout_s": 0.3})
    assert (last["type"], content(last)) == ("completed", "Ha")


async def test_usage_in_every_chunk_ends_nothing_early(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Some gateways count as they go; what is missing is the finish_reason."""
    monkeypatch.setattr("deltawire_worker.run.LINGER_S", 0.1)
    said = data({**text_chunk("Ha"), "usage": USAGE}, end=HOLD)
    [*_, last] = await ends(redis_url, answer(said), options={"idle_timeout_s": 0.6})
    assert last["incomplete_details"] == {"reason": "idle_timeout"}


async def test_a_choice_that_has_not_begun_is_waited_for(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A gateway that counts as it goes, and answers one choice after the other, has not said all."""
    monkeypatch.setattr("deltawire_worker.run.LINGER_S", 0.1)
    first = data({**text_chunk("One"), "usage": USAGE}, {**STOP, "usage": USAGE}, end=HOLD)
    async with asking(redis_url, answer(first)) as (bench, _):
        await bench.run("job", request() | {"n": 2}, {"idle_timeout_s": 0.8, "max_retries": 0})
        last = (await bench.ended("job"))[-1]
    assert last["timings"]["total_s"] >= 0.7  # not LINGER_S


async def test_a_gateway_that_does_not_take_the_request_is_given_up(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write time-out: it accepts, and reads nothing of a long prompt."""
    monkeypatch.setattr("deltawire_worker.upstream.WRITE_TIMEOUT_S", 0.3)

    async def deaf(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        reader._transport.pause_reading()  # type: ignore[attr-defined] # asyncio's own
        await gone.wait()
        writer.transport.abort()

    gone = asyncio.Event()
    server = await asyncio.start_server(deaf, "127.0.0.1", 0)
    url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    async with server, open_bench(redis_url, upstream_url=url) as bench:
        await bench.run("job", request("x" * 20_000_000), {"max_retries": 0})
        [*_, last] = await bench.ended("job")
        gone.set()
    assert (last["error"]["code"], last["status_code"]) == ("upstream_unreachable", None)


# -- switches


async def test_done_without_a_finish_reason_is_the_end_where_the_upstream_is_known_for_it(
    redis_url: str,
) -> None:
    """`done_completes`: the chunk that it left out is in the log, so that all folds agree."""
    said = answer(data(text_chunk("Ha"), text_chunk(" ha", index=1)))
    events = await ends(redis_url, said, done_completes=True)
    last = events[-1]
    assert last["type"] == "completed"
    assert [choice["finish_reason"] for choice in last["completion"]["choices"]] == ["stop", "stop"]
    assert [c["finish_reason"] for c in events[-2]["chunk"]["choices"]] == ["stop", "stop"]
    [*_, last] = await ends(redis_url, said)
    assert last["incomplete_details"] == {"reason": "upstream_eof"}
    [*_, last] = await ends(redis_url, answer(data(text_chunk("Ha"), end=b"")), done_completes=True)
    assert last["incomplete_details"] == {"reason": "upstream_eof"}


async def test_an_upstream_is_asked_as_it_is_configured(redis_url: str) -> None:
    """Key, headers, query, model; without what it refuses."""
    async with asking(
        redis_url,
        answer(GOOD),
        auth_header="api-key",
        headers={"X-Team": "chat-team"},
        query={"api-version": "2024-10-21"},
        aliases={"fast": "gpt-5.4-mini"},
        stream_options=False,
        omit=["metadata"],
    ) as (bench, scripted):
        body = request(fields={"model": "fast", "metadata": {"a": "b"}, "deltawire": {"x": 1}})
        await bench.run("job", body)
        events = await bench.ended("job")
    head, _, sent = scripted.requests[0].partition(b"\r\n\r\n")
    assert head.startswith(b"POST /chat/completions?api-version=2024-10-21 HTTP/1.1\r\n")
    lines = {line.lower() for line in head.split(b"\r\n")}
    assert {b"api-key: " + KEY.encode(), b"x-team: chat-team"} <= lines
    assert not any(line.startswith(b"authorization:") for line in lines)
    asked = json.loads(sent)
    assert asked == {"model": "gpt-5.4-mini", "messages": body["messages"], "stream": True}
    assert (events[1]["upstream"], events[1]["model"]) == ("default", "fast")
