"""How a job is followed, whatever carries its events: what to ask for, what to make of each message, and of
each connection that is lost. No I/O and no clock; the clients are the shells around it.
"""

import logging
import random
from typing import Final
from urllib.parse import quote, urlencode

import msgspec
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI

from deltawire.close_codes import CloseCode, may_come_back
from deltawire.codec import type_of
from deltawire.cursor import Cursor
from deltawire.errors import Error
from deltawire.events import Delta, Event, TerminalEvent
from deltawire.messages import ErrorMessage, Goodbye, ServerMessage, Snapshot, Subscribed

from .errors import (
    AuthenticationError,
    JobUnavailableError,
    ServerError,
    UnreachableError,
    close_code_of,
    closed_for_good,
    handshake_refused,
    refusal,
)

BACKOFF_MAX_S: Final = 5.0
GIVE_UP_AFTER_S: Final = 60.0
SILENCE_S: Final = 40.0
"""A connection on which nothing came for so long is dead: the relay says something every 15 s (§6.3, §7)."""
MAX_MESSAGE_BYTES: Final = 268_435_456  # a snapshot of a long job with logprobs
Message = Event | Snapshot
"""What a caller gets: each event once, or a Snapshot in the place of all events up to its number."""

_TOO_BIG: Final = 1009  # RFC 6455 §7.4.1
_PASSING: Final = frozenset({408, 425, 429})

_decoder: Final[msgspec.json.Decoder[Event | ServerMessage]] = msgspec.json.Decoder(Event | ServerMessage)
_KNOWN: Final = frozenset(
    str(kind.__struct_config__.tag).encode() for kind in (*Event.__args__, *ServerMessage.__args__)
)
_log = logging.getLogger(__name__)


class Following:
    """One reader of one job: its position, and its patience.

    `renews`: the credential is asked for anew at each connection, so that one that has expired is no end.
    """

    def __init__(
        self,
        job_id: str,
        *,
        starting_after: int = 0,
        merge: bool = False,
        snapshot: bool = False,
        renews: bool = False,
    ) -> None:
        self.job_id = job_id
        self.is_over = False
        self._cursor = Cursor(starting_after)
        self._merge = merge
        self._wants_snapshot = snapshot
        self._renews = renews
        self._has_renewed = False
        self._may_miss_events = False  # before the next one
        self._failures = 0  # since something good came
        self._failing_since = 0.0
        self._wait_s = 0.0  # as the relay has asked before it closed
        self._said: Error | None = None  # in the same way

    @property
    def position(self) -> int:
        """The sequence number of the last event that came."""
        return self._cursor.position

    def path(self, door: str) -> str:
        """Where to go on reading: `door` is `ws` or `events`."""
        query: dict[str, str | int] = {"starting_after": self.position}
        if self._wants_snapshot:
            query["mode"] = "snapshot"
        if self._merge:
            query["merge"] = "true"
        return f"{job_path(self.job_id)}/{door}?{urlencode(query)}"

    def take(self, line: bytes) -> Message | None:
        """What a message holds for the caller, in order and once. None: nothing.

        Raises JobUnavailableError where the relay refuses for good.
        """
        try:
            if type_of(line) not in _KNOWN:
                return None  # of a later version
            message = _decoder.decode(line)
        except (ValueError, msgspec.DecodeError) as error:
            raise ServerError(f"this is no message of a relay: {error}") from error
        if isinstance(message, ErrorMessage):
            self._said, self._wait_s = message.error, message.error.retry_after_s or 0.0
            if not (message.error.retryable or message.error.code == "token_expired"):
                raise refusal(message.error)
            return None
        if isinstance(message, Goodbye):
            self._wait_s = message.retry_after_s
            return None
        self._failures, self._has_renewed = 0, False
        if isinstance(message, Subscribed):
            self._may_miss_events = not message.recovered
            return None
        if isinstance(message, Delta):
            first = message.first_sequence_number
            begins = None if first is msgspec.UNSET else first
            return message if self._cursor.accept(message.sequence_number, begins) else None
        if isinstance(message, Snapshot):
            self._cursor.jump(message.sequence_number)
            self._wants_snapshot = self._may_miss_events = False
            return message
        if self._may_miss_events and isinstance(message, TerminalEvent):
            self._cursor.jump(message.sequence_number - 1)  # all that is left of a log that was lost (§6.3)
        if isinstance(message, Event) and self._cursor.accept(message.sequence_number):
            self.is_over = isinstance(message, TerminalEvent)
            return message
        return None

    def lost(self, error: Exception, now: float) -> float:
        """In how many seconds to connect again, after this has ended a connection or its making.

        Raises JobUnavailableError where there is no point in that. `now` is any clock's, in seconds.
        """
        said, self._said = self._said, None
        wait_s, self._wait_s = self._wait_s, 0.0
        if isinstance(error, InvalidStatus):
            error = handshake_refused(error, "the relay")
        if isinstance(error, InvalidURI):  # websockets follows redirects, but not to http
            raise ServerError(f"the relay's address leads elsewhere: {error}") from error
        code = close_code_of(error) if isinstance(error, ConnectionClosed) else 0
        if isinstance(error, ConnectionClosed) and error.sent and error.sent.code == _TOO_BIG:
            raise ServerError(f"a message of more than {MAX_MESSAGE_BYTES} bytes") from error
        if code == CloseCode.TOKEN_EXPIRED or _is(said, "token_expired") or _status_of(error) == 401:
            if self._renews and not self._has_renewed:
                self._has_renewed = True
                return 0.0
            if isinstance(error, JobUnavailableError):
                raise error
            raise refusal(said) if said else AuthenticationError("the token has expired") from error
        if not self.is_over and ((code == 1000 and said is None) or _status_of(error) == 204):
            self.is_over = True  # the job had ended where the caller began (§6.5, §7)
            return 0.0
        if code and not may_come_back(code):
            raise closed_for_good(code, said) from error
        if isinstance(error, JobUnavailableError):
            if not may_pass(error):
                raise error
            wait_s = max(wait_s, error.retry_after_s or 0.0)
        return self._patience(error, wait_s, now)

    def _patience(self, error: Exception, wait_s: float, now: float) -> float:
        if not self._failures:
            self._failing_since = now
            _log.warning("the connection to the relay was lost; reconnecting")
        elif now - self._failing_since > GIVE_UP_AFTER_S:
            raise UnreachableError(f"the relay cannot be reached: {error}") from error
        self._failures += 1
        return max(min(wait_s, GIVE_UP_AFTER_S), backoff_s(self._failures))


def may_pass(error: JobUnavailableError) -> bool:
    """Whether the same may succeed later: as the relay says (PROTOCOL.md §8.1), else by the status."""
    if error.error is not None:
        return error.error.retryable
    return error.status is None or error.status in _PASSING or error.status >= 500


def backoff_s(failures: int) -> float:
    """How long to wait after so many failures in a row, 1 or more: doubled each time, with jitter."""
    return random.uniform(0, min(BACKOFF_MAX_S, 0.1 * 2 ** min(failures, 10)))  # noqa: S311 - jitter


def job_path(job_id: str) -> str:
    """An id may come from a stranger; it is to stay one segment."""
    return f"/v1/jobs/{quote(job_id, safe='')}"


def _is(error: Error | None, code: str) -> bool:
    return error is not None and error.code == code


def _status_of(error: Exception) -> int | None:
    return error.status if isinstance(error, JobUnavailableError) else None
