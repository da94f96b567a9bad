"""The client for programs with an event loop. `sync_client.py` is its twin, and says more."""

import asyncio
import inspect
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import httpx

from deltawire.events import TerminalEvent
from deltawire.messages import CancelResult

from . import calls
from .async_connections import EventStream, WebSocket
from .calls import Call, Failed, Options, Request, Transport, Tries
from .errors import LOST, JobUnavailableError, NotFoundError, WaitTimeoutError, read_answer, unavailable
from .following import Following, Message
from .job import JobBase
from .reading import Folded, TextReader
from .result import PydanticModel, Result, result_of_event

if TYPE_CHECKING:
    from celery import Celery


class AsyncClient:
    """One relay, one credential; for one event loop. Parameters are those of `Client`.

        async with deltawire.AsyncClient() as client:
            job = await client.submit({"model": "gpt-5.4", "messages": […]})
            async for text in job.text():
                print(text, end="", flush=True)

    A callable `api_key` may return an awaitable.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | Callable[[], str | Awaitable[str]] | None = None,
        celery: "Celery | None" = None,
        transport: Transport = "websocket",
        timeout_s: float = 10.0,
        max_retries: int = 2,
    ) -> None:
        self.base_url = calls.address(base_url)
        self._api_key = calls.default_api_key() if api_key is None else api_key
        self._celery = celery
        self._transport = calls.known(transport)
        self._timeout_s = timeout_s
        self._max_retries = max_retries

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends what is kept open for commands; streams end with their own `async with`, or loop."""
        if "_http" in self.__dict__:
            await self._http.aclose()

    @cached_property
    def _http(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(**calls.http_options(self.base_url, self._timeout_s))

    async def submit(
        self,
        request: Request,
        options: Options | None = None,
        *,
        idempotency_key: str | None = None,
        response_format: type[PydanticModel] | None = None,
    ) -> "AsyncJob":
        """As `Client.submit`. To a broker it sends from a thread, so the loop goes on; cancelled, it may
        have sent.
        """
        body = calls.with_model(request, response_format)
        if self._celery is not None:
            from .celery_door import send

            answer = await asyncio.to_thread(send, self._celery, body, options, idempotency_key)
        else:
            answer = await self._call(calls.submission(body, options, idempotency_key))
        known = calls.accepted(answer, options, self._api_key)
        return AsyncJob(self, **known, response_model=response_format)

    def job(self, job_id: str, *, token: str | None = None) -> "AsyncJob":
        """A handle of a job; asks nobody. `token`: a credential for it, instead of the client's."""
        return AsyncJob(self, job_id, credential=token, renews=callable(self._api_key))

    async def retrieve(self, job_id: str) -> dict[str, Any]:
        """The job as GET /v1/jobs/{id} shows it. Raises JobUnavailableError."""
        return await self._call(calls.retrieval(job_id))

    async def list(self, *, limit: int = 20, after: str = "", status: str = "") -> dict[str, Any]:
        """A page of jobs, as GET /v1/jobs shows it, the latest first. Raises JobUnavailableError."""
        return await self._call(calls.listing(limit, after, status))

    async def delete(self, job_id: str) -> None:
        """As `Client.delete`."""
        await self._call(calls.deletion(job_id))

    async def cancel(self, job_id: str, *, reason: str = "client") -> CancelResult:
        """As `Job.cancel`."""
        return await self.job(job_id).cancel(reason=reason)

    def events(
        self, job_id: str, *, starting_after: int = 0, merge: bool = False, snapshot: bool = False
    ) -> AsyncGenerator[Message]:
        """As `AsyncJob.events`."""
        return self.job(job_id).events(starting_after, merge=merge, snapshot=snapshot)

    async def _call(self, call: Call, credential: str | None = None) -> dict[str, Any]:
        tries = Tries(call, max_retries=self._max_retries, max_wait_s=self._timeout_s)
        return await self._ask(call, credential, tries.failed)

    async def _ask(self, call: Call, own_credential: str | None, failed: Failed) -> dict[str, Any]:
        while True:
            headers = call.headers_with(await self._credential(own_credential))
            try:
                response = await self._http.request(
                    call.method, call.path, content=call.content, headers=headers
                )
                return read_answer(response)
            except (httpx.RequestError, JobUnavailableError) as error:
                wait_s = failed(unavailable(error, self.base_url))
            if wait_s is None:
                return {}
            await asyncio.sleep(wait_s)

    async def _credential(self, own: str | None) -> str | None:
        if own is not None:
            return own
        made = self._api_key() if callable(self._api_key) else self._api_key
        return await made if inspect.isawaitable(made) else made

    async def _events(self, following: Following, own_credential: str | None) -> AsyncGenerator[Message]:
        connection: WebSocket | EventStream | None = None
        try:
            while not following.is_over:
                try:
                    if connection is None:
                        connection = await self._connect(following, await self._credential(own_credential))
                    line = await connection.receive()
                except LOST as error:
                    if connection is not None:
                        await connection.close()
                        connection = None
                    await asyncio.sleep(following.lost(error, time.monotonic()))
                    continue
                event = following.take(line)
                if event is not None:
                    yield event
        finally:
            if connection is not None:
                await connection.close()

    async def _connect(self, following: Following, credential: str | None) -> WebSocket | EventStream:
        headers = calls.bearer(credential)
        if self._transport == "websocket":
            return await WebSocket.open(self.base_url, following, headers, self._timeout_s)
        return await EventStream.open(self._http, following, headers, self._timeout_s)


class AsyncJob(JobBase):
    """A job's handle. It holds nothing open; make as many as you like."""

    def __init__(self, client: AsyncClient, job_id: str, **known: Any) -> None:
        super().__init__(job_id, **known)
        self._client = client

    def events(
        self, starting_after: int = 0, *, merge: bool = False, snapshot: bool = False
    ) -> AsyncGenerator[Message]:
        """Every event after `starting_after`, once and in order, to the terminal one.

        Reconnects and resumes by itself, when the relay says. A Snapshot stands for all events up to its
        number: it comes first with `snapshot`, else only where the log cannot give what is missing. With
        `merge`, text deltas that wait for a slow reader come as one (PROTOCOL.md §6.6). Raises
        JobUnavailableError when the relay says not to come back, or cannot be reached for a minute.
        """
        following = self._following(starting_after, merge=merge, snapshot=snapshot)
        return self._client._events(following, self._credential)

    async def text(self, starting_after: int = 0) -> AsyncGenerator[str]:
        """The text of the first choice as it grows, to the job's end, whatever that is: see `result`.

        Where a job begins anew (option `restart: always`) so does its text. Raises as `events`.
        """
        reader = TextReader()
        async with aclosing(self.events(starting_after)) as events:
            async for event in events:
                if text := reader.add(event):
                    yield text
                elif isinstance(event, TerminalEvent):
                    self._ended(event)

    def stream(
        self, starting_after: int = 0, *, merge: bool = False, snapshot: bool = False
    ) -> "AsyncStream":
        """The same events, and what they add up to. Connects when it is iterated."""
        return AsyncStream(self, self._following(starting_after, merge=merge, snapshot=snapshot))

    async def wait(
        self, timeout_s: float | None = None, on_event: Callable[[Message], object] | None = None
    ) -> Result:
        """Waits for the job's end, whatever it is. `on_event` is given every event meanwhile, and awaited if
        it is a coroutine function.

        Raises WaitTimeoutError after `timeout_s` seconds, JobUnavailableError as `events` does, and what
        `on_event` raises.
        """
        try:
            async with asyncio.timeout(timeout_s) as scope:
                return await self._wait(on_event)
        except TimeoutError as error:
            if not scope.expired():
                raise
            raise WaitTimeoutError(f"the job has not ended within {timeout_s} s") from error

    async def _wait(self, on_event: Callable[[Message], object] | None) -> Result:
        if self._result is not None and on_event is None:
            return self._result
        is_watched = on_event is not None
        following = self._following(merge=not is_watched, snapshot=not is_watched)
        last: Message | None = None
        async with aclosing(self._client._events(following, self._credential)) as events:
            async for last in events:
                if on_event is not None and inspect.isawaitable(answer := on_event(last)):
                    await answer
        end = last if isinstance(last, TerminalEvent) else None
        if (result := self._ended(end)) is not None:
            return result
        try:
            shown = await self._client._ask(
                calls.retrieval(self.id),
                self._credential,
                lambda error: following.lost(error, time.monotonic()),
            )
        except NotFoundError:  # erased meanwhile
            if end is None:
                raise
            return self._made(result_of_event(end, {}))
        return self._shown(shown)

    async def result(
        self, timeout_s: float | None = None, on_event: Callable[[Message], object] | None = None
    ) -> Result:
        """As `wait`, but raises JobFailedError, JobCancelledError or JobIncompleteError unless completed."""
        return (await self.wait(timeout_s, on_event)).check()

    async def cancel(self, reason: str = "client") -> CancelResult:
        """As `Job.cancel`."""
        answer = await self._client._call(calls.cancellation(self.id, reason), self._credential)
        return calls.cancelled(self.id, answer)

    async def ticket_url(
        self, subject: str | None = None, *, ttl_s: float = 900, snapshot: bool = False
    ) -> str:
        """An address that a page's EventSource can open: this job, to read, for `ttl_s` seconds (up to 900).

        `subject` says whose it is (by default the API key's name), so that it can be revoked; with `snapshot`
        the stream begins with the text so far. Needs a key with the scope `tokens`, of a relay that signs
        tokens (PROTOCOL.md §5.10). Raises JobUnavailableError.
        """
        answer = await self._client._call(calls.ticketing(self.id, subject, ttl_s), self._credential)
        return calls.ticket_url(self._client.base_url, self.urls["events"], answer, snapshot)

    async def retrieve(self) -> dict[str, Any]:
        """The job as GET /v1/jobs/{id} shows it. Raises JobUnavailableError."""
        return await self._client._call(calls.retrieval(self.id), self._credential)


class AsyncStream(Folded):
    """An iterator of a job's events, and what they add up to. As a context manager it ends its connection."""

    def __init__(self, job: AsyncJob, following: Following) -> None:
        super().__init__(following, job._metadata, job._response_model)
        self._events = job._client._events(following, job._credential)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the connection. Idempotent; go on with `job.stream(stream.position)`."""
        await self._events.aclose()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Message:
        event = await anext(self._events)
        self._add(event)
        return event

    async def text(self) -> AsyncGenerator[str]:
        """As `AsyncJob.text`, from here on."""
        reader = TextReader()
        async for event in self:
            if text := reader.add(event):
                yield text
