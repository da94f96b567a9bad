"""nginx and Caddy by the recipes in deploy/proxies, on free ports, with a certificate of our own.

Only addresses and paths are put into the recipes, and for Caddy that certificate.
"""

import os
import shutil
import socket
import ssl
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Literal, Self

from deltawire.redis_server import free_port
from tests.support.absent import lack
from tests.support.processes import end

RECIPES: Final = Path(__file__).parents[2] / "deploy" / "proxies"
PROGRAMS: Final = {"nginx": "/usr/sbin/nginx", "caddy": "/usr/bin/caddy"}
START_TIMEOUT_S: Final = 60.0


def program(name: str) -> str:
    """The path of nginx or caddy, which a laptop may lack."""
    return shutil.which(name) or (
        PROGRAMS[name] if Path(PROGRAMS[name]).exists() else lack(f"no {name}: apt-get install {name}")
    )


def put(text: str, *pairs: tuple[str, str]) -> str:
    """The text with the left ones replaced. Each of them must be there: a recipe that changes is noticed."""
    for old, new in pairs:
        assert old in text, old
        text = text.replace(old, new)
    return text


class Proxy:
    """One of them, from `with` to its end, before `relays` (ports)."""

    def __init__(self, kind: Literal["nginx", "caddy"], relays: Sequence[int]) -> None:
        self.kind = kind
        self._relays = list(relays)
        self._directory = tempfile.TemporaryDirectory(prefix=f"deltawire-{kind}-")
        self.path = Path(self._directory.name)
        self.port = free_port()
        self.certificate = self.path / "certificate.pem"
        self._key = self.path / "key.pem"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def logs(self) -> str:
        """All that it has said, and logged."""
        return "\n".join(path.read_text(errors="replace") for path in self.path.glob("*.log"))

    def tls(self) -> ssl.SSLContext:
        """What a client needs who trusts it."""
        return ssl.create_default_context(cafile=str(self.certificate))

    def _nginx(self) -> list[str]:
        shutil.copy(RECIPES / "nginx-relay.conf", self.path)
        text = put(
            (RECIPES / "nginx.conf").read_text(),
            ("pid /run/nginx.pid", f"pid {self.path}/nginx.pid"),
            ("/var/log/nginx", str(self.path)),
            ("listen 80;", f"listen 127.0.0.1:{free_port()};"),
            ("listen 443 ", f"listen 127.0.0.1:{self.port} "),
            ("relay.example.com", "localhost"),
            ("/etc/nginx/tls/fullchain.pem", str(self.certificate)),
            ("/etc/nginx/tls/privkey.pem", str(self._key)),
            ("127.0.0.1:8080", f"127.0.0.1:{self._relays[0]}"),
            ("127.0.0.1:8082", f"127.0.0.1:{self._relays[1]}"),
            ("worker_rlimit_nofile 65536;", "user root;" if os.geteuid() == 0 else ""),
            ("worker_connections 32768;", "worker_connections 512;"),
            (
                "server_tokens off;",
                "".join(
                    f"{kind}_temp_path {self.path}/{kind};"
                    for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
                ),
            ),
        )
        (self.path / "nginx.conf").write_text(text)
        return [program("nginx"), "-e", "stderr", "-c", f"{self.path}/nginx.conf", "-g", "daemon off;"]

    def _caddy(self) -> list[str]:
        text = put(
            (RECIPES / "Caddyfile").read_text(),
            ("\tadmin off\n", "\tadmin off\n\tauto_https disable_redirects\n"),
            (
                "relay.example.com {",
                f"https://localhost:{self.port} {{\n\ttls {self.certificate} {self._key}",
            ),
            (
                "127.0.0.1:8080 127.0.0.1:8082 {",
                " ".join(f"127.0.0.1:{port}" for port in self._relays) + " {",
            ),
        )
        caddy = program("caddy")
        said = subprocess.run([caddy, "version"], capture_output=True, text=True, check=True).stdout
        if said.strip().lstrip("v").startswith("2.6."):
            text = put(text, ("request_buffers 11MB", "buffer_requests"))  # as the recipe says
        (self.path / "Caddyfile").write_text(text)
        return [caddy, "run", "--adapter", "caddyfile", "--config", f"{self.path}/Caddyfile"]

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _start(self) -> None:
        subprocess.run(
            [
                *(
                    "openssl",
                    "req",
                    "-x509",
                    "-newkey",
                    "ec",
                    "-pkeyopt",
                    "ec_paramgen_curve:P-256",
                    "-nodes",
                ),
                *(
                    "-nodes",
                    "-subj",
                    "/CN=localhost",
                    "-addext",
                    "subjectAltName=DNS:localhost",
                    "-days",
                    "2",
                ),
                *("-keyout", str(self._key), "-out", str(self.certificate)),
            ],
            check=True,
            capture_output=True,
        )
        command = self._nginx() if self.kind == "nginx" else self._caddy()
        homes = dict.fromkeys(("HOME", "XDG_DATA_HOME", "XDG_CONFIG_HOME"), str(self.path))
        with (self.path / "output.log").open("wb") as output:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **homes},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline = time.monotonic() + START_TIMEOUT_S
        while not self._answers():
            assert self._process.poll() is None, self.logs
            assert time.monotonic() < deadline, self.logs
            time.sleep(0.02)

    def _answers(self) -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=1):
            return True
        return False

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None:
            end(self._process)
        self._directory.cleanup()
