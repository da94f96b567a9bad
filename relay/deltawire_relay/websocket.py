"""The WebSocket door: many jobs on one socket, or one job on its own (PROTOCOL.md §6)."""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain, cycle
from typing import Any, Final

from .admissions import Admissions
from .auth import Gate
from .conversation import Connection
from .hubs import Hubs
from .jobs import Jobs
from .limits import Address, Limits
from .websocket_protocol import Spare

HEARTBEAT_S: Final = 15.0
TURNS: Final = 60

_log = logging.getLogger(__name__)


class WebSocketDoor:
    """Makes a protocol for each upgraded connection, as `uvicorn.Config(ws=…)` wants, and owns them all."""

    def __init__(
        self, gate: Gate, hubs: Hubs, jobs: Jobs, admissions: Admissions, limits: Limits | None = None
    ) -> None:
        self.gate = gate
        self.hubs = hubs
        self.jobs = jobs
        self.admissions = admissions
        self.limits = limits or Limits()
        self.spare = Spare(self.limits.bounds.max_message_bytes)
        self.is_serving = True
        self._turns: list[set[Connection]] = [set() for _ in range(TURNS)]
        self._last_turn = self._turns[-1]
        self._has_lost = asyncio.Event()

    def __call__(self, peer: Address | None = None, **_: Any) -> Connection:
        """`peer` has been counted, and departs from here; uvicorn's config and state are of no use here."""
        return Connection(self, peer or self.limits.arrive(None))

    def __iter__(self) -> Iterator[Connection]:
        """Those of this moment."""
        return iter([*chain.from_iterable(self._turns)])

    def join(self, connection: Connection) -> set[Connection]:
        """The set from which it is to be discarded at its end."""
        self._last_turn.add(connection)
        return self._last_turn

    async def keep(self) -> None:
        """Until cancelled: each connection's heart beats every HEARTBEAT_S, without a timer of its own."""
        for turn in cycle(self._turns):
            await asyncio.sleep(HEARTBEAT_S / TURNS)
            for connection in tuple(turn):
                try:
                    connection.beat()
                except Exception:  # noqa: BLE001 - one connection is not to end the others
                    _log.exception("a WebSocket's heartbeat failed")
                    connection.transport.abort()
            self._last_turn = turn  # who joins now has a whole round before it

    async def drain(self, window_s: float) -> None:
        """Says goodbye to all, with delays spread over the window, and closes."""
        self.is_serving = False
        for connection in self:
            connection.leave(window_s)
        await self._until_empty(window_s)
        # Some take nothing, not even a goodbye.
        for connection in self:
            connection.transport.abort()
        await self._until_empty(window_s)

    def left(self) -> None:
        """A connection has left its set."""
        self._has_lost.set()

    async def _until_empty(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                while any(self._turns):
                    self._has_lost.clear()
                    await self._has_lost.wait()
