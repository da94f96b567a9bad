"""Everything in Redis expires, whatever became of a job; but for what Celery keeps for itself."""

import re
from collections.abc import Iterator

import httpx
import pytest
import redis

from deltawire.keys import INDEX_TTL_S
from tests.support.system import (
    WAIT_S,
    System,
    backend_app,
    cancel,
    eventually,
    request,
    send_task,
    show,
    submit,
    watch,
)

# kombu's: messages that wait and those that are not acknowledged, which go with their jobs, and which queues
# there are: as many as there are, however many jobs there were.
OF_CELERY = re.compile(r"deltawire(\W.*)?|dw:unacked(_index)?|_kombu\.binding.*")
KINDS = {
    *("dw:*:meta", "dw:*:log", "dw:*:cancel", "dw:queued", "dw:parked", "dw:owners"),
    *("dw:owner:*:jobs", "dw:webhooks", "dw:webhook:*", "dw:models", "dw:tenants"),
}
WEBHOOKS = """
[webhooks.nowhere]
url = "http://127.0.0.1:9/hook"
secret = "whsec_MDEyMzQ1Njc4OWFiY2RlZjAxMjM0NTY3ODlhYmNkZWY="
"""
LONG_WAITS = "import deltawire_worker.retry; deltawire_worker.retry.MAX_SLEEP_S = 1.0"


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """One tenant may run one job at a time."""
    environment = {
        "DELTAWIRE_WEBHOOKS": WEBHOOKS,
        "DELTAWIRE_TENANTS": "[tenants.small]\nmax_running = 1",
    }
    with System(workers=0, relay_environment=environment, worker_environment=environment) as running:
        yield running


async def test_every_key_expires(system: System) -> None:
    """Ended, cancelled, parked, held, erased, bare and unknown jobs, all noted for webhooks."""
    in_queue = await submit(system, request("never"))
    await cancel(system, in_queue)
    await cancel(system, "nobody-knows-it")
    system.start_worker(before_main=LONG_WAITS)
    whole = await submit(system, request("hello", deltas=3), {"retention_s": 60})
    await watch(system, whole)
    erased = await submit(system, request("hello", deltas=100_000))
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.delete(f"{system.relay_url}/v1/jobs/{erased}", timeout=WAIT_S)
        assert answer.status_code == 200, answer.text
    parked = request(deltas=3, fault="status", status=429, retry_after="60", fail_first=1)
    app = backend_app(system.broker_url)
    send_task(app, parked, task_id="parked")
    send_task(app, "no request at all", task_id="wrong")
    for job_id in ("running", "held"):
        options = {"tenant": "small", "on_abandon": "cancel", "abandon_grace_s": 600}
        send_task(app, request(deltas=100_000), options, task_id=job_id)
    app.close()
    await watch(system, "wrong")
    await watch(system, "parked", until=lambda event: event["type"] == "retrying")
    await watch(system, "running", until=lambda event: event["type"] == "delta")
    with redis.Redis.from_url(system.redis_url, decode_responses=True) as keys:
        assert (await show(system, whole))["status"] == "completed"
        await eventually(lambda: keys.exists(f"dw:webhook:{whole}"), what="what webhooks are told")

        def look() -> dict[str, int] | None:
            """How long each key has, once there are some of all kinds: a worker writes now and again."""
            found = {name: keys.ttl(name) for name in keys.scan_iter(count=1000)}
            kinds = {re.sub(r"\{[^}]*\}|(?<=webhook:).*|(?<=owner:)[^:]*", "*", name) for name in found}
            return found if kinds >= KINDS else None

        left_s = await eventually(look, what=f"all of {sorted(KINDS)}")
    stay = {name for name, ttl_s in left_s.items() if ttl_s == -1}
    assert not {name for name in stay if not OF_CELERY.fullmatch(name)}
    assert not {name for name in stay if "job" in name or whole in name}
    # Long enough for a job that waits for a day, and its day of retention; no key is renewed for longer.
    assert max(left_s.values()) <= INDEX_TTL_S
