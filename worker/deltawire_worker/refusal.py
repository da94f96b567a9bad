"""What a gateway says when it refuses or fails, as an error of ours. Pure.

Of its page and headers nothing goes further than the status, when to come again, `type`, `code` and `param`
of an error object where they are plain short words, and its message where that is for the caller to mend.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any, Final
from urllib.parse import unquote_plus

import msgspec

from deltawire.errors import ERRORS, WireError
from deltawire.events import UpstreamErrorDetails

from .retry_after import retry_after_s

MAX_MESSAGE_CHARACTERS: Final = 500
PIECE_CHARACTERS: Final = 12

_WORD: Final = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,64}")
_PARAM: Final = re.compile(r"[A-Za-z0-9_.\-\[\]]{1,256}")
# What looks like a key, a token, or an address with a password, whoever's it is.
_SECRET: Final = re.compile(
    r"(?i)\b(?:bearer|basic)\s+[\w.~+/=*-]{6,}"
    r"|\b(?:sk|pk|rk|gsk|xai|hf|key|AIza)[-_*][\w*-]{6,}"
    r"|\beyJ[\w-]{8,}(?:\.[\w-]+)*"
    r"|\b(?:api[-_ ]?key|token|secret|password|authorization)\b[\"']?\s*[:=]\s*[\"']?"
    r"(?:(?:bearer|basic)\s+)?[^\s\"',]{4,}"
    r"|(?<=://)[^\s/@]+@"
)
_OUT_OF_MONEY: Final = frozenset({"insufficient_quota", "billing_hard_limit_reached", "billing_not_active"})
# The status that an error object without one means, under an answer's 200. OpenAI's types, and Google's.
_STATUS_OF_TYPE: Final = {
    "invalid_request_error": 400,
    "INVALID_ARGUMENT": 400,
    "authentication_error": 401,
    "permission_error": 403,
    "not_found_error": 404,
    "rate_limit_error": 429,
    "insufficient_quota": 429,
    "RESOURCE_EXHAUSTED": 429,
}
_CODES: Final = {
    **dict.fromkeys((401, 403), ("upstream_authentication", "the gateway refuses our credentials")),
    402: ("upstream_quota", "our account at the gateway is out of credit"),
    404: ("upstream_not_found", "the gateway does not have what the request names"),
    # Its own time-out, a lock (so do the OpenAI SDKs read a conflict), too early.
    **dict.fromkeys((408, 409, 425), ("upstream_busy", "the gateway could not take the request just now")),
    429: ("upstream_rate_limit", "the gateway's rate limit is reached"),
}
_FOR_THE_CALLER: Final = frozenset({"upstream_invalid_request", "upstream_not_found"})


_NOT_REACHED: Final = frozenset({"connect_timeout", "upstream_unreachable"})


class UpstreamError(WireError):
    """The gateway refused, failed or could not be reached.

    `status_code` is its HTTP status, or the one that its error object names; `details` what that said of
    itself; `should_retry` what `x-should-retry` said, a header that OpenAI's SDKs obey.
    """

    def __init__(
        self,
        code: str,
        message: str,
        *,
        status_code: int | None = None,
        retry_after_s: float | None = None,
        details: UpstreamErrorDetails | None = None,
        should_retry: bool | None = None,
    ) -> None:
        super().__init__(code, message, retry_after_s=retry_after_s)
        self.status_code = status_code
        self.details = details
        self.should_retry = should_retry

    @property
    def is_refusal(self) -> bool:
        """Whether nothing was generated for sure, so that nothing is to be paid."""
        if self.code == "upstream_error_event":
            return False
        return self.code in _NOT_REACHED or self.status_code not in {None, 200}


def refusal(
    status: int, headers: Mapping[str, str], body: bytes, *, secrets: Collection[str] = (), now: float
) -> UpstreamError:
    """The error for an answer that is not 2xx. `secrets` are ours, and in nothing that comes out."""
    error = _error_in(body)
    should_retry = {"true": True, "false": False}.get(headers.get("x-should-retry", ""))
    return _refused(status, error, secrets, retry_after_s(headers, now), should_retry)


def said_in_answer(error: Any, *, secrets: Collection[str] = ()) -> UpstreamError:  # whatever JSON it was
    """The error for an error object in the place of an answer, under a status of 200.

    Where it names a status (OpenRouter's `code`) it is as if the answer had had that.
    """
    status = _status_of(error)
    if status is not None:
        return _refused(status, error, secrets, None, None)
    details = _details(error, secrets)
    message = f"the gateway sent an error instead of an answer{_by_name(details)}"
    return UpstreamError("upstream_error_event", message, details=details)


def said_in_stream(error: Any, *, secrets: Collection[str] = ()) -> UpstreamError:  # as above
    """The error for an error object that comes after chunks. Its text may be for the gateway's operator."""
    details = _details(error, secrets)
    message = f"the gateway sent an error in mid-stream{_by_name(details)}"
    return UpstreamError("upstream_error_event", message, status_code=_status_of(error), details=details)


def error_object(answer: Any) -> Any:  # whatever JSON it was
    """The error in an answer or event that is one; None where it is none.

    OpenAI's `{"error": …}` (an object, or a mere text); the error itself with `object` or `type` "error"
    (Mistral, older vLLM); a list with one of them (Gemini's compatible endpoint).
    """
    if isinstance(answer, list) and len(answer) == 1:
        answer = answer[0]
    if not isinstance(answer, dict):
        return None
    if error := answer.get("error"):
        return error
    return (
        answer if "choices" not in answer and "error" in (answer.get("object"), answer.get("type")) else None
    )


def error_in_chunk(chunk: dict[str, Any]) -> Any:
    """As `error_object`, or the error in one of the chunk's choices (OpenRouter)."""
    error = error_object(chunk)
    choices = chunk.get("choices")
    if error is not None or not isinstance(choices, list):
        return error
    errors = (choice.get("error") for choice in choices if isinstance(choice, dict))
    return next(filter(None, errors), None)


def _error_in(body: bytes) -> Any:
    try:
        answer = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return error_object(answer) or _not_valid(answer)


def _not_valid(answer: Any) -> dict[str, str] | None:
    """FastAPI's answer to a body with wrong fields, which Mistral's and vLLM's are, as an error object."""
    fields = answer.get("detail") if isinstance(answer, dict) else None
    said = []
    for field in fields if isinstance(fields, list) else ():
        where, what = (field.get("loc"), field.get("msg")) if isinstance(field, dict) else (None, None)
        if isinstance(where, list) and isinstance(what, str):
            said.append(f"{'.'.join(map(str, where))}: {what}")
    return {"message": "; ".join(said)} if said else None


def _refused(
    status: int, error: Any, secrets: Collection[str], after_s: float | None, should_retry: bool | None
) -> UpstreamError:
    details = _details(error, secrets)
    if status in _CODES:
        code, message = _CODES[status]
    elif 300 <= status < 400 or status < 200:
        code, message = "upstream_not_streaming", f"the gateway redirects ({status}); its base_url is wrong"
    elif status < 500:
        code, message = "upstream_invalid_request", "the gateway refuses the request"
    else:
        code, message = "upstream_server_error", f"the gateway answered {status}"
    if status == 429 and details and _OUT_OF_MONEY & {details.code, details.type}:
        code, message = _CODES[402]
    if code in _FOR_THE_CALLER and (said := _message(error, secrets)):
        message = f"{message}: {said}"
    may_retry = ERRORS[code].retryable if should_retry is None else should_retry
    return UpstreamError(
        code,
        message,
        status_code=status,
        retry_after_s=after_s if may_retry else None,
        details=details,
        should_retry=should_retry,
    )


def _status_of(error: Any) -> int | None:
    """The status that an error object names: a number as its code (also in quotes), or by its type."""
    if not isinstance(error, dict):
        return None
    for name in ("code", "status", "status_code"):
        value = error.get(name)
        if isinstance(value, str) and re.fullmatch(r"[45][0-9]{2}", value, re.ASCII):
            value = int(value)
        if isinstance(value, int) and 400 <= value < 600:
            return value
    for name in ("code", "type", "status"):
        word = error.get(name)
        if isinstance(word, str) and word in _STATUS_OF_TYPE:
            return _STATUS_OF_TYPE[word]
    return None


def _details(error: Any, secrets: Collection[str]) -> UpstreamErrorDetails | None:
    if not isinstance(error, dict):
        return None

    def word(value: Any, pattern: re.Pattern[str] = _WORD) -> str | None:
        if isinstance(value, int) and not isinstance(value, bool):
            value = str(value)
        is_plain = isinstance(value, str) and pattern.fullmatch(value) and not _SECRET.search(value)
        return value if is_plain and not _holds(value, secrets) else None

    status = error.get("status")
    kind = word(error.get("type")) or (word(status) if isinstance(status, str) else None)
    details = UpstreamErrorDetails(kind, word(error.get("code")), word(error.get("param"), _PARAM))
    return None if details == UpstreamErrorDetails() else details


def _message(error: Any, secrets: Collection[str]) -> str:
    """An error object's message, fit for the caller; empty for anything else, and if it holds our secrets."""
    message = error.get("message") if isinstance(error, dict) else None
    if not isinstance(message, str):
        return ""
    message = message[: 4 * MAX_MESSAGE_CHARACTERS]  # pages may be long
    if _holds(message, secrets):
        return ""
    message = "".join(character if character.isprintable() else " " for character in message)
    return _SECRET.sub("***", message)[:MAX_MESSAGE_CHARACTERS].strip()


def _holds(text: str, secrets: Collection[str]) -> bool:
    """Whether a secret is in it, or so many characters of one in a row: some repeat a key's beginning."""
    texts = (text, unquote_plus(text))
    return any(
        secret[start : start + PIECE_CHARACTERS] in each
        for secret in filter(None, secrets)
        for start in range(max(1, len(secret) - PIECE_CHARACTERS + 1))
        for each in texts
    )


def _by_name(details: UpstreamErrorDetails | None) -> str:
    name = details and (details.code or details.type)
    return f" ({name})" if name else ""
