"""Subscribers by the thousand in one process: WebSockets with many jobs, with one, and event streams.

They do as PROTOCOL §6.4 says: whatever becomes of the connection, they come back (to the next relay that they
know) with the last number they have. What they see goes into a `Ledger` each.
"""

import asyncio
import itertools
import json
import random
import re
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Any, Final, Self

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, WebSocketException

from deltawire.close_codes import may_come_back
from tests.support.ledger import FaultClock, Ledger

CONNECTING: Final = 50
OPEN_TIMEOUT_S: Final = 30.0
BACKOFF_MAX_S: Final = 1.0
#: PROTOCOL §2: an event (and a snapshot) can be routed by its first bytes.
_EVENT: Final = re.compile(rb'\{"type":"(\w+)","job_id":"([^"]+)","sequence_number":(\d+)[,}]')
_ONE_JOB: Final = "/v1/jobs/%s/ws?starting_after=%d"


class Viewer:
    """One connection, made again and again until all of its jobs are over."""

    def __init__(self, crowd: "Crowd", relays: Iterable[str]) -> None:
        self.crowd = crowd
        self.ledgers: dict[str, Ledger] = {}
        self._relays = itertools.cycle(relays)
        self._wait_s = 0.0

    @property
    def is_over(self) -> bool:
        return all(ledger.is_over for ledger in self.ledgers.values())

    async def run(self) -> None:
        failures = 0
        while not self.is_over:
            before = sum(ledger.events for ledger in self.ledgers.values())
            self._wait_s = 0.0
            try:
                await self.read(next(self._relays))
            except ConnectionClosed as error:
                code = error.rcvd.code if error.rcvd else 1006
                if not may_come_back(code):
                    self.refuse_all(f"close code {code}")
            except (OSError, TimeoutError, WebSocketException, httpx.TransportError):
                pass
            if self.is_over:
                return
            heard = sum(ledger.events for ledger in self.ledgers.values()) > before
            failures = 0 if heard else failures + 1
            self.crowd.reconnects += 1
            backoff_s = random.uniform(0, min(BACKOFF_MAX_S, 0.05 * 2 ** min(failures, 10)))
            await asyncio.sleep(max(self._wait_s, backoff_s))

    async def read(self, relay: str) -> None:
        """Connects, and reads until the connection ends or all jobs are over."""
        raise NotImplementedError

    def hear(self, line: bytes) -> Ledger | None:
        """Notes an event or a message; the ledger, if its job is over now."""
        if not (found := _EVENT.match(line)):
            self._hear_message(json.loads(line))
            return None
        ledger = self.ledgers[found[2].decode()]
        if found[1] == b"snapshot":
            ledger.snapshot(int(found[3]))
            return None
        ledger.event(found[1].decode(), int(found[3]), line)
        self.crowd.events += 1
        return ledger if ledger.is_over else None

    def _hear_message(self, message: dict[str, Any]) -> None:
        kind, ledger = message["type"], self.ledgers.get(message.get("job_id", ""))
        if kind == "subscribed" and ledger:
            ledger.subscribed(recovered=message["recovered"])
        elif kind == "goodbye":
            self._wait_s = message["retry_after_s"]
            self.crowd.goodbyes.append(self._wait_s)
        elif kind == "error":
            error = message["error"]
            self.crowd.errors.append(error["code"])
            if not error["retryable"]:
                for refused in [ledger] if ledger else self.ledgers.values():
                    refused.refused(error["code"])
            elif ledger:
                self.ask_again(ledger, error["retry_after_s"] or BACKOFF_MAX_S)

    def ask_again(self, ledger: Ledger, after_s: float) -> None:
        """A refusal about one job that is worth another try. On its own connection that ends by itself."""
        self._wait_s = after_s

    def refuse_all(self, code: str) -> None:
        for ledger in self.ledgers.values():
            if not ledger.is_over:
                ledger.refused(code)


def _connect(relay: str, path: str) -> connect:
    return connect(
        f"ws://{relay}{path}",
        proxy=None,
        compression=None,
        max_size=None,
        max_queue=None,
        open_timeout=OPEN_TIMEOUT_S,
        ping_interval=None,
        close_timeout=1,
    )


class OneJobViewer(Viewer):
    """`/v1/jobs/{id}/ws`."""

    async def read(self, relay: str) -> None:
        [ledger] = self.ledgers.values()
        async with self.crowd.door:
            connection = await _connect(relay, _ONE_JOB % (ledger.job_id, ledger.position))
        async with connection:
            while not ledger.is_over:
                self.hear(await connection.recv(decode=False))


class ManyJobsViewer(Viewer):
    """`/v1/ws` with any number of jobs, more of which may come later. It stays until it is closed."""

    def __init__(self, crowd: "Crowd", relays: Iterable[str]) -> None:
        super().__init__(crowd, relays)
        self._connection: ClientConnection | None = None
        self._asking: set[asyncio.Task[None]] = set()

    @property
    def is_over(self) -> bool:
        return False

    def subscribe(self, ledgers: Iterable[Ledger]) -> None:
        new = {ledger.job_id: ledger for ledger in ledgers}
        self.ledgers |= new
        if self._connection is not None:
            self._ask(self._connection, new.values())

    async def read(self, relay: str) -> None:
        async with self.crowd.door:
            connection = await _connect(relay, "/v1/ws")
        async with connection:
            self._connection = connection
            try:
                self._ask(connection, self.ledgers.values())
                while True:
                    self.hear(await connection.recv(decode=False))
            finally:
                self._connection = None

    def _ask(self, connection: ClientConnection, ledgers: Iterable[Ledger], after_s: float = 0) -> None:
        """Beside the reading, because a relay lets those wait who ask and do not read."""

        async def ask() -> None:
            await asyncio.sleep(after_s)
            for ledger in tuple(ledgers):
                if not ledger.is_over:
                    message = {
                        "type": "subscribe",
                        "job_id": ledger.job_id,
                        "starting_after": ledger.position,
                    }
                    try:
                        await connection.send(json.dumps(message))
                    except ConnectionClosed:
                        return

        task = asyncio.create_task(ask())
        self._asking.add(task)
        task.add_done_callback(self._asking.discard)

    def ask_again(self, ledger: Ledger, after_s: float) -> None:
        if self._connection is not None:
            self._ask(self._connection, [ledger], after_s)


class StreamViewer(Viewer):
    """`/v1/jobs/{id}/events`, as a browser's EventSource does it."""

    async def read(self, relay: str) -> None:
        [ledger] = self.ledgers.values()
        headers = {"Last-Event-ID": str(ledger.position)} if ledger.position else {}
        url = f"http://{relay}/v1/jobs/{ledger.job_id}/events"
        async with self.crowd.http.stream("GET", url, headers=headers) as response:
            if response.status_code == 204:
                ledger.refused("204")
            elif response.status_code != 200:
                await response.aread()
                self._hear_message({"type": "error", **response.json(), "job_id": ledger.job_id})
            else:
                async for text in response.aiter_lines():
                    if text.startswith("data: ") and self.hear(text[6:].encode()):
                        return


class Crowd:
    """All viewers of a scenario, who know the same relays ("host:port"). Ends them when it is left."""

    def __init__(self, relays: Sequence[str], clock: FaultClock) -> None:
        self.relays = relays
        self.clock = clock
        self.ledgers: list[Ledger] = []
        self.events = 0
        self.reconnects = 0
        self.goodbyes: list[float] = []
        self.errors: list[str] = []
        self.door = asyncio.Semaphore(CONNECTING)
        self.http = httpx.AsyncClient(
            trust_env=False,
            timeout=httpx.Timeout(OPEN_TIMEOUT_S, read=60),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=20),
        )
        self._viewers: list[Viewer] = []
        self._tasks: list[asyncio.Task[None]] = []

    def open_socket(self, job_ids: Iterable[str] = (), *, first: int = 0) -> ManyJobsViewer:
        """One socket for many jobs, which begins at the relay with the number `first`."""
        viewer = ManyJobsViewer(self, self._from(first))
        self.subscribe(viewer, job_ids)
        self._start(viewer)
        return viewer

    def subscribe(self, viewer: ManyJobsViewer, job_ids: Iterable[str]) -> None:
        viewer.subscribe([self._ledger(job_id) for job_id in job_ids])

    def watch(self, job_ids: Iterable[str], kind: type[Viewer] = OneJobViewer, *, first: int = 0) -> None:
        """A connection for each of the jobs."""
        for job_id in job_ids:
            viewer = kind(self, self._from(first))
            viewer.ledgers[job_id] = self._ledger(job_id)
            self._start(viewer)

    def _from(self, first: int) -> Sequence[str]:
        first %= len(self.relays)
        return [*self.relays[first:], *self.relays[:first]]

    def _ledger(self, job_id: str) -> Ledger:
        ledger = Ledger(job_id, self.clock)
        self.ledgers.append(ledger)
        return ledger

    def _start(self, viewer: Viewer) -> None:
        self._viewers.append(viewer)
        self._tasks.append(asyncio.create_task(viewer.run()))

    async def until(self, condition: Callable[[Ledger], bool], timeout_s: float) -> bool:
        """Waits until it holds for every subscription; whether it does."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        while not all(condition(ledger) for ledger in self.ledgers):
            for task in self._tasks:
                if task.done():
                    task.result()  # a viewer that has failed: its bug, or a server's that nobody expected
            if asyncio.get_running_loop().time() > deadline:
                return False
            await asyncio.sleep(0.05)
        return True

    async def over(self, timeout_s: float) -> bool:
        """Waits until every subscription is over."""
        return await self.until(lambda ledger: ledger.is_over, timeout_s)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.http.aclose()
