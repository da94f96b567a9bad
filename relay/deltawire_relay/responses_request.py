"""What a client of OpenAI's Responses API asks for, as a chat completion of ours (PROTOCOL.md §5.11).

Pure: a body in, a job or a WireError out. Whatever has no equal there is refused by name: a client that
believes that something is done which is not would be worse off.
"""

from collections.abc import Mapping
from typing import Any, Final

import msgspec

from deltawire.errors import WireError
from deltawire.options import Options, check_request, parse_options

from .chat_request import renamed
from .responses_events import ECHOED

Json = dict[str, Any]

_AS_THEY_ARE: Final = {
    *("model", "parallel_tool_calls", "temperature", "top_p", "service_tier"),
    *("user", "safety_identifier", "prompt_cache_key"),
}
_READ: Final = {
    *("input", "instructions", "tools", "tool_choice", "max_output_tokens", "text", "reasoning"),
    *("background", "deltawire", "metadata", "stream", "stream_options"),
}
#: What says no more than what is so anyway.
_HARMLESS: Final[Json] = {
    "store": True,
    "truncation": "disabled",
    "include": [],
    "top_logprobs": 0,
}
_INSTEAD: Final = {
    "background": "send background: true; POST /v1/chat/completions answers without it",
    "conversation": "send the whole conversation as input",
    "previous_response_id": "send the whole conversation as input",
    "prompt": "send instructions and input",
    "store": "a response in the background is always stored",
}
#: Of what a Response repeats: each reader of its events gets that four times, and may be slow.
MAX_REPEATED_BYTES: Final = 262_144
_TEXTS: Final = ("input_text", "output_text", "text")


class ResponsesRequest(msgspec.Struct, frozen=True):
    """A body of `POST /v1/responses`, taken apart."""

    request: Json
    """The chat completion."""
    options: Options
    response: Json
    """What the Response repeats of the body; no prompt."""
    is_streamed: bool


def read_responses_request(body: Mapping[str, Any]) -> ResponsesRequest:
    """Raises WireError, whose `param` is the field's name in this body."""
    body = {name: value for name, value in body.items() if value is not None}
    for name, value in body.items():
        if name not in _AS_THEY_ARE | _READ and (name not in _HARMLESS or value != _HARMLESS[name]):
            raise unsupported(name, _INSTEAD.get(name, "leave it out"))
    if body.get("background") is not True:
        raise unsupported("background", _INSTEAD["background"])
    is_streamed = body.get("stream", False)
    if not isinstance(is_streamed, bool):
        raise WireError("invalid_request", "stream must be true or false", param="stream")
    stream_options = _object(body, "stream_options")
    if stream_options not in ({}, {"include_obfuscation": False}):
        raise unsupported("stream_options", "nothing is added to the events")
    ours = dict(_object(body, "deltawire"))
    extra = _object(ours, "request", "deltawire.")
    ours.pop("request", None)
    try:
        options = parse_options({"metadata": _metadata(body), **ours}, from_http=True)
        request = check_request({**extra, **_completion(body)})
    except WireError as error:
        raise renamed(error) from None
    if options.restart == "always":
        raise WireError(
            "invalid_request",
            "deltawire.restart cannot be always here: events that were sent cannot be taken back",
            param="deltawire.restart",
        )
    request["stream_options"] = {"include_usage": True}
    response = {name: value for name, value in body.items() if name in ECHOED}
    _check_size(response)
    response["model"] = request["model"]
    return ResponsesRequest(request, options, response, is_streamed)


def _check_size(response: Json) -> None:
    sizes = {name: len(msgspec.json.encode(value)) for name, value in response.items()}
    if sum(sizes.values()) > MAX_REPEATED_BYTES:
        largest = max(sizes, key=lambda name: sizes[name])
        said = f"{largest} is too large: what a response repeats has at most {MAX_REPEATED_BYTES} bytes"
        raise WireError("request_too_large", said, param=largest)


def _completion(body: Mapping[str, Any]) -> Json:
    """The body as one of chat.completions."""
    request = {name: value for name, value in body.items() if name in _AS_THEY_ARE}
    request["messages"] = _messages(body)
    if "tools" in body:
        request["tools"] = [
            _tool(tool, f"tools[{n}]") for n, tool in enumerate(_list(body["tools"], "tools"))
        ]
    if "tool_choice" in body:
        request["tool_choice"] = _tool_choice(body["tool_choice"])
    if "max_output_tokens" in body:
        request["max_completion_tokens"] = body["max_output_tokens"]
    text, reasoning = _object(body, "text"), _object(body, "reasoning")
    _only(text, {"format", "verbosity"}, "text.")
    _only(reasoning, {"effort"}, "reasoning.")
    if "verbosity" in text:
        request["verbosity"] = text["verbosity"]
    if "effort" in reasoning:
        request["reasoning_effort"] = reasoning["effort"]
    declared = dict(_object(text, "format", "text."))
    kind = declared.pop("type", "text")
    if kind == "json_schema":
        request["response_format"] = {"type": kind, "json_schema": declared}
    elif kind == "json_object":
        request["response_format"] = {"type": kind}
    elif kind != "text":
        raise unsupported("text.format.type", "text, json_object and json_schema are taken")
    return request


def _messages(body: Mapping[str, Any]) -> list[Json]:
    messages: list[Json] = []
    if "instructions" in body:
        messages.append({"role": "system", "content": _text(body["instructions"], "instructions")})
    asked = body.get("input")
    if isinstance(asked, str):
        return [*messages, {"role": "user", "content": asked}]
    if not isinstance(asked, list) or not asked:
        raise WireError("invalid_request", "input must be a text, or an array with an item", param="input")
    for number, item in enumerate(asked):
        message = _message(item, f"input[{number}]")
        if "tool_calls" in message and messages and messages[-1]["role"] == "assistant":
            # One message has all that an assistant said at a time.
            messages[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            messages.append(message)
    return messages


def _message(item: Any, where: str) -> Json:  # JSON
    if not isinstance(item, dict):
        raise WireError("invalid_request", f"{where} must be an object", param=where)
    match item.get("type", "message"):
        case "message":
            content = _content(item.get("content"), f"{where}.content")
            return {"role": _text(item.get("role"), f"{where}.role"), "content": content}
        case "function_call":
            return {"role": "assistant", "content": None, "tool_calls": [_call(item, where)]}
        case "function_call_output":
            content = _content(item.get("output"), f"{where}.output")
            call_id = _text(item.get("call_id"), f"{where}.call_id")
            return {"role": "tool", "tool_call_id": call_id, "content": content}
    raise unsupported(f"{where}.type", "message, function_call and function_call_output are taken")


def _call(item: Json, where: str) -> Json:
    function = {name: _text(item.get(name), f"{where}.{name}") for name in ("name", "arguments")}
    return {"id": _text(item.get("call_id"), f"{where}.call_id"), "type": "function", "function": function}


def _content(value: Any, where: str) -> str | list[Json]:  # JSON
    if isinstance(value, str):
        return value
    parts = [_part(part, f"{where}[{number}]") for number, part in enumerate(_list(value, where))]
    if len(parts) == 1 and parts[0]["type"] == "text":
        return str(parts[0]["text"])  # which every gateway takes
    return parts


def _part(part: Any, where: str) -> Json:  # JSON
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in _TEXTS:
        return {"type": "text", "text": _text(part.get("text"), f"{where}.text")}
    if kind == "refusal":
        return {"type": kind, "refusal": _text(part.get(kind), f"{where}.{kind}")}
    if kind == "input_image" and isinstance(part.get("image_url"), str):
        detail = {"detail": part["detail"]} if part.get("detail") else {}
        return {"type": "image_url", "image_url": {"url": part["image_url"], **detail}}
    raise unsupported(f"{where}.type", "text, refusals and images (by image_url) are taken")


def _tool(tool: Any, where: str) -> Json:  # JSON
    if not isinstance(tool, dict) or tool.get("type") != "function":
        raise unsupported(f"{where}.type", "only functions can be called here; run other tools behind one")
    _only(tool, {"type", "name", "description", "parameters", "strict"}, f"{where}.")
    function = {name: value for name, value in tool.items() if name != "type" and value is not None}
    return {"type": "function", "function": {**function, "name": _text(tool.get("name"), f"{where}.name")}}


def _tool_choice(choice: Any) -> Any:  # JSON
    if choice in ("none", "auto", "required"):
        return choice
    if isinstance(choice, dict) and choice.get("type") == "function":
        name = _text(choice.get("name"), "tool_choice.name")
        return {"type": "function", "function": {"name": name}}
    raise unsupported("tool_choice", "none, auto, required and a function are taken")


def _metadata(body: Mapping[str, Any]) -> Json:
    metadata = _object(body, "metadata")
    if not all(isinstance(value, str) for value in metadata.values()):
        raise WireError("invalid_request", "metadata must hold texts", param="metadata")
    return metadata


def _text(value: Any, where: str) -> str:  # JSON
    if not isinstance(value, str):
        raise WireError("invalid_request", f"{where} must be a text", param=where)
    return value


def _list(value: Any, where: str) -> list[Any]:  # JSON
    if not isinstance(value, list):
        raise WireError("invalid_request", f"{where} must be an array", param=where)
    return value


def _object(fields: Mapping[str, Any], name: str, prefix: str = "") -> Json:
    value = fields.get(name)
    if value is not None and not isinstance(value, dict):
        raise WireError("invalid_request", f"{prefix}{name} must be an object", param=prefix + name)
    return {key: each for key, each in (value or {}).items() if each is not None}


def _only(fields: Json, known: set[str], prefix: str) -> None:
    for name, value in fields.items():
        if name not in known and value is not None:
            raise unsupported(prefix + name, "leave it out")


def unsupported(param: str, instead: str) -> WireError:
    """The refusal of what cannot be done here, and what to do instead."""
    message = f"{param} is not supported here as it is: {instead}"
    return WireError("unsupported_parameter", message, param=param)
