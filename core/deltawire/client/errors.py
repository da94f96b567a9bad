"""What a caller of the client may have to handle, as one tree.

DeltawireError
├── JobUnavailableError      the relay refused, or was not reached; `error` is what it said, or None
│   ├── UnreachableError       nobody answered, or the answer never came
│   ├── InvalidRequestError    the request is at fault; `error.param` names the field
│   ├── AuthenticationError    no credential, a wrong one, or one that has expired
│   ├── PermissionDeniedError  the credential may not do that
│   ├── NotFoundError          no such job, or not for this credential
│   ├── RateLimitError         too much; `retry_after_s` says when to come again
│   └── ServerError            the relay's fault, or that of what it stands on
├── JobEndedError            `job.result()`: the job has ended in another way; `result` is what there is
│   ├── JobFailedError         `result.error` says why
│   ├── JobCancelledError      `result.cancel` says by whom
│   └── JobIncompleteError     `result.incomplete_details.reason`: cut off by length, by the gateway, …
├── OutputError              the answer is not what `response_format` asked for; `reason` says why
└── WaitTimeoutError         a TimeoutError as well: the job goes on
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

import httpx
import msgspec
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI

from deltawire.errors import ERRORS, DeltawireError, Error

if TYPE_CHECKING:
    from .result import Result


class JobUnavailableError(DeltawireError):
    """The relay refused, or could not be reached.

    `error` is what it said, if it said something; `status` the answer's HTTP status, if there was one;
    `retry_after_s` in how many seconds to come again, if it said so.
    """

    def __init__(
        self,
        message: str,
        error: Error | None = None,
        *,
        status: int | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.error = error
        self.status = status
        said_s = error.retry_after_s if error is not None else None
        self.retry_after_s = retry_after_s if said_s is None else said_s


class UnreachableError(JobUnavailableError):
    """Nobody answered at the address, or the connection broke before an answer came.

    Then what was asked for may have been done: submit again under the `idempotency_key` that you gave.
    """


class InvalidRequestError(JobUnavailableError):
    """The request is at fault; `error.param` names the field."""


class AuthenticationError(JobUnavailableError):
    """No credential, a wrong one, or one that has expired or was revoked."""


class PermissionDeniedError(JobUnavailableError):
    """The credential may not do that."""


class NotFoundError(JobUnavailableError):
    """There is no such job (any more), or not for this credential."""


class RateLimitError(JobUnavailableError):
    """Too many jobs or connections."""


class ServerError(JobUnavailableError):
    """The relay's fault, or that of what it stands on (Redis, the broker)."""


class JobEndedError(DeltawireError):
    """The job has not completed. `result` is what there is of it."""

    def __init__(self, message: str, result: "Result") -> None:
        super().__init__(message)
        self.result = result


class JobFailedError(JobEndedError):
    """`result.error` says why; `result.error.retryable` whether another job may do better."""


class JobCancelledError(JobEndedError):
    """`result.cancel` says who cancelled it, and when."""


class JobIncompleteError(JobEndedError):
    """`result.incomplete_details.reason` says what cut it off."""


class OutputError(DeltawireError):
    """The answer is not what was asked for. `reason` is one of those of PROTOCOL.md §2.3: `not_valid`, …"""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


class WaitTimeoutError(DeltawireError, TimeoutError):
    """The time that the caller gave was not enough. The job goes on: wait again, or cancel it."""


LOST: Final = (
    ConnectionClosed,
    InvalidHandshake,
    InvalidURI,  # of a redirect
    OSError,  # TimeoutError is one
    EOFError,
    httpx.RequestError,
    JobUnavailableError,
)
"""What ends a connection, or the making of one."""

_BY_TYPE: Final[dict[str, type[JobUnavailableError]]] = {
    "invalid_request_error": InvalidRequestError,
    "authentication_error": AuthenticationError,
    "permission_error": PermissionDeniedError,
    "not_found_error": NotFoundError,
    "rate_limit_error": RateLimitError,
}
_BY_STATUS: Final[dict[int, type[JobUnavailableError]]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    429: RateLimitError,
}
_TYPE_BY_CLOSE_CODE: Final = {int(kind.close_code): kind.type for kind in ERRORS.values() if kind.close_code}


def refusal(error: Error, message: str = "", *, status: int | None = None) -> JobUnavailableError:
    """What the relay said, as an exception."""
    return _BY_TYPE.get(error.type, ServerError)(message or error.message, error, status=status)


def refused(status: int, headers: Mapping[str, str], body: bytes, where: str) -> JobUnavailableError:
    """An HTTP answer that is not a success, ours or a proxy's."""
    try:
        return refusal(msgspec.convert(msgspec.json.decode(body)["error"], Error), status=status)
    except (msgspec.MsgspecError, ValueError, KeyError, TypeError):
        told = headers.get("Retry-After", "")  # RFC 9110 §10.2.3; a date is taken for nothing
        kind = _BY_STATUS.get(status) or (InvalidRequestError if 400 <= status < 500 else ServerError)
        retry_after_s = float(told) if told.isascii() and told.isdecimal() else None
        return kind(f"{where} answered {status}", status=status, retry_after_s=retry_after_s)


def unavailable(error: httpx.RequestError | JobUnavailableError, where: str) -> JobUnavailableError:
    """A try of a command that has failed, as one kind of error."""
    if isinstance(error, JobUnavailableError):
        return error
    made = UnreachableError(f"no relay at {where}: {str(error) or type(error).__name__}")
    made.__cause__ = error
    return made


def read_answer(response: httpx.Response) -> dict[str, Any]:
    """The body of an answer. Raises JobUnavailableError."""
    if not response.is_success:
        raise refused(response.status_code, response.headers, response.content, response.url.host)
    try:
        return msgspec.json.decode(response.content, type=dict[str, Any])
    except (msgspec.DecodeError, ValueError) as error:
        raise ServerError(
            f"{response.url.host} does not answer as a relay does", status=response.status_code
        ) from error


def handshake_refused(error: InvalidStatus, where: str) -> JobUnavailableError:
    """An HTTP answer in the place of a WebSocket."""
    answer = error.response
    return refused(answer.status_code, answer.headers, bytes(answer.body or b""), where)


def closed_for_good(code: int, said: Error | None) -> JobUnavailableError:
    """A WebSocket that was closed with a code that says not to come back; `said` came before it."""
    message = f"the relay closed the connection for good ({code})"
    if said is not None:
        return refusal(said, f"{message}: {said.message}")
    return _BY_TYPE.get(_TYPE_BY_CLOSE_CODE.get(code, ""), ServerError)(message)


def close_code_of(error: ConnectionClosed) -> int:
    """1006 (RFC 6455 §7.1.5): it broke without a word."""
    return error.rcvd.code if error.rcvd else 1006
