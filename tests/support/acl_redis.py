"""A Redis server with the ACL file that we ship, completed by deploy/make-secrets, and an administrator."""

import subprocess
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

import redis

from deltawire.redis_server import find_server, free_port

MAKE_SECRETS: Final = Path(__file__).parents[2] / "deploy" / "make-secrets"
START_TIMEOUT_S: Final = 60.0
STOP_TIMEOUT_S: Final = 60.0


class AclRedis:
    """From `with` to its end. `url_of` has the URLs that make-secrets has written."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="deltawire-acl-")
        self.secrets = Path(self._directory.name, "secrets")
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    def url_of(self, user: str) -> str:
        """Of worker, relay or operator."""
        return (self.secrets / f"{user}_redis_url").read_text()

    @property
    def url(self) -> str:
        """Of the user who may do all, whom only tests have."""
        return f"redis://admin:admin@127.0.0.1:{self.port}/0"

    def client(self, user: str = "") -> Any:
        """A client that speaks as this user."""
        return redis.Redis.from_url(self.url_of(user) if user else self.url)

    def denied(self) -> list[str]:
        """What was refused since the last call: who, what and why, as ACL LOG has it."""
        with self.client() as client:
            entries = client.acl_log()
            client.acl_log_reset()
        return [f"{entry['username']}: {entry['reason']} {entry['object']}" for entry in entries]

    def __enter__(self) -> Self:
        subprocess.run([MAKE_SECRETS, self.secrets, f"127.0.0.1:{self.port}"], check=True)
        acl = self.secrets / "users.acl"
        acl.write_text(acl.read_text() + "user admin on >admin ~* &* +@all\n")
        log = Path(self._directory.name, "server.log")
        program = [find_server(), "--port", str(self.port), "--bind", "127.0.0.1", "--save", ""]
        program += ["--dir", self._directory.name, "--logfile", str(log), "--aclfile", str(acl)]
        self._process = subprocess.Popen(program, stdout=subprocess.DEVNULL, start_new_session=True)
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            if self._process.poll() is not None or time.monotonic() > deadline:
                said = log.read_text()[-500:] if log.exists() else ""
                self.__exit__()
                raise AssertionError(f"no Redis with this ACL file: {said}")
            time.sleep(0.02)
        return self

    def _answers(self) -> bool:
        with suppress(redis.ConnectionError), redis.Redis(port=self.port, username="health") as client:
            return bool(client.ping())
        return False

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait(STOP_TIMEOUT_S)
        self._directory.cleanup()
