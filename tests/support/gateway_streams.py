"""What OpenAI-compatible gateways are known to send, as scripts for our own, and what must become of it.

Written by hand from the public sources of docs/gateways.md, which has a row for each `name`.
"""

import json
from typing import Any, Final

from msgspec import Struct

Json = dict[str, Any]

EVENT_STREAM: Final = "text/event-stream"
USAGE: Final[Json] = {"prompt_tokens": 9, "completion_tokens": 4, "total_tokens": 13}
HEAD: Final[Json] = {
    "id": "chatcmpl-1",
    "object": "chat.completion.chunk",
    "created": 1_750_000_000,
    "model": "gpt-5.4",
}


class Quirk(Struct, frozen=True, kw_only=True):
    """One stream or answer. `ends` is what the terminal event holds: of objects, the fields named here."""

    name: str
    script: Json
    ends: Json
    asks: Json = {}  # further fields of the request
    deltas: int | None = None  # how many chunks are published; None: all of the script's
    lacks: tuple[str, ...] = ()  # fields that the completion must not have
    hides: str = ""  # what no event may show
    requests: int = 1  # how often the gateway is asked


def chunk(
    delta: Json | None = None, finish_reason: str | None = None, choice: Json | None = None, **top: Any
) -> Json:
    """A chunk with one choice; `choice` and `top` are what a gateway adds to the choice and beside it."""
    body = {"index": 0, "delta": delta or {}, "finish_reason": finish_reason, **(choice or {})}
    return {**HEAD, "choices": [body], **top}


def usage_chunk(**top: Any) -> Json:
    return {**HEAD, "choices": [], "usage": USAGE, **top}


def call(id_: str, name: str, arguments: str, **more: Any) -> Json:
    """A tool call, or the first piece of one."""
    return {"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}, **more}


def sse(*events: Json | str) -> Json:
    """A script that answers exactly these events: data, or lines as they are."""
    lines = [event if isinstance(event, str) else f"data: {compact(event)}" for event in events]
    return {"body": "".join(f"{line}\n\n" for line in lines), "content_type": EVENT_STREAM}


def compact(value: Json | list[Json]) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def refusal(status: int, body: Json | list[Json], **more: Any) -> Json:
    return {"fault": "status", "status": status, "body": compact(body), **more}


def bare(delta: Json, finish_reason: str | None = None, **top: Any) -> Json:
    """A chunk that says no more than it must."""
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}], **top}


def completed(message: Json, *, finish_reason: str = "stop", choice: Json | None = None, **more: Any) -> Json:
    body = {"message": message, "finish_reason": finish_reason, **(choice or {})}
    completion = {"object": "chat.completion", "choices": [body], **more.pop("completion", {})}
    return {"type": "completed", "completion": completion, **more}


def failed(
    code: str, *, status_code: int | None = None, upstream_error: Json | None = None, **more: Any
) -> Json:
    event: Json = {"type": "failed", "error": {"code": code}, "source": "upstream", **more}
    if status_code is not None:
        event["status_code"] = status_code
    if upstream_error is not None:
        event["upstream_error"] = upstream_error
    return event


FROM_GATEWAY: Final[Json] = {"usage": USAGE, "usage_source": "provider"}
ROLE: Final = chunk({"role": "assistant", "content": ""})
TEXT: Final = (ROLE, chunk({"content": "Whisper"}), chunk({"content": " of"}))
SAYS: Final[Json] = {"role": "assistant", "content": "Whisper of"}
STOP: Final = chunk(finish_reason="stop")
SAFE: Final[Json] = {"hate": {"filtered": False, "severity": "safe"}}

INFINITYBLUE: Final = [
    Quirk(
        name="infinityblue-stream",
        script=sse(
            *(
                {"id": "chatcmpl-1", "object": "chat.completion.chunk", **bare(delta, finish_reason)}
                for delta, finish_reason in (
                    ({"role": "assistant"}, None),
                    ({"content": "Whisper"}, None),
                    ({"content": " of"}, None),
                    ({}, "stop"),
                )
            ),
            "data: [DONE]",
        ),
        deltas=4,
        ends=completed(SAYS, usage_source="estimated", completion={"id": "chatcmpl-1"}),
    ),
    *(
        Quirk(
            name=f"infinityblue-{status}",
            script=refusal(
                status,
                {"error": {"message": "No.", "type": type_, "param": None, "code": None}},
                **({"retry_after": 7} if status == 429 else {}),
            ),
            deltas=0,
            ends=failed(
                code,
                status_code=status,
                upstream_error={"type": type_},
                **({"usage_source": "unavailable"} if status < 500 else {}),
                **({"error": {"code": code, "retry_after_s": 7}} if status == 429 else {}),
            ),
        )
        for status, type_, code in (
            (400, "invalid_request_error", "upstream_invalid_request"),
            (413, "invalid_request_error", "upstream_invalid_request"),
            (401, "authentication_error", "upstream_authentication"),
            (403, "permission_error", "upstream_authentication"),
            (404, "not_found_error", "upstream_not_found"),
            (429, "rate_limit_error", "upstream_rate_limit"),
            (500, "server_error", "upstream_server_error"),
            (502, "server_error", "upstream_server_error"),
            (503, "server_error", "upstream_server_error"),
            (504, "server_error", "upstream_server_error"),
        )
    ),
]

OPENAI: Final = [
    Quirk(
        name="openai-obfuscation",
        script={
            "chunks": [
                {**piece, "service_tier": "default", "usage": None, "obfuscation": f"x{i}"}
                for i, piece in enumerate((*TEXT, STOP))
            ]
            + [usage_chunk(service_tier="default", obfuscation="yyyy")]
        },
        ends=completed(SAYS, **FROM_GATEWAY, completion={"service_tier": "default", "usage": USAGE}),
        lacks=("obfuscation",),
    ),
    Quirk(
        name="openai-refusal",
        script={
            "chunks": [
                chunk({"role": "assistant", "content": None, "refusal": ""}),
                chunk({"refusal": "I can't"}),
                chunk({"refusal": " help."}),
                STOP,
            ]
        },
        ends=completed({"role": "assistant", "content": None, "refusal": "I can't help."}),
    ),
    Quirk(
        name="openai-named-tool-ends-in-stop",
        asks={
            "tools": [{"type": "function", "function": {"name": "weather"}}],
            "tool_choice": {"type": "function", "function": {"name": "weather"}},
        },
        script={
            "chunks": [
                chunk({"role": "assistant", "tool_calls": [call("call_1", "weather", "", index=0)]}),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]}),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": '"Rome"}'}}]}),
                STOP,
            ]
        },
        ends=completed(
            {"tool_calls": [call("call_1", "weather", '{"city":"Rome"}')]},
            outputs=[{"index": 0, "tool_calls": "complete"}],
        ),
    ),
    Quirk(
        name="openai-error-in-mid-stream",
        script={
            "chunks": [
                *TEXT,
                {
                    "error": {
                        "message": "The server had an error.",
                        "type": "server_error",
                        "param": None,
                        "code": None,
                    }
                },
            ],
            "fault": "no_done",
        },
        deltas=3,
        ends=failed(
            "upstream_error_event",
            upstream_error={"type": "server_error"},
            completion={"choices": [{"message": SAYS, "finish_reason": None}]},
            usage_source="estimated",
        ),
    ),
    Quirk(
        name="openai-insufficient-quota",
        asks={"max_retries": 3},
        script=refusal(
            429,
            {
                "error": {
                    "message": "You exceeded your current quota.",
                    "type": "insufficient_quota",
                    "param": None,
                    "code": "insufficient_quota",
                }
            },
        ),
        deltas=0,
        ends=failed(
            "upstream_quota",
            status_code=429,
            upstream_error={"type": "insufficient_quota", "code": "insufficient_quota"},
        ),
    ),
    Quirk(
        name="openai-x-should-retry",
        asks={"max_retries": 3},
        script=refusal(500, {}, headers={"x-should-retry": "false"}),
        deltas=0,
        ends=failed("upstream_server_error", status_code=500),
    ),
]

AZURE: Final = [
    Quirk(
        name="azure-prompt-filter-results",
        script={
            "chunks": [
                {
                    "choices": [],
                    "created": 0,
                    "id": "",
                    "model": "",
                    "object": "",
                    "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}],
                },
                *(
                    chunk(piece, choice={"content_filter_results": results})
                    for piece, results in (
                        ({"role": "assistant", "content": ""}, {}),
                        ({"content": "Whisper"}, SAFE),
                        ({"content": " of"}, SAFE),
                    )
                ),
                chunk(finish_reason="stop", choice={"content_filter_results": {}}),
                usage_chunk(),
            ]
        },
        ends=completed(
            SAYS,
            **FROM_GATEWAY,
            completion={
                "id": "chatcmpl-1",
                "model": "gpt-5.4",
                "created": HEAD["created"],
                "prompt_filter_results": [{"prompt_index": 0, "content_filter_results": SAFE}],
            },
        ),
    ),
    Quirk(
        name="azure-async-filter",
        script={
            "chunks": [
                *TEXT,
                STOP,
                {
                    "id": "",
                    "object": "",
                    "created": 0,
                    "model": "",
                    "choices": [
                        {
                            "index": 0,
                            "finish_reason": None,
                            "content_filter_results": SAFE,
                            "content_filter_offsets": {
                                "check_offset": 44,
                                "start_offset": 44,
                                "end_offset": 198,
                            },
                        }
                    ],
                    "usage": None,
                },
            ]
        },
        ends=completed(
            SAYS,
            completion={"id": "chatcmpl-1", "model": "gpt-5.4"},
            choice={"content_filter_results": SAFE, "content_filter_offsets": {"check_offset": 44}},
        ),
    ),
    Quirk(
        name="azure-content-filter-400",
        script=refusal(
            400,
            {
                "error": {
                    "message": "The response was filtered.",
                    "type": None,
                    "param": "prompt",
                    "code": "content_filter",
                    "status": 400,
                    "innererror": {"code": "ResponsibleAIPolicyViolation", "content_filter_result": {}},
                }
            },
        ),
        deltas=0,
        ends=failed(
            "upstream_invalid_request",
            status_code=400,
            upstream_error={"code": "content_filter", "param": "prompt"},
        ),
        hides="ResponsibleAIPolicyViolation",
    ),
]

VLLM: Final = [
    Quirk(
        name="vllm-usage-in-every-chunk",
        script={
            "chunks": [
                {
                    **piece,
                    "usage": {"prompt_tokens": 9, "completion_tokens": i, "total_tokens": 9 + i},
                }
                for i, piece in enumerate((*TEXT, chunk(finish_reason="stop", choice={"stop_reason": None})))
            ]
            + [usage_chunk()]
        },
        ends=completed(SAYS, **FROM_GATEWAY),
    ),
    Quirk(
        name="vllm-reasoning",
        script={
            "chunks": [
                ROLE,
                chunk({"reasoning": "Five"}),
                chunk({"reasoning": " syllables."}),
                chunk({"content": "Whisper of"}),
                STOP,
            ]
        },
        ends=completed({**SAYS, "reasoning": "Five syllables."}),
    ),
    Quirk(
        name="vllm-error-event",
        script={
            "chunks": [
                *TEXT,
                {"error": {"message": "No.", "type": "BadRequestError", "param": None, "code": 400}},
            ]
        },
        deltas=3,
        ends=failed("upstream_error_event", upstream_error={"type": "BadRequestError", "code": "400"}),
    ),
    Quirk(
        name="vllm-old-error-object",
        script={
            "chunks": [
                *TEXT,
                {
                    "object": "error",
                    "message": "No.",
                    "type": "BadRequestError",
                    "param": None,
                    "code": 400,
                },
            ]
        },
        deltas=3,
        ends=failed("upstream_error_event", upstream_error={"type": "BadRequestError", "code": "400"}),
    ),
]

LLAMACPP: Final = [
    Quirk(
        name="llamacpp-stream",
        script={
            "chunks": [
                chunk({"role": "assistant", "content": None}),
                chunk({"content": "Whisper"}),
                chunk({"content": " of"}),
                STOP,
                usage_chunk(timings={"prompt_n": 1, "predicted_n": 2}),
            ]
        },
        ends=completed(SAYS, **FROM_GATEWAY, completion={"timings": {"prompt_n": 1, "predicted_n": 2}}),
    ),
    Quirk(
        name="llamacpp-error-field",
        script=sse(
            "error: "
            + compact(
                {"code": 400, "message": "It exceeds the context size.", "type": "invalid_request_error"}
            ),
            "data: [DONE]",
        ),
        deltas=0,
        ends=failed(
            "upstream_invalid_request", upstream_error={"type": "invalid_request_error", "code": "400"}
        ),
    ),
    Quirk(
        name="llamacpp-done-without-blank-line",
        script={
            "body": "".join(f"data: {compact(event)}\n\n" for event in (bare(SAYS), bare({}, "stop")))
            + "data: [DONE]\n",
            "content_type": EVENT_STREAM,
        },
        deltas=2,
        ends=completed(SAYS),
    ),
]

OLLAMA: Final = [
    Quirk(
        name="ollama-same-index-for-all-calls",
        script={
            "chunks": [
                chunk({"role": "assistant", "content": "", "tool_calls": [call(id_, "write", "{}", index=0)]})
                for id_ in ("call_a", "call_b")
            ]
            + [chunk({"role": "assistant", "content": ""}, "tool_calls")]
        },
        ends=completed(
            {"tool_calls": [call("call_a", "write", "{}"), call("call_b", "write", "{}")]},
            finish_reason="tool_calls",
            outputs=[{"index": 0, "tool_calls": "complete"}],
        ),
    ),
    Quirk(
        name="ollama-calls-without-index",
        script={
            "chunks": [
                chunk(
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [
                            call("call_a", "put", '{"n":1}'),
                            call("call_b", "put", '{"n":2}'),
                        ],
                    }
                ),
                chunk({"role": "assistant", "content": ""}, "stop"),
            ]
        },
        ends=completed(
            {"tool_calls": [call("call_a", "put", '{"n":1}'), call("call_b", "put", '{"n":2}')]},
            outputs=[{"index": 0, "tool_calls": "incomplete"}],
        ),
    ),
    Quirk(
        name="ollama-empty-finish-reason",
        script={
            "chunks": [
                chunk({"role": "assistant", "content": " if"}, ""),
                chunk({"role": "assistant", "content": " you"}, ""),
            ],
            "fault": "cut",
            "after": 2,
        },
        ends={
            "type": "incomplete",
            "incomplete_details": {"reason": "upstream_eof"},
            "completion": {
                "choices": [{"message": {"role": "assistant", "content": " if you"}, "finish_reason": None}]
            },
        },
    ),
]

LITELLM: Final = [
    Quirk(
        name="litellm-ping",
        script=sse(": ping", ": ping", bare(SAYS), ": ping", bare({}, "stop"), "data: [DONE]"),
        deltas=2,
        ends=completed(SAYS, usage_source="estimated"),
    ),
    Quirk(
        name="litellm-usage-beside-a-choice",
        script={
            "chunks": [
                {**HEAD, "choices": [{"index": 0, "delta": SAYS}]},
                {**HEAD, "choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
                {**HEAD, "choices": [{"index": 0, "delta": {}}], "usage": {**USAGE, "cost": 0.5}},
            ]
        },
        ends=completed(SAYS, **FROM_GATEWAY),
    ),
    Quirk(
        name="litellm-code-in-digits",
        script=refusal(
            400,
            {"error": {"message": "No.", "type": None, "param": None, "code": "400"}},
        ),
        deltas=0,
        ends=failed("upstream_invalid_request", status_code=400, upstream_error={"code": "400"}),
    ),
]

OPENROUTER: Final = [
    Quirk(
        name="openrouter-comments",
        script=sse(
            ": OPENROUTER PROCESSING",
            ": OPENROUTER PROCESSING",
            chunk(SAYS, choice={"native_finish_reason": None}, provider="OpenAI"),
            ": OPENROUTER PROCESSING",
            chunk(
                {"role": "assistant", "content": ""},
                "stop",
                choice={"native_finish_reason": "completed"},
                provider="OpenAI",
            ),
            "data: [DONE]",
        ),
        deltas=2,
        ends=completed(
            SAYS,
            choice={"native_finish_reason": "completed"},
            completion={"provider": "OpenAI"},
        ),
    ),
    Quirk(
        name="openrouter-reasoning-details",
        script={
            "chunks": [
                chunk(
                    {
                        "role": "assistant",
                        "content": "",
                        "reasoning": piece,
                        "reasoning_details": [
                            {"type": "reasoning.text", "text": piece, "format": "unknown", "index": 0}
                        ],
                    }
                )
                for piece in ("Five", " syllables.")
            ]
            + [chunk({"content": "Whisper of"}), STOP]
        },
        ends=completed(
            {
                **SAYS,
                "reasoning": "Five syllables.",
                "reasoning_details": [
                    {"type": "reasoning.text", "text": "Five syllables.", "format": "unknown"}
                ],
            }
        ),
    ),
    Quirk(
        name="openrouter-error-in-mid-stream",
        script={
            "chunks": [
                *TEXT,
                chunk(
                    {"content": ""},
                    "error",
                    provider="openai",
                    error={"code": "server_error", "message": "Provider disconnected unexpectedly"},
                ),
            ]
        },
        deltas=3,
        ends=failed(
            "upstream_error_event",
            upstream_error={"code": "server_error"},
            completion={"choices": [{"message": SAYS}]},
        ),
    ),
    Quirk(
        name="openrouter-error-beside-no-choices",
        script={
            "chunks": [
                {
                    **HEAD,
                    "choices": [],
                    "error": {"code": 502, "message": "Provider", "metadata": {"raw": "sk-leak"}},
                }
            ]
        },
        deltas=0,
        ends=failed("upstream_server_error", upstream_error={"code": "502"}),
        hides="sk-leak",
    ),
    Quirk(
        name="openrouter-error-as-answer",
        script={"body": compact({"error": {"code": 429, "message": "Rate limited", "metadata": {}}})},
        deltas=0,
        ends=failed("upstream_rate_limit", upstream_error={"code": "429"}),
    ),
]

DEEPSEEK: Final = [
    Quirk(
        name="deepseek-reasoning",
        script=sse(
            ": keep-alive\n\n\n",
            *(
                bare({"content": content, "reasoning_content": reasoning}, finish_reason, usage=usage)
                for content, reasoning, finish_reason, usage in (
                    (None, "", None, None),
                    (None, "Five syllables.", None, None),
                    ("Whisper of", None, None, None),
                    ("", None, "stop", USAGE),
                )
            ),
            "data: [DONE]",
        ),
        deltas=4,
        ends=completed({**SAYS, "reasoning_content": "Five syllables."}, **FROM_GATEWAY),
    ),
    Quirk(
        name="deepseek-insufficient-system-resource",
        script={"chunks": [*TEXT, chunk(finish_reason="insufficient_system_resource")]},
        ends=failed(
            "upstream_error_event",
            completion={
                "choices": [{"message": SAYS, "finish_reason": "insufficient_system_resource"}],
            },
        ),
    ),
]

GROQ: Final = [
    Quirk(
        name="groq-usage",
        script={
            "chunks": [
                {**ROLE, "x_groq": {"id": "req_1"}},
                chunk({"content": "Whisper of"}),
                chunk(finish_reason="stop", x_groq={"id": "req_1", "usage": USAGE}),
            ]
        },
        ends=completed(SAYS, **FROM_GATEWAY, completion={"x_groq": {"id": "req_1"}}),
    ),
    Quirk(
        name="groq-error-event",
        script=sse(
            bare(SAYS),
            "event: error\ndata: "
            + compact(
                {
                    "error": {
                        "message": "Failed to call a function.",
                        "type": "invalid_request_error",
                        "code": "tool_use_failed",
                        "failed_generation": "<function=sk-leak>",
                        "status_code": 400,
                    }
                }
            ),
        ),
        deltas=1,
        ends=failed(
            "upstream_error_event",
            upstream_error={"type": "invalid_request_error", "code": "tool_use_failed"},
        ),
        hides="sk-leak",
    ),
    Quirk(
        name="groq-stopped-early",
        script={"chunks": [*TEXT, {**HEAD, "choices": [], "x_groq": {"error": "over capacity"}}]},
        ends={
            "type": "incomplete",
            "incomplete_details": {"reason": "upstream_eof"},
            "completion": {"choices": [{"message": SAYS}]},
        },
    ),
]

MISTRAL: Final = [
    Quirk(
        name="mistral-thinking-parts",
        script={
            "chunks": [
                ROLE,
                *(
                    chunk({"content": [{"type": "thinking", "thinking": [{"type": "text", "text": piece}]}]})
                    for piece in ("Five", " syllables.")
                ),
                chunk({"content": [{"type": "text", "text": "Whisper"}]}),
                chunk({"content": [{"type": "text", "text": " of"}]}),
                STOP,
            ]
        },
        ends=completed(
            {
                "role": "assistant",
                "content": [
                    {"type": "thinking", "thinking": [{"type": "text", "text": "Five syllables."}]},
                    {"type": "text", "text": "Whisper of"},
                ],
            }
        ),
    ),
    Quirk(
        name="mistral-padding",
        script={
            "chunks": [{**piece, "p": "abcdefgh"[:i]} for i, piece in enumerate((*TEXT, STOP), 1)]
            + [chunk(usage=USAGE, p="z")]
        },
        ends=completed(SAYS, **FROM_GATEWAY),
        lacks=("p",),
    ),
    Quirk(
        name="mistral-finish-reason-error",
        script={"chunks": [*TEXT, chunk(finish_reason="error")]},
        ends=failed("upstream_error_event", completion={"choices": [{"message": SAYS}]}),
    ),
    Quirk(
        name="mistral-model-length",
        script={"chunks": [*TEXT, chunk(finish_reason="model_length")]},
        ends={
            "type": "incomplete",
            "incomplete_details": {"reason": "length"},
            "completion": {"choices": [{"message": SAYS, "finish_reason": "model_length"}]},
        },
    ),
    Quirk(
        name="mistral-extra-forbidden",
        script=refusal(
            422,
            {
                "detail": [
                    {
                        "type": "extra_forbidden",
                        "loc": ["body", "stream_options", "include_usage"],
                        "msg": "Extra inputs are not permitted",
                        "input": True,
                    }
                ]
            },
        ),
        deltas=0,
        ends=failed("upstream_invalid_request", status_code=422),
    ),
]

_SIGNATURE: Final = {"extra_content": {"google": {"thought_signature": "c2ln"}}}
GEMINI: Final = [
    Quirk(
        name="gemini-calls-without-index",
        script={
            "chunks": [
                chunk({"role": "assistant", "tool_calls": [call("call_1", "read", '{"n":1}', **_SIGNATURE)]}),
                chunk({"role": "assistant", "tool_calls": [call("call_2", "read", '{"n":2}')]}),
                chunk({"role": "assistant"}, "stop"),
            ]
        },
        ends=completed(
            {
                "tool_calls": [
                    call("call_1", "read", '{"n":1}', **_SIGNATURE),
                    call("call_2", "read", '{"n":2}'),
                ]
            },
            outputs=[{"index": 0, "tool_calls": "incomplete"}],
        ),
    ),
    Quirk(
        name="gemini-pieces-without-index",
        script={
            "chunks": [
                chunk({"role": "assistant", "tool_calls": [call("call_1", "read", '{"n"')]}),
                chunk({"tool_calls": [{"id": "", "function": {"arguments": ":1"}, "type": ""}]}),
                chunk({"tool_calls": [{"function": {"arguments": "}"}}]}),
                chunk(finish_reason="tool_calls"),
            ]
        },
        ends=completed(
            {"tool_calls": [call("call_1", "read", '{"n":1}')]},
            finish_reason="tool_calls",
            outputs=[{"index": 0, "tool_calls": "complete"}],
        ),
    ),
    Quirk(
        name="gemini-error-in-array",
        script=refusal(
            400,
            [
                {
                    "error": {
                        "code": 400,
                        "message": 'Unknown name "reasoning": Cannot find field.',
                        "status": "INVALID_ARGUMENT",
                        "details": [],
                    }
                }
            ],
        ),
        deltas=0,
        ends=failed(
            "upstream_invalid_request",
            status_code=400,
            upstream_error={"code": "400"},
            error={
                "code": "upstream_invalid_request",
                "message": 'the gateway refuses the request: Unknown name "reasoning": Cannot find field.',
            },
        ),
    ),
]

OTHERS: Final = [
    Quirk(
        name="together-stream",
        script={
            "chunks": [
                chunk(
                    {"token_id": token, "role": "assistant", "content": text},
                    finish_reason,
                    choice={"text": text, "seed": None, "logprobs": None},
                    usage=usage,
                )
                for token, text, finish_reason, usage in (
                    (9906, "Whisper", None, None),
                    (0, " of", None, None),
                    (128009, "", "stop", USAGE),
                )
            ]
        },
        ends=completed(SAYS, **FROM_GATEWAY),
    ),
    Quirk(
        name="moonshot-usage-in-choice",
        script={"chunks": [*TEXT, chunk(finish_reason="stop", choice={"usage": USAGE})]},
        ends=completed(SAYS, **FROM_GATEWAY),
    ),
    Quirk(
        name="minimax-whole-message-at-the-end",
        script={
            "chunks": [
                chunk({"role": "", "content": "Whisper"}),
                chunk({"role": "assistant", "content": " of"}, "stop"),
                {
                    **HEAD,
                    "object": "chat.completion",
                    "choices": [{"index": 0, "finish_reason": "stop", "message": SAYS}],
                    "usage": USAGE,
                    "base_resp": {"status_code": 0, "status_msg": ""},
                },
            ]
        },
        ends=completed(SAYS, **FROM_GATEWAY),
    ),
    Quirk(
        name="minimax-error-as-answer",
        script={"body": compact({"base_resp": {"status_code": 1004, "status_msg": "not authorized"}})},
        deltas=0,
        ends=failed("upstream_not_streaming", status_code=200),
    ),
    Quirk(
        name="qwen-empty-ids",
        script={
            "chunks": [
                chunk({"role": "assistant", "tool_calls": [call("call_1", "search", "", index=0)]}),
                chunk({"tool_calls": [call("", "", '{"q":', index=0)]}),
                chunk({"tool_calls": [{"index": 0, "function": {"name": None, "arguments": None}}]}),
                chunk({"tool_calls": [call("", "", "1}", index=0)]}, "tool_calls"),
            ]
        },
        ends=completed(
            {"tool_calls": [call("call_1", "search", '{"q":1}')]},
            finish_reason="tool_calls",
            outputs=[{"index": 0, "tool_calls": "complete"}],
        ),
    ),
    Quirk(
        name="perplexity-citations",
        script={
            "chunks": [
                {
                    **chunk({"content": piece}, finish_reason),
                    "citations": ["https://example.com/a", "https://example.com/b"],
                    "usage": {**USAGE, "completion_tokens": tokens, "total_tokens": 9 + tokens},
                }
                for piece, finish_reason, tokens in (("Whisper", None, 2), (" of", "stop", 4))
            ]
        },
        ends=completed(
            SAYS,
            **FROM_GATEWAY,
            completion={"citations": ["https://example.com/a", "https://example.com/b"]},
        ),
    ),
    Quirk(
        name="cloudflare-choice-without-index",
        script={
            "chunks": [
                {**HEAD, "choices": [{"delta": {"content": "Whisper"}}]},
                {**HEAD, "choices": [{"delta": {"content": " of"}}]},
                {**HEAD, "choices": [{"delta": {}, "finish_reason": "stop"}]},
            ]
        },
        ends=completed(SAYS, choice={"index": 0}),
    ),
    Quirk(
        name="tgi-eos-token-without-done",
        script={"chunks": [*TEXT, chunk(finish_reason="eos_token")], "fault": "no_done"},
        ends=completed(SAYS, finish_reason="eos_token"),
    ),
    Quirk(
        name="sglang-refusal-as-event",
        asks={"max_retries": 3},
        script={
            "chunks": [
                {
                    "error": {
                        "object": "error",
                        "message": "The input is longer than the context.",
                        "type": "BadRequestError",
                        "param": None,
                        "code": 400,
                    }
                }
            ]
        },
        deltas=0,
        ends=failed("upstream_invalid_request", upstream_error={"type": "BadRequestError", "code": "400"}),
    ),
    Quirk(
        name="lmstudio-error",
        script=sse(bare(SAYS), {"error": {"message": "Compute error."}, "message": "Compute error."}),
        deltas=1,
        ends=failed("upstream_error_event"),
    ),
    Quirk(
        name="fireworks-performance-metrics",
        script={
            "chunks": [
                *TEXT,
                chunk(finish_reason="stop", usage=USAGE, perf_metrics={"server-time-to-first-token": "0.1"}),
            ]
        },
        ends=completed(
            SAYS, **FROM_GATEWAY, completion={"perf_metrics": {"server-time-to-first-token": "0.1"}}
        ),
    ),
    Quirk(
        name="portkey-event-after-done",
        script=sse(
            ": L1Gt0UZWbB",
            bare(SAYS, "stop"),
            "data: [DONE]",
            {"hook_results": {"after_request_hooks": []}},
        ),
        deltas=1,
        ends=completed(SAYS),
    ),
    Quirk(
        name="anthropic-ignores-response-format",
        asks={"response_format": {"type": "json_object"}},
        script={"chunks": [*TEXT, STOP]},
        ends=completed(SAYS, outputs=[{"index": 0, "parsed": None, "parse_error": {"reason": "not_json"}}]),
    ),
]

QUIRKS: Final = [
    *INFINITYBLUE,
    *OPENAI,
    *AZURE,
    *VLLM,
    *LLAMACPP,
    *OLLAMA,
    *LITELLM,
    *OPENROUTER,
    *DEEPSEEK,
    *GROQ,
    *MISTRAL,
    *GEMINI,
    *OTHERS,
]
