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
from contextlib import suppress
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
CONTROL_PROGRAM: Final = "/usr/lib/rabbitmq/bin/rabbitmqctl"
ELECTION: Final = """
    [ra:trigger_election(amqqueue:get_pid(Queue)) || Queue <- rabbit_amqqueue:list(),
        amqqueue:get_type(Queue) =:= rabbit_quorum_queue].
"""


class RabbitMQDidNotStartError(AssertionError):
    """The message ends with its log's tail."""


class RabbitMQ:
    """From `start` to `stop`, through `kill` and `restart`. Blocking; also a context manager.

    `consumer_timeout_s` is how long a consumer may hold a message before RabbitMQ closes its channel.
    """

    def __init__(self, *, consumer_timeout_s: int = 1800) -> None:
        self._consumer_timeout_s = consumer_timeout_s
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

    @property
    def _environment(self) -> dict[str, str]:
        directory = Path(self._directory.name)
        return {
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
            "RABBITMQ_ADVANCED_CONFIG_FILE": str(directory / "advanced.config"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "enabled_plugins"),
            "RABBITMQ_PID_FILE": str(directory / "pid"),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +sbwt none",
            # The script then becomes the server, rather than its parent: one process to end.
            "RUNNING_UNDER_SYSTEMD": "true",
        }

    def _start(self) -> None:
        directory = Path(self._directory.name)
        (directory / "enabled_plugins").write_text("[].")
        # The tick is when a channel looks at its consumers' time-outs.
        timeout_ms = self._consumer_timeout_s * 1000
        (directory / "advanced.config").write_text(
            f"[{{rabbit, [{{consumer_timeout, {timeout_ms}}}, {{channel_tick_interval, 1000}}]}}]."
        )
        if self._epmd is None:
            # Else the server starts one, which outlives it.
            assert self._epmd_program is not None
            self._epmd = self._spawn([self._epmd_program])
        self._server = self._spawn([PROGRAM])
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._server.poll() is not None or time.monotonic() > deadline:
                raise RabbitMQDidNotStartError(f"RabbitMQ did not start: {self.log[-3000:]}")
            time.sleep(0.05)

    def _spawn(self, command: list[str]) -> subprocess.Popen[bytes]:
        with self._log_path.open("ab") as output:
            return subprocess.Popen(
                command,
                env=self._environment,
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
                # Somebody else may have taken the port in the meantime. The name ends with the machine's,
                # whatever the node's host is called.
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
        """Ends it at once. The data stay."""
        if self._server is not None:
            self._server.kill()
            self._server.wait()
            self._server = None

    def restart(self) -> None:
        """Ends it in order; then the same server, on the same ports and with its data.

        Raises RabbitMQDidNotStartError.
        """
        if self._server is not None:
            self._server.terminate()
            with suppress(subprocess.TimeoutExpired):
                self._server.wait(STOP_TIMEOUT_S)
        self.kill()
        self.start()
        # A single node of 3.10 may forget to elect the leaders of its quorum queues: docs/rabbitmq.md.
        subprocess.run(
            [CONTROL_PROGRAM, "eval", ELECTION], env=self._environment, capture_output=True, check=True
        )

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
