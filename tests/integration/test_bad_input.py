# ruff: noqa: E501 - a row of the table is a line
"""Every kind of bad input at the HTTP and WebSocket doors, and its answer (PROTOCOL §8 in rows)."""

import asyncio
import base64
import contextlib
import functools
import gzip
import json
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from string import Template
from typing import Any, Literal, NamedTuple

import httpx
import pytest
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed

from deltawire.errors import ERRORS
from deltawire.redis_server import RedisServer
from deltawire.tokens import new_claims, sign
from deltawire_relay import http_protocol
from tests.support.producer import REQUEST
from tests.support.readers import WAIT_S, WebSocketReader, http_client, websocket
from tests.support.relay_process import Keyring, RelayProcess, relay_in_process


class Case(NamedTuple):
    """One row. `answer` is the HTTP status, the close code, or "open": an error, and the socket goes on."""

    door: Literal[
        "POST /v1/jobs",
        "GET /v1/jobs",
        "OpenAI API",
        "Responses",
        "HTTP",
        "job paths",
        "event stream",
        "tokens",
        "WebSocket",
    ]
    input: str
    answer: int | Literal["open"]
    code: str | None
    retryable: bool | None
    send: dict[str, Any]


JOB = {"request": REQUEST}
CLOSE_S = 8.0  # below the time that there is to authenticate in
NESTED = '{"x":' * 10_000
CHAT_PATH = "/v1/chat/completions"
RESPONSES = "/v1/responses"
RESPONSE = {"model": "m", "input": "hi", "background": True}
LARGE = {"request": {**REQUEST, "padding": "x" * 10_485_760}}


def http(
    door: Any,
    input_: str,
    status: int,
    code: str,
    *,
    path: str = "/v1/jobs",
    method: str = "POST",
    body: Any = None,
    raw: bytes | None = None,
    headers: dict[str, str] | None = None,
    key: str | None = "all",
) -> Case:
    content = raw if raw is not None else json.dumps(body).encode() if body is not None else b""
    send = {"method": method, "path": path, "content": content, "headers": headers or {}, "key": key}
    return Case(door, input_, status, code, ERRORS[code].retryable, send)


def raw(input_: str, status: int, code: str, data: bytes) -> Case:
    """What no HTTP client sends: bytes, and then nothing."""
    return Case("HTTP", input_, status, code, ERRORS[code].retryable, {"bytes": data, "key": "open"})


def websocket_case(
    input_: str,
    answer: int | Literal["open"],
    code: str | None,
    *messages: Any,
    path: str = "/v1/ws",
    key: str | None = "all",
    **send: Any,
) -> Case:
    retryable = ERRORS[code].retryable if code else None
    send = {"messages": messages, "path": path, "key": key, **send}
    return Case("WebSocket", input_, answer, code, retryable, send)


def subscribe(**fields: Any) -> dict[str, Any]:
    return {"type": "subscribe", "job_id": "nobody", **fields}


CREATE: Any = "POST /v1/jobs"
CHAT: Any = "OpenAI API"
RESP: Any = "Responses"
ANY: Any = "HTTP"
PATHS: Any = "job paths"
LIST: Any = "GET /v1/jobs"
STREAM: Any = "event stream"
TOKENS: Any = "tokens"
PAGE = {"Origin": "https://app.example"}
SECRET = "0123456789abcdef0123456789abcdef"

CASES: list[Case] = [
    # What is asked for.
    http(CREATE, "no body", 415, "unsupported_media_type"),
    http(CREATE, "an empty body sent as JSON", 400, "invalid_json", raw=b"", headers={"Content-Type": "application/json"}),
    http(CREATE, "a form", 415, "unsupported_media_type", raw=b"a=b", headers={"Content-Type": "application/x-www-form-urlencoded"}),
    http(CREATE, "a compressed body", 415, "unsupported_media_type", raw=gzip.compress(b"{}"), headers={"Content-Type": "application/json", "Content-Encoding": "gzip"}),
    http(CREATE, "JSON sent as text/plain", 415, "unsupported_media_type", body=JOB, headers={"Content-Type": "text/plain"}),
    http(CREATE, "a body that is not JSON", 400, "invalid_json", raw=b"{"),
    http(CREATE, "a body that is not UTF-8", 400, "invalid_json", raw=b'{"request":"\xff"}'),
    http(CREATE, "JSON nested ten thousand deep", 400, "invalid_json", raw=b"[" * 10_000),
    http(CREATE, "NaN in the body", 400, "invalid_json", raw=b'{"request":NaN}'),
    http(CREATE, "a body that is no object", 400, "invalid_request", body=[JOB]),
    http(CREATE, "a body above 10 MiB", 413, "request_too_large", body=LARGE),
    http(CREATE, "a field besides request and options", 400, "invalid_request", body={**JOB, "priority": 3}),
    http(CREATE, "no request", 400, "invalid_request", body={}),
    http(CREATE, "a request that is no object", 400, "invalid_request", body={"request": "hi"}),
    http(CREATE, "a request without a model", 400, "invalid_request", body={"request": {"messages": [{}]}}),
    http(CREATE, "an empty model", 400, "invalid_request", body={"request": {**REQUEST, "model": ""}}),
    http(CREATE, "a request without messages", 400, "invalid_request", body={"request": {"model": "m"}}),
    http(CREATE, "no message in messages", 400, "invalid_request", body={"request": {"model": "m", "messages": []}}),
    http(CREATE, "options that are no object", 400, "invalid_request", body={**JOB, "options": []}),
    http(CREATE, "an option that does not exist", 400, "unknown_option", body={**JOB, "options": {"speed": 1}}),
    http(CREATE, "a priority above 9", 400, "invalid_request", body={**JOB, "options": {"priority": 10}}),
    http(LIST, "a limit above 100", 400, "invalid_request", path="/v1/jobs?limit=101", method="GET"),
    http(LIST, "a status that does not exist", 400, "invalid_request", path="/v1/jobs?status=done", method="GET"),
    http(LIST, "an order that does not exist", 400, "invalid_request", path="/v1/jobs?order=up", method="GET"),
    http(LIST, "after a job that is not in the list", 400, "invalid_request", path="/v1/jobs?after=nobody", method="GET"),
    http(LIST, "a key without the list scope", 403, "forbidden", path="/v1/jobs", method="GET", key="submitter"),
    http(PATHS, "DELETE of a job that does not exist", 404, "unknown_job", path="/v1/jobs/nobody", method="DELETE"),
    http(PATHS, "DELETE without the cancel scope", 403, "forbidden", path="/v1/jobs/nobody", method="DELETE", key="reader"),
    http(CREATE, "the option tenant", 400, "unknown_option", body={**JOB, "options": {"tenant": "other"}}),
    http(CREATE, "an option of the wrong type", 400, "invalid_request", body={**JOB, "options": {"timeout_s": "1"}}),
    http(CREATE, "a duration of 0", 400, "invalid_request", body={**JOB, "options": {"timeout_s": 0}}),
    http(CREATE, "a duration above a day", 400, "invalid_request", body={**JOB, "options": {"retention_s": 86_401}}),
    http(CREATE, "max_attempts of 0", 400, "invalid_request", body={**JOB, "options": {"max_attempts": 0}}),
    http(CREATE, "an empty Idempotency-Key", 400, "invalid_request", body=JOB, headers={"Idempotency-Key": ""}),
    http(CREATE, "an Idempotency-Key above 255 characters", 400, "invalid_request", body=JOB, headers={"Idempotency-Key": "k" * 256}),
    # Jobs and paths.
    http(PATHS, "a job that does not exist", 404, "unknown_job", method="GET", path="/v1/jobs/nobody"),
    http(PATHS, "a job id with other characters", 400, "invalid_job_id", method="GET", path="/v1/jobs/a.b"),
    http(PATHS, "a job id above 128 characters", 400, "invalid_job_id", method="GET", path=f"/v1/jobs/{'a' * 129}"),
    http(PATHS, "a job id with braces", 400, "invalid_job_id", path="/v1/jobs/%7Ba%7D/cancel"),
    http(PATHS, "a reason that is no text", 400, "invalid_request", path="/v1/jobs/nobody/cancel", body={"reason": 1}),
    http(PATHS, "a reason above 255 characters", 400, "invalid_request", path="/v1/jobs/nobody/cancel", body={"reason": "x" * 256}),
    http(PATHS, "a cancel body that is not JSON", 400, "invalid_json", path="/v1/jobs/nobody/cancel", raw=b"stop"),
    http(STREAM, "a job id with other characters", 400, "invalid_job_id", method="GET", path="/v1/jobs/a.b/events"),
    http(STREAM, "starting_after that is no number", 400, "invalid_request", method="GET", path="/v1/jobs/a/events?starting_after=x"),
    http(STREAM, "starting_after below 0", 400, "invalid_request", method="GET", path="/v1/jobs/a/events?starting_after=-1"),
    http(STREAM, "Last-Event-ID that is no number", 400, "invalid_request", method="GET", path="/v1/jobs/a/events", headers={"Last-Event-ID": "x"}),
    http(STREAM, "a mode that does not exist", 400, "invalid_request", method="GET", path="/v1/jobs/a/events?mode=fast"),
    http(STREAM, "merge that is neither true nor false", 400, "invalid_request", method="GET", path="/v1/jobs/a/events?merge=perhaps"),
    http(CHAT, "no body", 415, "unsupported_media_type", path=CHAT_PATH),
    http(CHAT, "JSON sent as text/plain", 415, "unsupported_media_type", path=CHAT_PATH, body=REQUEST, headers={"Content-Type": "text/plain"}),
    http(CHAT, "a body that is not JSON", 400, "invalid_json", path=CHAT_PATH, raw=b"{"),
    http(CHAT, "a body that is no object", 400, "invalid_request", path=CHAT_PATH, body=[REQUEST]),
    http(CHAT, "a body above 10 MiB", 413, "request_too_large", path=CHAT_PATH, body=LARGE["request"]),
    http(CHAT, "no model", 400, "invalid_request", path=CHAT_PATH, body={"messages": [{}]}),
    http(CHAT, "no messages", 400, "invalid_request", path=CHAT_PATH, body={"model": "m"}),
    http(CHAT, "a stream that is neither true, false nor null", 400, "invalid_request", path=CHAT_PATH, body={**REQUEST, "stream": "yes"}),
    http(CHAT, "stream_options that are no object", 400, "invalid_request", path=CHAT_PATH, body={**REQUEST, "stream_options": [1]}),
    http(CHAT, "a deltawire that is no object", 400, "invalid_request", path=CHAT_PATH, body={**REQUEST, "deltawire": "fast"}),
    http(CHAT, "an option that does not exist", 400, "unknown_option", path=CHAT_PATH, body={**REQUEST, "deltawire": {"speed": 1}}),
    http(CHAT, "the option tenant", 400, "unknown_option", path=CHAT_PATH, body={**REQUEST, "deltawire": {"tenant": "other"}}),
    http(CHAT, "the option restart: always", 400, "invalid_request", path=CHAT_PATH, body={**REQUEST, "deltawire": {"restart": "always"}}),
    http(CHAT, "a grace below 0", 400, "invalid_request", path=CHAT_PATH, body={**REQUEST, "deltawire": {"abandon_grace_s": -1}}),
    http(CHAT, "an empty Idempotency-Key", 400, "invalid_request", path=CHAT_PATH, body=REQUEST, headers={"Idempotency-Key": ""}),
    http(CHAT, "a GET of completions", 405, "method_not_allowed", path=CHAT_PATH, method="GET"),
    http(CHAT, "a model that nobody has", 404, "model_not_found", path="/v1/models/none/such", method="GET"),
    http(RESP, "no background", 400, "unsupported_parameter", path=RESPONSES, body=RESPONSE | {"background": False}),
    http(RESP, "a tool that is no function", 400, "unsupported_parameter", path=RESPONSES, body=RESPONSE | {"tools": [{"type": "web_search"}]}),
    http(RESP, "previous_response_id", 400, "unsupported_parameter", path=RESPONSES, body=RESPONSE | {"previous_response_id": "resp_a"}),
    http(RESP, "a field that does not exist", 400, "unsupported_parameter", path=RESPONSES, body=RESPONSE | {"speed": 1}),
    http(RESP, "no model", 400, "invalid_request", path=RESPONSES, body={"input": "hi", "background": True}),
    http(RESP, "no input", 400, "invalid_request", path=RESPONSES, body={"model": "m", "background": True}),
    http(RESP, "an option that does not exist", 400, "unknown_option", path=RESPONSES, body=RESPONSE | {"deltawire": {"speed": 1}}),
    http(RESP, "the option restart: always", 400, "invalid_request", path=RESPONSES, body=RESPONSE | {"deltawire": {"restart": "always"}}),
    http(RESP, "a body that is not JSON", 400, "invalid_json", path=RESPONSES, raw=b"{"),
    http(RESP, "a response that does not exist", 404, "unknown_job", path=f"{RESPONSES}/resp_nobody", method="GET"),
    http(RESP, "an id that is no response's", 404, "unknown_job", path=f"{RESPONSES}/a.b/cancel"),
    http(RESP, "DELETE of a response that does not exist", 404, "unknown_job", path=f"{RESPONSES}/resp_nobody", method="DELETE"),
    http(RESP, "no credential", 401, "missing_credentials", path=RESPONSES, body=RESPONSE, key=None),
    http(RESP, "a key without the submit scope", 403, "forbidden", path=RESPONSES, body=RESPONSE, key="reader"),
    http(RESP, "a key without the read scope", 403, "forbidden", path=f"{RESPONSES}/resp_a", method="GET", key="submitter"),
    http(RESP, "cancel: a key without the cancel scope", 403, "forbidden", path=f"{RESPONSES}/resp_a/cancel", key="reader"),
    http(RESP, "a response that the token is not for", 404, "unknown_job", path=f"{RESPONSES}/resp_b", method="GET", key="ticket"),
    http(ANY, "a path that does not exist", 404, "not_found", method="GET", path="/v2/jobs"),
    http(ANY, "a slash behind a path", 404, "not_found", method="GET", path="/v1/jobs/nobody/"),
    http(ANY, "a WebSocket path without an upgrade", 404, "not_found", method="GET", path="/v1/ws"),
    http(ANY, "a method that the path does not have", 405, "method_not_allowed", method="PUT", path="/v1/jobs/a"),
    raw("bytes that are not HTTP", 400, "invalid_request", b"\x16\x03\x01\x00\r\n\r\n"),
    raw("headers above 64 KiB", 431, "headers_too_large", b"GET / HTTP/1.1\r\nX: " + b"x" * 65_536 + b"\r\n\r\n"),
    raw("headers that take longer than 10 s", 408, "request_timeout", b"GET / HTTP/1.1\r\nX: "),
    raw("a body that takes longer than 30 s", 408, "request_timeout", b"POST /v1/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"),
    # Who asks.
    http(ANY, "no credential", 401, "missing_credentials", body=JOB, key=None),
    http(ANY, "a credential of another scheme", 401, "missing_credentials", body=JOB, key=None, headers={"Authorization": "Basic YTpi"}),
    http(ANY, "an unknown API key", 401, "invalid_credentials", body=JOB, key=None, headers={"Authorization": "Bearer dw_x"}),
    http(CREATE, "a key without the submit scope", 403, "forbidden", body=JOB, key="reader"),
    http(CHAT, "no credential", 401, "missing_credentials", path=CHAT_PATH, body=REQUEST, key=None),
    http(CHAT, "an unknown API key", 401, "invalid_credentials", path=CHAT_PATH, body=REQUEST, key="unknown"),
    http(CHAT, "a key without the submit scope", 403, "forbidden", path=CHAT_PATH, body=REQUEST, key="reader"),
    http(CHAT, "a key without the read scope", 403, "forbidden", path=CHAT_PATH, body=REQUEST, key="submitter"),
    http(CHAT, "models: a key without the read scope", 403, "forbidden", path="/v1/models", method="GET", key="submitter"),
    http(CHAT, "an Origin that is not allowed", 403, "origin_not_allowed", path=CHAT_PATH, body=REQUEST, headers={"Origin": "https://evil.example"}),
    http(PATHS, "a key without the read scope", 403, "forbidden", method="GET", path="/v1/jobs/a", key="submitter"),
    http(PATHS, "a key without the cancel scope", 403, "forbidden", path="/v1/jobs/a/cancel", key="reader"),
    http(STREAM, "a key without the read scope", 403, "forbidden", method="GET", path="/v1/jobs/a/events", key="submitter"),
    http(ANY, "an Origin that is not allowed", 403, "origin_not_allowed", body=JOB, headers={"Origin": "https://evil.example"}),
    http(ANY, "a foreign Host, without keys", 421, "host_not_allowed", body=JOB, key="open", headers={"Host": "evil.example"}),
    http(ANY, "a Host that is none, without keys", 421, "host_not_allowed", body=JOB, key="open", headers={"Host": "["}),
    # Messages on a WebSocket.
    websocket_case("a text frame that is not JSON", 4501, "invalid_json", "{"),
    websocket_case("JSON nested ten thousand deep", 4501, "invalid_json", NESTED),
    websocket_case("a binary frame", 4501, "binary_frame", b"{}"),
    websocket_case("JSON that is no object", 4501, "invalid_json", "[]"),
    websocket_case("a frame above 64 KiB", 1009, None, "x" * 65_537),
    websocket_case("a message above 64 KiB in fragments", 1009, None, ["x" * 1_000] * 66),
    websocket_case("a message of ten thousand fragments", 1009, None, ["x"] * 10_000),
    websocket_case("text that is not UTF-8", 1007, None, raw_text=b"\xff\xfe"),
    websocket_case("a message without a type", "open", "invalid_request", {"job_id": "a"}),
    websocket_case("a type that does not exist", "open", "unknown_message_type", {"type": "sing"}),
    websocket_case("a message without a field it needs", "open", "invalid_request", {"type": "subscribe"}),
    websocket_case("a field of the wrong type", "open", "invalid_request", subscribe(starting_after="1")),
    websocket_case("a mode that does not exist", "open", "invalid_request", subscribe(mode="fast")),
    websocket_case("starting_after below 0", "open", "invalid_request", subscribe(starting_after=-1)),
    websocket_case("merge that is no boolean", "open", "invalid_request", subscribe(merge="true")),
    websocket_case("a job id with other characters", "open", "invalid_job_id", subscribe(job_id="a.b")),
    websocket_case("a job subscribed twice", "open", "already_subscribed", subscribe(), subscribe()),
    websocket_case("unsubscribe without a subscription", "open", "not_subscribed", {"type": "unsubscribe", "job_id": "a"}),
    websocket_case("cancel of a job id with other characters", "open", "invalid_job_id", {"type": "cancel", "job_id": "a.b"}),
    websocket_case("subscribe without the read scope", "open", "forbidden", subscribe(), key="submitter"),
    websocket_case("cancel without the cancel scope", "open", "forbidden", {"type": "cancel", "job_id": "a"}, key="reader"),
    # Connections.
    websocket_case("an unknown API key in the header", 4500, "invalid_credentials", key="unknown"),
    websocket_case("an unknown API key in authenticate", 4500, "invalid_credentials", {"type": "authenticate", "token": "dw_x"}, key=None, headers=PAGE),
    websocket_case("an unknown API key in a later authenticate", 4500, "invalid_credentials", {"type": "authenticate", "token": "dw_x"}),
    websocket_case("another message before authenticate", 4502, "missing_credentials", subscribe(), key=None, headers=PAGE),
    websocket_case("an Origin that is not allowed", 4503, "origin_not_allowed", headers={"Origin": "https://evil.example"}),
    websocket_case("a foreign Host, without keys", 4503, "host_not_allowed", key="open", headers={"Host": "evil.example"}),
    websocket_case("a Host that is none, without keys", 4503, "host_not_allowed", key="open", headers={"Host": "["}),
    websocket_case("two Authorization headers", 4500, "invalid_credentials", key=None, headers=[("Authorization", "Bearer dw_x"), ("Authorization", "Bearer dw_y")]),
    websocket_case("a one-job socket: a job id with other characters", 4501, "invalid_job_id", path="/v1/jobs/a.b/ws"),
    websocket_case("a one-job socket: starting_after that is no number", 4501, "invalid_request", path="/v1/jobs/a/ws?starting_after=x"),
    websocket_case("a one-job socket: starting_after below 0", 4501, "invalid_request", path="/v1/jobs/a/ws?starting_after=-1"),
    websocket_case("a one-job socket: merge that is neither true nor false", 4501, "invalid_request", path="/v1/jobs/a/ws?merge=perhaps"),
    websocket_case("a one-job socket: no read scope", 4503, "forbidden", path="/v1/jobs/a/ws", key="submitter"),
    # Tokens.
    http(ANY, "an expired token", 401, "token_expired", method="GET", path="/v1/jobs/a", key="expired"),
    http(ANY, "a revoked token", 401, "token_revoked", method="GET", path="/v1/jobs/a", key="revoked"),
    http(ANY, "a token for another audience", 401, "invalid_credentials", method="GET", path="/v1/jobs/a", key="audience"),
    http(ANY, "a token that nobody signed", 401, "invalid_credentials", method="GET", path="/v1/jobs/a", key="unsigned"),
    http(ANY, "a token signed by somebody else", 401, "invalid_credentials", method="GET", path="/v1/jobs/a", key="forged"),
    http(ANY, "a token above 8 KiB", 401, "invalid_credentials", method="GET", path="/v1/jobs/a", key="giant"),
    http(ANY, "a ticket where a header is needed", 401, "missing_credentials", method="GET", path="/v1/jobs/a?ticket=$ticket", key=None),
    http(PATHS, "a job that the token is not for", 404, "unknown_job", method="GET", path="/v1/jobs/b", key="ticket"),
    http(PATHS, "a token without the capability cancel", 403, "forbidden", path="/v1/jobs/a/cancel", key="ticket"),
    http(STREAM, "a job that the token is not for", 404, "unknown_job", method="GET", path="/v1/jobs/b/events", key="ticket"),
    http(STREAM, "a ticket for another job", 404, "unknown_job", method="GET", path="/v1/jobs/b/events?ticket=$ticket", key=None),
    http(STREAM, "a ticket that may do more", 401, "invalid_credentials", method="GET", path="/v1/jobs/a/events?ticket=$more", key=None),
    http(STREAM, "two tickets", 401, "invalid_credentials", method="GET", path="/v1/jobs/a/events?ticket=$ticket&ticket=$ticket", key=None),
    http(STREAM, "an API key as a ticket", 401, "invalid_credentials", method="GET", path="/v1/jobs/a/events?ticket=$key", key=None),
    http(STREAM, "a ticket in another site's image", 403, "origin_not_allowed", method="GET", path="/v1/jobs/a/events?ticket=$ticket", key=None, headers={"Sec-Fetch-Site": "cross-site"}),
    http(TOKENS, "a key without the tokens scope", 403, "forbidden", path="/v1/jobs/a/tokens", key="reader"),
    http(TOKENS, "a token in the place of a key", 403, "forbidden", path="/v1/jobs/a/tokens", key="ticket"),
    http(TOKENS, "a capability that does not exist", 400, "invalid_request", path="/v1/jobs/a/tokens", body={"cap": ["list"]}),
    http(TOKENS, "no capability", 400, "invalid_request", path="/v1/jobs/a/tokens", body={"cap": []}),
    http(TOKENS, "a life above a day", 400, "invalid_request", path="/v1/jobs/a/tokens", body={"ttl_s": 86_401}),
    http(TOKENS, "a subject with a line end", 400, "invalid_request", path="/v1/jobs/a/tokens", body={"sub": "a\nb"}),
    http(TOKENS, "a field that does not exist", 400, "invalid_request", path="/v1/jobs/a/tokens", body={"tenant": "other"}),
    http(TOKENS, "a job id with other characters", 400, "invalid_job_id", path="/v1/jobs/a.b/tokens"),
    http(TOKENS, "a relay without a secret", 404, "not_found", path="/v1/jobs/a/tokens", key="open"),
    http(TOKENS, "revoke: nothing is named", 400, "invalid_request", path="/v1/tokens/revoke", body={}),
    http(TOKENS, "revoke: two are named", 400, "invalid_request", path="/v1/tokens/revoke", body={"sub": "u", "token_id": "t"}),
    http(TOKENS, "revoke: what is no token", 400, "invalid_request", path="/v1/tokens/revoke", body={"token": "t"}),
    http(TOKENS, "revoke: a key without the tokens scope", 403, "forbidden", path="/v1/tokens/revoke", body={"sub": "u"}, key="reader"),
    websocket_case("an expired token in the header", 4005, "token_expired", key="expired"),
    websocket_case("a revoked token in the header", 4500, "token_revoked", key="revoked"),
    websocket_case("a token signed by somebody else in the header", 4500, "invalid_credentials", key="forged"),
    websocket_case("no Origin and no Authorization header", 4503, "origin_not_allowed", key=None),
    websocket_case("a later authenticate of another subject", 4503, "forbidden", {"type": "authenticate", "token": "$ticket"}, key="all"),
    websocket_case("subscribe to a job that the token is not for", "open", "unknown_job", subscribe(job_id="b"), key="ticket"),
    websocket_case("a one-job socket: a job that the token is not for", 4507, "unknown_job", path="/v1/jobs/b/ws", key="ticket"),
    websocket_case("a one-job socket: a ticket for another job", 4507, "unknown_job", path="/v1/jobs/b/ws?ticket=$ticket", key=None, headers=PAGE),
    websocket_case("a one-job socket: a ticket that may do more", 4500, "invalid_credentials", path="/v1/jobs/a/ws?ticket=$more", key=None, headers=PAGE),
    websocket_case("a one-job socket: a ticket without an Origin", 4503, "origin_not_allowed", path="/v1/jobs/a/ws?ticket=$ticket", key=None),
]  # fmt: skip


class Relays(NamedTuple):
    keyed: RelayProcess
    open: RelayProcess
    keys: Keyring

    def of(self, key: str | None) -> RelayProcess:
        return self.open if key == "open" else self.keyed

    def headers(self, key: str | None) -> dict[str, str]:
        if key in {None, "open"}:
            return {}
        tokens = {"unknown": "dw_x", **samples()}
        return {"Authorization": f"Bearer {tokens[key]}"} if key in tokens else self.keys.headers(str(key))

    def filled(self, text: str) -> str:
        """With tokens where $names are."""
        return Template(text).safe_substitute(samples(), key=self.keys["all"])


def token(*, secret: str = SECRET, now: float | None = None, **claims: Any) -> str:
    return sign(new_claims(subject="u", jobs=["a"], tenant="acme", ttl_s=600, now=now, **claims), secret)


def unsigned(text: str) -> str:
    head = base64.urlsafe_b64encode(b'{"alg":"none"}').decode().rstrip("=")
    return f"{head}.{text.split('.')[1]}.AAAA"


@functools.cache
def samples() -> dict[str, str]:
    """Made when they are first wanted: they live for ten minutes, and these tests may be run as late as that."""
    return {
        "ticket": token(),
        "more": token(capabilities=["read", "cancel"]),
        "expired": token(now=time.time() - 3_600),
        "revoked": token(),
        "audience": token(audience="other"),
        "unsigned": unsigned(token()),
        "forged": token(secret=SECRET[::-1]),
        "giant": token() + "x" * 8_192,
    }


@pytest.fixture(scope="module")
def relays(redis_server: RedisServer) -> Iterator[Relays]:
    """One relay with keys, and one without."""
    keys = Keyring(
        all=("acme", ["read", "cancel", "submit", "list", "tokens"]),
        reader=("acme", ["read"]),
        submitter=("acme", ["submit"]),
    )
    environment = {
        "DELTAWIRE_API_KEYS": keys.text,
        "DELTAWIRE_JWT_SECRET": SECRET,
        "DELTAWIRE_ALLOWED_ORIGINS": PAGE["Origin"],
    }
    with (
        RelayProcess(redis_server.url, environment) as keyed,
        RelayProcess(redis_server.url) as open_,
    ):
        body = {"token": samples()["revoked"]}
        httpx.post(f"{keyed.url}/v1/tokens/revoke", json=body, headers=keys.headers("all"), trust_env=False)
        yield Relays(keyed, open_, keys)


def rows(kind: Literal["HTTP", "bytes", "WebSocket"]) -> list[Any]:
    return [
        pytest.param(case, id=f"{case.door}: {case.input}")
        for case in CASES
        if kind == ("WebSocket" if case.door == "WebSocket" else "bytes" if "bytes" in case.send else "HTTP")
    ]


def check_error(error: dict[str, Any], case: Case) -> None:
    """The one error shape (PROTOCOL §8), and a message for people."""
    assert set(error) == {"message", "type", "param", "code", "retryable", "retry_after_s"}
    assert (error["code"], error["retryable"]) == (case.code, case.retryable)
    assert 0 < len(error["message"]) < 400


@pytest.mark.parametrize("case", rows("HTTP"))
async def test_http_refuses(case: Case, relays: Relays) -> None:
    """Status, code and shape are those of the row (PROTOCOL §5, §8)."""
    send = case.send
    headers = {**relays.headers(send["key"]), **send["headers"]}
    if send["content"]:
        headers.setdefault("Content-Type", "application/json")
    async with http_client(base_url=relays.of(send["key"]).url) as client:
        response = await client.request(
            send["method"], relays.filled(send["path"]), content=send["content"], headers=headers
        )
    assert response.status_code == case.answer, response.text
    assert response.headers["Content-Type"] == "application/json"
    assert list(response.json()) == ["error"]
    check_error(response.json()["error"], case)


@pytest.mark.parametrize("case", rows("bytes"))
async def test_http_refuses_what_is_slow_or_no_request(
    case: Case, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same shape, and the connection closes (PROTOCOL §5.6); time runs faster here."""
    if case.answer == 408:  # what is refused for another reason comes in time, however slow this machine is
        monkeypatch.setattr(http_protocol, "HEADERS_TIMEOUT_S", 0.2)
        monkeypatch.setattr(http_protocol, "BODY_TIMEOUT_S", 0.4)
    async with relay_in_process(redis_url, monkeypatch) as address:
        host, _, port = address.partition(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        try:
            writer.write(case.send["bytes"])
            async with asyncio.timeout(WAIT_S):
                head, _, body = (await reader.read()).partition(b"\r\n\r\n")
        finally:
            writer.close()
    assert head.startswith(f"HTTP/1.1 {case.answer} ".encode())
    assert b"content-type: application/json" in head
    check_error(json.loads(body)["error"], case)


@asynccontextmanager
async def socket_of(case: Case, relays: Relays) -> AsyncIterator[WebSocketReader]:
    url = relays.of(case.send["key"]).websocket_url + relays.filled(case.send["path"])
    headers = [*relays.headers(case.send["key"]).items()]
    given = case.send.get("headers", [])
    headers += given.items() if isinstance(given, dict) else given
    host = dict(headers).get("Host")
    if host is None:
        async with connect(url, additional_headers=headers, proxy=None, compression=None) as connection:
            yield WebSocketReader(connection)
    else:  # the library writes Host itself, from the URL; the address to connect to is given beside it
        port = relays.of(case.send["key"]).port
        async with websocket(f"ws://host.test{case.send['path']}", host="127.0.0.1", port=port) as reader:
            yield reader


async def closed_by(reader: WebSocketReader) -> tuple[list[dict[str, Any]], int]:
    async with asyncio.timeout(CLOSE_S):
        return await reader.until_closed()


@pytest.mark.parametrize("case", rows("WebSocket"))
async def test_a_websocket_refuses(case: Case, relays: Relays) -> None:
    """An `error` with the row's code; then the row's close code, or a socket that goes on (PROTOCOL §6.5)."""
    if case.input.startswith("a Host") or case.input.startswith("a foreign Host"):
        error, code = await host_refused(case, relays)
        assert code == case.answer
        check_error(error, case)
        return
    async with socket_of(case, relays) as reader:
        for message in case.send["messages"]:
            is_ready = isinstance(message, str | bytes | list)  # a list is sent in fragments
            with contextlib.suppress(ConnectionClosed):
                await reader.connection.send(message if is_ready else relays.filled(json.dumps(message)))
        if raw := case.send.get("raw_text"):
            await reader.connection.send(raw, text=True)
        if case.answer == "open":
            check_error((await reader.receive_type("error"))["error"], case)
            await reader.send("unsubscribe", job_id="not-there", request_id="still here")
            answer = await reader.receive_type("error")
            assert answer["error"]["code"] == "not_subscribed"
            return
        messages, code = await closed_by(reader)
    assert code == case.answer
    if case.code is not None:
        check_error(messages[-1]["error"], case)


async def host_refused(case: Case, relays: Relays) -> tuple[dict[str, Any], int]:
    """A handshake written by hand, with the row's Host, and what the server sends after it."""
    relay = relays.of(case.send["key"])
    reader, writer = await asyncio.open_connection("127.0.0.1", relay.port)
    try:
        host = case.send["headers"]["Host"]
        writer.write(
            f"GET /v1/ws HTTP/1.1\r\nHost: {host}\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            "Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n".encode()
        )
        async with asyncio.timeout(WAIT_S):
            head = await reader.readuntil(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 101 ")
            first = await frame(reader)
            error = json.loads(first)["error"] if first.startswith(b"{") else {}
            closing = await frame(reader) if error else first
    finally:
        writer.close()
    return error, int.from_bytes(closing[:2], "big")


async def frame(reader: asyncio.StreamReader) -> bytes:
    """The payload of a server's frame of less than 64 KiB."""
    size = (await reader.readexactly(2))[1]
    if size == 126:
        size = int.from_bytes(await reader.readexactly(2), "big")
    return await reader.readexactly(size)


def test_no_row_is_there_twice() -> None:
    """Door and input name a row."""
    names = [(case.door, case.input) for case in CASES]
    assert len(set(names)) == len(names)


async def test_nothing_of_it_was_logged_as_a_failure_of_ours(relays: Relays) -> None:
    """What a peer does wrong is no traceback in our log. (Rows that are known to fail are left out.)"""
    with RelayProcess(relays.open._environment["DELTAWIRE_REDIS_URL"]) as relay:
        sent = Relays(relay, relay, relays.keys)
        for case in CASES:
            if case.send["key"] not in {"all", "open"}:
                continue
            if case.door == "WebSocket" and not case.input.startswith("a foreign Host"):
                async with socket_of(case._replace(send={**case.send, "key": None}), sent) as reader:
                    try:
                        for message in case.send["messages"]:
                            is_ready = isinstance(message, str | bytes | list)
                            text = message if is_ready else json.dumps(message)
                            await reader.connection.send(text)
                    except ConnectionClosed:
                        pass
        assert "Traceback" not in relay.log
        assert "rror" not in relay.log


def test_the_table_in_the_protocol_is_this_one() -> None:
    """PROTOCOL §8.2 lists exactly these rows."""
    protocol = (Path(__file__).parents[2] / "PROTOCOL.md").read_text()
    section = protocol.partition("### 8.2 Bad input")[2].partition("### 8.3")[0]
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]
    assert table == [row(case) for case in CASES]


def row(case: Case) -> str:
    """A case as a row of the protocol's table."""
    code = f"`{case.code}`" if case.code else "none"
    retryable = "none" if case.retryable is None else "yes" if case.retryable else "no"
    return f"| {case.door} | {case.input} | {case.answer} | {code} | {retryable} |"
