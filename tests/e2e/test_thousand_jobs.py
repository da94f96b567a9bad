"""A thousand jobs at once in one worker process and one relay process, each of them watched."""

import asyncio
import json
import time
from collections import Counter

import pytest
from websockets.asyncio.client import connect

from tests.support.system import TERMINAL, System, backend_app, request, send_task

JOBS = 1_000
RATE = 10
DELTAS = 100
CONNECTING = 50


async def reader(url: str, door: asyncio.Semaphore) -> str:
    """Watches one job to its end; what it saw, in a word."""
    async with door:
        connection = await connect(url, proxy=None, compression=None, open_timeout=60, ping_interval=None)
    expected = 1
    async with connection:
        async for text in connection:
            message = json.loads(text)
            if "created_at" not in message:
                continue
            if message["sequence_number"] != expected:
                return f"{message['sequence_number']} instead of {expected}"
            expected += 1
            if message["type"] in TERMINAL:
                # queued, in_progress, role, content, finish_reason, usage, terminal
                return f"{message['type']} after {expected - 1}"
    return "closed before the end"


@pytest.mark.timeout(300)
async def test_every_reader_of_a_thousand_jobs_sees_every_event_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """1,000 jobs of 10 deltas per second for 10 s: the rate may slip, nothing else (PROTOCOL §4.1)."""
    with System(gateway_rate=RATE) as system:
        app = backend_app(system.redis_url)
        door = asyncio.Semaphore(CONNECTING)
        ids = [f"thousand-{number}" for number in range(JOBS)]
        urls = [f"{system.websocket_url}/v1/jobs/{job_id}/ws" for job_id in ids]
        began = time.monotonic()
        readers = [asyncio.create_task(reader(url, door)) for url in urls]
        body = request("a river", deltas=DELTAS)

        def send() -> None:
            for job_id in ids:
                send_task(app, body, task_id=job_id)

        await asyncio.to_thread(send)
        seen = Counter(await asyncio.gather(*readers))
        took_s = time.monotonic() - began
        app.close()
    with capsys.disabled():
        print(f"\n{JOBS} jobs of {DELTAS} deltas at {RATE}/s, all watched: {took_s:.1f} s")
    assert seen == {f"completed after {DELTAS + 6}": JOBS}
