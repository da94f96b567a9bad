"""A flusher on a connection of ours: a test sees each call that it sends, and answers it."""

import asyncio
from collections.abc import Callable, Iterable
from typing import cast

import hiredis

from deltawire.errors import RedisUnavailableError
from deltawire.keys import Keys
from deltawire.log import AppendCode
from deltawire.options import Options
from deltawire.record import Record
from deltawire.redis_connection import RedisConnection, RedisLink, Reply
from deltawire.scripts import APPEND, REWRITE
from deltawire_worker.flusher import HOLD_S, Flusher
from deltawire_worker.writer import JobWriter

OWNER = "w1"
RECORD = Record(status="in_progress", attempt=3, created_at=1_000.0, tenant="default", options=Options())


class Append:
    """One call of append.lua as it was sent."""

    def __init__(self, command: list[bytes], answer: Callable[[Reply], None]) -> None:
        assert command[:2] == [b"EVALSHA", APPEND.sha.encode()]
        assert command[2] == b"4"
        self.keys = [key.decode() for key in command[3:7]]
        assert command[8] == OWNER.encode()
        self.attempt, self.first, self.ttl_s = int(command[7]), int(command[9]), int(command[10])
        self.terminal = command[11].decode()
        assert command[12] == b"PUBLISH"
        fields_end = 14 + int(command[13])
        words = [word.decode() for word in command[14:fields_end]]
        self.fields = dict(zip(words[::2], words[1::2], strict=True))
        self.events = command[fields_end:]
        self.answer = answer

    def accept(self, code: str = "OK") -> None:
        self.answer([code.encode(), self.first + len(self.events) - 1, 0])

    def refuse(self, code: str) -> None:
        self.answer([code.encode(), self.first - 1, 0])


class Rewrite:
    """One call of rewrite.lua as it was sent."""

    def __init__(self, command: list[bytes], answer: Callable[[Reply], None]) -> None:
        assert command[:3] == [b"EVALSHA", REWRITE.sha.encode(), b"4"]
        self.attempt, self.owner, self.ttl_s = int(command[7]), command[8].decode(), int(command[9])
        self.lease_ms, self.first, self.snapshot = int(command[10]), int(command[12]), command[13]
        fields_end = 15 + int(command[14])
        words = [word.decode() for word in command[15:fields_end]]
        self.fields = dict(zip(words[::2], words[1::2], strict=True))
        self.events = command[fields_end:]
        self.answer = answer

    def accept(self, code: str = "OK") -> None:
        self.answer([code.encode(), self.first + len(self.events) - 1, 0])


class FakeConnection:
    """A connection that answers when the test does."""

    def __init__(self) -> None:
        self.commands: list[list[bytes]] = []
        self.appends: list[Append] = []  # those that have no answer yet, and all others
        self.rewrites: list[Rewrite] = []  # as the appends
        self.answers: list[Callable[[Reply], None]] = []
        self.writes = 0
        self.is_aborted = False
        self.is_open = True

    async def execute(self, *args: str) -> bytes:
        assert args[:2] == ("SCRIPT", "LOAD")
        return b"sha"

    def write(self, packed: bytes, callbacks: Iterable[Callable[[Reply], None]]) -> None:
        if not self.is_open:  # as RedisConnection
            raise RedisUnavailableError("not connected to Redis")
        self.writes += 1
        reader = hiredis.Reader()
        reader.feed(packed)
        for callback in callbacks:
            command = reader.gets()
            self.commands.append(command)
            self.answers.append(callback)
            if command[1] == APPEND.sha.encode():
                self.appends.append(Append(command, callback))
            elif command[1] == REWRITE.sha.encode():
                self.rewrites.append(Rewrite(command, callback))
        assert reader.gets() is False

    @property
    def calls(self) -> list[Append | Rewrite]:
        """Those that have no answer yet."""
        return [*self.appends, *self.rewrites]

    def abort(self) -> None:
        self.is_aborted = True


class Bench:
    """A flusher on a fake connection, with one writer."""

    def __init__(self, *, top: int = 0) -> None:
        self.flusher = Flusher("redis://127.0.0.1:1/0", Keys())
        self.cancels = 0
        self.refusals: list[AppendCode] = []
        self.writer = self.open("job", top=top)
        self.connection: FakeConnection

    def open(self, job_id: str, *, top: int = 0) -> JobWriter:
        def hear() -> None:
            self.cancels += 1

        return self.flusher.open(
            job_id, record=RECORD, owner=OWNER, top=top, on_cancel=hear, on_refused=self.refusals.append
        )

    async def connect(self) -> FakeConnection:
        """As RedisLink does it."""
        self.connection = FakeConnection()
        connection = cast("RedisConnection", self.connection)
        await self.flusher._connected(self._link, connection)
        self._link._connection = connection
        await settle()
        return self.connection

    def lose(self) -> None:
        """As RedisConnection and RedisLink do it: the callbacks first."""
        self.connection.is_open = False
        for call in self.connection.calls:
            call.answer(RedisUnavailableError("lost"))
        self.connection.appends.clear()
        self.connection.rewrites.clear()
        self._link._connection = None

    @property
    def _link(self) -> RedisLink:
        [link] = self.flusher.nodes.links()
        return link

    @property
    def under_way(self) -> Append:
        """The one append that has no answer; it is taken out."""
        [append] = self.connection.appends
        self.connection.appends.clear()
        assert self.connection.rewrites == []
        return append

    @property
    def rewrite_under_way(self) -> Rewrite:
        """As `under_way`."""
        [rewrite] = self.connection.rewrites
        self.connection.rewrites.clear()
        assert self.connection.appends == []
        return rewrite


async def turns() -> None:
    """No time passes."""
    for _ in range(3):
        await asyncio.sleep(0)


async def settle() -> None:
    """Until what waits for other appends has left."""
    await turns()
    await asyncio.sleep(2 * HOLD_S)
    await turns()


async def bench(*, top: int = 0) -> Bench:
    made = Bench(top=top)
    await made.connect()
    return made
