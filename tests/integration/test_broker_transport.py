"""What our transport promises: kombu's keys and formats, and nothing lost on its way."""

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

import pytest
import redis
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.messaging import Consumer

from deltawire.scripts import TAKE
from deltawire_worker.broker_transport import TAKEN
from tests.support.redis_servers import eventually

OURS = "deltawire_worker.broker_transport:Transport"
KOMBUS = "kombu.transport.redis:Transport"
QUEUE = "transport_test"
MANY = 3 * TAKEN


@pytest.fixture
def client(redis_url: str) -> Iterator[Any]:
    with closing(redis.Redis.from_url(redis_url, decode_responses=True)) as made:
        made.flushdb()
        yield made


class Receiver:
    """One consumer of the queue on a connection of its own."""

    def __init__(
        self, url: str, *, transport: str = OURS, prefetch: int = 0, no_ack: bool = False, prefix: str = ""
    ) -> None:
        options = {"priority_steps": [0, 5], "global_keyprefix": prefix, "visibility_timeout": 60}
        self.connection = Connection(url, transport=transport, transport_options=options)
        self.channel: Any = self.connection.channel()
        self.got: list[Any] = []
        consumer = Consumer(
            self.channel, [Queue(QUEUE)], on_message=self.got.append, no_ack=no_ack, accept=["json"]
        )
        if prefetch:
            consumer.qos(prefetch_count=prefetch)
        consumer.consume()

    @property
    def bodies(self) -> list[Any]:
        return [message.payload for message in self.got]

    def drain_to(self, count: int) -> None:
        """Takes messages until there are so many."""
        while len(self.got) < count:
            self.connection.drain_events(timeout=60)

    def drain_all(self) -> None:
        """Takes messages until there are no more."""
        with suppress(socket.timeout):
            while True:
                self.connection.drain_events(timeout=3)

    def close(self) -> None:
        self.connection.release()


@pytest.fixture
def receive(redis_url: str) -> Iterator[Callable[..., Receiver]]:
    opened: list[Receiver] = []

    def make(**options: Any) -> Receiver:
        opened.append(Receiver(redis_url, **options))
        return opened[-1]

    yield make
    for receiver in opened:
        with suppress(redis.ConnectionError):
            receiver.close()


def send(url: str, *bodies: Any, priority: int = 0, prefix: str = "") -> None:
    """By kombu's own transport, as any backend does."""
    options = {"priority_steps": [0, 5], "global_keyprefix": prefix}
    with Connection(url, transport_options=options) as connection:
        producer = connection.Producer(serializer="json")
        for body in bodies:
            producer.publish(body, exchange="", routing_key=QUEUE, priority=priority)


def unacked(client: Any) -> dict[str, Any]:
    return {tag: json.loads(value) for tag, value in client.hgetall("unacked").items()}


def test_a_backlog_comes_in_order_and_leaves_empty_books(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(MANY))
    receiver = receive()
    receiver.drain_to(MANY)
    assert receiver.bodies == list(range(MANY))
    receiver.channel.books.settle()
    assert client.hlen("unacked") == client.zcard("unacked_index") == MANY
    for message in receiver.got:
        message.ack()
    receiver.channel.books.settle()
    assert not client.exists("unacked", "unacked_index")


def test_what_is_booked_is_booked_as_kombu_does(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    """Popped by BRPOP, as the first one is, or by the script."""
    booked = {}
    for transport in (KOMBUS, OURS):
        client.flushdb()
        send(redis_url, "first", {"second": "\u2028ü\x00"}, "third")
        receiver = receive(transport=transport)
        receiver.drain_to(3)
        if transport == OURS:
            receiver.channel.books.settle()
        tags = [message.delivery_tag for message in receiver.got]
        assert sorted(client.zrange("unacked_index", 0, -1)) == sorted(tags)
        booked[transport] = [unacked(client)[tag] for tag in tags]
        assert [entry[0] for entry in booked[transport]] == [message._raw for message in receiver.got]
        receiver.close()
    assert (
        [entry[1:] for entry in booked[OURS]] == [entry[1:] for entry in booked[KOMBUS]] == [["", QUEUE]] * 3
    )


def test_priorities_go_first_and_the_prefetch_limit_holds(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(100, 100 + TAKEN), priority=5)
    send(redis_url, *range(TAKEN), priority=0)
    receiver = receive(prefetch=TAKEN + 2)
    receiver.drain_to(TAKEN + 2)
    receiver.drain_all()
    assert receiver.bodies == [*range(TAKEN), 100, 101]
    receiver.got[0].ack()
    receiver.drain_to(TAKEN + 3)
    receiver.drain_all()
    assert receiver.bodies[TAKEN + 2 :] == [102]


def test_what_was_not_acknowledged_comes_back_to_any_consumer(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(MANY))
    receiver = receive()
    receiver.drain_to(MANY)
    receiver.got[0].ack()
    receiver.got[1].reject(requeue=True)
    receiver.got[2].reject()
    receiver.close()
    assert not client.exists("unacked", "unacked_index")
    other = receive(transport=KOMBUS)
    other.drain_to(MANY - 2)
    assert sorted(other.bodies) == [1, *range(3, MANY)]


def test_what_a_script_has_taken_for_a_connection_that_is_gone_is_booked(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    """kombu's BRPOP loses the one message that it has popped then."""
    client.script_load(TAKE.text)
    send(redis_url, *range(MANY))
    receiver = receive()
    receiver.drain_to(1)
    receiver.channel._may_be_more = True  # however slowly the first one came
    receiver.channel._brpop_start()  # the script runs; its answer will never be read
    eventually(lambda: client.llen(QUEUE) == MANY - 1 - TAKEN, "taken messages")
    receiver.channel.client.connection.disconnect()
    receiver.drain_to(MANY - TAKEN)
    receiver.channel.books.settle()
    tags = {message.delivery_tag for message in receiver.got}
    left = [entry[0]["body"] for tag, entry in unacked(client).items() if tag not in tags]
    assert len(left) == TAKEN
    assert len(unacked(client)) == MANY


@pytest.mark.parametrize("is_cancelled", [False, True])
def test_what_a_script_has_taken_for_a_channel_that_closes_goes_back_in_order(
    receive: Callable[..., Receiver], client: Any, redis_url: str, is_cancelled: bool
) -> None:
    """Also where its consumer has been cancelled, as Celery does first."""
    client.script_load(TAKE.text)
    send(redis_url, *range(MANY))
    receiver = receive()
    receiver.drain_to(1)
    receiver.channel._may_be_more = True  # however slowly the first one came
    receiver.channel._brpop_start()
    eventually(lambda: client.llen(QUEUE) == MANY - 1 - TAKEN, "taken messages")
    if is_cancelled:
        for tag in list(receiver.channel._consumers):
            receiver.channel.basic_cancel(tag)
    receiver.close()
    assert not client.exists("unacked", "unacked_index")
    other = receive()
    other.drain_to(MANY)
    assert other.bodies == list(range(MANY))


def test_a_server_that_forgets_the_script_is_told_it_again(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    client.script_flush()
    receiver = receive()
    for _ in range(2):
        send(redis_url, *range(MANY))
        receiver.drain_to(MANY)
        assert receiver.bodies == list(range(MANY))
        assert client.script_exists(TAKE.sha) == [True]
        receiver.got.clear()
        client.script_flush()


@pytest.mark.parametrize(
    ("said", "instead"),
    [('"body_encoding": "base64"', '"body_encoding": "base46"'), ('"headers": {}', '"headers": {"x": 0x10}')],
)
@pytest.mark.parametrize("transport", [KOMBUS, OURS])
def test_what_kombu_cannot_read_is_in_nobodys_way(
    receive: Callable[..., Receiver], client: Any, redis_url: str, transport: str, said: str, instead: str
) -> None:
    """Back from `unacked` it would end each worker that takes it, or keep kombu from restoring others."""
    send(redis_url, *range(4))
    poison = client.lindex(QUEUE, 1)
    assert said in poison
    client.lset(QUEUE, 1, poison.replace(said, instead))
    receiver = receive(transport=transport)
    with pytest.raises((AttributeError, json.JSONDecodeError)):
        receiver.drain_to(4)
    receiver.drain_to(3)
    assert receiver.bodies == [0, 1, 3]
    for message in receiver.got:
        message.ack()
    if transport == OURS:
        receiver.channel.books.settle()
    assert not client.exists("unacked", "unacked_index")


def test_without_the_right_to_run_scripts_brpop_does(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(MANY))
    client.execute_command("ACL", "SETUSER", "default", "-eval", "-evalsha")
    try:
        receiver = receive()
        receiver.drain_to(MANY)
        assert receiver.bodies == list(range(MANY))
    finally:
        client.execute_command("ACL", "SETUSER", "default", "+eval", "+evalsha")


def test_what_needs_no_acknowledgement_is_not_booked(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(MANY))
    receiver = receive(no_ack=True)
    receiver.drain_to(MANY)
    assert receiver.bodies == list(range(MANY))
    assert not client.exists("unacked", "unacked_index")


def test_a_key_prefix_is_before_all_keys(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(MANY), prefix="mine:")
    receiver = receive(prefix="mine:")
    receiver.drain_to(MANY)
    assert receiver.bodies == list(range(MANY))
    receiver.channel.books.settle()
    assert client.hlen("mine:unacked") == client.zcard("mine:unacked_index") == MANY
    receiver.got[0].ack()
    receiver.channel.books.settle()
    assert client.hlen("mine:unacked") == client.zcard("mine:unacked_index") == MANY - 1


def test_books_on_a_connection_that_was_killed_are_kept_on_the_next(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(4))
    receiver = receive()
    receiver.drain_to(4)
    receiver.channel.books.settle()
    client.client_kill_filter(_type="normal", skipme=True)
    with suppress(redis.ConnectionError):
        while True:  # until it has heard of it
            receiver.got[0].channel.qos.ack(receiver.got[0].delivery_tag)
            receiver.channel.books.settle()
    for message in receiver.got[1:]:
        message.ack()
    receiver.channel.books.settle()
    assert set(unacked(client)) <= {receiver.got[0].delivery_tag}


def test_books_whose_pool_was_closed_wait_for_no_reply(
    receive: Callable[..., Receiver], client: Any, redis_url: str
) -> None:
    send(redis_url, *range(4))
    receiver = receive()
    receiver.drain_to(4)
    receiver.channel.pool.disconnect()
    with pytest.raises(ConnectionResetError):
        receiver.got[0].ack()
    for message in receiver.got:
        message.ack()
    receiver.channel.books.settle()
    assert not client.exists("unacked", "unacked_index")
