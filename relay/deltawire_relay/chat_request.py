"""What a client of the OpenAI API asks for, as a job of ours. Pure: a body in, a job or a WireError out."""

from collections.abc import Mapping
from typing import Any

import msgspec

from deltawire.errors import WireError
from deltawire.options import Options, check_request, parse_options


class ChatRequest(msgspec.Struct, frozen=True):
    """A `chat.completions` body, taken apart."""

    request: dict[str, Any]
    """As it is stored: always with usage, which the accounts need whether the client wants it or not."""
    options: Options
    is_streamed: bool
    wants_usage: bool
    """Whether the client itself asked for the chunk that has nothing but the usage."""


def read_chat_request(body: Mapping[str, Any], defaults: Mapping[str, Any]) -> ChatRequest:
    """`defaults` are options of the door, over which the client's own (the field `deltawire`) go.

    Raises WireError, whose `param` is the field's name in this body.
    """
    request = {name: value for name, value in body.items() if name not in {"deltawire", "stream"}}
    is_streamed = body.get("stream")
    if is_streamed is not None and not isinstance(is_streamed, bool):
        raise WireError("invalid_request", "stream must be true or false", param="stream")
    asked = body.get("deltawire")
    if asked is not None and not isinstance(asked, dict):
        raise WireError("invalid_request", "deltawire must be an object of options", param="deltawire")
    try:
        check_request(request)
        options = parse_options({**defaults, **(asked or {})}, from_http=True)
    except WireError as error:
        raise renamed(error) from None
    if options.restart == "always":
        raise WireError(
            "invalid_request",
            "deltawire.restart cannot be always here: chunks that were sent cannot be taken back",
            param="deltawire.restart",
        )
    stream_options = request.get("stream_options") or {}
    request["stream_options"] = {**stream_options, "include_usage": True}
    return ChatRequest(request, options, bool(is_streamed), stream_options.get("include_usage") is True)


def param_here(param: str | None) -> str | None:
    """The name that a field of a job has in a body of this door."""
    if param is None or param in {"request", "options"}:
        return {"options": "deltawire"}.get(param or "")
    if param.startswith("options."):
        return f"deltawire.{param.removeprefix('options.')}"
    return param.removeprefix("request.")


def renamed(error: WireError) -> WireError:
    """The error about a job, as one about a body of this door."""
    message = error.error.message.removeprefix("request.")
    if message.startswith("options"):
        message = f"deltawire{message.removeprefix('options')}"
    return WireError(error.code, message, param=param_here(error.error.param))
