"""The asynchronous client, over HTTP for commands and WebSocket for events."""

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, Iterator
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import urlencode

import httpx
import msgspec
import websockets
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from deltawire.close_codes import may_come_back
from deltawire.codec import type_of
from deltawire.cursor import Cursor
from deltawire.errors import DeltawireError, Error
from deltawire.events import Delta, Event, TerminalEvent
from deltawire.messages import CancelResult, ErrorMessage, Goodbye, ServerMessage, Snapshot

SUBPROTOCOL: Final = "deltawire.v1"
RECONNECT_MAX_S: Final = 5.0
GIVE_UP_AFTER_S: Final = 60.0
MAX_MESSAGE_BYTES: Final = 16_777_216  # a snapshot of a long job

_decoder: Final[msgspec.json.Decoder[Event | ServerMessage]] = msgspec.json.Decoder(Event | ServerMessage)
_log = logging.getLogger(__name__)
_FOR_GOOD: Final = frozenset(range(400, 500)) - {408, 429}
_KNOWN: Final = frozenset(
    str(kind.__struct_config__.tag).encode() for kind in (*Event.__args__, *ServerMessage.__args__)
)


class Job(msgspec.Struct, frozen=True):
    """A job that was taken."""

    id: str
    status: str
    urls: dict[str, str]
    token: str | None = None
    """For a client that is to watch it, or cancel it: see PROTOCOL.md §5.2."""


class JobUnavailableError(DeltawireError):
    """The relay refused, or could not be reached; `error` is what it said, if it said something.

    Where trying again may help, `error.retry_after_s` is when.
    """

    def __init__(self, message: str, error: Error | None = None) -> None:
        super().__init__(message)
        self.error = error


class AsyncClient:
    """One relay, one credential. `base_url` is the relay's address, such as http://127.0.0.1:8080."""

    def __init__(self, base_url: str, *, api_key: str | None = None) -> None:
        self._base_url = base_url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._http = httpx.AsyncClient(base_url=self._base_url, headers=self._headers, timeout=10.0)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def submit(
        self,
        request: dict[str, Any],
        options: dict[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
    ) -> Job:
        """Enqueues a chat.completions body. Raises JobUnavailableError."""
        headers = {"Idempotency-Key": idempotency_key} if idempotency_key else {}
        body = {"request": request} if options is None else {"request": request, "options": options}
        return msgspec.convert(await self._call("POST", "/v1/jobs", body, headers), Job)

    async def retrieve(self, job_id: str) -> dict[str, Any]:
        """The job as GET /v1/jobs/{id} shows it. Raises JobUnavailableError."""
        return await self._call("GET", f"/v1/jobs/{job_id}")

    async def list(self, *, limit: int = 20, after: str = "", status: str = "") -> dict[str, Any]:
        """A page of jobs, as GET /v1/jobs shows it, the latest first. Raises JobUnavailableError."""
        params = {"limit": str(limit), "after": after, "status": status}
        query = urlencode({name: value for name, value in params.items() if value})
        return await self._call("GET", f"/v1/jobs?{query}")

    async def delete(self, job_id: str) -> None:
        """Cancels the job if it runs, and erases all of it. Raises JobUnavailableError."""
        await self._call("DELETE", f"/v1/jobs/{job_id}")

    async def cancel(self, job_id: str, *, reason: str = "client") -> CancelResult:
        """Cancels; returns what that met. Idempotent. Raises JobUnavailableError."""
        answer = await self._call("POST", f"/v1/jobs/{job_id}/cancel", {"reason": reason})
        return msgspec.convert({"type": "cancel_result", "job_id": job_id, **answer}, CancelResult)

    async def events(
        self, job_id: str, *, starting_after: int = 0, merge: bool = False
    ) -> AsyncGenerator[Event | Snapshot]:
        """Every event after `starting_after`, once and in order, to the terminal one.

        With `merge`, text deltas that wait for a slow reader come as one Delta (PROTOCOL.md §6.6).
        Reconnects and resumes by itself, when the relay says. A Snapshot comes only where the log cannot give
        what is missing: it stands for all events up to its number. Raises JobUnavailableError when the relay
        says not to come back, or cannot be reached for GIVE_UP_AFTER_S.
        """
        cursor = Cursor(starting_after)
        failures = 0
        last_heard = asyncio.get_running_loop().time()
        while True:
            wait_s, refusal = 0.0, None
            try:
                async with self._connect(job_id, cursor.position, merge) as connection:
                    while True:
                        message = await _receive(connection)
                        failures, last_heard = 0, asyncio.get_running_loop().time()
                        if isinstance(message, Goodbye):
                            wait_s = message.retry_after_s
                        elif isinstance(message, ErrorMessage):
                            if not message.error.retryable:
                                raise JobUnavailableError(message.error.message, message.error)
                            wait_s, refusal = message.error.retry_after_s or 0.0, message.error
                        elif isinstance(message, Snapshot):
                            cursor.jump(message.sequence_number)
                            yield message
                        elif isinstance(message, Event) and cursor.accept(
                            message.sequence_number, _first_of(message)
                        ):
                            yield message
                            if isinstance(message, TerminalEvent):
                                return
            except (ConnectionClosed, InvalidHandshake, OSError, TimeoutError) as error:
                silent_for_s = asyncio.get_running_loop().time() - last_heard
                if final := _reason_to_give_up(error, silent_for_s, refusal):
                    raise final from error
                wait_s = max(wait_s, _retry_after_s(error))
                if not failures:
                    _log.warning("the connection to the relay was lost; reconnecting")
            failures += 1
            backoff_s = random.uniform(0, min(RECONNECT_MAX_S, 0.1 * 2 ** min(failures, 10)))  # noqa: S311 - jitter
            await asyncio.sleep(max(min(wait_s, GIVE_UP_AFTER_S), backoff_s))

    def _connect(self, job_id: str, position: int, merge: bool) -> connect:
        url = f"ws{self._base_url.removeprefix('http')}/v1/jobs/{job_id}/ws?starting_after={position}"
        if merge:
            url += "&merge=true"
        return connect(
            url,
            subprotocols=[websockets.Subprotocol(SUBPROTOCOL)],
            additional_headers=self._headers,
            compression=None,
            max_size=MAX_MESSAGE_BYTES,
            open_timeout=10,
        )

    async def _call(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None = None,
        headers: dict[str, str] | None = None,
    ) -> dict[str, Any]:
        try:
            response = await self._http.request(method, path, json=body, headers=headers)
        except httpx.TransportError as error:
            raise JobUnavailableError(f"no relay at {self._base_url}: {error}") from error
        if response.is_success:
            answer: dict[str, Any] = response.json()
            return answer
        try:
            said = msgspec.convert(response.json()["error"], Error)
        except (ValueError, KeyError, TypeError) as error:
            raise JobUnavailableError(f"{self._base_url} answered {response.status_code}") from error
        raise JobUnavailableError(said.message, said)


async def _receive(connection: ClientConnection) -> Event | ServerMessage | None:
    """The next message; None for a type that this client does not know, and ignores."""
    line = await connection.recv(decode=False)
    return _decoder.decode(line) if type_of(line) in _KNOWN else None


def _first_of(event: Event) -> int:
    """Where the event begins: several deltas may come as one."""
    if isinstance(event, Delta) and event.first_sequence_number is not msgspec.UNSET:
        return event.first_sequence_number
    return event.sequence_number


def _reason_to_give_up(
    error: Exception, silent_for_s: float, said: Error | None
) -> JobUnavailableError | None:
    """What a lost or refused connection means: None to come back. `said` came before it was closed."""
    if isinstance(error, ConnectionClosed):
        code = error.rcvd.code if error.rcvd else 1006
        if not may_come_back(code):
            why = f": {said.message}" if said is not None else ""
            return JobUnavailableError(f"the relay closed the connection for good ({code}){why}", said)
    elif isinstance(error, InvalidStatus) and error.response.status_code in _FOR_GOOD:
        return JobUnavailableError(f"the relay refused: {error}")
    if silent_for_s > GIVE_UP_AFTER_S:
        return JobUnavailableError(f"the relay cannot be reached: {error}")
    return None


def _retry_after_s(error: Exception) -> float:
    """How long a refused handshake says to wait (RFC 9110 §10.2.3, in seconds); 0 where it does not say."""
    told = error.response.headers.get("Retry-After", "") if isinstance(error, InvalidStatus) else ""
    return float(told) if told.isascii() and told.isdecimal() else 0.0


def text_of(event: Event | Snapshot) -> Iterator[str]:
    """The text that a delta adds to the first choice (or a snapshot holds)."""
    if isinstance(event, Delta):
        choices, key = msgspec.json.decode(event.chunk).get("choices"), "delta"
    elif isinstance(event, Snapshot):
        choices, key = (event.completion or {}).get("choices"), "message"
    else:
        return
    for choice in choices or ():
        if choice.get("index", 0) == 0 and (text := (choice.get(key) or {}).get("content")):
            yield text


__all__ = ["AsyncClient", "Job", "JobUnavailableError", "text_of"]
