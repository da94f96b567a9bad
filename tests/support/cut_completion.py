"""A `chat.completion`, cut into the chunks in which a gateway would have streamed it."""

from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

Json = dict[str, Any]


def cut(completion: Json, size: int = 7) -> list[Json]:
    """Its chunks: choices in turn, texts and arguments in pieces of `size` characters, usage at the end.

    Text with logprobs is cut into their tokens instead.
    """
    parts = ("choices", "usage")
    frame = {name: value for name, value in completion.items() if name not in parts}
    frame["object"] = "chat.completion.chunk"
    turns = zip_longest(*(_choice_in_pieces(choice, size) for choice in completion["choices"]))
    chunks = [{**frame, "choices": [piece]} for turn in turns for piece in turn if piece]
    return [*chunks, {**frame, "choices": [], "usage": completion["usage"]}]


def _choice_in_pieces(choice: Json, size: int) -> Iterator[Json]:
    message, logprobs = choice["message"], choice["logprobs"] or {}
    deltas: list[tuple[Json, Json | None]] = [
        ({"role": message["role"], "content": None, "refusal": None}, None)
    ]
    for name in ("reasoning_content", "content", "refusal"):
        text = message.get(name)
        if text is None:
            continue
        if tokens := logprobs.get(name):
            told = [{"content": None, "refusal": None, **{name: [token]}} for token in tokens]
            deltas += [({name: token["token"]}, each) for token, each in zip(tokens, told, strict=True)]
        else:
            deltas += [({name: piece}, None) for piece in _pieces(text, size)]
    for i, call in enumerate(message.get("tool_calls") or []):
        function = {**call["function"], "arguments": ""}
        deltas.append(({"tool_calls": [{"index": i, **call, "function": function}]}, None))
        for piece in _pieces(call["function"]["arguments"], size):
            deltas.append(({"tool_calls": [{"index": i, "function": {"arguments": piece}}]}, None))
    if call := message.get("function_call"):
        deltas.append(({"function_call": {**call, "arguments": ""}}, None))
        deltas += [
            ({"function_call": {"arguments": piece}}, None) for piece in _pieces(call["arguments"], size)
        ]
    for delta, told_by_it in deltas:
        yield {"index": choice["index"], "delta": delta, "logprobs": told_by_it, "finish_reason": None}
    yield {"index": choice["index"], "delta": {}, "logprobs": None, "finish_reason": choice["finish_reason"]}


def _pieces(text: str, size: int) -> list[str]:
    return [text[i : i + size] for i in range(0, len(text), size)]
