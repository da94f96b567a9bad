"""A real RabbitMQ of our own: the packaged programs on free loopback ports, all files in a temp directory.

    with RabbitMQ() as rabbitmq:
        app = Celery(broker=rabbitmq.url)

Without the programs, tests that need it are skipped; with CI set they fail. A server that the package has
started is left alone, and so is its epmd.
"""

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import amqp  # type: ignore[import-untyped] # ships no types
import pytest

from deltawire.redis_server import free_port

START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 15.0
#: Not the one on the PATH, which Debian wraps to become the package's user, in the package's directories.
PROGRAM: Final = "/usr/lib/rabbitmq/bin/rabbitmq-server"


class RabbitMQDidNotStartError(AssertionError):
    """The message ends with its log's tail."""


class RabbitMQ:
    """From `start` to `stop`, through `kill` and `restart`. Blocking; also a context manager."""

    def __init__(self) -> None:
        self._epmd_program = shutil.which("epmd")
        if self._epmd_program is None or not Path(PROGRAM).exists():
            reason = "there is no RabbitMQ: apt-get install rabbitmq-server"
            if os.environ.get("CI"):
                pytest.fail(reason)
            pytest.skip(reason)
        self.port = free_port()
        self._epmd_port = free_port()
        self._distribution_port = free_port()
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-rabbitmq-")
        self._epmd: subprocess.Popen[bytes] | None = None
        self._server: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"amqp://guest:guest@127.0.0.1:{self.port}//"

    @property
    def _name(self) -> str:
        return f"deltawire-{self.port}"

    def start(self) -> None:
        """Returns when the server answers. Raises RabbitMQDidNotStartError; nothing runs then."""
        try:
            self._start()
        except BaseException:
            self.stop()
            raise

    def _start(self) -> None:
        directory = Path(self._directory.name)
        plugins = directory / "enabled_plugins"
        plugins.write_text("[].")
        environment = {
            "PATH": os.environ["PATH"],
            "LANG": "C.UTF-8",
            "HOME": str(directory),  # of the cookie
            "ERL_EPMD_PORT": str(self._epmd_port),
            "ERL_EPMD_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODENAME": f"{self._name}@localhost",
            "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
            "RABBITMQ_NODE_PORT": str(self.port),
            "RABBITMQ_DIST_PORT": str(self._distribution_port),
            "RABBITMQ_MNESIA_BASE": str(directory / "mnesia"),
            "RABBITMQ_LOG_BASE": str(directory / "log"),
            "RABBITMQ_GENERATED_CONFIG_DIR": str(directory / "config"),
            "RABBITMQ_CONFIG_FILE": str(directory / "none"),
            "RABBITMQ_CONF_ENV_FILE": str(directory / "none.sh"),
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "none.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(plugins),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
            # The script then becomes the server, rather than its parent: one process to end.
            "RUNNING_UNDER_SYSTEMD": "true",
        }
        if self._epmd is None:
            # Else the server starts one, which outlives it.
            assert self._epmd_program is not None
            self._epmd = self._spawn([self._epmd_program], environment)
        self._server = self._spawn([PROGRAM], environment)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RabbitMQDidNotStartError(f"RabbitMQ did not start: {self.log[-3000:]}")
            time.sleep(0.05)

    def _spawn(self, command: list[str], environment: dict[str, str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as output:
            return subprocess.Popen(
                command,
                env=environment,
                cwd=self._directory.name,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def connect(self) -> amqp.Connection:
        """A connection of the test's own, to look at things; use it with `with`."""
        return amqp.Connection(f"127.0.0.1:{self.port}", connect_timeout=5, read_timeout=5, write_timeout=5)

    def delete_queue(self, name: str) -> None:
        with self.connect() as connection:
            connection.channel().queue_delete(name)

    def _answers(self) -> bool:
        try:
            with self.connect() as connection:
                # Somebody else may have taken the port in the meantime.
                # It ends with the machine's name, whatever the node's host is called.
                return bool(connection.server_properties["cluster_name"].startswith(f"{self._name}@"))
        except (OSError, amqp.AMQPError):
            return False

    @property
    def _log_path(self) -> Path:
        return Path(self._directory.name, "output.log")

    @property
    def log(self) -> str:
        """What the server has said so far."""
        paths = [self._log_path, *Path(self._directory.name, "log").glob("*.log")]
        return "\n".join(path.read_text(errors="replace") for path in paths if path.exists())

    def kill(self) -> None:
        """As a machine that loses its power, but that its disk keeps what was written."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def restart(self) -> None:
        """The same server again, on the same ports and with its data. Raises RabbitMQDidNotStartError."""
        self.kill()
        self.start()

    def stop(self) -> None:
        """Ends the server and its epmd, and forgets the data. Idempotent."""
        self.kill()
        if self._epmd is not None:
            self._epmd.terminate()
            self._epmd.wait(STOP_TIMEOUT_S)
            self._epmd = None
        self._directory.cleanup()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.stop()
