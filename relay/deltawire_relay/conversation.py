"""One WebSocket client's conversation: who it is, its subscribers, what it asks (PROTOCOL.md §6)."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, assert_never
from urllib.parse import urlsplit

import msgspec
from websockets.http11 import Request

from deltawire.close_codes import CloseCode
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.messages import (
    Authenticate,
    Authenticated,
    Cancel,
    ClientMessage,
    ErrorMessage,
    Goodbye,
    Heartbeat,
    Subscribe,
    Unsubscribe,
    Unsubscribed,
)
from deltawire.tokens import UnknownKeyError

from .auth import Principal, bearer_token
from .frames import PING, message_frame
from .inbound import decode_message, envelope, one_job, subscription, ticket_in
from .jobs import check_job_id
from .limits import Address, Place
from .subscriber import Subscriber
from .tail import Batch
from .websocket_protocol import Refusal, WebSocketProtocol

if TYPE_CHECKING:
    from .websocket import WebSocketDoor

AUTHENTICATION_TIMEOUT_S: Final = 10.0
MAX_TASKS: Final = 32
# A client is not heard while more than this waits for it, or for us.
MAX_UNTAKEN_BYTES: Final = 65_536
MAX_UNANSWERED: Final = 16

_log = logging.getLogger(__name__)


class Connection(WebSocketProtocol):
    """One client: its credential, its subscribers, what it has asked.

    It has a task only while it answers. What is seldom there is None where it is not: ten thousand wait for
    hours.
    """

    via = "websocket"

    __slots__ = (
        "_answering",
        "_door",
        "_full_at",
        "_is_deaf",
        "_is_listening",
        "_is_over",
        "_one_job",
        "_peer",
        "_pings",
        "_place",
        "_principal",
        "_query",
        "_subscriptions",
        "_tasks",
        "_turn",
        "_unanswered",
    )

    def __init__(self, door: "WebSocketDoor", peer: Address) -> None:
        super().__init__(door.spare)
        self._door = door
        self._peer = peer
        self._place: Place | None = None
        self._full_at = 0.0  # see Rate
        self._principal: Principal | None = None
        self._one_job: str | None = None
        self._query = ""
        self._subscriptions: dict[str, tuple[Subscriber, Callable[[], None]]] = {}
        self._unanswered: deque[_Asked] | None = None
        self._answering: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] | None = None
        self._is_over = False  # refused or lost: nothing is answered any more
        self._is_deaf = False  # since the client takes nothing
        self._is_listening = True
        self._pings = 0  # since the client was heard last

    # What the transport calls.

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override] # as uvicorn's
        super().connection_made(transport)
        self._turn = self._door.join(self)

    def data_received(self, data: bytes) -> None:
        self._pings = 0
        super().data_received(data)
        if self.is_paused and self.transport.get_write_buffer_size() > MAX_UNTAKEN_BYTES:
            # The library answers each ping, whether or not anybody takes the answers.
            self._is_deaf = True
            self._listen()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._is_deaf = False
        for subscriber, _ in tuple(self._subscriptions.values()):
            subscriber.pump()
        self._go_on()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._place is not None:
            self._place.release()
        self._door.limits.depart(self._peer)
        self._is_over, self._unanswered = True, None
        self._door.admissions.leave(self)
        for job_id in tuple(self._subscriptions):
            self._drop(job_id)
        for task in (self._answering, *(self._tasks or ())):
            if task is not None:
                task.cancel()
        self._turn.discard(self)
        self._door.left()

    # The handshake.

    def judge(self, request: Request) -> None:
        try:
            is_ours = one_job(request.path) is not None or urlsplit(request.path).path == "/v1/ws"
        except ValueError:  # "//[" and the like
            is_ours = False
        if not is_ours:
            raise Refusal(HTTPStatus.NOT_FOUND, "WebSockets live at /v1/ws and /v1/jobs/{id}/ws\n")
        if not self._door.is_serving:
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, "The relay is shutting down.\n")

    def opened(self, request: Request) -> None:
        """Asks who it is, if no header says so. A refusal is about the whole connection and closes it."""
        self._one_job, self._query = one_job(request.path), urlsplit(request.path).query
        gate, limits = self._door.gate, self._door.limits
        host = _header(request, "Host")
        token = bearer_token(_header(request, "Authorization"))
        ticket = ticket_in(self._query) if token is None and self._one_job is not None else None
        credential = _Credential(token or ticket, is_ticket=ticket is not None)
        try:
            forwarded_for = request.headers.get_all("X-Forwarded-For")
            self._place = limits.enter("websocket", self._peer, forwarded_for)
            gate.check_host(host)
            gate.check_origin(_header(request, "Origin"), host, has_header=token is not None)
            if credential.text is None and gate.needs_credentials:
                self._await_credential()
            else:
                self._begin(gate.authenticate(credential.text, is_ticket=credential.is_ticket))
        except UnknownKeyError:
            self._await_credential()
            self._ask(credential)  # which takes a while
        except WireError as error:
            self._end(error)

    def _await_credential(self) -> None:
        loop = asyncio.get_running_loop()
        self.set_timer(loop.call_later(AUTHENTICATION_TIMEOUT_S, self._lock_out))

    def _lock_out(self) -> None:
        self._end(WireError("missing_credentials", "no authenticate message came in time"))

    def _begin(self, principal: Principal) -> None:
        """Raises WireError."""
        self._count_as(principal)
        self.set_timer(None)
        self._principal = principal
        self._door.admissions.enter(self)
        if self._one_job is not None:
            self._ask(subscription(self._one_job, self._query))
            self._query = ""

    # What the admissions know and call (Holder).

    @property
    def principal(self) -> Principal | None:
        return self._principal

    def put_out(self, error: WireError) -> None:
        if error.kind.close_code is CloseCode.TOKEN_EXPIRED:  # may come back, with another one
            self.write_message(Goodbye(code=CloseCode.TOKEN_EXPIRED, retry_after_s=0.0))
        self._end(error)

    # What subscribers call (Sink).

    def write_batch(self, batch: Batch) -> None:
        if self.is_writable:  # as it is when they call, and then there is nothing else to mind
            self.transport.write(batch.websocket)
        else:
            self.write(batch.websocket)

    def write_message(self, message: msgspec.Struct) -> None:
        self.write(message_frame(message))

    def ended(self, subscriber: Subscriber) -> None:
        self._drop(subscriber.hub.job_id)
        if self._one_job is not None:
            self.close(1000, "the job has ended")

    def refused(self, subscriber: Subscriber, error: WireError) -> None:
        self._drop(subscriber.hub.job_id)
        self._refuse(error, job_id=subscriber.hub.job_id)
        if self._one_job is not None:
            self.close(error.kind.close_code or CloseCode.INTERNAL, error.code)

    # The conversation.

    def heard(self) -> None:
        limits, now = self._door.limits, asyncio.get_running_loop().time()
        full_at = limits.messages.take(self._full_at, now)
        if full_at is not None:
            self._full_at = full_at
        elif not self._is_over:
            error = limits.too_many_messages(self._full_at, now)
            self._is_over, self._unanswered = True, None
            self._refuse(error, job_id=self._one_job)
            self._fail(CloseCode.RATE_LIMITED, error.code)  # it would send on while it is asked to close

    def _count_as(self, principal: Principal) -> None:
        """Raises WireError where that one has too many connections."""
        assert self._place is not None  # noqa: S101 - since it was opened
        self._place.belong_to(principal.counted_as)

    def message_too_large(self) -> None:
        self._door.limits.message_too_large()

    def received(self, message: str | bytes) -> None:
        self._ask(message)

    def _ask(self, message: "_Asked") -> None:
        if not self._is_over:
            if self._unanswered is None:
                self._unanswered = deque()
            self._unanswered.append(message)
            self._go_on()

    @property
    def _may_answer(self) -> bool:
        """A client that asks but does not read is not answered, and so not asked for more."""
        return not (self.is_paused or (self._tasks is not None and len(self._tasks) >= MAX_TASKS))

    def _go_on(self) -> None:
        if self._unanswered and self._answering is None and self._may_answer:
            self._answering = asyncio.create_task(self._answer_all(), name="websocket-answers")
        self._listen()

    def _listen(self) -> None:
        """Reads, unless the client takes nothing, or has asked too much."""
        listens = not self._is_deaf and len(self._unanswered or ()) <= MAX_UNANSWERED
        if listens is not self._is_listening and not self.transport.is_closing():
            self._is_listening = listens
            if listens:
                self.transport.resume_reading()
            else:
                self.transport.pause_reading()

    async def _answer_all(self) -> None:
        """Some of what was asked, one by one; whatever may take long has a task of its own."""
        try:
            for _ in range(MAX_UNANSWERED):  # then others have their turn
                if not (self._unanswered and self._may_answer):
                    break
                await self._answer_one(self._unanswered.popleft())
        except WireError as error:
            self._end(error)
        except RedisUnavailableError:
            self._end(_redis_unavailable(), CloseCode.INTERNAL)
        except Exception:  # noqa: BLE001 - the outer edge of a connection
            tenant = self._principal and self._principal.tenant
            _log.exception("a WebSocket connection failed", extra={"tenant": tenant} if tenant else {})
            self._is_over, self._unanswered = True, None
            self.close(CloseCode.INTERNAL, "internal error")
        finally:
            self._answering = None
            self._unanswered = self._unanswered or None
            self._go_on()

    def _end(self, error: WireError, code: int = CloseCode.MALFORMED) -> None:
        """Says why, closes, and hears nothing more."""
        self._is_over, self._unanswered = True, None
        self._refuse(error, job_id=self._one_job)
        self.close(error.kind.close_code or code, error.code)

    def _refuse(self, error: WireError, *, job_id: str | None = None, request_id: str | None = None) -> None:
        self.write_message(ErrorMessage(error=error.error, job_id=job_id, request_id=request_id))

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = asyncio.create_task(coroutine, name=name)
        if self._tasks is None:
            self._tasks = set()
        self._tasks.add(task)
        task.add_done_callback(self._on_done)

    def _on_done(self, task: asyncio.Task[None]) -> None:
        if self._tasks is not None:
            self._tasks.discard(task)
            self._tasks = self._tasks or None
        self._go_on()

    async def _answer_one(self, asked: "_Asked") -> None:
        if isinstance(asked, Subscribe):
            await self._subscribe(asked)
        elif isinstance(asked, _Credential):
            principal = await self._door.gate.admit(asked.text, is_ticket=asked.is_ticket)
            if not self._is_over:
                self._begin(principal)
        elif self._principal is None:
            message = decode_message(asked)
            if not isinstance(message, Authenticate):
                raise WireError("missing_credentials", "the first message must be authenticate")
            await self._authenticate(message)
        else:
            await self._receive(asked)

    async def _authenticate(self, message: Authenticate) -> None:
        """Lets it in, or goes on with another credential of the same subject. Raises WireError."""
        principal, former = await self._door.gate.admit(message.token), self._principal
        if former is not None and not principal.may_follow(former):
            raise WireError("forbidden", "this socket is another subject's, or another tenant's")
        if self._is_over:
            return
        self._count_as(principal)
        expires_at = None if principal.is_key else principal.expires_at
        self.write_message(Authenticated(expires_at=expires_at, request_id=message.request_id))
        if former is None:
            self._begin(principal)
            return
        self._door.admissions.leave(self)
        self._principal = principal
        self._door.admissions.enter(self)
        for job_id, (subscriber, _) in tuple(self._subscriptions.items()):
            try:
                principal.may(job_id, "read")
            except WireError as error:
                subscriber.refuse(error)

    async def _receive(self, data: str | bytes) -> None:
        """One message. A refusal leaves the socket open, unless the peer does not speak the protocol."""
        message: ClientMessage | None = None
        try:
            message = decode_message(data)
            if isinstance(message, Subscribe):
                await self._subscribe(message)
            elif isinstance(message, Unsubscribe):
                self._unsubscribe(message)
            elif isinstance(message, Cancel):
                self._spawn(self._cancel(message), f"cancel-{message.job_id}")
            elif isinstance(message, Authenticate):
                await self._authenticate(message)
            else:
                assert_never(message)
        except (WireError, RedisUnavailableError) as error:
            refusal = error if isinstance(error, WireError) else _redis_unavailable()
            if (message is None or isinstance(message, Authenticate)) and refusal.kind.close_code is not None:
                raise refusal from error
            said = envelope(data) if message is None else message
            self._refuse(refusal, job_id=getattr(said, "job_id", None), request_id=said.request_id)

    async def _subscribe(self, message: Subscribe) -> None:
        assert self._principal is not None  # noqa: S101 - authenticated before
        job_id = check_job_id(message.job_id)
        self._principal.may(job_id, "read")
        if message.starting_after < 0:
            raise WireError("invalid_request", "starting_after must be 0 or more", param="starting_after")
        if job_id in self._subscriptions:
            raise WireError(
                "already_subscribed", f"this socket has subscribed to {job_id} already", param="job_id"
            )
        self._door.limits.check_subscriptions(len(self._subscriptions))
        hub, release = await self._door.hubs.acquire(job_id)
        subscriber = Subscriber(
            hub,
            self,
            tenant=self._principal.tenant,
            position=message.starting_after,
            merge=message.merge,
        )
        self._subscriptions[job_id] = subscriber, release
        hub.subscribers.add(subscriber)
        if self._one_job is None:
            # It may wait for a log that heals, and other jobs on the socket must not wait with it.
            self._spawn(self._open(subscriber, message), f"open-{job_id}")
        else:
            await subscriber.open(mode=message.mode, request_id=message.request_id)

    async def _open(self, subscriber: Subscriber, message: Subscribe) -> None:
        try:
            await subscriber.open(mode=message.mode, request_id=message.request_id)
        except RedisUnavailableError:
            entry = self._subscriptions.get(message.job_id)
            if entry is not None and entry[0] is subscriber:  # it may have been given up, and made anew
                self._drop(message.job_id)
                self._refuse(_redis_unavailable(), job_id=message.job_id, request_id=message.request_id)

    def _unsubscribe(self, message: Unsubscribe) -> None:
        if message.job_id not in self._subscriptions:
            raise WireError("not_subscribed", f"there is no subscription to {message.job_id}", param="job_id")
        self._drop(message.job_id)
        self.write_message(Unsubscribed(job_id=message.job_id, request_id=message.request_id))

    async def _cancel(self, message: Cancel) -> None:
        assert self._principal is not None  # noqa: S101 - authenticated before
        try:
            result = await self._door.jobs.cancel(
                message.job_id, self._principal, reason=message.reason, request_id=message.request_id
            )
        except (WireError, RedisUnavailableError) as error:
            refusal = error if isinstance(error, WireError) else _redis_unavailable()
            self._refuse(refusal, job_id=message.job_id, request_id=message.request_id)
        else:
            self.write_message(result)

    def _drop(self, job_id: str) -> None:
        if entry := self._subscriptions.pop(job_id, None):
            subscriber, release = entry
            subscriber.close()
            release()

    def beat(self) -> None:
        """Positions and a ping. A client that answers none of two is closed (4012), if we listen to it."""
        if self._principal is None or not self.is_writable:
            return
        if self._pings == 2:
            self.close(CloseCode.NO_PONG, "no pong")
        else:
            self._pings += self._is_listening
            positions = {job_id: entry[0].position for job_id, entry in self._subscriptions.items()}
            self.write(message_frame(Heartbeat(positions=positions)) + PING)

    def leave(self, window_s: float) -> None:
        """`goodbye`, with a delay that spreads the reconnects over the window, then 4001."""
        retry_after_s = round(random.uniform(0, window_s), 3)  # noqa: S311 - jitter
        self.write_message(Goodbye(code=CloseCode.DRAINING, retry_after_s=retry_after_s))
        self.close(CloseCode.DRAINING, "the relay is restarting")


class _Credential(msgspec.Struct, frozen=True):
    """What came with the handshake."""

    text: str | None
    is_ticket: bool


_Asked = str | bytes | Subscribe | _Credential


def _header(request: Request, name: str) -> str | None:
    """A header's value. One that comes twice is joined, as HTTP says, and then fits nothing here."""
    return ", ".join(request.headers.get_all(name)) or None


def _redis_unavailable() -> WireError:
    return WireError("redis_unavailable", "the relay cannot reach Redis; try again", retry_after_s=1.0)
