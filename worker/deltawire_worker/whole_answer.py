"""A gateway that answers a streaming request in one piece, and the chunk that says the same. Pure."""

from typing import Any, Final, Literal

import msgspec

from .refusal import error_object

Form = Literal["events", "whole", "other"]

_BOM: Final = b"\xef\xbb\xbf"
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b"error:", b":")


def form_of(head: bytes, media_type: str) -> Form | None:
    """What an answer is by its first bytes; None: more of them are needed.

    The bytes are believed, not the media type, which some gateways leave out, misspell or get wrong. It only
    decides about an event stream that begins with a field that nobody knows.
    """
    head = head.removeprefix(_BOM).lstrip(b" \t\r\n")
    if not head or _BOM.startswith(head):
        return None
    if head.startswith((b"{", b"[")):
        return "whole"
    if head.startswith(_FIELDS):
        return "events"
    if any(field.startswith(head) for field in _FIELDS):
        return None
    return "events" if media_type == "text/event-stream" and not head.startswith(b"<") else "other"


def read_whole(body: bytes) -> tuple[Any, dict[str, Any] | None]:
    """(error object or None, chunk or None) of a JSON answer; both None for what is neither."""
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None, None
    if error := error_object(answer):
        return error, None
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        return None, None
    choices = [_as_streamed(choice) for choice in answer["choices"] if isinstance(choice, dict)]
    if not choices:
        return None, None
    return None, {**answer, "object": "chat.completion.chunk", "choices": choices}


def _as_streamed(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice of a `chat.completion` with all of its message as one delta."""
    streamed = {key: value for key, value in choice.items() if key != "message"}
    delta = choice.get("message")
    if isinstance(delta, dict):
        calls = delta.get("tool_calls")
        if isinstance(calls, list):
            indexed = [
                {"index": at, **call} if isinstance(call, dict) else call for at, call in enumerate(calls)
            ]
            delta = {**delta, "tool_calls": indexed}
        streamed["delta"] = delta
    return streamed
