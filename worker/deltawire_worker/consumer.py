"""Celery's consumer, without what it sets up on RabbitMQ for messages with an `eta`.

    worker_consumer = "deltawire_worker.consumer:Consumer"

Where there is a quorum queue, Celery 5.7 declares 28 queues and as many exchanges more, which only a sender
that publishes to a topic exchange can use. Ours is direct: a message with an `eta` goes to the worker, which
holds it until then, as on Redis. No setting leaves the step out.
"""

from celery.worker import consumer

__all__ = ("Consumer",)


class Consumer(consumer.Consumer):  # type: ignore[misc]  # Celery ships no types
    """See the module."""

    class Blueprint(consumer.Consumer.Blueprint):  # type: ignore[misc]  # as above
        default_steps = tuple(
            step for step in consumer.Consumer.Blueprint.default_steps if "delayed_delivery" not in step
        )
