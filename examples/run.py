"""Runs an example application with a deltawire behind it: `python examples/run.py django|fastapi|flask`.

What stands here, an operator would configure: keys, a secret for tickets, the page's origin, a webhook.
"""

import base64
import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.request import ProxyHandler, build_opener

from deltawire.api_keys import new_api_key
from deltawire.redis_server import RedisServer

HERE = Path(__file__).parent
MANAGE = [sys.executable, "manage.py"]


def commands(name: str, port: str) -> list[list[str]]:
    """How the application is prepared, and at last run."""
    match name:
        case "django":
            run = [*MANAGE, "runserver", "--noreload", port]
            return [[*MANAGE, "migrate", "-v0"], [*MANAGE, "loaddata", "-v0", "demo"], run]
        case "fastapi":
            return [[sys.executable, "-m", "uvicorn", "app:app", "--port", port, "--log-level", "warning"]]
        case "flask":
            return [[sys.executable, "-m", "flask", "run", "--port", port]]
        case _:
            raise SystemExit(__doc__)


def settings(app: str, relay_port: str, redis_url: str) -> dict[str, str]:
    """Of deltawire and of the application."""
    key, entry = new_api_key("app", "default", ["read", "cancel", "submit"])
    webhook_secret = "whsec_" + base64.b64encode(secrets.token_bytes(32)).decode()
    webhook = f'[webhooks.app]\nurl = "{app}/hooks/deltawire"\nsecret = "{webhook_secret}"\n'
    return {
        "DELTAWIRE_PORT": relay_port,
        "DELTAWIRE_PUBLIC_URL": f"http://127.0.0.1:{relay_port}",
        "DELTAWIRE_REDIS_URL": redis_url,
        "DELTAWIRE_JWT_SECRET": secrets.token_urlsafe(32),
        "DELTAWIRE_ALLOWED_ORIGINS": f"{app},{app.replace('127.0.0.1', 'localhost')}",
        "DELTAWIRE_API_KEYS": entry,
        "DELTAWIRE_API_KEY": key,
        "DELTAWIRE_WEBHOOKS": webhook,
        "WEBHOOK_SECRET": webhook_secret,
    }


class Program:
    """A program that is ended at the end. A context manager."""

    def __init__(self, command: list[str], environment: dict[str, str], cwd: Path) -> None:
        self.process = subprocess.Popen(command, env=environment, cwd=cwd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.process.terminate()
        self.process.wait()


def answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2):
            return True
    except OSError:  # urllib's errors included
        return False


def main() -> None:
    name = sys.argv[1] if len(sys.argv) == 2 else ""
    port = os.environ.get("PORT", "8000")
    app = f"http://127.0.0.1:{port}"
    *prepare, run = commands(name, port)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with ExitStack() as stack:
        redis = stack.enter_context(RedisServer())
        environment = os.environ | settings(app, os.environ.get("DELTAWIRE_PORT", "8080"), redis.url)
        for command in prepare:
            subprocess.run(command, env=environment, cwd=HERE / name, check=True)
        up = [str(Path(sys.executable).with_name("deltawire")), "up"]
        running = [
            stack.enter_context(Program(up, environment, Path.cwd())),  # it names its own path
            stack.enter_context(Program(run, environment, HERE / name)),
        ]
        addresses = [f"{app}/login", f"{environment['DELTAWIRE_PUBLIC_URL']}/readyz"]
        while all(program.process.poll() is None for program in running):
            if addresses and all(map(answers, addresses)):
                addresses = []
                time.sleep(1)  # for `deltawire up` to have its say before
                print(f"\n{name}: {app}   log in as ada (lovelace) or grace (hopper)")
                print(f"its key, until Ctrl-C: {environment['DELTAWIRE_API_KEY']}\n", flush=True)
            time.sleep(0.2)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
