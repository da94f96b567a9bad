"""Streams to begin with: what gateways send, well-behaved or not, in small."""

import json
from collections.abc import Iterable
from typing import Any, Final

from deltawire.sse_decoder import SseDecoder
from tests.support.recorded_streams import RECORDED

Json = dict[str, Any]


def _chunk(delta: Any, *, reason: str | None = None, index: int = 0, **more: Any) -> Json:
    top = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return {**top, "choices": [{"index": index, "delta": delta, "finish_reason": reason}], **more}


def _call(arguments: Any, **more: Any) -> Json:
    return {"tool_calls": [{**more, "function": {"arguments": arguments}}]}


def _named(name: str, arguments: Any, **more: Any) -> Json:
    return {"tool_calls": [{"type": "function", **more, "function": {"name": name, "arguments": arguments}}]}


_USAGE: Final = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
_THINKING: Final = {"type": "thinking", "thinking": [{"type": "text", "text": "Hm"}]}
_DETAIL: Final = {"type": "reasoning.text", "text": "a", "format": "f", "index": 0}
_TOKEN: Final = {"token": "a", "logprob": -1.5, "bytes": [97], "top_logprobs": []}

CHUNKS: Final[dict[str, list[Json]]] = {
    "text": [
        _chunk({"role": "assistant", "content": ""}),
        _chunk({"content": "Hé"}),
        _chunk({}, reason="stop"),
    ],
    "usage": [_chunk({"content": "a"}, usage=None), {"choices": [], "usage": _USAGE}],
    "choices": [
        _chunk({"content": "b"}, index=1),
        _chunk({"content": "a"}),
        _chunk({}, index=1, reason="length"),
    ],
    "tools": [
        _chunk(_named("f", "", index=0, id="a")),
        _chunk(_call('{"a"', index=0)),
        _chunk(_named("g", "{}", index=1, id="b")),
        _chunk(_call(":1}", index=0)),
        _chunk({}, reason="tool_calls"),
    ],
    "Gemini": [_chunk(_named("f", '{"a":1}', index=0, id="a")), _chunk(_named("g", "{}", index=0, id="b"))],
    "without id": [_chunk(_named("f", '{"a":1}')), _chunk(_named("f", "{}", id=""))],
    "Ollama": [_chunk(_named("f", {"a": 1}, id="a")), _chunk({"tool_calls": None}, reason="stop")],
    "Poolside": [_chunk(_named("f", "{", index=0, id="a")), _chunk(_call("}", index=0, id="x"))],
    "legacy": [_chunk({"function_call": {"name": "f", "arguments": "{}"}}, reason="function_call")],
    "custom": [
        _chunk(
            {"tool_calls": [{"index": 0, "id": "a", "type": "custom", "custom": {"name": "f", "input": "x"}}]}
        )
    ],
    "Mistral": [
        _chunk({"content": ""}),
        _chunk({"content": [_THINKING]}),
        _chunk({"content": [_THINKING, {"type": "text", "text": "A"}]}, p="xx"),
        _chunk({"content": "B"}, reason="model_length"),
    ],
    "OpenRouter": [
        _chunk({"reasoning": "a", "reasoning_details": [_DETAIL]}),
        _chunk({"reasoning_details": [_DETAIL]}),
    ],
    "Azure": [
        {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": [{}]}
    ],
    "Groq": [{"choices": [], "x_groq": {"id": "r", "usage": _USAGE}}],
    "Moonshot": [{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop", "usage": _USAGE}]}],
    "MiniMax": [{"choices": [{"index": 0, "finish_reason": "stop", "message": {"content": "all"}}]}],
    "logprobs": [{"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [_TOKEN]}}]}],
    "audio": [
        _chunk({"audio": {"id": "a", "data": "AA=="}}),
        _chunk({"audio": {"transcript": "x", "expires_at": 9}}),
    ],
    "JSON": [_chunk({"content": '{"a":'}), _chunk({"content": "[1]}"}, reason="stop")],
    "refusal": [_chunk({"refusal": "I"}), _chunk({"refusal": " cannot", "content": None}, reason="stop")],
    "error": [_chunk({"content": "a"}), _chunk({}, reason="error"), {"error": {"message": "x", "code": 500}}],
    "nothing": [{}, {"choices": None}, {"choices": [{"index": 0, "delta": None}]}, {"choices": [{}]}],
    "vLLM": [{"choices": [{"index": 0, "delta": {}, "token_ids": [1], "stop_reason": 7}]}],
}


def _recorded() -> Iterable[bytes]:
    """The beginning and the end of each stream that a real provider has sent."""
    for path in RECORDED:
        payloads = SseDecoder().feed(path.read_bytes())
        yield b"".join(b"data: %s\n\n" % payload for payload in (*payloads[:6], *payloads[-3:]))


def _encoded(chunks: list[Json]) -> bytes:
    return b"".join(b"data: %s\n\n" % json.dumps(chunk).encode() for chunk in chunks) + b"data: [DONE]\n\n"


EVENTS: Final = [chunk for chunks in CHUNKS.values() for chunk in chunks]
STREAMS: Final = [*map(_encoded, CHUNKS.values()), *_recorded()]
