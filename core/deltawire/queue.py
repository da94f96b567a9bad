"""The Celery side that producers and workers share: names, message format, transport options."""

import uuid
from typing import Any, Final
from urllib.parse import unquote

from celery import Celery
from kombu.connection import Connection
from kombu.entity import Queue
from kombu.exceptions import KombuError
from kombu.utils.json import dumps

from . import redis_url
from .errors import WireError
from .options import FIRST

TASK: Final = "deltawire.generate"
QUEUE: Final = "deltawire"

VISIBILITY_TIMEOUT_S: Final = 60
"""How long Redis holds an unacknowledged message before it is delivered again. Workers renew it."""

PRIORITY_STEPS: Final = (0, 3, 6, 9)
SEPARATOR: Final = "\x06\x16"
"""kombu's defaults, which other senders and workers at our queue have, too."""

_JOB_ID: Final = "{job_id}"
_TAG: Final = "{delivery_tag}"

ANSWER_TIMEOUT_S: Final = 5.0
"""How long a sender waits for RabbitMQ to confirm, or for a connection of the pool, before it tries again."""


def transport_options(key_prefix: str) -> dict[str, Any]:
    """For kombu's Redis transport.

    kombu's own `unacked*` keys are shared by every Celery app on the database, and whichever app has the
    shortest visibility time-out would have the others' long tasks started again. Ours are named apart.
    """
    return {
        "visibility_timeout": VISIBILITY_TIMEOUT_S,
        "unacked_key": f"{key_prefix}:unacked",
        "unacked_index_key": f"{key_prefix}:unacked_index",
        "unacked_mutex_key": f"{key_prefix}:unacked_mutex",
        "unacked_restore_interval": 5,
        "unacked_restore_throttle": 1,
        "priority_steps": list(PRIORITY_STEPS),
        "sep": SEPARATOR,
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry_on_timeout": True,
    }


def make_app(broker_url: str, *, key_prefix: str) -> Celery:
    """A Celery app that speaks of our task; it is not made the process' current app."""
    broker_url, options = _as_kombu_says(broker_url)
    app = Celery("deltawire", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        task_default_queue=QUEUE,
        task_routes={TASK: {"queue": QUEUE}},
        task_ignore_result=True,
        broker_transport_options=transport_options(key_prefix) | options,
        broker_connection_timeout=5,
        broker_connection_retry_on_startup=True,
    )
    if broker_url.startswith(("amqp:", "amqps:", "pyamqp:")):
        app.conf.update(rabbitmq_settings())
    return app


def _as_kombu_says(broker_url: str) -> tuple[str, dict[str, Any]]:
    """A broker's URL and further transport options, for forms of ours that kombu does not know."""
    if broker_url.startswith("unix:"):
        return f"redis+socket:{broker_url.removeprefix('unix:')}".replace("?db=", "?virtual_host="), {}
    if not broker_url.startswith(redis_url.SENTINEL_SCHEMES):
        return broker_url, {}
    where = redis_url.parse(broker_url)
    hosts = (f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in where.hosts)
    urls = [f"sentinel://{where.credentials}{host}/{where.db}" for host in hosts]
    options: dict[str, Any] = {"master_name": where.master_name}
    if where.credentials.startswith(":"):  # as redis_url's: a password is the sentinels', too
        password = unquote(where.credentials[1:-1])
        options["sentinel_kwargs"] = {"username": "default", "password": password}
    return ";".join(urls), options


def rabbitmq_settings() -> dict[str, Any]:
    """What RabbitMQ wants otherwise; docs/rabbitmq.md says why."""
    return {
        "task_queues": [quorum_queue()],
        "broker_transport_options": {
            "confirm_publish": True,  # else a message is sent when it is in a socket's buffer
            "read_timeout": 10,
            "write_timeout": 10,
        },
        "broker_heartbeat": 30,
        # RabbitMQ closes the channel of a worker that holds a message for longer than `consumer_timeout`.
        "broker_channel_error_retry": True,
    }


def quorum_queue() -> Queue:
    """As whoever comes first has to declare it on RabbitMQ.

    A limit of deliveries that nobody reaches, because RabbitMQ 4 drops a message after 20, and 3.x takes
    -1, which would switch that off, for 0.
    """
    arguments = {"x-queue-type": "quorum", "x-delivery-limit": 1_000_000}
    return Queue(QUEUE, queue_arguments=arguments)  # type: ignore[no-untyped-call] # kombu has few types


class MessageTemplate:
    """Makes messages for a Redis list, in microseconds."""

    def __init__(self, text: str, queue: str) -> None:
        self._text = text
        self.queue = queue
        """The list's name."""

    def message(self, job_id: str) -> str:
        return self._text.replace(_JOB_ID, job_id).replace(_TAG, str(uuid.uuid4()))


class TaskSender:
    """Sends messages of jobs that have their records, and counts them. Blocking; for several threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def send(self, job_id: str, *, priority: int = FIRST, **message: Any) -> None:
        """`message`: what else Celery's `send_task` takes (`link`, `kwargs`, `queue`).

        Raises WireError `queue_unavailable`.
        """
        try:
            self._send(
                job_id,
                **self._in_class(priority),
                **message,
                confirm_timeout=ANSWER_TIMEOUT_S,
                retry=True,
                retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_max": 0.5},
            )
        except self._errors as error:
            raise WireError(
                "queue_unavailable", "the message broker did not take the job; try again"
            ) from error

    def template(self, priority: int = FIRST) -> "MessageTemplate":
        """Of the messages that `send` puts into a list of a Redis, as Celery and kombu make them."""
        # The format is that of all of kombu's virtual transports.
        with Connection("memory://") as connection:  # type: ignore[no-untyped-call] # kombu has few types
            self._send(_JOB_ID, connection=connection, **self._in_class(priority))
            message = connection.default_channel._get(QUEUE)
        message["properties"]["delivery_tag"] = _TAG
        text = dumps(message)  # type: ignore[no-untyped-call] # as above
        return MessageTemplate(text, _list_of(priority))

    def priority_of(self, number: int | None) -> int:
        """Ours, of the number that a message of the broker's bears."""
        if number is None:
            return FIRST
        return min(FIRST, max(0, number if self.is_rabbitmq else FIRST - number))

    @property
    def is_rabbitmq(self) -> bool:
        """RabbitMQ wants the queue declared, and its first class has the highest number; on Redis it is 0."""
        return str(self._app.conf.broker_url).startswith(("amqp", "pyamqp"))

    def _in_class(self, priority: int) -> dict[str, int]:
        number = priority if self.is_rabbitmq else FIRST - priority
        return {"priority": number} if number else {}

    def depth(self) -> int:
        """How many messages wait in our queue, says the broker; those that workers hold are not counted.

        0 if there is no queue yet. Raises WireError `queue_unavailable`.
        """
        try:
            with self._app.pool.acquire(block=True, timeout=ANSWER_TIMEOUT_S) as connection:
                try:
                    return _depth(connection)
                except connection.recoverable_connection_errors:
                    # The broker was restarted, or has closed what was idle; the next use connects again.
                    connection.collect()
                    return _depth(connection)
        except self._errors as error:
            raise WireError("queue_unavailable", "the message broker does not answer; try again") from error

    def _send(self, job_id: str, **options: Any) -> None:
        # No body: the record has it. No representation of arguments either.
        self._app.send_task(
            TASK,
            task_id=job_id,
            **{"queue": QUEUE, "argsrepr": "", "kwargsrepr": "", "ignore_result": True, **options},
        )

    @property
    def _errors(self) -> tuple[type[Exception], ...]:
        """All that the transport raises when the broker is away or unwilling."""
        broker = self._app.pool.connection
        return (KombuError, *broker.connection_errors, *broker.channel_errors)


def _list_of(priority: int) -> str:
    """kombu's list of a Redis for messages of that priority: one for each of its steps, 0 comes first."""
    step = max(step for step in PRIORITY_STEPS if step <= FIRST - priority)
    return f"{QUEUE}{SEPARATOR}{step}" if step else QUEUE


def _depth(connection: Any) -> int:
    connection.ensure_connection(max_retries=1, interval_start=0.1)
    try:
        # A channel of its own, because asking for a queue that does not exist closes it.
        with connection.channel() as channel:
            return int(channel.queue_declare(QUEUE, passive=True).message_count)
    except connection.channel_errors as error:
        if str(getattr(error, "reply_code", "")) == "404":
            return 0
        raise
