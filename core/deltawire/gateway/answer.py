"""OpenAI's objects as the gateway sends them: errors, completions, chunks. Pure."""

from typing import Any, Literal

import msgspec
from msgspec import Struct

FINGERPRINT = "fp_de17a31e55"
JSON_TYPE = "application/json"
MODELS = ("deltawire-scripted", "gpt-5.4")

FinishReason = Literal["stop", "length", "tool_calls"]

_ERRORS: dict[int, tuple[str, str | None, str]] = {
    401: ("authentication_error", "invalid_api_key", "Incorrect API key provided."),
    403: ("permission_error", "forbidden", "The key is not allowed to use this model."),
    404: ("not_found_error", "model_not_found", "The model does not exist."),
    408: ("timeout", "request_timeout", "The request took too long."),
    429: ("rate_limit_error", "rate_limit_exceeded", "Rate limit reached. Please try again later."),
    500: ("server_error", None, "The server had an error while processing the request."),
    502: ("server_error", "bad_gateway", "The model's server gave no valid answer."),
    503: ("server_error", "overloaded", "The engine is overloaded. Please try again later."),
    504: ("server_error", "gateway_timeout", "The model's server did not answer in time."),
}


class Reply(Struct, frozen=True, kw_only=True):
    """An answer that is sent whole, `at_s` seconds after the request."""

    status: int
    body: bytes
    content_type: str = JSON_TYPE
    headers: tuple[tuple[str, str], ...] = ()
    at_s: float = 0.0
    deltas: int = 0


class Usage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int

    def encode(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": 0},
            "completion_tokens_details": {"reasoning_tokens": 0},
        }


class Envelope(Struct, frozen=True):
    """What all chunks of one stream have in common. `usage` is null in each chunk if it is to come last."""

    completion_id: str
    created: int
    model: str
    has_usage: bool = False

    def around_choice(self, index: int, *, finish_reason: FinishReason | None = None) -> tuple[bytes, bytes]:
        """The bytes before and after a choice's `delta` object."""
        head = self._open() + b'[{"index":%d,"delta":' % index
        tail = b',"logprobs":null,"finish_reason":' + msgspec.json.encode(finish_reason) + b"}]"
        return head, tail + (b',"usage":null}' if self.has_usage else b"}")

    def usage_chunk(self, usage: Usage) -> bytes:
        return self._open() + b'[],"usage":' + msgspec.json.encode(usage.encode()) + b"}"

    def completion(self, choices: list[dict[str, Any]], usage: Usage) -> bytes:
        """The `chat.completion` that is not streamed."""
        return msgspec.json.encode(
            {
                "id": self.completion_id,
                "object": "chat.completion",
                "created": self.created,
                "model": self.model,
                "choices": choices,
                "usage": usage.encode(),
                "system_fingerprint": FINGERPRINT,
            }
        )

    def _open(self) -> bytes:
        return b'{"id":%b,"object":"chat.completion.chunk","created":%d,"model":%b,%b,"choices":' % (
            msgspec.json.encode(self.completion_id),
            self.created,
            msgspec.json.encode(self.model),
            b'"system_fingerprint":"%b"' % FINGERPRINT.encode(),
        )


def encode_error(
    message: str, *, type_: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> bytes:
    return msgspec.json.encode({"error": {"message": message, "type": type_, "param": param, "code": code}})


def encode_status_error(status: int) -> bytes:
    """The error body that goes with a status."""
    default = _ERRORS[500] if status >= 500 else ("invalid_request_error", None, "The request failed.")
    type_, code, message = _ERRORS.get(status, default)
    return encode_error(message, type_=type_, code=code)


def encode_error_page(status: int) -> bytes:
    """What a proxy in front of a gateway says when the gateway does not."""
    return (
        f"<html>\r\n<head><title>{status} Error</title></head>\r\n<body>\r\n<center><h1>{status} Error</h1>"
        "</center>\r\n<hr><center>deltawire scripted gateway</center>\r\n</body>\r\n</html>\r\n"
    ).encode()


def encode_models(created: int) -> bytes:
    data = [{"id": m, "object": "model", "created": created, "owned_by": "deltawire"} for m in MODELS]
    return msgspec.json.encode({"object": "list", "data": data})
