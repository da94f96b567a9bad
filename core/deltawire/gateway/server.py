"""The gateway as a server: `Gateway` for a running loop, `run` for a process of its own."""

import asyncio
import contextlib
import signal
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Self

from deltawire.gateway.connection import Connection
from deltawire.gateway.desk import Desk
from deltawire.gateway.records import RequestRecord
from deltawire.gateway.wheel import TimerWheel

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8090
DEFAULT_RATE = 20.0
_BACKLOG = 4096  # a thousand clients may come in one moment
_STOP_S = 2.0


class Gateway:
    """A scripted OpenAI-compatible server in the loop that is running.

    `rate` is in content deltas per second and stream, 0 for no limit, and yields to a request's
    `script.rate`. With an `api_key`, `/v1` wants it as a bearer token. `direct` gets the body of each chat
    completion and returns what to take for it, such as the same with a script. Nothing that a request says
    is kept but its model and its `X-Client-Request-Id`. A gateway that was stopped may be started again and
    then listens where it did before; its records are kept.
    """

    def __init__(
        self,
        *,
        host: str = DEFAULT_HOST,
        port: int = 0,
        rate: float = DEFAULT_RATE,
        api_key: str | None = None,
        direct: Callable[[bytes], bytes] = lambda body: body,
    ) -> None:
        if rate < 0:
            raise ValueError("rate must not be negative")
        self._host = host
        self._port = port
        self._desk = Desk(rate=rate, api_key=api_key, direct=direct)
        self._server: asyncio.Server | None = None
        self._wheel: TimerWheel | None = None
        self._is_open = False
        self._connections: set[Connection] = set()
        self._is_empty = asyncio.Event()

    @property
    def port(self) -> int:
        """The port it listens on; what was asked for (perhaps 0) before the first start."""
        return self._port

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes for its `base_url`, ending in /v1."""
        host = {"": "127.0.0.1", "0.0.0.0": "127.0.0.1", "::": "::1"}.get(self._host, self._host)  # noqa: S104
        return f"http://[{host}]:{self._port}/v1" if ":" in host else f"http://{host}:{self._port}/v1"

    @property
    def records(self) -> list[RequestRecord]:
        """The last 10,000 chat completions, newest last: a new list of the live records."""
        return self._desk.ledger.find()

    async def start(self) -> None:
        """Listens when it returns. Raises `OSError` if the address is taken, `RuntimeError` if it runs."""
        if self._is_open:
            raise RuntimeError("the gateway is running already")
        loop = asyncio.get_running_loop()
        self._wheel = wheel = TimerWheel(loop)
        self._is_open = True
        try:
            self._server = await loop.create_server(
                lambda: Connection(self._desk, wheel, on_made=self._hold, on_lost=self._release),
                self._host,
                self._port,
                backlog=_BACKLOG,
            )
        except BaseException:
            self._is_open = False
            raise
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Close the listening socket and all connections, at once; what is under way is cut off.

        Returns when every connection is gone (2 s at most). Does nothing if it does not run.
        """
        if self._server is None or self._wheel is None:
            return
        server, wheel = self._server, self._wheel
        self._server = self._wheel = None
        self._is_open = False
        server.close()
        for connection in tuple(self._connections):
            connection.shut()
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_STOP_S):
                    while self._connections:
                        self._is_empty.clear()
                        await self._is_empty.wait()
                    await server.wait_closed()
        finally:
            wheel.close()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.stop()

    def _hold(self, connection: Connection) -> None:
        self._connections.add(connection)
        if not self._is_open:
            connection.shut()  # accepted just before the stop

    def _release(self, connection: Connection) -> None:
        self._connections.discard(connection)
        if not self._connections:
            self._is_empty.set()


def run(
    *,
    host: str = DEFAULT_HOST,
    port: int = DEFAULT_PORT,
    rate: float = DEFAULT_RATE,
    api_key: str | None = None,
) -> None:
    """Serve until SIGINT or SIGTERM, then stop and return. For the main thread of a process.

    On uvloop where it is installed. Prints one line with the address once it listens. Raises `OSError` if
    it cannot listen there.
    """
    gateway = Gateway(host=host, port=port, rate=rate, api_key=api_key)
    with asyncio.Runner(loop_factory=_find_loop_factory()) as runner:
        runner.run(_serve(gateway))


async def _serve(gateway: Gateway) -> None:
    loop = asyncio.get_running_loop()
    is_told_to_stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, is_told_to_stop.set)
    async with gateway:
        sys.stdout.write(f"deltawire gateway listening on {gateway.base_url}\n")
        sys.stdout.flush()
        await is_told_to_stop.wait()


def _find_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
