"""A chat.completions body as a job: what is stored, what is ours, what is refused (PROTOCOL §9.2)."""

from typing import Any

import pytest

from deltawire.errors import WireError
from deltawire_relay.chat_request import param_here, read_chat_request
from tests.support.producer import REQUEST

DEFAULTS: dict[str, Any] = {"on_abandon": "cancel", "abandon_grace_s": 2.0}


@pytest.mark.parametrize(
    ("fields", "is_streamed"),
    [({}, False), ({"stream": None}, False), ({"stream": False}, False), ({"stream": True}, True)],
)
def test_whether_it_is_streamed(fields: dict[str, Any], is_streamed: bool) -> None:
    """As OpenAI reads the field; it is not stored, since the worker always streams."""
    chat = read_chat_request({**REQUEST, **fields}, {})
    assert chat.is_streamed is is_streamed
    assert chat.request == {**REQUEST, "stream_options": {"include_usage": True}}


@pytest.mark.parametrize(
    ("stream_options", "wants_usage"),
    [(None, False), ({"include_usage": True, "x": 1}, True), ({"include_usage": False, "x": 1}, False)],
)
def test_usage_is_always_asked_for(stream_options: Any, wants_usage: bool) -> None:
    """What the client said of it is remembered for its own stream; its other stream options stay."""
    chat = read_chat_request({**REQUEST, "stream": True, "stream_options": stream_options}, {})
    assert chat.wants_usage is wants_usage
    assert chat.request["stream_options"] == {**(stream_options or {}), "include_usage": True}


def test_everything_else_goes_upstream_as_it_is() -> None:
    """Fields that we do not know included; the body that was given stays as it was."""
    body = {**REQUEST, "n": 3, "tools": [{"type": "function"}], "vendor": {"a": None}, "options": 1}
    given = {**body, "deltawire": {"timeout_s": 5}}
    chat = read_chat_request(given, DEFAULTS)
    assert chat.request == {**body, "stream_options": {"include_usage": True}}
    assert chat.options.timeout_s == 5
    assert (chat.options.on_abandon, chat.options.abandon_grace_s) == ("cancel", 2.0)
    assert given == {**body, "deltawire": {"timeout_s": 5}}


@pytest.mark.parametrize(
    ("fields", "code", "param", "begins"),
    [
        ({"model": ""}, "invalid_request", "model", "model must be"),
        ({"messages": []}, "invalid_request", "messages", "messages must be"),
        ({"stream": 1}, "invalid_request", "stream", "stream must be"),
        ({"stream_options": 5}, "invalid_request", "stream_options", "stream_options must be"),
        ({"stream_options": []}, "invalid_request", "stream_options", "stream_options must be"),
        ({"stream_options": False}, "invalid_request", "stream_options", "stream_options must be"),
        ({"deltawire": []}, "invalid_request", "deltawire", "deltawire must be"),
        (
            {"deltawire": {"timeout_s": 0}},
            "invalid_request",
            "deltawire.timeout_s",
            "deltawire.timeout_s must",
        ),
        ({"deltawire": {"timeout_s": "5"}}, "invalid_request", "deltawire", "deltawire: Expected"),
        ({"deltawire": {"speed": 1}}, "unknown_option", "deltawire.speed", "there is no option 'speed'"),
        ({"deltawire": {"restart": "always"}}, "invalid_request", "deltawire.restart", "deltawire.restart"),
    ],
)
def test_errors_name_the_field_as_the_client_wrote_it(
    fields: dict[str, Any], code: str, param: str, begins: str
) -> None:
    """OpenAI's `param` is a name in the body."""
    with pytest.raises(WireError) as caught:
        read_chat_request({**REQUEST, **fields}, DEFAULTS)
    assert (caught.value.code, caught.value.error.param) == (code, param)
    assert caught.value.error.message.startswith(begins)


@pytest.mark.parametrize(
    ("param", "here"),
    [
        (None, None),
        ("request", None),
        ("request.model", "model"),
        ("options", "deltawire"),
        ("options.upstream", "deltawire.upstream"),
        ("Idempotency-Key", "Idempotency-Key"),
    ],
)
def test_a_jobs_field_has_a_name_here(param: str | None, here: str | None) -> None:
    assert param_here(param) == here
