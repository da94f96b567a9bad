"""Server-side processes of a benchmark: started, accounted for, stopped. Linux only (/proc).

CPU is that of each process and its children, user and system, in seconds, as the kernel counts it in
nanoseconds; memory is PSS, so that what forked processes share is counted once.
"""

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from deltawire.redis_server import find_server, free_port

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 10.0


class DidNotStartError(RuntimeError):
    """A server ended or did not listen in time; the message ends with its log's tail."""


class Servers:
    """All processes of one system under test, by name. A context manager that ends what it started."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="deltawire-bench-")
        self.folder = Path(self._folder.name)
        self._processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def start(
        self,
        name: str,
        command: Sequence[str | Path],
        *,
        environment: Mapping[str, str] | None = None,
        port: int | None = None,
        is_ready: Callable[[], bool] | None = None,
        cwd: Path | None = None,
    ) -> subprocess.Popen[bytes]:
        """Starts a process and waits until it listens on `port`, or `is_ready`. Raises DidNotStartError."""
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("DELTAWIRE_")}
        log = self.folder / f"{name}.log"
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(part) for part in command],
                env={**inherited, **(environment or {})},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                start_new_session=True,
            )
        self._processes[name] = process
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (_listens(port) if port is not None else is_ready is None or is_ready()):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_text(errors="replace")[-3000:]
                raise DidNotStartError(f"{name} did not start ({process.poll()}); its log:\n{tail}")
            time.sleep(0.02)
        return process

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def cpu_s(self) -> dict[str, float]:
        """Seconds of CPU that each has used since it began, with its living children."""
        return {name: sum(map(cpu_s, tree(process.pid))) for name, process in self._processes.items()}

    def memory_kb(self) -> dict[str, int]:
        """What each holds, with its children: PSS."""
        return {name: sum(map(_pss_kb, tree(process.pid))) for name, process in self._processes.items()}

    def kill(self, name: str) -> None:
        """Ends one at once, as a crash would."""
        _signal_group(self._processes[name], signal.SIGKILL)

    def stop(self) -> None:
        """Ends all, the last started first. Idempotent."""
        for process in reversed(self._processes.values()):
            _signal_group(process, signal.SIGTERM)
            try:
                process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                _signal_group(process, signal.SIGKILL)
                process.wait()
        self._processes.clear()
        self._folder.cleanup()


def start_redis(servers: Servers) -> int:
    """With its defaults, but on a port of its own and without files. Returns the port."""
    port = free_port()
    words = ("--port", str(port), "--bind", "127.0.0.1", "--save", "", "--dir", servers.folder)
    servers.start("redis", (find_server(), *words), port=port)
    return port


def end_in_order() -> None:
    """For programs: SIGTERM (`timeout` sends it) ends this process as Ctrl-C does, its servers first.

    Not by an exception of its own: whichever callback of the loop it met would swallow it.
    """
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))


def tree(pid: int) -> list[int]:
    """A process and all that descend from it."""
    found = [pid]
    for parent in found:
        for task in Path(f"/proc/{parent}/task").glob("*"):
            try:
                found += map(int, (task / "children").read_text().split())
            except OSError:
                continue
    return found


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used; 0 if it is gone."""
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the clock of another process (clock_getcpuclockid(3))
    except OSError:
        return 0.0


def _pss_kb(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1])
    except OSError:
        pass
    return 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)  # its own session, so its group is ours to end
