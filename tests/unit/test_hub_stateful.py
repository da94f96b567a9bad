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
from deltawire.log_fold import LogFold
from deltawire.messages import Snapshot
from deltawire.scripts import Scripts
from deltawire_relay import hub as hub_module
from deltawire_relay import subscriber as subscriber_module
from deltawire_relay.hub import HEAL_TIMEOUT_S
from deltawire_relay.hubs import Hubs
from deltawire_relay.looks import CHECK_INTERVAL_S, TAIL_CHECK_AFTER_S
from deltawire_relay.standby import Standby
from deltawire_relay.subscriber import Subscriber
from deltawire_relay.tail import Tail
from tests.support.fake_log import FakeRedis, FakeSink
from tests.support.sample_events import completed, delta, line, queued
from tests.support.virtual_time import VirtualTimeLoop

HEALED_S = HEAL_TIMEOUT_S + 4 * (TAIL_CHECK_AFTER_S + CHECK_INTERVAL_S)
LOSS_S = TAIL_CHECK_AFTER_S  # how long Redis may be without the job before a worker heals it: one look


def expected(position: int, sink: FakeSink, history: list[bytes]) -> list[bytes]:
    """What a reader with this position must have got so far: all events but those its snapshots stand for.

    A snapshot that takes it back, or that is none of the history, fails.
    """
    events: list[bytes] = []
    top = position
    for entry in sink.all:
        if isinstance(entry, bytes):
            events.append(history[top])
            top += 1
        elif isinstance(entry, Snapshot):
            fold = LogFold()
            for text in history[: entry.sequence_number]:
                fold.add(text)
            assert entry.completion == fold.completion()
            assert entry.sequence_number >= top, "a snapshot of what the reader has"
            top = entry.sequence_number
    return events


class NoMarks:
    """No job here ends when nobody watches."""

    async def execute(self, *_: str | bytes | float) -> Any:  # a raw reply, if there were one
        raise AssertionError


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
        self.redis.log.scripts = Scripts(NoMarks())
        standby = Standby(self.hubs, self.redis.log, self.redis.feed)
        self.standing_by = self._loop.create_task(standby.keep())
        self.readers: list[tuple[int, FakeSink, Subscriber]] = []
        self.opening: list[asyncio.Task[None]] = []
        self.unsent: list[bytes] = []
        self.is_ended = False
        self.redis.append(line(queued()))

    @precondition(lambda self: not self.is_ended)
    @rule(count=st.integers(1, 4), publish=st.sampled_from([0, 1, 1, 1, 2]), is_late=st.booleans())
    def append(self, count: int, publish: int, is_late: bool) -> None:
        """Events are appended; their message is lost, sent, doubled, or kept for later."""
        first = len(self.redis.history) + 1
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
        position = max(0, len(self.redis.history) - back)
        sink = FakeSink(room=room)

        async def attach() -> None:
            try:
                hub, _ = await self.hubs.acquire("job")
            except RedisUnavailableError:
                return
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

    @rule(back=st.integers(0, 6))
    def compact(self, back: int) -> None:
        """A worker puts a snapshot in the place of the log's beginning."""
        self._in_loop(lambda: self.redis.heal(self._through(back)))

    @precondition(lambda self: not self.is_ended)
    @rule(back=st.integers(0, 6), after_s=st.sampled_from([0.0, 0.001, 0.1, 1.0, LOSS_S]))
    def lose_and_heal(self, back: int, after_s: float) -> None:
        """Redis loses everything, and the worker brings back what it holds; it may publish it all."""
        self.redis.forget()
        self._loop.run_until_complete(asyncio.sleep(after_s))
        self.redis.heal(self._through(back))
        payload = b"\n".join(self.redis.lines)
        self._in_loop(lambda: self.redis.publish(payload))
        if after_s:  # losses one after the other are one to those who look every few seconds
            self._loop.run_until_complete(asyncio.sleep(2 * TAIL_CHECK_AFTER_S))

    def _through(self, back: int) -> int:
        """A number that a snapshot may have; never that of the terminal event."""
        return max(1, len(self.redis.history) - back - self.is_ended)

    @precondition(lambda self: not self.is_ended and len(self.redis.history) > 8)
    @rule(publish=st.integers(0, 1))
    def end(self, publish: int) -> None:
        """The terminal event comes; its message may be lost."""
        self.is_ended = True
        last = line(completed(len(self.redis.history) + 1))
        self._in_loop(lambda: self.redis.append(last, publish=publish))

    @invariant()
    def all_readers_see_a_part_of_the_log(self) -> None:
        """From position+1 on, without a hole or a repeat; and nothing is refused."""
        for position, sink, _ in self.readers:
            assert sink.lines == expected(position, sink, self.redis.history)
            assert sink.error is None

    def teardown(self) -> None:
        """When all is well again, everybody gets everything, and the end."""
        try:
            if not self.is_ended:
                self.redis.append(line(completed(len(self.redis.history) + 1)), publish=0)
            self.redis.away_for = set()
            self._in_loop(self.redis.feed.reconnect)
            for task in self.opening:
                self._loop.run_until_complete(task)
            for _, sink, subscriber in self.readers:
                sink.room = None
                self._in_loop(subscriber.pump)
            self._loop.run_until_complete(asyncio.sleep(HEALED_S))
            assert not self.standing_by.done()
            self.all_readers_see_a_part_of_the_log()
            for position, sink, _ in self.readers:
                assert sink.lines[-1:] == self.redis.history[-1:] or position == len(self.redis.history)
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
