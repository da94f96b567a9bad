"""The pytest plugin, by tests as its users write them: each runs in a pytest of its own."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from tests.support.processes import end

pytest_plugins = ["pytester"]
# Each starts a pytest with a deltawire of its own, which takes its time on a machine that is busy.
pytestmark = pytest.mark.timeout(300)

ROOT: Final = Path(__file__).parents[2]
PAGE: Final = (ROOT / "docs" / "how-to" / "test-your-application.md").read_text()
WAIT_S: Final = 120
#: Strict, and with no plugin that the user may not have.
INI: Final = "[pytest]\nfilterwarnings = error\naddopts = -p no:schemathesis -p no:asyncio -p no:anyio\n"
MARKER: Final = "MARKER_OF_TEST"  # what begins with DELTAWIRE_ services do not inherit


def files_of_page() -> list[tuple[str, str]]:
    """The code blocks, each a file, with its name."""
    return re.findall(r'```python title="(\w+\.py)"\n(.*?)```', PAGE, re.DOTALL)


def processes_with(name: str, text: str) -> list[int]:
    """Those whose `environ` or `cmdline` has the text in it (Linux)."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if text.encode() in (directory / name).read_bytes():
                found.append(int(directory.name))
        except OSError:
            continue
    return found


@pytest.fixture
def marker(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> str:
    """In the environment of all processes that a pytest of this test starts."""
    pytester.makefile(".ini", pytest=INI)
    monkeypatch.setenv(MARKER, pytester.path.name)
    return pytester.path.name


def check_nothing_is_left(marker: str, pytester: pytest.Pytester, *, but: Sequence[int] = ()) -> None:
    """Neither a process nor, where a test wrote down its port, a Redis (it overwrites its environment)."""
    port = pytester.path / "redis-port"
    redis = f":{port.read_text()}" if port.exists() else "no Redis"
    deadline = time.monotonic() + WAIT_S
    while left := {*processes_with("environ", f"{MARKER}={marker}"), *processes_with("cmdline", redis)} - {
        *but
    }:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def test_the_page(pytester: pytest.Pytester, marker: str) -> None:
    """What docs/how-to/test-your-application.md shows passes, with warnings as errors; nothing is left."""
    del marker
    for name, code in files_of_page()[:3]:
        (pytester.path / name).write_text(code)
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", timeout=WAIT_S)
    result.assert_outcomes(passed=3)
    check_nothing_is_left(pytester.path.name, pytester)


def test_services_have_the_settings_that_a_fixture_names(pytester: pytest.Pytester, marker: str) -> None:
    """As the page has it; a webhook is called, a page of that origin is let in."""
    (pytester.path / "conftest.py").write_text(files_of_page()[3][1])
    pytester.makepyfile(
        """
        import httpx, pytest, redis

        def test_origin(deltawire_server):
            for origin, is_known in (("http://127.0.0.1:8000", True), ("http://127.0.0.1:9000", False)):
                headers = {"Origin": origin, "Authorization": f"Bearer {deltawire_server.api_key}"}
                answer = httpx.get(f"{deltawire_server.url}/v1/jobs", headers=headers)
                assert answer.is_success == is_known

        def test_wrong_settings(deltawire_server):
            assert "relay" in deltawire_server.logs

        @pytest.mark.parametrize("number", range(2))
        def test_no_webhook_of_an_earlier_test_comes(deltawire_server, number):
            with redis.Redis.from_url(deltawire_server.redis_url) as its:
                assert its.keys("dw:webhook*") == []
                body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
                with deltawire_server.client() as client:
                    client.submit(body).result(timeout_s=60)  # nobody answers at the webhook's address
                    client.submit(body | {"script": {"fault": "stall"}})
                while not its.keys("dw:webhook:*"):
                    pass
        """
    )
    pytester.runpytest_subprocess(timeout=WAIT_S).assert_outcomes(passed=4)
    check_nothing_is_left(marker, pytester)


def test_each_test_meets_its_own_jobs_and_answers(
    pytester: pytest.Pytester, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Jobs that a test left, running, queued or just sent, are gone before the next; so are answers.

    All of it is on this machine, whatever proxy the environment names.
    """
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("all_proxy", "socks5://127.0.0.1:1")
    pytester.makepyfile(
        """
        import asyncio, celery, pytest

        BODY = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}

        @pytest.mark.parametrize("number", range(3))
        def test_one(deltawire_server, deltawire_gateway, number):
            assert deltawire_gateway.requests == []
            with deltawire_server.client() as client:
                assert client.list()["data"] == []
                deltawire_gateway.reply(f"first {number}")
                deltawire_gateway.reply("second")
                assert client.submit(BODY).result(timeout_s=60).text == f"first {number}"
                assert client.submit(BODY).result(timeout_s=60).text == "second"
                assert client.submit(BODY).result(timeout_s=60).text == "second"
                assert len(deltawire_gateway.requests) == 3
                deltawire_gateway.script({"fault": "stall"})
                deltawire_gateway.script({"fault": "stall"})
                for _ in range(4):
                    client.submit(BODY)
            with celery.Celery(broker=deltawire_server.broker_url, set_as_current=False) as app:
                for _ in range(4):
                    app.send_task("deltawire.generate", kwargs={"request": BODY}, queue="deltawire")

        def test_another(deltawire_server, deltawire_gateway):
            async def ask():
                async with deltawire_server.async_client(transport="sse") as client:
                    job = await client.submit(BODY)
                    return [text async for text in job.text()]

            deltawire_gateway.reply("Hello")
            assert "".join(asyncio.run(ask())) == "Hello"
        """
    )
    pytester.runpytest_subprocess(timeout=WAIT_S).assert_outcomes(passed=4)
    check_nothing_is_left(marker, pytester)


def test_the_gateway_alone(pytester: pytest.Pytester, marker: str) -> None:
    """For code that asks a model directly; a script that there cannot be is refused where it is written."""
    del marker
    pytester.makepyfile(
        """
        import openai, pytest

        def ask(gateway, **more):
            with openai.OpenAI(base_url=gateway.base_url, api_key="any", max_retries=0) as client:
                messages = [{"role": "user", "content": "Hi"}]
                return client.chat.completions.create(model="m", messages=messages, **more)

        def test_reply(deltawire_gateway):
            deltawire_gateway.reply("Hello")
            assert ask(deltawire_gateway).choices[0].message.content == "Hello"
            own = ask(deltawire_gateway, extra_body={"script": {"text": "own"}})
            assert own.choices[0].message.content == "own"
            with pytest.raises(ValueError, match="Unknown key in script: 'txt'"):
                deltawire_gateway.script({"txt": "Hello"})

        def test_without_an_answer(deltawire_gateway):
            assert ask(deltawire_gateway).choices[0].message.content
            with pytest.raises(openai.BadRequestError):
                ask(deltawire_gateway, n=1000)
            with pytest.raises(openai.BadRequestError):
                ask(deltawire_gateway, extra_body={"model": None})
        """
    )
    pytester.runpytest_subprocess(timeout=WAIT_S).assert_outcomes(passed=2)


def test_several_processes_have_one_each(pytester: pytest.Pytester, marker: str) -> None:
    """As pytest-xdist makes them."""
    pytester.makepyfile(
        """
        import pathlib, pytest

        @pytest.mark.parametrize("number", range(4))
        def test_one(deltawire_server, deltawire_gateway, worker_id, number):
            deltawire_gateway.reply(worker_id)
            with deltawire_server.client() as client:
                body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
                assert client.submit(body).result(timeout_s=60).text == worker_id
            pathlib.Path(worker_id).write_text(deltawire_server.url)
        """
    )
    pytester.runpytest_subprocess("-n", "2", "--dist", "each", timeout=WAIT_S).assert_outcomes(passed=8)
    urls = {(pytester.path / name).read_text() for name in ("gw0", "gw1")}
    assert len(urls) == 2
    check_nothing_is_left(marker, pytester)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize(
    ("number", "arguments"),
    [(signal.SIGKILL, []), (signal.SIGINT, ["-n", "1"])],
    ids=["kill", "int-xdist"],
)
def test_an_interrupted_run_leaves_nothing(
    pytester: pytest.Pytester, marker: str, number: signal.Signals, arguments: list[str]
) -> None:
    """Ctrl-C, a CI that ends the job, and one that does not ask; in the middle of a stream."""
    pytester.makepyfile(
        """
        import pathlib, time

        def test_long(deltawire_server, deltawire_gateway):
            deltawire_gateway.script({"deltas": 10_000, "rate": 10})
            with deltawire_server.client() as client:
                body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}]}
                next(iter(client.submit(body).text()))
                port = deltawire_server.redis_url.rpartition(":")[2].partition("/")[0]
                pathlib.Path("redis-port").write_text(port)
                time.sleep(600)
        """
    )
    process = subprocess.Popen([sys.executable, "-m", "pytest", *arguments], stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + WAIT_S
        while not (pytester.path / "redis-port").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert len(processes_with("environ", f"{MARKER}={marker}")) >= 4  # pytest, keeper, relay, worker
        process.send_signal(number)
        process.wait(WAIT_S)
        check_nothing_is_left(marker, pytester)
    finally:
        end(process)


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
def test_a_forked_process_that_goes_on_keeps_nothing(pytester: pytest.Pytester, marker: str) -> None:
    """It holds what the tests have open; all ends with the tests all the same, though they are killed."""
    pytester.makepyfile(
        """
        import os, pathlib, time, warnings

        def test_fork(deltawire_server):
            port = deltawire_server.redis_url.rpartition(":")[2].partition("/")[0]
            pathlib.Path("redis-port").write_text(port)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pid = os.fork()
            if not pid:
                time.sleep(600)
                os._exit(0)
            pathlib.Path("forked").write_text(str(pid))
            os.kill(os.getpid(), 9)
        """
    )
    process = subprocess.Popen([sys.executable, "-m", "pytest"], stdout=subprocess.DEVNULL)
    try:
        assert process.wait(WAIT_S) == -9
        forked = int((pytester.path / "forked").read_text())
        check_nothing_is_left(marker, pytester, but=[forked])
        os.kill(forked, signal.SIGKILL)
    finally:
        end(process)


def test_what_does_not_start_says_why(pytester: pytest.Pytester, marker: str) -> None:
    """A setting that is wrong: the tests that need the server fail with what the service said."""
    pytester.makeconftest(
        """
        import pytest

        @pytest.fixture(scope="session")
        def deltawire_environment():
            return {"DELTAWIRE_CONCURRENCY": "many"}
        """
    )
    pytester.makepyfile("def test_one(deltawire_server): pass\ndef test_other(deltawire_gateway): pass\n")
    result = pytester.runpytest_subprocess(timeout=WAIT_S)
    result.assert_outcomes(passed=1, errors=1)
    result.stdout.fnmatch_lines(["*deltawire did not start: the worker ended:", "*DELTAWIRE_CONCURRENCY*"])
    check_nothing_is_left(marker, pytester)


def test_it_costs_next_to_nothing_where_nobody_wants_it(pytester: pytest.Pytester) -> None:
    """Loaded in every pytest of everybody who has deltawire installed: it imports pytest, and that is all."""
    code = """
import sys, pytest
before = set(sys.modules)
import deltawire.testing
print(sorted({name.partition(".")[0] for name in sys.modules.keys() - before} - sys.stdlib_module_names))
print(sorted(name for name in sys.modules if name.startswith("deltawire")))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "core"), *sys.path[1:]])}
    said = subprocess.check_output(
        [sys.executable, "-c", code], env=environment, text=True, cwd=pytester.path
    )
    assert said.splitlines() == ["['deltawire']", "['deltawire', 'deltawire.testing']"]
