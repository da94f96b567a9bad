"""The errors of deltawire, and the one shape in which they travel.

    DeltawireError
    ├── WireError            has a stable `code`; what a peer is told (HTTP body, frame, `failed` event)
    ├── GapError             a reader was handed events with a hole before them
    ├── JobExpiredError      a queue message names a job whose record is gone
    └── RedisUnavailableError  Redis did not answer within the time allowed

The codes, their HTTP statuses, close codes and whether trying again can help stand in `ERRORS`, once.
PROTOCOL.md §8 is the same table in words.
"""

from typing import Final

import msgspec

from .close_codes import CloseCode

MAX_MESSAGE_CHARACTERS: Final = 1_000


class Error(msgspec.Struct, frozen=True, kw_only=True):
    """The one error shape (OpenAI's fields, plus `retryable` and `retry_after_s`)."""

    message: str
    type: str
    param: str | None = None
    code: str
    retryable: bool
    retry_after_s: float | None = None


class ErrorKind(msgspec.Struct, frozen=True):
    """What a code means. `close_code` is set where the code ends a WebSocket."""

    type: str
    status: int
    retryable: bool = False
    close_code: CloseCode | None = None


_INVALID: Final = "invalid_request_error"
_AUTHENTICATION: Final = "authentication_error"
_PERMISSION: Final = "permission_error"
_NOT_FOUND: Final = "not_found_error"
_RATE_LIMIT: Final = "rate_limit_error"
_SERVER: Final = "server_error"
_UPSTREAM: Final = "upstream_error"

ERRORS: Final[dict[str, ErrorKind]] = {
    # Requests: the peer's to mend.
    "invalid_json": ErrorKind(_INVALID, 400, close_code=CloseCode.MALFORMED),
    "invalid_request": ErrorKind(_INVALID, 400),
    "unknown_option": ErrorKind(_INVALID, 400),
    "unsupported_parameter": ErrorKind(_INVALID, 400),
    "unknown_upstream": ErrorKind(_INVALID, 400),
    "invalid_job_id": ErrorKind(_INVALID, 400),
    "unknown_message_type": ErrorKind(_INVALID, 400),
    "already_subscribed": ErrorKind(_INVALID, 400),
    "not_subscribed": ErrorKind(_INVALID, 400),
    "binary_frame": ErrorKind(_INVALID, 400, close_code=CloseCode.MALFORMED),
    "request_timeout": ErrorKind(_INVALID, 408, retryable=True),
    "request_too_large": ErrorKind(_INVALID, 413),
    "headers_too_large": ErrorKind(_INVALID, 431),
    "unsupported_media_type": ErrorKind(_INVALID, 415),
    "idempotency_conflict": ErrorKind(_INVALID, 422),
    "method_not_allowed": ErrorKind(_INVALID, 405),
    "host_not_allowed": ErrorKind(_INVALID, 421, close_code=CloseCode.FORBIDDEN),
    "missing_credentials": ErrorKind(_AUTHENTICATION, 401, close_code=CloseCode.AUTHENTICATION_TIMEOUT),
    "invalid_credentials": ErrorKind(_AUTHENTICATION, 401, close_code=CloseCode.BAD_TOKEN),
    "token_expired": ErrorKind(_AUTHENTICATION, 401, close_code=CloseCode.TOKEN_EXPIRED),
    "token_revoked": ErrorKind(_AUTHENTICATION, 401, close_code=CloseCode.BAD_TOKEN),
    "forbidden": ErrorKind(_PERMISSION, 403, close_code=CloseCode.FORBIDDEN),
    "origin_not_allowed": ErrorKind(_PERMISSION, 403, close_code=CloseCode.FORBIDDEN),
    "not_found": ErrorKind(_NOT_FOUND, 404),
    "model_not_found": ErrorKind(_NOT_FOUND, 404),
    "unknown_job": ErrorKind(_NOT_FOUND, 404, close_code=CloseCode.UNKNOWN_JOB),
    # Too much: of connections, of messages, of jobs.
    "connection_limit": ErrorKind(_RATE_LIMIT, 429, retryable=True, close_code=CloseCode.CONNECTION_LIMIT),
    "subscription_limit": ErrorKind(_RATE_LIMIT, 429, close_code=CloseCode.SUBSCRIPTION_LIMIT),
    "rate_limited": ErrorKind(_RATE_LIMIT, 429, retryable=True, close_code=CloseCode.RATE_LIMITED),
    "tenant_queue_full": ErrorKind(_RATE_LIMIT, 429, retryable=True),
    "overloaded": ErrorKind(_SERVER, 503, retryable=True, close_code=CloseCode.RATE_LIMITED),
    # Ours, or what we stand on.
    "redis_unavailable": ErrorKind(_SERVER, 503, retryable=True),
    "queue_unavailable": ErrorKind(_SERVER, 503, retryable=True),
    "shutting_down": ErrorKind(_SERVER, 503, retryable=True, close_code=CloseCode.DRAINING),
    "internal_error": ErrorKind(_SERVER, 500, retryable=True, close_code=CloseCode.INTERNAL),
    # How a job can end without its completion.
    "cancelled": ErrorKind(_INVALID, 409),
    "queue_timeout": ErrorKind(_SERVER, 504, retryable=True),
    "worker_lost": ErrorKind(_SERVER, 502, retryable=True),
    "worker_shutdown": ErrorKind(_SERVER, 503, retryable=True),
    "state_lost": ErrorKind(_SERVER, 500, retryable=True),
    "upstream_unreachable": ErrorKind(_UPSTREAM, 502, retryable=True),
    "connect_timeout": ErrorKind(_UPSTREAM, 504, retryable=True),
    "first_delta_timeout": ErrorKind(_UPSTREAM, 504, retryable=True),
    "idle_timeout": ErrorKind(_UPSTREAM, 504, retryable=True),
    "total_timeout": ErrorKind(_UPSTREAM, 504, retryable=True),
    "upstream_eof": ErrorKind(_UPSTREAM, 502, retryable=True),
    "upstream_invalid_request": ErrorKind(_INVALID, 400),
    "upstream_not_found": ErrorKind(_NOT_FOUND, 404),
    "upstream_authentication": ErrorKind(_UPSTREAM, 502),
    "upstream_rate_limit": ErrorKind(_RATE_LIMIT, 429, retryable=True),
    "upstream_quota": ErrorKind(_RATE_LIMIT, 429),
    "upstream_busy": ErrorKind(_UPSTREAM, 503, retryable=True),
    "upstream_server_error": ErrorKind(_UPSTREAM, 502, retryable=True),
    "upstream_error_event": ErrorKind(_UPSTREAM, 502, retryable=True),
    "upstream_malformed": ErrorKind(_UPSTREAM, 502, retryable=True),
    "upstream_not_streaming": ErrorKind(_UPSTREAM, 502),
    "upstream_event_too_large": ErrorKind(_UPSTREAM, 502),
}


class DeltawireError(Exception):
    """Base of all errors raised by deltawire."""


class WireError(DeltawireError):
    """An error with a stable code, as a peer sees it.

    `code` must be a key of `ERRORS`; `param` names the offending field in dotted form.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        status: int | None = None,
    ) -> None:
        # Both may repeat what a peer has sent, lone surrogates (which cannot be encoded) included.
        message = _clean(message[:MAX_MESSAGE_CHARACTERS])
        param = param and _clean(param[:MAX_MESSAGE_CHARACTERS])
        super().__init__(f"{code}: {message}")
        self.kind = ERRORS[code]
        self.status = status or self.kind.status
        self.error = Error(
            message=message,
            type=self.kind.type,
            param=param,
            code=code,
            retryable=self.kind.retryable,
            retry_after_s=retry_after_s,
        )

    @property
    def code(self) -> str:
        return self.error.code


def _clean(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


class GapError(DeltawireError):
    """Events were handed over that do not follow the reader's position."""

    def __init__(self, expected: int, got: int) -> None:
        super().__init__(f"expected event {expected}, got {got}")
        self.expected = expected
        self.got = got


class JobExpiredError(DeltawireError):
    """A queue message names a job that has no record (any more), and cannot or must not make one."""


class RedisUnavailableError(DeltawireError):
    """Redis could not be reached, or did not answer, within the time allowed."""


class RedisRefusedError(RedisUnavailableError):
    """Redis answered with an error: to everybody (out of memory), or because of one key (of another type)."""
