"""The WebSocket door: many jobs on one socket, or one job on its own (PROTOCOL.md §6).

The websockets library does the handshake, frames in, pings and closing. Events go out past it, as ready
frames, straight to the transport; what it keeps is checked before each such write.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Any, Final, assert_never
from urllib.parse import urlsplit

import msgspec
from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed
from websockets.http11 import Request, Response
from websockets.protocol import State
from websockets.server import ServerProtocol

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

from .auth import Gate, Principal, bearer_token
from .flow import StallWatch, limit_buffers
from .frames import PING, message_frame
from .hubs import Hubs
from .inbound import decode_message, envelope, one_job, subscription
from .jobs import Jobs, check_job_id
from .subscriber import Subscriber
from .tail import Batch

SUBPROTOCOL: Final = "deltawire.v1"
AUTHENTICATION_TIMEOUT_S: Final = 10.0
HEARTBEAT_S: Final = 15.0
MAX_MESSAGE_BYTES: Final = 65_536
MAX_TASKS: Final = 32
# A client is not heard while more than this waits for it.
MAX_UNTAKEN_BYTES: Final = 65_536

_log = logging.getLogger(__name__)


class WebSocketDoor:
    """Makes a protocol for each upgraded connection, as `uvicorn.Config(ws=…)` wants, and owns them all."""

    # What ServerConnection asks of its server.
    logger = logging.getLogger("websockets.server")

    def __init__(self, gate: Gate, hubs: Hubs, jobs: Jobs) -> None:
        self.gate = gate
        self.hubs = hubs
        self.jobs = jobs
        self.handler_tasks: set[asyncio.Task[None]] = set()
        self.connections: set[Connection] = set()
        self._is_serving = True

    def __call__(self, **_: Any) -> "Connection":  # uvicorn's config and state, of no use here
        return Connection(self)

    def is_serving(self) -> bool:
        return self._is_serving

    async def handler(self, connection: ServerConnection) -> None:
        """One connection, from handshake to close."""
        assert isinstance(connection, Connection)  # noqa: S101 - we make no others
        task = asyncio.current_task()
        try:
            await connection.handshake(process_request=check_path)
            if connection.state is State.OPEN:
                self.connections.add(connection)
                await connection.serve()
        except ConnectionClosed:
            pass
        except Exception:  # noqa: BLE001 - the outer edge of a connection
            _log.exception("a WebSocket connection failed")
            await connection.close(CloseCode.INTERNAL, "internal error")
        finally:
            self.connections.discard(connection)
            if task is not None:
                self.handler_tasks.discard(task)
            if connection.state is not State.CLOSED:
                connection.transport.abort()

    async def drain(self, window_s: float) -> None:
        """Says goodbye to all, with delays spread over the window, and closes."""
        self._is_serving = False
        leaving = [asyncio.create_task(connection.leave(window_s)) for connection in self.connections]
        if leaving:
            await asyncio.wait(leaving, timeout=window_s)
        # Some take nothing, not even a goodbye.
        for connection in tuple(self.connections):
            connection.transport.abort()
        if self.handler_tasks:
            await asyncio.wait(self.handler_tasks, timeout=window_s)


def check_path(connection: ServerConnection, request: Request) -> Response | None:
    """A response for a path that is no WebSocket of ours."""
    if one_job(request.path) is None and urlsplit(request.path).path != "/v1/ws":
        return connection.respond(HTTPStatus.NOT_FOUND, "WebSockets live at /v1/ws and /v1/jobs/{id}/ws\n")
    return None


def _choose_subprotocol(_: ServerProtocol, offered: Any) -> Any:  # the library's own NewType of str
    """Ours if offered; a client that offers none is served as well."""
    return SUBPROTOCOL if SUBPROTOCOL in offered else None


class Connection(ServerConnection):
    """One client: its credential, its subscribers, its heartbeat."""

    def __init__(self, door: WebSocketDoor) -> None:
        super().__init__(
            ServerProtocol(select_subprotocol=_choose_subprotocol, max_size=MAX_MESSAGE_BYTES),
            door,  # type: ignore[arg-type] # it has what a connection asks of its server
            ping_interval=None,  # the heartbeat pings, without a task for each connection
            close_timeout=5,
        )
        self._door = door
        self._principal: Principal | None = None
        self._subscriptions: dict[str, tuple[Subscriber, Callable[[], None]]] = {}
        self._one_job: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._heartbeat: asyncio.TimerHandle | None = None
        self._is_deaf = False
        self._heard_at = self.loop.time()

    # What the transport calls.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        limit_buffers(self.transport)
        self._stall = StallWatch(self.transport)

    def data_received(self, data: bytes) -> None:
        self._heard_at = self.loop.time()
        super().data_received(data)
        if self.paused and self.transport.get_write_buffer_size() > MAX_UNTAKEN_BYTES:
            # The library answers each ping, whether or not anybody takes the answers.
            self._is_deaf = True
            self.transport.pause_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._stall.start()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stall.stop()
        if self._is_deaf:
            self._is_deaf = False
            self._heard_at = self.loop.time()
            if not self.recv_messages.paused:
                self.transport.resume_reading()
        for subscriber, _ in tuple(self._subscriptions.values()):
            subscriber.pump()

    def connection_lost(self, exc: Exception | None) -> None:
        if self._heartbeat is not None:
            self._heartbeat.cancel()
        self._stall.stop()
        super().connection_lost(exc)

    # What subscribers call (Sink).

    @property
    def is_writable(self) -> bool:
        return not self.paused and self.protocol.state is State.OPEN

    def write_batch(self, batch: Batch) -> None:
        self._write(batch.websocket)

    def write_message(self, message: msgspec.Struct) -> None:
        self._write(message_frame(message))

    def ended(self, subscriber: Subscriber) -> None:
        self._drop(subscriber.hub.job_id)
        if self._one_job is not None:
            self._close_soon(1000, "the job has ended")

    def refused(self, subscriber: Subscriber, error: WireError) -> None:
        self._drop(subscriber.hub.job_id)
        self._refuse(error, job_id=subscriber.hub.job_id)
        if self._one_job is not None:
            self._close_soon(error.kind.close_code or CloseCode.INTERNAL, error.code)

    def _write(self, frames: bytes) -> None:
        # Ours are the only data frames, and never fragmented, so they may go between any two frames of
        # the library's. After a close frame nothing may (RFC 6455 §5.5.1).
        if self.protocol.state is State.OPEN:
            if self.paused:
                self._stall.wrote(len(frames))
            self.transport.write(frames)

    def _refuse(self, error: WireError, *, job_id: str | None = None, request_id: str | None = None) -> None:
        self.write_message(ErrorMessage(error=error.error, job_id=job_id, request_id=request_id))

    def _close_soon(self, code: int, reason: str) -> None:
        self._spawn(self.close(code, reason), "websocket-close")

    def _spawn(self, coroutine: Coroutine[Any, Any, None], name: str) -> None:
        task = self.loop.create_task(coroutine, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # The conversation.

    async def serve(self) -> None:
        """Until the connection closes. A refusal here is about the connection as a whole and closes it."""
        try:
            assert self.request is not None  # noqa: S101 - the handshake is over
            host = _header(self.request, "Host")
            self._door.gate.check_host(host)
            self._door.gate.check_origin(_header(self.request, "Origin"), host)
            await self._authenticate(bearer_token(_header(self.request, "Authorization")))
            self._beat()
            self._one_job = one_job(self.request.path)
            if self._one_job is not None:
                await self._subscribe(subscription(self._one_job, urlsplit(self.request.path).query))
            async for data in self:
                await self._receive(data)
                # A client that asks but does not read is not asked for more.
                await self.drain()
                if len(self._tasks) >= MAX_TASKS:
                    await asyncio.wait(self._tasks, return_when=asyncio.FIRST_COMPLETED)
        except WireError as error:
            self._refuse(error, job_id=self._one_job)
            await self.close(error.kind.close_code or CloseCode.MALFORMED, error.code)
        except RedisUnavailableError:
            self._refuse(_redis_unavailable(), job_id=self._one_job)
            await self.close(CloseCode.INTERNAL, "redis_unavailable")
        finally:
            for job_id in tuple(self._subscriptions):
                self._drop(job_id)
            for task in self._tasks:
                task.cancel()

    async def _authenticate(self, token: str | None) -> None:
        """By header, else by the first message. Raises WireError."""
        gate = self._door.gate
        if token is not None or not gate.needs_credentials:
            self._principal = gate.authenticate(token)
            return
        try:
            async with asyncio.timeout(AUTHENTICATION_TIMEOUT_S):
                message = decode_message(await self.recv())
        except TimeoutError as error:
            raise WireError("missing_credentials", "no authenticate message came in time") from error
        if not isinstance(message, Authenticate):
            raise WireError("missing_credentials", "the first message must be authenticate")
        self._log_in(message)

    def _log_in(self, message: Authenticate) -> None:
        """Raises WireError."""
        self._principal = self._door.gate.authenticate(message.token)
        self.write_message(Authenticated(expires_at=None, request_id=message.request_id))

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
                self._log_in(message)
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
        self._principal.require("read")
        job_id = check_job_id(message.job_id)
        if message.starting_after < 0:
            raise WireError("invalid_request", "starting_after must be 0 or more", param="starting_after")
        if job_id in self._subscriptions:
            raise WireError(
                "already_subscribed", f"this socket has subscribed to {job_id} already", param="job_id"
            )
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

    def _beat(self) -> None:
        """Every HEARTBEAT_S: positions and a ping. A client that answers none of two is closed (4012)."""
        if self.is_writable and self._heartbeat is not None:
            if self.loop.time() - self._heard_at > 2.5 * HEARTBEAT_S:
                self._close_soon(CloseCode.NO_PONG, "no pong")
                return
            positions = {job_id: entry[0].position for job_id, entry in self._subscriptions.items()}
            self._write(message_frame(Heartbeat(positions=positions)) + PING)
        self._heartbeat = self.loop.call_later(HEARTBEAT_S, self._beat)

    async def leave(self, window_s: float) -> None:
        """`goodbye`, with a delay that spreads the reconnects over the window, then 4001."""
        retry_after_s = round(random.uniform(0, window_s), 3)  # noqa: S311 - jitter
        self.write_message(Goodbye(code=CloseCode.DRAINING, retry_after_s=retry_after_s))
        await self.close(CloseCode.DRAINING, "the relay is restarting")


def _header(request: Request, name: str) -> str | None:
    """A header's value. One that comes twice is joined, as HTTP says, and then fits nothing here."""
    return ", ".join(request.headers.get_all(name)) or None


def _redis_unavailable() -> WireError:
    return WireError("redis_unavailable", "the relay cannot reach Redis; try again", retry_after_s=1.0)
