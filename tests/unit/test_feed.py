"""A feed knows whether what is published reaches it, and mends itself if not (PROTOCOL §4.3, §5.5).

The link is a double whose connections may be half-open, or lead to a server that nobody publishes to; time
is virtual.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from unittest import mock

import hiredis
import pytest

from deltawire import redis_nodes
from deltawire.errors import RedisUnavailableError
from deltawire_relay.feed import PROBE_INTERVAL_S, PROBE_PATIENCE, PROBE_TIMEOUT_S, SUBSCRIBE_NAMES, Feed
from tests.support.virtual_time import virtual_time

PROBE = b"dw:probe:me:0"
RECONNECT_S = 0.1
LATENCY_S = 0.001
FOUND_S = PROBE_INTERVAL_S + PROBE_TIMEOUT_S + 0.1


class FakeConnection:
    """Subscribes to what it is told; what comes through is `redis`' to say."""

    def __init__(self, redis: "FakePubSub") -> None:
        self.redis = redis
        self.is_open = True
        self.channels: set[bytes] = set()
        self.batches: list[int] = []
        self.lost = asyncio.get_running_loop().create_future()

    def push(self, command: str, *names: bytes) -> None:
        if command == "SUBSCRIBE":
            self.batches.append(len(names))
            self.channels.update(names)
        else:
            self.channels.difference_update(names)

    async def execute(self, *_: str) -> None:
        await asyncio.sleep(LATENCY_S)
        if not self.is_open:
            raise RedisUnavailableError("lost")
        if self.redis.on_ping is not None:
            self.redis.on_ping()

    def abort(self) -> None:
        self.is_open = False
        if not self.lost.done():
            self.lost.set_result(None)


class FakePubSub:
    """Makes connections for the feed's link, and answers PUBLISH."""

    def __init__(self) -> None:
        self.connections: list[FakeConnection] = []
        self.is_through = True  # what is published reaches the feed
        self.is_refusing = False  # no new connection
        self.answer: Exception | None = None  # to PUBLISH
        self.is_silent = False  # no answer to PUBLISH
        self.on_ping: Callable[[], None] | None = None
        self.push: Callable[[list[Any]], None] = lambda _: None
        self.read: Callable[[], None] = lambda: None

    @property
    def connection(self) -> FakeConnection:
        return self.connections[-1]

    def publish(self, channel: bytes, payload: bytes) -> None:
        connection = self.connection
        if self.is_through and connection.is_open and channel in connection.channels:
            self.push([b"message", channel, payload])
            self.read()

    async def execute(self, *args: str | bytes | float) -> int:
        await asyncio.sleep(LATENCY_S)
        while self.is_silent:  # noqa: ASYNC110 - on virtual time
            await asyncio.sleep(LATENCY_S)
        if self.answer is not None:
            raise self.answer
        command, channel, payload = args
        assert command == "PUBLISH"
        assert isinstance(channel, bytes)
        self.publish(channel, str(payload).encode())
        return 1


class FakeLink:
    """A RedisLink on a FakePubSub."""

    redis: FakePubSub

    def __init__(
        self, _: str, *, on_connected: Any, on_lost: Any, on_push: Any, on_read: Any, **__: Any
    ) -> None:
        self._on_connected, self._on_lost = on_connected, on_lost
        self.redis.push, self.redis.read = on_push, on_read
        self._current: FakeConnection | None = None
        self._is_up = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @property
    def connection(self) -> FakeConnection | None:
        return self._current if self._current is not None and self._current.is_open else None

    async def connected(self) -> FakeConnection:
        while (connection := self.connection) is None:
            self._is_up.clear()
            await self._is_up.wait()
        return connection

    async def start(self) -> None:
        self._task = asyncio.create_task(self._keep_up())
        await self.connected()

    async def close(self) -> None:
        assert self._task is not None
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _keep_up(self) -> None:
        while True:
            if not self.redis.is_refusing:
                connection = FakeConnection(self.redis)
                self.redis.connections.append(connection)
                try:
                    await self._on_connected(connection)
                    self._current = connection
                    self._is_up.set()
                    await connection.lost
                except RedisUnavailableError:
                    pass
                finally:
                    self._current = None
                    connection.abort()
                    self._on_lost()
            await asyncio.sleep(RECONNECT_S)


class Listening:
    """A listener that notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[bytes | str] = []

    def received(self, payload: bytes) -> None:
        self.heard.append(payload)

    def flush(self) -> None:
        self.heard.append("flush")

    def reconnected(self) -> None:
        self.heard.append("reconnected")


@asynccontextmanager
async def feed_on(redis: FakePubSub) -> AsyncIterator[Feed]:
    link = type("Link", (FakeLink,), {"redis": redis})
    with mock.patch.object(redis_nodes, "RedisLink", link):
        feed = Feed("redis://", redis, "dw:probe:me")
    await feed.start()
    try:
        await asyncio.sleep(0.1)
        yield feed
    finally:
        await feed.close()
        assert asyncio.all_tasks() == {asyncio.current_task()}


@virtual_time
async def test_a_feed_that_hears_itself_is_left_alone() -> None:
    """An hour without a job's message: one connection, always delivering."""
    redis = FakePubSub()
    async with feed_on(redis) as feed:
        for _ in range(3_600):
            assert feed.is_delivering
            assert feed.undelivered_s == 0
            assert feed.unanswered_s <= LATENCY_S  # one may be under way
            await asyncio.sleep(1)
        assert len(redis.connections) == 1


@virtual_time
async def test_a_connection_through_which_nothing_comes_is_made_anew() -> None:
    """Half-open: found in seconds; listeners read what they missed once the next one has proved itself."""
    redis, listener = FakePubSub(), Listening()
    async with feed_on(redis) as feed:
        await feed.subscribe("job", listener)
        redis.is_through = False
        await asyncio.sleep(FOUND_S - RECONNECT_S)
        assert not feed.is_delivering
        assert feed.undelivered_s > PROBE_TIMEOUT_S
        assert listener.heard == []
        redis.is_through = True
        await asyncio.sleep(2 * RECONNECT_S)
        assert feed.is_delivering
        assert listener.heard == ["reconnected"]
        redis.publish(b"job", b"1")
        assert listener.heard == ["reconnected", b"1", "flush"]
        assert len(redis.connections) == 2


@virtual_time
async def test_a_server_that_nobody_publishes_to_is_never_believed() -> None:
    """It takes connections and subscriptions, as a demoted replica does: not delivering, all the time."""
    redis, listener = FakePubSub(), Listening()
    async with feed_on(redis) as feed:
        await feed.subscribe("job", listener)
        redis.is_through = False
        await asyncio.sleep(FOUND_S)
        for second in range(60):
            assert not feed.is_delivering
            assert feed.undelivered_s >= second
            await asyncio.sleep(1)
        assert len(redis.connections) > 10
        assert listener.heard == []


@virtual_time
async def test_commands_that_are_not_answered_do_not_condemn_the_feed() -> None:
    """What was never published need not come back; only how long no answer came is told (§5.5)."""
    redis = FakePubSub()
    async with feed_on(redis) as feed:
        redis.is_silent = True
        await asyncio.sleep(60)
        assert feed.is_delivering
        assert feed.unanswered_s > 55
        redis.is_silent = False
        await asyncio.sleep(0.1)
        assert feed.unanswered_s == 0
        for answer in (RedisUnavailableError("away"), hiredis.ReplyError("NOPERM")):
            redis.answer = answer
            await asyncio.sleep(60)
            assert feed.is_delivering
            assert feed.unanswered_s > 55
            redis.answer = None
            await asyncio.sleep(PROBE_INTERVAL_S + 0.1)
            assert feed.unanswered_s == 0
        assert len(redis.connections) == 1


@pytest.mark.parametrize("windows", [1, PROBE_PATIENCE + 1])
def test_a_probe_behind_many_messages_is_waited_for(windows: int) -> None:
    """As long as anything comes, a while longer; but not for ever: it may be the wrong server that speaks."""

    @virtual_time
    async def check() -> None:
        redis, listener = FakePubSub(), Listening()
        original = redis.publish
        async with feed_on(redis) as feed:
            await feed.subscribe("job", listener)
            probes: list[bytes] = []

            def hold_probes(channel: bytes, payload: bytes) -> None:
                if channel == PROBE:
                    probes.append(payload)
                else:
                    original(channel, payload)

            redis.publish = hold_probes  # type: ignore[method-assign]
            for _ in range(round(windows * PROBE_TIMEOUT_S)):
                await asyncio.sleep(1)
                redis.publish(b"job", b"1")
            redis.publish = original  # type: ignore[method-assign]
            if probes and redis.connection.is_open:
                original(PROBE, probes[-1])
            await asyncio.sleep(1)
            assert (len(redis.connections) == 1) == (windows <= PROBE_PATIENCE)
            assert feed.is_delivering

    check()


@virtual_time
async def test_a_probe_behind_subscriptions_is_waited_for() -> None:
    """A storm of new hubs must not cost all of them their connection: acknowledgements come through, too."""
    redis = FakePubSub()
    original = redis.publish
    async with feed_on(redis) as feed:
        held: list[bytes] = []

        def hold(channel: bytes, payload: bytes) -> None:
            held.append(payload)

        redis.publish = hold  # type: ignore[method-assign]
        for _ in range(round(2 * PROBE_TIMEOUT_S)):
            await asyncio.sleep(1)
            redis.read()
        redis.publish = original  # type: ignore[method-assign]
        original(PROBE, held[-1])
        await asyncio.sleep(5)
        assert feed.is_delivering
        assert len(redis.connections) == 1


@virtual_time
async def test_a_probe_behind_other_commands_is_waited_for() -> None:
    """As long as those are answered, nothing is down; when they are not, that is told at once."""
    redis = FakePubSub()
    async with feed_on(redis) as feed:
        redis.is_silent = True
        for _ in range(20):
            await asyncio.sleep(1)
            feed.note_answer()
            assert feed.unanswered_s == 0
        await asyncio.sleep(5)
        assert feed.unanswered_s == feed.silent_s == pytest.approx(5)
        redis.is_silent = False


@virtual_time
async def test_ten_thousand_channels_are_subscribed_in_batches() -> None:
    """Redis never gets more names at once than it can take in passing, and each batch is acknowledged."""
    redis = FakePubSub()
    listeners = [Listening() for _ in range(10 * SUBSCRIBE_NAMES + 1)]
    async with feed_on(redis) as feed:
        for number, listener in enumerate(listeners):
            feed._listeners[b"%d" % number] = listener
        redis.connection.abort()
        await asyncio.sleep(1)
        assert feed.is_delivering
        assert len(redis.connection.channels) == len(listeners) + 1
        assert max(redis.connection.batches) <= SUBSCRIBE_NAMES
        assert len(redis.connection.batches) <= 12
        assert all(listener.heard == ["reconnected"] for listener in listeners)


@virtual_time
async def test_channels_that_come_and_go_while_all_are_subscribed_again() -> None:
    """Who comes is subscribed, and who has left is not, whenever that was."""
    redis = FakePubSub()
    async with feed_on(redis) as feed:
        await feed.subscribe("left", Listening())
        came = Listening()
        waiting: list[asyncio.Task[None]] = []

        def change() -> None:
            if not waiting:
                return
            feed.unsubscribe("left")

        redis.on_ping = change
        redis.connection.abort()
        await asyncio.sleep(0)
        waiting.append(asyncio.create_task(feed.subscribe("came", came)))
        await asyncio.sleep(1)
        assert waiting[0].done()
        assert redis.connection.channels == {PROBE, b"came"}
        redis.publish(b"came", b"1")
        assert came.heard[-2:] == [b"1", "flush"]


@pytest.mark.parametrize("after_s", [0.0, 0.0005, 0.0015, 0.5, 1.0005, 1.0015, 2.0, 4.5])
@pytest.mark.parametrize("is_through", [True, False])
def test_a_feed_can_be_closed_at_any_moment(after_s: float, is_through: bool) -> None:
    """Whatever it waits for: no task is left (`feed_on` looks)."""

    @virtual_time
    async def check() -> None:
        redis = FakePubSub()
        async with feed_on(redis):
            redis.is_through = is_through
            await asyncio.sleep(after_s)

    check()
