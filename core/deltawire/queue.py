"""The Celery side that producers and workers share: names, message format, transport options."""

from typing import Any, Final

import kombu.exceptions
from celery import Celery

from .errors import WireError

TASK: Final = "deltawire.generate"
QUEUE: Final = "deltawire"

VISIBILITY_TIMEOUT_S: Final = 60
"""How long Redis holds an unacknowledged message before it is delivered again. Workers renew it."""


def transport_options(key_prefix: str) -> dict[str, Any]:
    """For kombu's Redis transport; the other transports ignore them.

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
        "socket_timeout": 30,
        "socket_connect_timeout": 5,
        "socket_keepalive": True,
        "health_check_interval": 15,
        "retry_on_timeout": True,
    }


def make_app(broker_url: str, *, key_prefix: str) -> Celery:
    """A Celery app that speaks of our task; it is not made the process' current app."""
    app = Celery("deltawire", broker=broker_url, set_as_current=False)
    app.conf.update(
        accept_content=["json"],
        task_serializer="json",
        result_serializer="json",
        event_serializer="json",
        task_default_queue=QUEUE,
        task_routes={TASK: {"queue": QUEUE}},
        task_ignore_result=True,
        broker_transport_options=transport_options(key_prefix),
        broker_connection_timeout=5,
        broker_connection_retry_on_startup=True,
    )
    return app


class TaskSender:
    """Sends the message of a job that has its record already. Blocking; safe to use from several threads."""

    def __init__(self, app: Celery) -> None:
        self._app = app

    def send(self, job_id: str) -> None:
        """Raises WireError `queue_unavailable`."""
        try:
            # No body: the record has it. No representation of arguments either.
            self._app.send_task(
                TASK,
                task_id=job_id,
                queue=QUEUE,
                argsrepr="",
                kwargsrepr="",
                ignore_result=True,
                retry=True,
                retry_policy={"max_retries": 2, "interval_start": 0.1, "interval_max": 0.5},
            )
        except kombu.exceptions.OperationalError as error:
            raise WireError(
                "queue_unavailable", "the message broker did not take the job; try again"
            ) from error
