"""The worker of the tutorials: OpenAI's SDK in a Celery task, each chunk published on a channel of the job.

Runs in .venv-bench: `celery -A benchmarks.workers.celery_sdk_app worker -P threads -c 100`.
"""

import os
from typing import Any

import redis
from celery import Celery
from openai import OpenAI

app = Celery("tutorial", broker=os.environ["BENCH_REDIS_URL"])
client = OpenAI(base_url=os.environ["BENCH_GATEWAY_URL"], api_key="sk-bench")
# redis-py's pool refuses the hundred and first connection unless it is told otherwise.
publisher = redis.Redis.from_url(os.environ["BENCH_REDIS_URL"], max_connections=10_000)


@app.task(name="stream", bind=True, ignore_result=True)  # type: ignore[untyped-decorator]
def stream(self: Any, request: dict[str, Any]) -> None:
    for chunk in client.chat.completions.create(**request, stream=True):
        publisher.publish(f"job:{self.request.id}", chunk.model_dump_json())
