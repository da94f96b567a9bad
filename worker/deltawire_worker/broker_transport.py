"""kombu's Redis transports, without the bug that ends a worker when Redis restarts, and at a smaller price.

    broker_transport = "deltawire_worker.broker_transport:Transport"

for `redis://`, `rediss://` and `redis+socket://` URLs, `SentinelTransport` for `sentinel://`. Keys and
formats stay kombu's: other workers and senders may be at the same queues.

The bug: in kombu 5.7, losing the connection while Redis is down and messages are unacknowledged makes
Celery close each channel twice. The first attempt fails where it drains its BRPOP and leaves the channel
open; the second one restores messages through a transport that has been taken apart, and its
`AttributeError` is no connection error: Celery stops the worker. Here the second attempt gives up. The
messages stay in kombu's `unacked` hash, and the visibility time-out brings them back.

The price: kombu pops one message at a time, and books it, as well as its acknowledgement, by a new client
and a round trip each. Here what waits behind a message is popped and booked by one script, so that a worker
that is killed in between loses none of it; and the books are kept over a connection of their own, whose
replies nobody waits for.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from queue import Empty
from typing import Any, Final

from kombu.transport import redis, virtual
from kombu.utils.encoding import bytes_to_str
from kombu.utils.json import dumps, loads
from redis.exceptions import NoScriptError, ResponseError

from deltawire.scripts import TAKE

__all__ = ("SentinelTransport", "Transport")

TAKEN: Final = 16
"""Messages popped at once: the more there are, the fewer are left for a worker that has nothing to do."""
AT_ONCE_S: Final = 0.005
"""An answer in less than that tells of a message that was there already. Asking for more after any other one
costs the job that has just come milliseconds: the thread that runs it waits for the one that asks."""
MAX_OWED: Final = 128
SETTLE_S: Final = 1.0

_log = logging.getLogger(__name__)


class _Books:
    """Writes what is delivered and acknowledged, in order, over one connection of the channel's pool.

    A lost connection is raised by a later call, as kombu raises it. What was under way then is in doubt: an
    acknowledged message may come again; a delivered one is lost, as with kombu, if this process dies, too.
    """

    def __init__(self, channel: _Channel) -> None:
        self._channel = channel
        self._connection: Any = None
        self._owed = 0
        self._settled_at = 0.0
        self._is_busy = False
        self._is_closed = False

    def write(self, *commands: tuple[str | bytes | float, ...]) -> bool:
        """Whether they are on their way: not when closed, nor in a signal handler that interrupts this."""
        if self._is_busy or self._is_closed:
            return False
        self._is_busy = True
        try:
            if self._connection is None:
                self._connection = self._channel.pool.get_connection()
            if self._owed and not self._connection.is_connected:
                # With its pool; the one that would be made now owes nothing.
                raise ConnectionResetError("the books' connection was closed")  # noqa: TRY301 - dropped below
            if self._owed >= MAX_OWED or time.monotonic() - self._settled_at > SETTLE_S:
                self._read_owed()
                self._connection.check_health()
            packed = self._connection.pack_commands(commands)
            self._connection.send_packed_command(packed, check_health=False)
            self._owed += len(commands)
        except BaseException:  # a signal handler's, too
            self._drop()
            raise
        finally:
            self._is_busy = False
        return True

    def settle(self) -> None:
        """Waits until Redis has done what was written."""
        if self._is_busy:
            return
        self._is_busy = True
        try:
            self._read_owed()
        except BaseException:
            self._drop()
            raise
        finally:
            self._is_busy = False

    def close(self) -> None:
        """Settles, as far as Redis can be reached."""
        self._is_closed = True
        with suppress(*self._channel.connection_errors):
            self.settle()
        self._drop()

    def _read_owed(self) -> None:
        self._settled_at = time.monotonic()
        while self._owed:
            self._owed -= 1
            try:
                self._connection.read_response()
            except ResponseError as error:
                _log.warning("Redis does not book a message: %s", error)

    def _drop(self) -> None:
        self._owed = 0
        if self._connection is not None:
            self._connection.disconnect()  # whoever uses it next connects anew


class _QoS(redis.QoS):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.booked: set[str] = set()
        """Delivery tags of messages that the script has booked."""

    def append(self, message: Any, delivery_tag: str) -> None:
        channel, delivery = self.channel, message.delivery_info
        if delivery_tag in self.booked:
            self.booked.remove(delivery_tag)
        else:
            body = dumps([message._raw, delivery["exchange"], delivery["routing_key"]])
            # In this order: what is in the index alone is forgotten, in the hash alone kept for ever.
            is_written = channel.books.write(
                ("ZADD", channel.key(self.unacked_index_key), time.time(), delivery_tag),
                ("HSET", channel.key(self.unacked_key), delivery_tag, body),
            )
            if not is_written:
                super().append(message, delivery_tag)
                return
        virtual.QoS.append(self, message, delivery_tag)

    def ack(self, delivery_tag: str) -> None:
        if self._take_out(delivery_tag):
            virtual.QoS.ack(self, delivery_tag)
        else:
            super().ack(delivery_tag)

    def drop_unread(self, delivery_tag: str) -> None:
        """Takes a message that kombu could not read out of the books: it would come back, for ever."""
        if delivery_tag in self.booked:
            self.booked.remove(delivery_tag)
            with suppress(*self.channel.connection_errors):  # the next write says so
                self._take_out(delivery_tag)

    def _take_out(self, delivery_tag: str) -> bool:
        channel = self.channel
        books: _Books = channel.books
        return books.write(
            ("HDEL", channel.key(self.unacked_key), delivery_tag),
            ("ZREM", channel.key(self.unacked_index_key), delivery_tag),
        )

    # Both read what must be booked by then, over other connections.

    def reject(self, delivery_tag: str, requeue: bool = False) -> None:
        self.channel.books.settle()
        super().reject(delivery_tag, requeue)

    def restore_unacked(self, client: Any = None) -> None:
        self.channel.books.settle()
        super().restore_unacked(client)


class _Channel(redis.Channel):
    QoS = _QoS
    _in_poll: Any  # the connection over which a command is under way
    _brpop_sent_at: Any  # monotonic time

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.books = _Books(self)
        self._may_be_more = False  # behind the message that came last
        self._taking: list[str] | None = None  # from these lists, if the command under way is no BRPOP
        self._is_script_known = True
        super().__init__(*args, **kwargs)
        self._can_take = bool(self.ack_emulation)

    def key(self, name: str) -> str:
        return f"{self.global_keyprefix}{name}"

    def basic_consume(self, queue: str, no_ack: bool, *args: Any, **kwargs: Any) -> Any:
        if no_ack:  # nobody would take out of the books what the script writes into them
            self._can_take = False
        return super().basic_consume(queue, no_ack, *args, **kwargs)

    def _brpop_start(self, timeout: float | None = None) -> None:
        is_taking = self._may_be_more and self._can_take
        self._may_be_more, self._taking = False, None
        if not is_taking:
            super()._brpop_start(timeout)
            return
        queues = self._queue_cycle.consume(len(self.active_queues))
        if not queues:
            return
        self._taking = [self._q_for_pri(queue, pri) for pri in self.priority_steps for queue in queues]
        keys = [self.key(name) for name in (self.unacked_key, self.unacked_index_key, *self._taking)]
        room = self.qos.can_consume_max_estimate()
        script = ("EVALSHA", TAKE.sha) if self._is_script_known else ("EVAL", TAKE.text)
        connection = self.client.connection
        self._in_poll = connection
        self._brpop_sent_at = time.monotonic()
        count = TAKEN if room is None else min(TAKEN, room)
        connection.send_command(*script, len(keys), *keys, count, time.time())

    def _brpop_read(self, **options: Any) -> bool:
        if self._taking is None:
            waited_s = time.monotonic() - self._brpop_sent_at
            super()._brpop_read(**options)
            self._may_be_more = waited_s < AT_ONCE_S
            return True
        lists, self._taking = self._taking, None
        try:
            taken = self._read_taken()
        finally:
            self._in_poll = None
            self._flush_brpop_reauth()
        if not taken:
            raise Empty
        if self._closing:
            # Nobody is to have them any more: back to where they were, and not only by the time-out.
            for raw_tag in () if self._is_taken_apart else reversed(taken[1::3]):
                self.qos.restore_by_tag(bytes_to_str(raw_tag))
            raise Empty
        self._may_be_more = True
        problem: Exception | None = None
        for index, raw_tag, raw in zip(taken[::3], taken[1::3], taken[2::3], strict=True):
            queue, tag = lists[index].rsplit(self.sep, 1)[0], bytes_to_str(raw_tag)
            self._queue_cycle.rotate(queue)
            self.qos.booked.add(tag)
            try:
                self.connection._deliver(loads(bytes_to_str(raw)), queue)
            except Exception as error:  # noqa: BLE001 - the others have been taken, too
                problem = problem or error
                if not isinstance(error, self.connection_errors):
                    self.qos.drop_unread(tag)
        if problem is not None:
            raise problem
        return True

    def _read_taken(self) -> list[Any]:
        connection = self.client.connection
        try:
            taken: list[Any] = connection.read_response()
        except NoScriptError:
            self._is_script_known, self._may_be_more = False, True
        except ResponseError as error:
            # Not allowed, say; if it was no server's to write to, BRPOP will have the same answer.
            _log.warning("Redis refuses to hand out messages by script: %s", error)
            self._can_take = False
        except self.connection_errors:
            connection.disconnect()  # as kombu does: the next turn connects anew
            raise
        else:
            self._is_script_known = True
            return taken
        return []

    @property
    def _is_taken_apart(self) -> bool:
        return self.connection is not None and self.connection.client is None

    def close(self) -> None:
        if self._is_taken_apart and not self.closed:
            self.closed = True
            if self._qos is not None:
                self._qos._on_collect.cancel()  # would restore at garbage collection, with the same error
        self.books.close()
        super().close()


class _SentinelChannel(_Channel, redis.SentinelChannel): ...


class Transport(redis.Transport):
    """See the module."""

    Channel = _Channel


class SentinelTransport(redis.SentinelTransport):
    """See the module."""

    Channel = _SentinelChannel
