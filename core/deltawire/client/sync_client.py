"""The client for programs without an event loop: Django, Flask, scripts. `async_client.py` is its twin.

What is to be done is decided elsewhere (`following`, `calls`, `errors`, `reading`); here is the I/O.
"""

import os
import time
from collections.abc import Callable, Generator
from contextlib import closing
from typing import TYPE_CHECKING, Any, Self

import httpx

from deltawire.events import TerminalEvent
from deltawire.messages import CancelResult

from . import calls
from .calls import Call, Failed, Options, Request, Transport, Tries
from .errors import LOST, JobUnavailableError, NotFoundError, read_answer, unavailable
from .following import Following, Message
from .job import JobBase
from .reading import Folded, TextReader
from .result import PydanticModel, Result, result_of_event
from .sync_connections import Deadline, EventStream, WebSocket

if TYPE_CHECKING:
    from celery import Celery


class Client:
    """One relay, one credential. Used by several threads, it opens a connection for each stream.

        with deltawire.Client() as client:
            for text in client.submit({"model": "gpt-5.4", "messages": […]}).text():
                print(text, end="", flush=True)

    - `base_url`: the relay's address; by default DELTAWIRE_PUBLIC_URL, else http://127.0.0.1 with the port
      DELTAWIRE_PORT, or 8080.
    - `api_key`: an API key or a token; by default DELTAWIRE_API_KEY. A callable is asked for it before each
      request and connection, so that a token that expires in mid-stream is replaced unnoticed. Jobs that
      a token has submitted are read by the token that came with them.
    - `celery`: an app whose broker is deltawire's: `submit` sends to it, and needs no relay.
    - `transport`: what streams come by; `sse` where something on the way lets no WebSocket pass.
    - `timeout_s`: seconds for each try of a command, and for each connection to be made.
    - `max_retries`: how often a command is sent again that got no answer, or one that says that it may
      succeed later (429, 5xx): after what the answer asks for, and up to 0.2 s, 0.4 s, … 5 s by itself.
      Where the relay asks for more than `timeout_s` it is not. `submit` makes one job all the same.
    """

    def __init__(
        self,
        base_url: str | None = None,
        *,
        api_key: str | Callable[[], str] | None = None,
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
        self._https: dict[int, httpx.Client] = {}  # by process

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends what is kept open for commands; streams end with their own `with`, or loop."""
        if http := self._https.get(os.getpid()):
            http.close()

    @property
    def _http(self) -> httpx.Client:
        """A forked process has its own: on its parent's connections it would read the parent's answers."""
        pid = os.getpid()
        http = self._https.get(pid)
        if http is None:  # of several threads' the first one stays
            made = httpx.Client(**calls.http_options(self.base_url, self._timeout_s))
            http = self._https.setdefault(pid, made)
        return http

    def submit(
        self,
        request: Request,
        options: Options | None = None,
        *,
        idempotency_key: str | None = None,
        response_format: type[PydanticModel] | None = None,
    ) -> "Job":
        """Enqueues a chat.completions body.

        - `options`: PROTOCOL.md §1.2; durations are seconds.
        - `idempotency_key`: the same key names the same job, so you may submit it again. (What `max_retries`
          repeats has a key of its own.)
        - `response_format`: a pydantic model; its schema goes with the request, and `job.result().parsed` is
          such a model.

        Raises JobUnavailableError; also where a broker does not take the job.
        """
        body = calls.with_model(request, response_format)
        if self._celery is not None:
            from .celery_door import send

            answer = send(self._celery, body, options, idempotency_key)
        else:
            answer = self._call(calls.submission(body, options, idempotency_key))
        known = calls.accepted(answer, options, self._api_key)
        return Job(self, **known, response_model=response_format)

    def job(self, job_id: str, *, token: str | None = None) -> "Job":
        """A handle of a job; asks nobody. `token`: a credential for it, instead of the client's."""
        return Job(self, job_id, credential=token, renews=callable(self._api_key))

    def retrieve(self, job_id: str) -> dict[str, Any]:
        """The job as GET /v1/jobs/{id} shows it. Raises JobUnavailableError."""
        return self._call(calls.retrieval(job_id))

    def list(self, *, limit: int = 20, after: str = "", status: str = "") -> dict[str, Any]:
        """A page of jobs, as GET /v1/jobs shows it, the latest first. Raises JobUnavailableError."""
        return self._call(calls.listing(limit, after, status))

    def delete(self, job_id: str) -> None:
        """Cancels the job if it runs, and erases all of it. Raises JobUnavailableError.

        Where it was sent again, since no answer came, a job that is not there counts as erased.
        """
        self._call(calls.deletion(job_id))

    def cancel(self, job_id: str, *, reason: str = "client") -> CancelResult:
        """As `Job.cancel`."""
        return self.job(job_id).cancel(reason=reason)

    def events(
        self, job_id: str, *, starting_after: int = 0, merge: bool = False, snapshot: bool = False
    ) -> Generator[Message]:
        """As `Job.events`."""
        return self.job(job_id).events(starting_after, merge=merge, snapshot=snapshot)

    def _call(self, call: Call, credential: str | None = None) -> dict[str, Any]:
        tries = Tries(call, max_retries=self._max_retries, max_wait_s=self._timeout_s)
        return self._ask(call, credential, tries.failed, Deadline(None))

    def _ask(
        self, call: Call, own_credential: str | None, failed: Failed, deadline: Deadline
    ) -> dict[str, Any]:
        while True:
            headers = call.headers_with(self._credential(own_credential))
            timeout_s = deadline.limit(self._timeout_s)
            try:
                response = self._http.request(
                    call.method, call.path, content=call.content, headers=headers, timeout=timeout_s
                )
                return read_answer(response)
            except (httpx.RequestError, JobUnavailableError) as error:
                wait_s = failed(unavailable(error, self.base_url))
            if wait_s is None:
                return {}
            time.sleep(deadline.limit(wait_s))

    def _credential(self, own: str | None) -> str | None:
        return own or (self._api_key() if callable(self._api_key) else self._api_key)

    def _events(
        self, following: Following, own_credential: str | None, deadline: Deadline
    ) -> Generator[Message]:
        connection: WebSocket | EventStream | None = None
        try:
            while not following.is_over:
                try:
                    if connection is None:
                        connection = self._connect(following, self._credential(own_credential), deadline)
                    line = connection.receive(deadline)
                except LOST as error:
                    if connection is not None:
                        connection.close()
                        connection = None
                    deadline.limit(0)
                    time.sleep(deadline.limit(following.lost(error, time.monotonic())))
                    continue
                event = following.take(line)
                if event is not None:
                    yield event
        finally:
            if connection is not None:
                connection.close()

    def _connect(
        self, following: Following, credential: str | None, deadline: Deadline
    ) -> WebSocket | EventStream:
        headers, timeout_s = calls.bearer(credential), deadline.limit(self._timeout_s)
        if self._transport == "websocket":
            return WebSocket(self.base_url, following, headers, timeout_s)
        return EventStream(self._http, following, headers, timeout_s, deadline)


class Job(JobBase):
    """A job's handle. It holds nothing open; make as many as you like."""

    def __init__(self, client: Client, job_id: str, **known: Any) -> None:
        super().__init__(job_id, **known)
        self._client = client

    def events(
        self, starting_after: int = 0, *, merge: bool = False, snapshot: bool = False
    ) -> Generator[Message]:
        """Every event after `starting_after`, once and in order, to the terminal one.

        Reconnects and resumes by itself, when the relay says. A Snapshot stands for all events up to its
        number: it comes first with `snapshot`, else only where the log cannot give what is missing. With
        `merge`, text deltas that wait for a slow reader come as one (PROTOCOL.md §6.6). Raises
        JobUnavailableError when the relay says not to come back, or cannot be reached for a minute.
        """
        following = self._following(starting_after, merge=merge, snapshot=snapshot)
        return self._client._events(following, self._credential, Deadline(None))

    def text(self, starting_after: int = 0) -> Generator[str]:
        """The text of the first choice as it grows, to the job's end, whatever that is: see `result`.

        Where a job begins anew (option `restart: always`) so does its text. Raises as `events`.
        """
        reader = TextReader()
        with closing(self.events(starting_after)) as events:
            for event in events:
                if text := reader.add(event):
                    yield text
                elif isinstance(event, TerminalEvent):
                    self._ended(event)

    def stream(self, starting_after: int = 0, *, merge: bool = False, snapshot: bool = False) -> "Stream":
        """The same events, and what they add up to. Connects when it is iterated."""
        return Stream(self, self._following(starting_after, merge=merge, snapshot=snapshot))

    def wait(
        self, timeout_s: float | None = None, on_event: Callable[[Message], object] | None = None
    ) -> Result:
        """Waits for the job's end, whatever it is. `on_event` is given every event meanwhile.

        Raises WaitTimeoutError after `timeout_s` seconds, JobUnavailableError as `events` does, and what
        `on_event` raises.
        """
        if self._result is not None and on_event is None:
            return self._result
        deadline, is_watched = Deadline(timeout_s), on_event is not None
        following = self._following(merge=not is_watched, snapshot=not is_watched)
        last: Message | None = None
        for last in self._client._events(following, self._credential, deadline):
            if on_event is not None:
                on_event(last)
        end = last if isinstance(last, TerminalEvent) else None
        if (result := self._ended(end)) is not None:
            return result
        try:
            shown = self._client._ask(
                calls.retrieval(self.id),
                self._credential,
                lambda error: following.lost(error, time.monotonic()),
                deadline,
            )
        except NotFoundError:  # erased meanwhile
            if end is None:
                raise
            return self._made(result_of_event(end, {}))
        return self._shown(shown)

    def result(
        self, timeout_s: float | None = None, on_event: Callable[[Message], object] | None = None
    ) -> Result:
        """As `wait`, but raises JobFailedError, JobCancelledError or JobIncompleteError unless completed."""
        return self.wait(timeout_s, on_event).check()

    def cancel(self, reason: str = "client") -> CancelResult:
        """Cancels; returns what that met. Idempotent. Raises JobUnavailableError.

        Where it was sent again, since no answer came, `cancelled_from` is None if the job had ended by then,
        and be it by this call; `status` is true in any case.
        """
        answer = self._client._call(calls.cancellation(self.id, reason), self._credential)
        return calls.cancelled(self.id, answer)

    def ticket_url(self, subject: str | None = None, *, ttl_s: float = 900, snapshot: bool = False) -> str:
        """An address that a page's EventSource can open: this job, to read, for `ttl_s` seconds (up to 900).

        `subject` says whose it is (by default the API key's name), so that it can be revoked; with `snapshot`
        the stream begins with the text so far. Needs a key with the scope `tokens`, of a relay that signs
        tokens (PROTOCOL.md §5.10). Raises JobUnavailableError.
        """
        answer = self._client._call(calls.ticketing(self.id, subject, ttl_s), self._credential)
        return calls.ticket_url(self._client.base_url, self.urls["events"], answer, snapshot)

    def retrieve(self) -> dict[str, Any]:
        """The job as GET /v1/jobs/{id} shows it. Raises JobUnavailableError."""
        return self._client._call(calls.retrieval(self.id), self._credential)


class Stream(Folded):
    """An iterator of a job's events, and what they add up to. As a context manager it ends its connection."""

    def __init__(self, job: Job, following: Following) -> None:
        super().__init__(following, job._metadata, job._response_model)
        self._events = job._client._events(following, job._credential, Deadline(None))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection. Idempotent; go on with `job.stream(stream.position)`."""
        self._events.close()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Message:
        event = next(self._events)
        self._add(event)
        return event

    def text(self) -> Generator[str]:
        """As `Job.text`, from here on."""
        reader = TextReader()
        for event in self:
            if text := reader.add(event):
                yield text
