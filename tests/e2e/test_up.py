"""`deltawire up`: one command, and nothing left behind."""

import os
import pty
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import httpx
import pytest

from deltawire.redis_server import free_port

WAIT_S: Final = 90
pytestmark = pytest.mark.timeout(300)


def processes_with(marker: str) -> list[str]:
    """The command lines of all processes whose environment holds `marker`."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            if marker.encode() in (directory / "environ").read_bytes():
                found.append((directory / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


@pytest.fixture
def up(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[bytes], str, Path, str]]:
    """`deltawire up` on free ports: process, relay's address, its output, a marker in its environment."""
    port = free_port()
    marker = f"DELTAWIRE_TEST_MARKER={os.getpid()}-{time.monotonic_ns()}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DELTAWIRE_")}
    environment |= {"DELTAWIRE_PORT": str(port), "DELTAWIRE_WORKER_PORT": str(free_port())}
    environment |= {"HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": ""}  # not for what is on this machine
    environment |= dict([marker.split("=")])
    output = tmp_path / "up.log"
    with output.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", "from deltawire.cli import main; main()", "up"],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + WAIT_S
        while "deltawire is up" not in output.read_text():
            assert process.poll() is None, output.read_text()
            assert time.monotonic() < deadline, output.read_text()
            time.sleep(0.05)
        yield process, f"http://127.0.0.1:{port}", output, marker
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_up_runs_everything_and_leaves_nothing(
    up: tuple[subprocess.Popen[bytes], str, Path, str], number: signal.Signals
) -> None:
    """Relay, worker, gateway and Redis answer; after the signal no process is left, the exit code is 0."""
    process, url, output, marker = up
    body = {"request": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "script": {"rate": 0}}}
    job = httpx.post(f"{url}/v1/jobs", json=body, trust_env=False, timeout=WAIT_S).json()
    events = httpx.get(f"{url}/v1/jobs/{job['id']}/events", trust_env=False, timeout=WAIT_S).text
    assert '"type":"completed"' in events
    assert len(processes_with(marker)) >= 4  # up, gateway, relay, worker; Redis overwrites its environment
    found = re.search(r"redis://127\.0\.0\.1:(\d+)", output.read_text())
    assert found
    redis_address = ("127.0.0.1", int(found[1]))
    socket.create_connection(redis_address, timeout=5).close()
    process.send_signal(number)
    assert process.wait(WAIT_S) == 0, output.read_text()
    assert processes_with(marker) == []
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(redis_address, timeout=5)
    lines = output.read_text()
    export = f"export DELTAWIRE_PORT={url.rpartition(':')[2]}"  # or the commands go to another port
    for name in ("relay │", "worker │", "gateway │", export, "submit --follow", "stopping"):
        assert name in lines


@pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc")
@pytest.mark.parametrize("is_window", [True, False], ids=["window", "pipe"])
def test_an_output_that_is_closed_leaves_nothing(is_window: bool) -> None:
    """The window or the reader of a pipe goes: printing fails, the services are stopped all the same."""
    marker = f"DELTAWIRE_TEST_MARKER={os.getpid()}-{time.monotonic_ns()}"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("DELTAWIRE_")}
    environment |= {"DELTAWIRE_PORT": str(free_port()), "DELTAWIRE_WORKER_PORT": str(free_port())}
    environment |= dict([marker.split("=")])
    window, terminal = pty.openpty() if is_window else os.pipe()
    process = subprocess.Popen(
        [sys.executable, "-c", "from deltawire.cli import main; main()", "up"],
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    try:
        said = b""
        while b"deltawire is up" not in said:
            more = os.read(window, 4_096)
            assert more, said
            said += more
        os.close(window)
        # A job gives the worker something to say.
        body = {
            "request": {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "script": {"rate": 0}}
        }
        url = f"http://127.0.0.1:{environment['DELTAWIRE_PORT']}/v1/jobs"
        job = httpx.post(url, json=body, trust_env=False, timeout=WAIT_S).json()
        events = httpx.get(f"{url}/{job['id']}/events", trust_env=False, timeout=WAIT_S).text
        assert '"type":"completed"' in events
        process.send_signal(signal.SIGHUP)
        process.wait(WAIT_S)
        assert processes_with(marker) == []
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def test_up_says_which_port_is_taken() -> None:
    """A taken port ends it at once, with the variable to set."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = subprocess.run(
            [sys.executable, "-c", "from deltawire.cli import main; main()", "up"],
            env={**os.environ, "DELTAWIRE_PORT": str(taken.getsockname()[1])},
            capture_output=True,
            text=True,
            timeout=WAIT_S,
            check=False,
        )
    assert result.returncode == 1
    assert "DELTAWIRE_PORT" in result.stdout
