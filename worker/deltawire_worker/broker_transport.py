"""kombu's Redis transports, without the bug that ends a worker when Redis restarts.

    broker_transport = "deltawire_worker.broker_transport:Transport"

for `redis://`, `rediss://` and `redis+socket://` URLs, `SentinelTransport` for `sentinel://`. In kombu 5.7,
losing the connection while Redis is down and messages are unacknowledged makes Celery close each channel
twice. The first attempt fails where it drains its BRPOP and leaves the channel open; the second one restores
messages through a transport that has been taken apart, and its `AttributeError` is no connection error:
Celery stops the worker. Here the second attempt gives up. The messages stay in kombu's `unacked` hash, and
the visibility time-out brings them back.
"""

from __future__ import annotations

from kombu.transport import redis

__all__ = ("SentinelTransport", "Transport")


class _Channel(redis.Channel):
    def close(self) -> None:
        is_taken_apart = self.connection is not None and self.connection.client is None
        if is_taken_apart and not self.closed:
            self.closed = True
            if self._qos is not None:
                self._qos._on_collect.cancel()  # would restore at garbage collection, with the same error
        super().close()  # type: ignore[no-untyped-call]  # kombu has few types


class _SentinelChannel(_Channel, redis.SentinelChannel): ...


class Transport(redis.Transport):
    """See the module."""

    Channel = _Channel


class SentinelTransport(redis.SentinelTransport):
    """See the module."""

    Channel = _SentinelChannel
