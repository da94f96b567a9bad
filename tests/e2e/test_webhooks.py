"""Webhooks hear of the end of each job, whoever dies (docs/webhooks.md). A real receiver, real processes."""

import base64
import json
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis

from tests.support.code_blocks import blocks
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

SECRET = "whsec_" + base64.b64encode(bytes(range(32))).decode()
PAGE = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
# Times of tests: looks of a second, retries at once, leases that a machine that is busy keeps.
FAST = """
import deltawire.log, deltawire.notices, deltawire_worker.webhooks
deltawire.log.LOOK_S = deltawire_worker.webhooks.LOOK_S = 0.5
deltawire.notices.LEASE_S = 5
deltawire_worker.webhooks.RETRIES_S = (0.2, 0.2)
"""
# It tells nothing, and dies before it can keep what is to be told of an end that it has written.
DIES_AT_ENDS = (
    FAST
    + """
import asyncio, os
deltawire_worker.webhooks.Webhooks.keep = lambda _: asyncio.sleep(3600)
deltawire.notices.Notices.ended = lambda *_: os.kill(os.getpid(), 9)
"""
)


class Call(NamedTuple):
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def job_id(self) -> str:
        return str(json.loads(self.body)["data"]["id"])


class Receiver:
    """Answers 200, or what a test has put into `answers` of a job: a status, or an event to wait for."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.answers: dict[str, list[int | threading.Event]] = defaultdict(list)
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                headers = {name.lower(): value for name, value in self.headers.items()}
                call = Call(self.path, headers, body)
                receiver.calls.append(call)
                answers = receiver.answers[call.job_id]
                answer = answers.pop(0) if answers else 200
                if isinstance(answer, threading.Event):
                    answer.wait(30)
                    return
                self.send_response(answer)
                if answer == 302:
                    self.send_header("location", f"{receiver.url}/elsewhere")
                self.send_header("content-length", "100000" if answer == 410 else "0")
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def of(self, job_id: str) -> list[Call]:
        return [call for call in self.calls if call.job_id == job_id]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture(scope="module")
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture(scope="module")
def system(receiver: Receiver) -> Iterator[System]:
    """Without a worker, at first."""
    webhooks = f"""
[webhooks.all]
url = "{receiver.url}/all"
secret = "{SECRET}"
[webhooks.others]
url = "{receiver.url}/others"
secret = "{SECRET}"
tenants = ["others"]
"""
    with System(
        workers=0,
        relay_environment={"DELTAWIRE_WEBHOOKS": "yes"},
        worker_environment={"DELTAWIRE_WEBHOOKS": webhooks},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def verify() -> Callable[..., dict[str, Any]]:
    """What the page says to do with a message."""
    (code,) = (block.code for block in blocks(PAGE) if block.language == "python")
    names: dict[str, Any] = {}
    exec(code, names)
    function: Callable[..., dict[str, Any]] = names["verify"]
    return function


async def test_ends_that_nobody_could_keep_are_found(
    system: System, receiver: Receiver, verify: Callable[..., dict[str, Any]]
) -> None:
    """Of a job cancelled in the queue without any worker; of one whose worker died with its end."""
    in_queue = await submit(system, request("never"))
    await cancel(system, in_queue)
    dying = system.start_worker(before_main=DIES_AT_ENDS)
    streamed = await submit(system, request("hello", deltas=3), {"metadata": {"a": "b"}})
    await watch(system, streamed)
    assert dying.wait(WAIT_S) == -signal.SIGKILL
    system.start_worker(before_main=FAST)
    (call,) = await eventually(lambda: receiver.of(in_queue))
    assert verify(SECRET, call.headers, call.body)["type"] == "job.cancelled"
    (call,) = await eventually(lambda: receiver.of(streamed))
    message = verify(SECRET, call.headers, call.body)
    assert (message["type"], call.path) == ("job.completed", "/all")
    assert message["data"] == await show(system, streamed)
    assert message["data"]["metadata"] == {"a": "b"}
    with pytest.raises(ValueError, match="no signature"):
        verify(SECRET, call.headers, call.body + b" ")
    with pytest.raises(ValueError, match="too old"):
        verify(SECRET, {**call.headers, "webhook-timestamp": str(int(time.time()) - 301)}, call.body)


async def test_failures_are_tried_again_by_the_same_id(system: System, receiver: Receiver) -> None:
    """Up to the last try. A redirect is a failure, and leads nowhere; 410 is the end of it."""
    plans: dict[str, list[int | threading.Event]] = {
        "once": [],
        "again": [500],
        "redirected": [302, 302, 302],
        "gone": [410],
    }
    app = backend_app(system.broker_url)
    for job_id, answers in plans.items():
        receiver.answers[job_id] = answers
        options = {"tenant": "others"} if job_id == "once" else None
        send_task(app, request("hello", deltas=1), options, task_id=job_id)
    app.close()
    expected = {"once": 2, "again": 2, "redirected": 3, "gone": 1}
    await eventually(lambda: {job: len(receiver.of(job)) for job in plans} == expected, what=str(expected))
    assert {call.path for call in receiver.of("once")} == {"/all", "/others"}
    for job_id in plans:
        assert len({call.headers["webhook-id"] for call in receiver.of(job_id)}) == 1
    with redis.Redis.from_url(system.redis_url) as client:
        await eventually(lambda: not client.zcard("dw:webhooks"), what="nothing waits any more")
        assert not client.hexists("dw:webhook:gone", "body")
        assert 0 < client.ttl("dw:webhook:gone") <= 172_800
    assert not [call for call in receiver.calls if call.path == "/elsewhere"]
    assert {job: len(receiver.of(job)) for job in plans} == expected


async def test_a_worker_that_dies_while_it_tells(system: System, receiver: Receiver) -> None:
    """Another one tells the same."""
    hanging = threading.Event()
    receiver.answers["hung"] = [hanging]
    app = backend_app(system.broker_url)
    send_task(app, request("hello", deltas=1), task_id="hung")
    app.close()
    await eventually(lambda: receiver.of("hung"), what="the first call")
    system.workers[-1].signal(signal.SIGKILL)
    system.workers[-1].wait()
    hanging.set()
    system.start_worker(before_main=FAST)
    await eventually(lambda: len(receiver.of("hung")) > 1, what="another call")
    assert len({(call.headers["webhook-id"], call.body) for call in receiver.of("hung")}) == 1
