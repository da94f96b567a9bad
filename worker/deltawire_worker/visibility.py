"""Keeps the messages of running tasks invisible to other workers, on kombu's Redis transport.

kombu emulates acknowledgement: a delivered message lies in a hash, and its delivery tag in the sorted set
`unacked_index`, scored with the time of delivery. What is older than `visibility_timeout` is put back into
its queue by whichever worker sweeps next. kombu never renews the score, so a short time-out starts long
tasks twice and a long one leaves a killed worker's tasks lying around. `VisibilityRenewal` sets the score
of what this worker holds to now, four times per time-out: then the time-out measures the worker's life
and not the task's.

    app.steps["consumer"].add(VisibilityRenewal)

It has a thread and a connection of its own, because the hub sleeps through a soft shutdown and because
kombu's connections have no time-out. On other transports it does nothing. It renews for as long as the
process lives and reaches Redis; it does not notice a hub that hangs.
"""

from __future__ import annotations

import logging
import threading
import time
from typing import Any

from celery import bootsteps

__all__ = ("VisibilityRenewal",)

logger = logging.getLogger(__name__)

#: So that one lost renewal, and the sweep that comes right after it, do no harm.
RENEWALS_PER_TIMEOUT = 4
#: Delivery tags per command; Redis runs nothing else meanwhile.
BATCH = 500


class VisibilityRenewal(bootsteps.StartStopStep):  # type: ignore[misc]  # Celery ships no types
    """Consumer bootstep. Lives from the first connection to the consumer's shutdown, after the last task."""

    requires = ("celery.worker.consumer.tasks:Tasks",)

    def __init__(self, consumer: Any, **options: Any) -> None:
        super().__init__(consumer, **options)
        self._is_closed = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self, consumer: Any) -> None:
        """Called again after each reconnection; the thread finds the consumer's new channel by itself."""
        if self._thread is None and consumer.connection.transport.driver_type == "redis":
            interval_s = consumer.task_consumer.channel.visibility_timeout / RENEWALS_PER_TIMEOUT
            self._thread = threading.Thread(
                target=self._run, args=(consumer, interval_s), name="visibility-renewal", daemon=True
            )
            self._thread.start()

    def stop(self, consumer: Any) -> None:
        """Go on: a lost connection stops the steps too, and so does the start of a warm shutdown."""

    terminate = stop

    def shutdown(self, consumer: Any) -> None:
        """Stop, before the consumer puts back what is not acknowledged."""
        self._is_closed.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)

    def _run(self, consumer: Any, interval_s: float) -> None:
        link: Any = None
        while not self._is_closed.wait(interval_s):
            try:
                tags = _delivered_tags(consumer)
                if tags:
                    link = link or _open_link(consumer, interval_s)
                    _renew(link, tags)
            except consumer.connection_errors + consumer.channel_errors as exc:
                logger.warning("Cannot renew the visibility of running tasks: %r", exc)
                link = None
            except Exception:
                # kombu is entitled to raise anything from a channel that the hub is closing.
                logger.exception("Cannot renew the visibility of running tasks")
                link = None


def _delivered_tags(consumer: Any) -> list[str]:
    """What the consumer's present channel has delivered and nobody has acknowledged.

    Read while the hub thread writes. `list` copies an `OrderedDict` of strings in one go under the GIL, but
    that is CPython's business and not a promise, hence the second and third try. An acknowledgement that
    slips in between does no harm: renewing never adds a tag.
    """
    task_consumer = consumer.task_consumer  # None while the consumer reconnects
    qos = None if task_consumer is None else getattr(task_consumer.channel, "qos", None)
    for _ in range(3):
        try:
            return [] if qos is None else [tag for tag in list(qos._delivered) if tag not in qos._dirty]
        except RuntimeError:  # changed size while it was read
            continue
    return []


def _open_link(consumer: Any, timeout_s: float) -> Any:
    """A channel on a connection of its own: kombu then sees to key prefix, TLS, Sentinel and credentials."""
    options = {"socket_timeout": timeout_s, "socket_connect_timeout": timeout_s}
    connection = consumer.app.connection_for_read(transport_options=options)
    return connection.channel()


def _renew(link: Any, tags: list[str]) -> None:
    now = time.time()  # kombu's own clock for these scores
    for start in range(0, len(tags), BATCH):
        batch = dict.fromkeys(tags[start : start + BATCH], now)
        link.client.zadd(link.unacked_index_key, batch, xx=True)  # XX: what was acknowledged stays away
