"""Subscribers of one job's hub on a Redis in memory, and what they saw."""

from deltawire_relay.hub import Hub
from deltawire_relay.hubs import Hubs
from deltawire_relay.subscriber import Subscriber
from tests.support.fake_log import FakeRedis, FakeSink
from tests.support.sample_events import delta, in_progress, line, queued

JOB = "job"
SETTLE_S = 0.1  # of virtual time: longer than any round trip here, shorter than any timer of the hub


def deltas(first: int, last: int) -> list[bytes]:
    return [line(delta(number, f"{number} ")) for number in range(first, last + 1)]


def started(redis: FakeRedis, last: int = 2) -> None:
    """A job whose log goes up to `last`, published before anybody listened."""
    redis.append(line(queued()), line(in_progress(2)), *deltas(3, last))


class Reader:
    """One subscriber and what its sink saw."""

    def __init__(self, hubs: Hubs, hub: Hub, sink: FakeSink, subscriber: Subscriber) -> None:
        self.hubs = hubs
        self.hub = hub
        self.sink = sink
        self.subscriber = subscriber


async def attach(
    hubs: Hubs,
    *,
    position: int = 0,
    mode: str = "replay",
    tenant: str | None = None,
    sink: FakeSink | None = None,
    merge: bool = False,
    job_id: str = JOB,
) -> Reader:
    """Subscribes as the doors do."""
    hub, _ = await hubs.acquire(job_id)
    sink = sink or FakeSink()
    subscriber = Subscriber(hub, sink, tenant=tenant, position=position, merge=merge)
    hub.subscribers.add(subscriber)
    await subscriber.open(mode=mode)
    return Reader(hubs, hub, sink, subscriber)


def hubs_of(redis: FakeRedis) -> Hubs:
    return Hubs(redis.log, redis.feed)
