"""Submission to the broker itself, by a Celery app of the caller's (PROTOCOL.md §1.1). Blocking.

The app needs the broker that deltawire's workers have, and nothing else of ours. On RabbitMQ the queue is
declared as docs/rabbitmq.md says; set the app's transport option `confirm_publish`, or a message counts as
sent when it is in a buffer. On Redis set `socket_timeout`, or a Redis that accepts and does not answer is
waited for without end.
"""

import uuid
from typing import Any, Final

import msgspec
from celery import Celery

from deltawire import queue
from deltawire.errors import WireError
from deltawire.options import check_request, parse_options

from .calls import Options
from .errors import refusal

_NAMESPACE: Final = uuid.UUID("5b8f5a0c-2f0e-4e0e-9a53-6a1d0f3f1c55")


def send(
    app: Celery, request: dict[str, Any], options: Options | None, idempotency_key: str | None
) -> dict[str, Any]:
    """The job, as POST /v1/jobs would answer. Raises JobUnavailableError.

    With an idempotency key its id is made of that, and of the tenant: a worker starts a job only once.
    """
    try:
        told = parse_options(None if options is None else dict(options))
        check_request(request)
        job_id = str(uuid.uuid4())
        if idempotency_key is not None:
            job_id = str(uuid.uuid5(_NAMESPACE, f"{told.tenant}:{idempotency_key}"))
        arguments = msgspec.to_builtins({"request": request, "options": dict(options or {})})
        sender = queue.TaskSender(app)
        sender.send(
            job_id,
            priority=told.priority,
            kwargs=arguments,
            serializer="json",
            queue=queue.quorum_queue() if sender.is_rabbitmq else queue.QUEUE,
        )
    except WireError as error:
        raise refusal(error.error) from error
    return {"id": job_id, "status": "queued", "urls": None}
