"""What HTTP requests carry, read with bounds: a JSON body, a key that names the job."""

from typing import Any, Final

import msgspec
from starlette.requests import Request

from deltawire.errors import WireError

from .limits import Limits

MAX_KEY_CHARACTERS: Final = 255


def idempotency_key(request: Request) -> str | None:
    """Raises WireError."""
    key = request.headers.get("idempotency-key")
    if key is not None and not 0 < len(key) <= MAX_KEY_CHARACTERS:
        raise WireError(
            "invalid_request", "an Idempotency-Key has 1 to 255 characters", param="Idempotency-Key"
        )
    return key


def sequence_number(name: str, text: str) -> int:
    """The number in a header or query. Raises WireError that names it."""
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise WireError("invalid_request", f"{name} must be a sequence number", param=name)
    return int(text)


async def json_object(request: Request, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The body. Raises WireError for another media type (a form on another site, say), size or shape."""
    body = bytearray()
    limits: Limits = request.app.state.limits
    limits.check_body(int(request.headers.get("content-length") or 0))
    async for piece in request.stream():
        body += piece
        limits.check_body(len(body))
    if not body and may_be_empty:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise WireError("unsupported_media_type", "send Content-Type: application/json")
    if request.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise WireError("unsupported_media_type", "send the body as it is: no Content-Encoding is taken")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("invalid_request", "the body must be a JSON object")
    return value
