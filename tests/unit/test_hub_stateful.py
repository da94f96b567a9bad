"""Whatever happens to messages, connections and readers: the log is what every subscriber sees, once."""

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from deltawire.errors import RedisUnavailableError
from deltawire.messages import Snapshot
from deltawire_relay import hub as hub_module
from deltawire_relay import subscriber as subscriber_module
from deltawire_relay.hub import CHECK_INTERVAL_S, TAIL_CHECK_AFTER_S
from deltawire_relay.hubs import Hubs
from deltawire_relay.subscriber import Subscriber
from deltawire_relay.tail import Tail
from tests.support.fake_log import FakeRedis, FakeSink
from tests.support.sample_events import completed, delta, line, queued
from tests.support.virtual_time import VirtualTimeLoop

HEALED_S = 4 * (TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S)


def start_of(sink: FakeSink, position: int) -> int:
    """The number after which the events of this sink begin: its position, or that of its snapshot."""
    snapshots = [message for message in sink.messages if isinstance(message, Snapshot)]
    return snapshots[0].sequence_number if snapshots else position


class HubMachine(RuleBasedStateMachine):
    """One job, its log as the oracle, and subscribers that come, stall and go on at any time."""

    def __init__(self) -> None:
        super().__init__()
        line_bytes = len(line(delta(10)))
        self._patches: list[Any] = [  # mock's patches have a private type
            mock.patch.object(hub_module, "Tail", partial(Tail, max_bytes=4 * line_bytes)),
            mock.patch.object(subscriber_module, "FIRST_PAGE_EVENTS", 3),
            mock.patch.object(subscriber_module, "PAGE_EVENTS", 3),
        ]
        for patch in self._patches:
            patch.start()
        self._runner = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self._loop = self._runner.get_loop()
        self.redis = FakeRedis()
        self.hubs = Hubs(self.redis.log, self.redis.feed)
        self.readers: list[tuple[int, FakeSink, Subscriber]] = []
        self.opening: list[asyncio.Task[None]] = []
        self.unsent: list[bytes] = []
        self.is_ended = False
        self.redis.append(line(queued()))

    @precondition(lambda self: not self.is_ended)
    @rule(count=st.integers(1, 4), publish=st.sampled_from([0, 1, 1, 1, 2]), is_late=st.booleans())
    def append(self, count: int, publish: int, is_late: bool) -> None:
        """Events are appended; their message is lost, sent, doubled, or kept for later."""
        first = len(self.redis.lines) + 1
        lines = [line(delta(number)) for number in range(first, first + count)]
        if is_late:
            self.unsent.append(self.redis.append(*lines, publish=0))
        else:
            self._in_loop(lambda: self.redis.append(*lines, publish=publish))

    @precondition(lambda self: self.unsent)
    @rule(data=st.data())
    def publish_late(self, data: st.DataObject) -> None:
        """A message comes after others that were sent later."""
        index = data.draw(st.integers(0, len(self.unsent) - 1))
        self._in_loop(lambda: self.redis.publish(self.unsent.pop(index)))

    @precondition(lambda self: len(self.readers) < 6)
    @rule(
        back=st.integers(0, 12),
        room=st.sampled_from([None, None, 0, 1, 2]),
        is_awaited=st.booleans(),
    )
    def attach(self, back: int, room: int | None, is_awaited: bool) -> None:
        """A subscriber comes, at a position so far behind the top; its sink may be slow."""
        position = max(0, len(self.redis.lines) - back)
        sink = FakeSink(room=room)

        async def attach() -> None:
            hub, _ = await self.hubs.acquire("job")
            subscriber = Subscriber(hub, sink, tenant=None, position=position)
            hub.subscribers.add(subscriber)
            reader = position, sink, subscriber
            self.readers.append(reader)
            try:
                await subscriber.open()
            except RedisUnavailableError:  # the doors say so, and the client comes back
                subscriber.close()
                self.readers.remove(reader)

        task = self._loop.create_task(attach())
        self.opening.append(task)
        if is_awaited:
            self._loop.run_until_complete(task)

    @rule(pause_s=st.sampled_from([0.0005, 0.002, 0.01, 0.1, 1.0, 5.0]))
    def pause(self, pause_s: float) -> None:
        """Time passes."""
        self._loop.run_until_complete(asyncio.sleep(pause_s))

    @precondition(lambda self: self.readers)
    @rule(data=st.data(), room=st.sampled_from([None, 0, 1, 3]))
    def change_room(self, data: st.DataObject, room: int | None) -> None:
        """A sink can take more, or less, than before."""
        _, sink, subscriber = data.draw(st.sampled_from(self.readers))
        sink.room = room
        self._in_loop(subscriber.pump)

    @rule()
    def lose_connection(self) -> None:
        """The feed's connection goes."""
        self._in_loop(self.redis.feed.lose)

    @rule()
    def reconnect(self) -> None:
        """The feed's connection is back."""
        self._in_loop(self.redis.feed.reconnect)

    @rule(is_away=st.booleans())
    def reads_fail(self, is_away: bool) -> None:
        """Reading the log fails for a while."""
        self.redis.away_for = {"read", "top"} if is_away else set()

    @precondition(lambda self: not self.is_ended and len(self.redis.lines) > 8)
    @rule(publish=st.integers(0, 1))
    def end(self, publish: int) -> None:
        """The terminal event comes; its message may be lost."""
        self.is_ended = True
        last = line(completed(len(self.redis.lines) + 1))
        self._in_loop(lambda: self.redis.append(last, publish=publish))

    @invariant()
    def all_readers_see_a_part_of_the_log(self) -> None:
        """From position+1 on, without a hole or a repeat; and nothing is refused."""
        for position, sink, _ in self.readers:
            start = start_of(sink, position)
            assert sink.lines == self.redis.lines[start : start + len(sink.lines)]
            assert sink.error is None

    def teardown(self) -> None:
        """When all is well again, everybody gets everything, and the end."""
        try:
            if not self.is_ended:
                self.redis.append(line(completed(len(self.redis.lines) + 1)), publish=0)
            self.redis.away_for = set()
            self._in_loop(self.redis.feed.reconnect)
            for task in self.opening:
                self._loop.run_until_complete(task)
            for _, sink, subscriber in self.readers:
                sink.room = None
                self._in_loop(subscriber.pump)
            self._loop.run_until_complete(asyncio.sleep(HEALED_S))
            for position, sink, _ in self.readers:
                assert sink.lines == self.redis.lines[start_of(sink, position) :]
                assert sink.has_ended
        finally:
            self._runner.close()
            for patch in self._patches:
                patch.stop()

    def _in_loop(self, function: Callable[[], object]) -> None:
        async def call() -> None:
            function()

        self._loop.run_until_complete(call())


TestHub = HubMachine.TestCase
TestHub.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
