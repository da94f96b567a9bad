"""What a gateway says when it refuses, as an error that gives nothing away."""

import json
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.events import UpstreamErrorDetails
from deltawire_worker.refusal import (
    MAX_MESSAGE_CHARACTERS,
    UpstreamError,
    error_object,
    refusal,
    said_in_answer,
    said_in_stream,
)

KEY = "sk-live-0123456789abcdef"
SECRETS = f"{KEY} internal-host-17 <b>stack</b>"
TYPE = "invalid_request_error"


def refused(status: int, content: bytes = b"", **headers: str) -> UpstreamError:
    return refusal(status, httpx.Headers(headers), content, secrets=(KEY,), now=1_764_000_000.0)


def openai_error(message: Any, **fields: Any) -> bytes:
    return json.dumps({"error": {"message": message, "type": TYPE, **fields}}).encode()


@pytest.mark.parametrize(
    ("status", "code", "retryable"),
    [
        (400, "upstream_invalid_request", False),
        (401, "upstream_authentication", False),
        (402, "upstream_quota", False),
        (403, "upstream_authentication", False),
        (404, "upstream_not_found", False),
        (408, "upstream_busy", True),
        (409, "upstream_busy", True),
        (413, "upstream_invalid_request", False),
        (422, "upstream_invalid_request", False),
        (425, "upstream_busy", True),
        (429, "upstream_rate_limit", True),
        (500, "upstream_server_error", True),
        (503, "upstream_server_error", True),
        (529, "upstream_server_error", True),
        (302, "upstream_not_streaming", False),
        (101, "upstream_not_streaming", False),
    ],
)
def test_the_status_says_whose_fault_it_was(status: int, code: str, retryable: bool) -> None:
    """And whether trying again can help."""
    error = refused(status)
    assert (error.code, error.status_code, error.error.retryable) == (code, status, retryable)
    assert error.is_refusal


INFINITYBLUE = [
    (400, "invalid_request_error", "upstream_invalid_request"),
    (413, "invalid_request_error", "upstream_invalid_request"),
    (401, "authentication_error", "upstream_authentication"),
    (403, "permission_error", "upstream_authentication"),
    (404, "not_found_error", "upstream_not_found"),
    (429, "rate_limit_error", "upstream_rate_limit"),
    *((status, "server_error", "upstream_server_error") for status in (500, 502, 503, 504)),
]


@pytest.mark.parametrize(("status", "type_", "code"), INFINITYBLUE)
def test_the_errors_of_infinityblue(status: int, type_: str, code: str) -> None:
    """Its documented table: OpenAI's shape; a rate limit says when to come again."""
    body = json.dumps({"error": {"message": "Said.", "type": type_, "param": None, "code": None}}).encode()
    error = refused(status, body, **({"Retry-After": "7"} if status == 429 else {}))
    assert (error.code, error.status_code) == (code, status)
    assert error.details == UpstreamErrorDetails(type_)
    assert error.error.retry_after_s == (7 if status == 429 else None)
    assert ("Said." in error.error.message) == (status in {400, 404, 413})


@pytest.mark.parametrize("status", [400, 404, 409, 413, 422])
def test_the_gateways_message_about_the_request_is_for_the_caller(status: int) -> None:
    """It says what to change; but not of a lock, which only time mends."""
    said = "temperature must be at most 2"
    assert (said in refused(status, openai_error(said)).error.message) == (status != 409)


def test_a_message_is_bounded_and_on_one_line() -> None:
    """However long and wild it was."""
    long = refused(400, openai_error("x" * 5_000))
    assert len(long.error.message) < MAX_MESSAGE_CHARACTERS + 100
    assert refused(400, openai_error("a\nb\x1b[31mc")).error.message.endswith(": a b [31mc")


@pytest.mark.parametrize("status", [401, 403, 429, 500, 502, 503, 302])
@pytest.mark.parametrize(
    "body",
    [
        openai_error(f"Incorrect API key provided: {SECRETS}", code=SECRETS),
        openai_error("", code=KEY, param=KEY),
        f"<html><body>{SECRETS}</body></html>".encode(),
        SECRETS.encode(),
    ],
    ids=["openai", "words", "html", "text"],
)
def test_nothing_of_any_other_error_page_goes_further(status: int, body: bytes) -> None:
    """Nor of its headers."""
    error = refused(
        status,
        body,
        **{"Set-Cookie": SECRETS, "X-Debug": SECRETS, "Location": "http://internal/?k=" + KEY},
    )
    said = f"{error.error!r} {error} {error.args} {error.details}"
    for secret in (*SECRETS.split(), "internal"):
        assert secret not in said


@pytest.mark.parametrize(
    "body",
    [
        f"<html><body>{SECRETS}</body></html>".encode(),
        SECRETS.encode(),
        json.dumps({"error": SECRETS}).encode(),
        json.dumps({"detail": SECRETS}).encode(),
        json.dumps([SECRETS]).encode(),
        openai_error({"nested": SECRETS}),
        openai_error(None),
        b'{"error":{"message":"' + KEY.encode() + b"\xff" + b'"}}',
        b"[" * 100_000,
        b"",
    ],
)
def test_only_an_error_object_is_read(body: bytes) -> None:
    """An HTML page of a proxy is not meant for the caller."""
    assert refused(400, body).error.message == "the gateway refuses the request"


def test_fields_that_a_gateway_does_not_take_are_named() -> None:
    """As Mistral does, in FastAPI's shape; what was sent in them is not repeated."""
    detail = [
        {"type": "extra_forbidden", "loc": ["body", "tools", 0], "msg": "Extra inputs", "input": "private"},
        {"type": "missing", "loc": ["body", "model"], "msg": "Field required"},
        {"msg": 7},
        "x",
    ]
    said = refused(422, json.dumps({"detail": detail}).encode()).error.message
    assert said.endswith(": body.tools.0: Extra inputs; body.model: Field required")


@pytest.mark.parametrize(
    "text",
    [
        f"Invalid API key: {KEY}",
        "Incorrect API key provided: sk-proj-********************wxyz. Find it at",
        "Bearer abc.def-ghi was refused",
        "Authorization: Bearer abc.def-ghi was refused",
        "use https://admin:hunter2@internal.example/v1",
        "api_key=AbCdEf012345 is not valid",
        "the token eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxIn0.c2lnbmF0dXJl has expired",
    ],
)
def test_a_400_that_repeats_a_key_does_not_give_it_away(text: str) -> None:
    """Not every gateway answers 401 to a bad key (Gemini and old LiteLLM: 400), and logs are public."""
    said = refused(400, openai_error(text)).error.message
    for secret in (KEY, "sk-proj", "abc.def", "hunter2", "AbCdEf", "eyJ"):
        assert secret not in said


def test_what_only_looks_a_little_like_a_key_stays() -> None:
    """The caller needs the names of models, fields and tokens."""
    said = "max_tokens: 5000 exceeds key-value cache; the model `sk-1` has token limits, basic ones"
    assert refused(400, openai_error(said)).error.message.endswith(said)


@pytest.mark.parametrize(
    ("error", "details"),
    [
        ({"type": "t", "code": "c", "param": "messages.[0].content"}, ("t", "c", "messages.[0].content")),
        ({"code": 400, "status": "INVALID_ARGUMENT"}, ("INVALID_ARGUMENT", "400", None)),
        ({"code": "x" * 64, "param": "p" * 256}, (None, "x" * 64, "p" * 256)),
        ({"code": "x" * 65, "type": "two words", "param": "p" * 257}, None),
        ({"code": True, "type": ["t"], "param": {}}, None),
        ({"code": KEY, "type": "sk-other-key-000", "param": f"a.{KEY}"}, None),
        ({"message": "m"}, None),
    ],
)
def test_what_an_error_object_says_of_itself_goes_further_where_it_is_a_word(
    error: dict[str, Any], details: tuple[str | None, ...] | None
) -> None:
    """For clients that look at OpenAI's `type`, `code` and `param`."""
    expected = None if details is None else UpstreamErrorDetails(*details)
    assert refused(400, json.dumps({"error": error}).encode()).details == expected
    assert said_in_stream(error, secrets=(KEY,)).details == expected


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ({"error": {"code": 1}}, {"code": 1}),
        ({"error": "text"}, "text"),
        ({"error": {"code": 1}, "choices": []}, {"code": 1}),
        ([{"error": {"code": 1}}], {"code": 1}),
        ({"object": "error", "code": 1}, {"object": "error", "code": 1}),
        ({"type": "error", "message": "m"}, {"type": "error", "message": "m"}),
        ({"object": "error", "choices": []}, None),
        ({"error": None}, None),
        ({"error": {}}, None),
        ({"error": False, "choices": []}, None),
        ([], None),
        ([1, 2], None),
        ("error", None),
        (None, None),
    ],
)
def test_the_shapes_of_an_error(answer: Any, error: Any) -> None:
    """OpenAI's, and those that are known of others; a field that is empty is no error."""
    assert error_object(answer) == error


@pytest.mark.parametrize(
    ("error", "code", "status"),
    [
        ({"code": 429}, "upstream_rate_limit", 429),
        ({"code": "503"}, "upstream_server_error", 503),
        ({"code": 400, "type": "BadRequestError"}, "upstream_invalid_request", 400),
        ({"status_code": 401}, "upstream_authentication", 401),
        ({"type": "rate_limit_error"}, "upstream_rate_limit", 429),
        ({"code": "insufficient_quota"}, "upstream_quota", 429),
        ({"code": 404, "message": "gone"}, "upstream_not_found", 404),
        ({"code": 200}, "upstream_error_event", None),
        ({"code": 4290}, "upstream_error_event", None),
        ({"type": "server_error"}, "upstream_error_event", None),
        ({"type": {"a": 1}}, "upstream_error_event", None),
        ("text", "upstream_error_event", None),
        (7, "upstream_error_event", None),
        (None, "upstream_error_event", None),
    ],
)
def test_an_error_in_place_of_an_answer_is_read_by_the_status_that_it_names(
    error: Any, code: str, status: int | None
) -> None:
    """Under a status of 200: OpenRouter sends its headers before it knows."""
    read = said_in_answer(error)
    assert (read.code, read.status_code, read.is_refusal) == (code, status, status is not None)
    in_stream = said_in_stream(error)
    assert (in_stream.code, in_stream.status_code) == ("upstream_error_event", status)
    assert not in_stream.is_refusal


def test_what_was_refused_is_not_to_be_paid() -> None:
    """Nor what never arrived; what broke off may have been at work."""
    for code in ("connect_timeout", "upstream_unreachable"):
        assert UpstreamError(code, "m").is_refusal
    assert refused(500).is_refusal
    for code in ("upstream_eof", "upstream_malformed", "upstream_event_too_large", "upstream_error_event"):
        assert not UpstreamError(code, "m").is_refusal
    assert not UpstreamError("upstream_not_streaming", "m", status_code=200).is_refusal


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "code", "type", "param", "message", "status"]), inner)
    ),
    max_leaves=10,
)


@given(JSON, st.sampled_from([200, 301, 400, 401, 404, 429, 500, 599]))
def test_no_json_makes_the_reader_fail(answer: Any, status: int) -> None:
    """Whatever a gateway says is an UpstreamError that can be encoded."""
    for error in (
        refused(status, json.dumps(answer).encode("utf-8", "replace")),
        said_in_answer(answer),
        said_in_stream(answer),
    ):
        assert json.dumps(error.error.message)


@pytest.mark.parametrize(
    "said",
    [
        "abcd+ef/0123456789==",
        "abcd%2Bef%2F0123456789%3D%3D",
        "abcd+ef/0123…",
        "0123456789==",
        "zzzzyyyyxxxxwwww",
    ],
)
def test_a_piece_of_a_secret_is_kept_back_too(said: str) -> None:
    """A key's beginning, a header's token without its scheme, and what stands in an address."""
    body = json.dumps({"error": {"message": f"no key {said} here", "code": said}}).encode()
    secrets = ("abcd+ef/0123456789==", "Token zzzzyyyyxxxxwwww")
    error = refusal(400, httpx.Headers(), body, secrets=secrets, now=0)
    assert error.error.message == "the gateway refuses the request"
    assert error.details is None or error.details.code is None
