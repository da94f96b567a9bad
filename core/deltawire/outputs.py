"""What can be relied on in a completion: whole tool calls, and the JSON that was asked for. Pure.

Whether the JSON keeps to the schema is for the worker to say (deltawire_worker.structured_output).
"""

from typing import Any, Final

import msgspec

from .codec import MAX_DEPTH
from .ending import LENGTH
from .events import LEFT_OUT, Output, ParseError

MAX_TEXT_BYTES: Final = 262_144
MAX_MESSAGE_CHARACTERS: Final = 500

_CUT_SHORT: Final = frozenset({*LENGTH, "content_filter"})


def read_request(request: bytes | None) -> dict[str, Any] | None:
    """The body in a job's record; None where it has none (any more), or one that is no object."""
    value = msgspec.json.decode(request) if request else None
    return value if isinstance(value, dict) else None


def judge(
    completion: dict[str, Any] | None, request: dict[str, Any] | None, *, is_over: bool = True
) -> list[Output]:
    """An entry for each choice that calls tools, or for all where `response_format` asks for JSON.

    `parsed` is what the text says, not compared with any schema. Where the job was ended before the answer
    was (`is_over` is false: it has failed, or was cancelled) nothing is complete. Never raises.
    """
    request = request or {}
    is_json = asks_for_json(request)
    outputs = []
    for choice in (completion or {}).get("choices", ()):
        message = choice["message"]
        reason = choice["finish_reason"] if is_over else None
        tool_calls = _calls(message)
        output = Output(index=choice["index"])
        if tool_calls:
            is_whole = _are_whole(tool_calls, reason, request)
            output = msgspec.structs.replace(output, tool_calls="complete" if is_whole else "incomplete")
        if is_json:
            output = _parsed(output, message, reason, request["response_format"])
        if tool_calls or is_json:
            outputs.append(output)
    return outputs


def asks_for_json(request: dict[str, Any]) -> bool:
    """Whether the answer is to be JSON."""
    response_format = request.get("response_format")
    return isinstance(response_format, dict) and response_format.get("type") in ("json_object", "json_schema")


def schema_of(response_format: dict[str, Any]) -> Any:  # whatever JSON the request had there
    """The schema that it declares, or None. Some gateways take one beside `json_object`."""
    if response_format.get("type") == "json_object":
        return response_format.get("schema")
    declared = response_format.get("json_schema")
    return declared.get("schema") if isinstance(declared, dict) else None


def text_of(message: dict[str, Any]) -> str:
    """The text of a message, also where it comes in parts."""
    content = message.get("content")
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    return "".join(text for text in texts if isinstance(text, str))


def parse(text: str) -> tuple[Any, ParseError | None]:
    """The JSON value in a text, or why there is none."""
    encoded = text.encode("utf-8", "replace")
    if len(encoded) > MAX_TEXT_BYTES:
        return None, ParseError("too_large", f"the text has more than {MAX_TEXT_BYTES} bytes")
    try:
        value = msgspec.json.decode(encoded)
    except RecursionError:
        return None, ParseError("too_large", "the JSON is nested too deeply")
    except msgspec.DecodeError as error:
        message = f"the text is not JSON: {error}" if text.strip() else "there is no text"
        return None, ParseError("not_json", message[:MAX_MESSAGE_CHARACTERS])
    if encoded.count(b"{") + encoded.count(b"[") > MAX_DEPTH and _is_too_deep(value):
        return None, ParseError("too_large", "the JSON is nested too deeply")
    return value, None


def parsed_again(outputs: list[Output], completion: dict[str, Any] | None) -> list[Output]:
    """The outputs with what the terminal event had no room for, from the text.

    It was compared with its schema when the event was written; a text that is too large never was.
    """
    texts = {choice["index"]: text_of(choice["message"]) for choice in (completion or {}).get("choices", ())}
    return [
        msgspec.structs.replace(output, parsed=parse(texts[output.index])[0], parse_error=None)
        if output.parse_error == LEFT_OUT and output.index in texts
        else output
        for output in outputs
    ]


def _parsed(output: Output, message: dict[str, Any], reason: Any, response_format: dict[str, Any]) -> Output:
    value, problem = None, None
    if message.get("refusal"):
        problem = ParseError("refused", "the model has refused")
    elif not isinstance(reason, str) or reason in _CUT_SHORT:
        problem = ParseError("incomplete", "the answer was cut off")
    elif (text := text_of(message)) or output.tool_calls is None:  # a call by name ends in `stop`, too
        value, problem = parse(text)
        if problem is None and response_format["type"] == "json_object" and not isinstance(value, dict):
            value, problem = None, ParseError("not_valid", "the text is JSON, but no object")
    return msgspec.structs.replace(output, parsed=value, parse_error=problem)


def _is_too_deep(value: Any) -> bool:  # JSON
    level = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
        if not level:
            return False
    return any(isinstance(item, dict | list) for item in level)


def _calls(message: dict[str, Any]) -> list[Any]:
    tool_calls, function_call = message.get("tool_calls"), message.get("function_call")
    calls = tool_calls if isinstance(tool_calls, list) else [tool_calls] if tool_calls else []
    return [*calls, {"function": function_call}] if function_call else calls


def _are_whole(calls: list[Any], reason: Any, request: dict[str, Any]) -> bool:
    """Whether all of the calls of a choice came to their end.

    The gateway says so by its finish_reason. Where the request has named the tool that says `stop`, as an
    answer without calls does, so then their arguments must be there. Arguments that do not parse are half of
    something, whatever the gateway says; a function without parameters may come without any.
    """
    named = None
    if reason == "stop":
        named = _named_tool(request)
        if named is None:
            return False
    elif reason not in ("tool_calls", "function_call"):
        return False
    return all(_is_whole(call, named) for call in calls)


def _is_whole(call: Any, named: str | None) -> bool:
    kinds = [kind for kind in ("function", "custom") if isinstance(call, dict) and call.get(kind) is not None]
    return bool(kinds) and all(_is_whole_of_kind(kind, call[kind], named) for kind in kinds)


def _is_whole_of_kind(kind: str, called: Any, named: str | None) -> bool:
    name = called.get("name") if isinstance(called, dict) else None
    if not isinstance(name, str) or name == "" or named not in {None, name}:
        return False
    if kind == "custom":
        return isinstance(called.get("input"), str)  # free text
    arguments = called.get("arguments")
    if not isinstance(arguments, str):
        return False
    return _is_object(arguments) or (named is None and not arguments.strip())


def _is_object(text: str) -> bool:
    try:
        return isinstance(msgspec.json.decode(text.encode("utf-8", "replace")), dict)
    except (msgspec.DecodeError, RecursionError):
        return False


def _named_tool(request: dict[str, Any]) -> str | None:
    """The one tool that the request tells the model to call."""
    tool_choice = request.get("tool_choice")
    if isinstance(tool_choice, dict):
        named = tool_choice.get("function") or tool_choice.get("custom")
    else:
        named = request.get("function_call")
    name = named.get("name") if isinstance(named, dict) else None
    return name if isinstance(name, str) and name else None
