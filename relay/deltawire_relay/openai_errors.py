"""How a job's end looks to a client of the OpenAI API: as a completion, or as a status and an error. Pure."""

from typing import Final

import msgspec

from deltawire.errors import ERRORS, Error, WireError
from deltawire.events import Cancelled, Completed, Failed, Incomplete, TerminalEvent

from .chat_request import param_here

PASSED_ON: Final = frozenset({400, 404, 409, 413, 422, 429})
"""Statuses of an upstream that its client can do something about: ours gets them as they are."""

_WHOLE: Final = frozenset({"length", "content_filter"})
_CUT_SHORT: Final = {
    "upstream_eof": "the gateway ended the stream before it was complete",
    "idle_timeout": "the gateway fell silent in mid-stream",
    "total_timeout": "the time for this completion is over",
}


class Failure(msgspec.Struct, frozen=True):
    """An error as this door tells it: a status before the headers, the error itself after them, too."""

    status: int
    error: Error

    @classmethod
    def of(cls, error: WireError) -> "Failure":
        return cls(error.status, error.error)


def failure_of(event: TerminalEvent) -> Failure | None:
    """Why a job that has ended so has no completion to show; None: it has one."""
    match event:
        case Completed():
            return None
        case Incomplete():
            reason = event.incomplete_details.reason
            return None if reason in _WHOLE else Failure.of(WireError(reason, _CUT_SHORT[reason]))
        case Cancelled():
            return Failure.of(WireError("cancelled", f"the job was cancelled ({event.cancel.reason})"))
        case Failed():
            return _of_failed(event)


def _of_failed(event: Failed) -> Failure:
    status = ERRORS[event.error.code if event.error.code in ERRORS else "internal_error"].status
    if event.source == "upstream" and event.status_code in PASSED_ON:
        status = event.status_code
    error = msgspec.structs.replace(event.error, param=param_here(event.error.param))
    said = event.upstream_error
    # What an upstream says of our own credentials would read as if it were about the client's.
    if isinstance(said, msgspec.UnsetType) or event.error.code == "upstream_authentication":
        return Failure(status, error)
    error = msgspec.structs.replace(
        error, type=said.type or error.type, code=said.code or error.code, param=said.param or error.param
    )
    return Failure(status, error)
