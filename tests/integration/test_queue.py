"""What a sender of messages promises, on each broker."""

import json
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import kombu.pools
import pytest
import redis
from celery import Celery

import deltawire
from deltawire.errors import WireError
from deltawire.queue import QUEUE, SEPARATOR, TASK, TaskSender, make_app
from deltawire.redis_server import RedisServer, free_port
from tests.support.rabbitmq import RabbitMQ
from tests.support.redis_servers import SentinelServers, eventually
from tests.support.system import backend_app


@pytest.fixture(params=["redis", "sentinel", "rabbitmq"])
def broker_url(request: pytest.FixtureRequest) -> str:
    """A broker without our queue."""
    if request.param == "redis":
        return str(request.getfixturevalue("redis_url"))
    if request.param == "sentinel":
        servers: SentinelServers = request.getfixturevalue("sentinel_servers")
        servers.flush()
        return servers.url
    broker: RabbitMQ = request.getfixturevalue("rabbitmq")
    # Connections remember what they have declared.
    kombu.pools.reset()  # type: ignore[no-untyped-call] # kombu has few types
    broker.delete_queue(QUEUE)
    return broker.url


@pytest.fixture
def app(broker_url: str) -> Iterator[Celery]:
    """The relay's Celery app."""
    with make_app(broker_url, key_prefix="dw") as made:
        yield made


def test_the_depth_counts_the_messages_that_wait(app: Celery) -> None:
    """None where the queue does not exist yet; on Redis of all priorities, which are lists of their own."""
    sender = TaskSender(app)
    assert sender.depth() == 0
    assert sender.depth() == 0  # the first question has not spoiled the connection
    sender.send("a")
    assert sender.depth() == 1
    app.send_task(TASK, queue=QUEUE, priority=9)
    assert sender.depth() == 2


def test_the_depth_leaves_out_what_a_worker_holds(app: Celery) -> None:
    """A message that is delivered and not acknowledged does not wait."""
    sender = TaskSender(app)
    sender.send("a")
    with app.connection() as connection, connection.SimpleQueue(app.amqp.queues[QUEUE]) as held:
        held.get(timeout=60)
        assert sender.depth() == 0


def test_many_threads_may_send_and_ask(app: Celery) -> None:
    """More than the pool has connections."""
    sender = TaskSender(app)
    begin = threading.Barrier(16)

    def work(number: int) -> list[int]:
        begin.wait(60)
        depths = []
        for message in range(5):
            sender.send(f"{number}-{message}")
            depths.append(sender.depth())
        return depths

    with ThreadPoolExecutor(16) as threads:
        depths = list(threads.map(work, range(16)))
    assert all(depth > 0 for mine in depths for depth in mine)
    assert sender.depth() == 80


def test_a_priority_is_a_list_of_its_own_on_redis(redis_url: str) -> None:
    """9 is kombu's first list, the plain one, where messages without a priority are; the depth counts all."""
    with make_app(redis_url, key_prefix="dw") as app, redis.Redis.from_url(redis_url) as client:
        sender = TaskSender(app)
        for priority in range(10):
            sender.send(f"p{priority}", priority=priority)
            assert sender.priority_of(9 - priority) == priority
        lists = [QUEUE, *(f"{QUEUE}{SEPARATOR}{step}" for step in (3, 6, 9))]
        assert [client.llen(name) for name in lists] == [3, 3, 3, 1]
        assert sender.depth() == 10


def test_a_priority_is_the_messages_on_rabbitmq(rabbitmq: RabbitMQ) -> None:
    """The higher the sooner, where it knows priorities at all."""
    rabbitmq.delete_queue(QUEUE)
    kombu.pools.reset()  # type: ignore[no-untyped-call] # as above
    with make_app(rabbitmq.url, key_prefix="dw") as app:
        sender = TaskSender(app)
        for priority in (9, 3, 0):
            sender.send("a", priority=priority)
        with app.connection() as connection, connection.SimpleQueue(app.amqp.queues[QUEUE]) as queue:
            found = [queue.get(timeout=60).properties.get("priority") for _ in range(3)]
        assert [sender.priority_of(number or 0) for number in found] == [9, 3, 0]
        assert sender.priority_of(None) == 9


def test_the_client_declares_the_queue_as_we_do(rabbitmq: RabbitMQ) -> None:
    """Whoever comes first declares it, and what comes second is not refused (docs/rabbitmq.md)."""
    rabbitmq.delete_queue(QUEUE)
    with backend_app(rabbitmq.url) as app, make_app(rabbitmq.url, key_prefix="dw") as ours:
        app.conf.broker_transport_options = {"confirm_publish": True}
        with deltawire.Client(celery=app) as client:
            job = client.submit({"model": "m", "messages": [{"role": "user", "content": "Hi"}]})
        TaskSender(ours).send("another")
        with ours.connection() as connection, connection.SimpleQueue(ours.amqp.queues[QUEUE]) as queue:
            message = queue.get(timeout=60)
    assert (message.headers["id"], message.headers["kwargsrepr"]) == (job.id, "")


def test_a_hundred_questions_leave_no_connection_behind(redis_url: str) -> None:
    """Nor a channel, which is a connection on Redis."""
    with make_app(redis_url, key_prefix="dw") as app, redis.Redis.from_url(redis_url) as client:
        sender = TaskSender(app)
        sender.depth()
        before = len(client.client_list())
        for _ in range(100):
            sender.depth()
        assert len(client.client_list()) <= before


def test_a_hundred_questions_leave_no_channel_behind(rabbitmq: RabbitMQ) -> None:
    """Whether there is a queue or not."""
    with make_app(rabbitmq.url, key_prefix="dw") as app:
        sender = TaskSender(app)
        sender.send("a")
        for delete in (False, True):
            if delete:
                rabbitmq.delete_queue(QUEUE)
            for _ in range(100):
                sender.depth()
            with app.pool.acquire() as connection:
                channels = connection.connection.channels
                assert len([number for number, channel in channels.items() if channel is not None]) <= 2


@pytest.mark.parametrize("priority", [9, 4])
def test_a_message_from_the_template_is_the_one_that_kombu_sends(redis_url: str, priority: int) -> None:
    """But for the job and the delivery tag, which no two messages share."""
    with make_app(redis_url, key_prefix="dw") as app, redis.Redis.from_url(redis_url) as client:
        sender = TaskSender(app)
        sender.send("a", priority=priority)
        template = sender.template(priority)
        sent = client.lrange(template.queue, 0, -1)
        assert len(sent) == 1
    wanted = json.loads(sent[0])
    tags = {wanted["properties"]["delivery_tag"]}
    for _ in range(2):
        made = json.loads(template.message("a"))
        tags.add(made["properties"]["delivery_tag"])
        made["properties"]["delivery_tag"] = wanted["properties"]["delivery_tag"]
        assert made == wanted
    assert len(tags) == 3


@pytest.mark.parametrize("scheme", ["redis", "amqp"])
def test_a_broker_that_is_away_is_said(scheme: str) -> None:
    """The depth is not 0, it is unknown."""
    with make_app(f"{scheme}://127.0.0.1:{free_port()}/0", key_prefix="dw") as app:
        sender = TaskSender(app)
        for operation in (sender.depth, lambda: sender.send("a")):
            with pytest.raises(WireError) as caught:
                operation()
            assert caught.value.code == "queue_unavailable"


def test_a_unix_socket_is_a_broker(tmp_path: Path) -> None:
    """By the URL that the data has it by; kombu has another one."""
    path = tmp_path / "redis.sock"
    with (
        RedisServer(options={"unixsocket": str(path)}),
        make_app(f"unix://{path}?db=3", key_prefix="dw") as app,
        redis.Redis.from_url(f"unix://{path}?db=3") as client,
    ):
        TaskSender(app).send("a")
        assert client.llen(QUEUE) == 1


def test_sentinels_with_a_password_lead_to_the_broker() -> None:
    """Whatever it is made of; the sentinels, which have none, take it; after a failover, too."""
    with (
        SentinelServers(sentinels=1, password="p w/@:%#ü") as servers,
        make_app(servers.url.replace("@", f"@127.0.0.1:{free_port()},"), key_prefix="dw") as app,
    ):
        sender = TaskSender(app)
        sender.send("a")
        lost = servers.primary
        servers.fail_over()
        servers.wait_for_failover(lost)
        eventually(lambda: sends(sender), "the new primary takes messages")
        assert sender.depth() == 2


def sends(sender: TaskSender) -> bool:
    try:
        sender.send("b")
    except WireError:
        return False
    return True


def test_a_redis_that_was_restarted_is_asked_again() -> None:
    """The connections in the pool are dead, and nobody has noticed."""
    server = RedisServer()
    with server, make_app(server.url, key_prefix="dw") as app:
        sender = TaskSender(app)
        sender.send("a")
        assert sender.depth() == 1
        server.stop()
        server.start()
        assert sender.depth() == 0
        sender.send("b")
        assert sender.depth() == 1


def test_a_rabbitmq_that_was_away_is_asked_again(rabbitmq: RabbitMQ) -> None:
    """The connection in the pool is dead, and nobody has noticed."""
    with make_app(rabbitmq.url, key_prefix="dw") as app:
        sender = TaskSender(app)
        sender.send("a")
        before = sender.depth()
        for operation in (sender.depth, lambda: sender.send("b")):
            with app.pool.acquire() as connection:
                connection.connection.transport.sock.shutdown(socket.SHUT_RDWR)
            operation()
        assert sender.depth() == before + 1


def test_a_message_may_be_given_back_often(rabbitmq: RabbitMQ) -> None:
    """RabbitMQ 4 drops it after 20 times, and 3.x after the first one where it is told -1."""
    kombu.pools.reset()  # type: ignore[no-untyped-call] # as above
    rabbitmq.delete_queue(QUEUE)
    with make_app(rabbitmq.url, key_prefix="dw") as app:
        TaskSender(app).send("a")
    with rabbitmq.connect() as connection:
        channel = connection.channel()
        for _ in range(50):
            message = None
            while message is None:  # given back is not there again at once
                message = channel.basic_get(QUEUE)
            channel.basic_reject(message.delivery_tag, requeue=True)
