"""`deltawire up`: all services in one terminal, their logs interleaved, and nothing left behind.

Each service is a process of its own, in a session of its own: Ctrl-C reaches only this process, which
then stops them in the right order.
"""

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import Final
from urllib.request import ProxyHandler, build_opener

from rich.console import Console
from rich.text import Text

from deltawire.redis_server import NoRedisServerError, RedisServer, free_port

START_TIMEOUT_S: Final = 30.0
STOP_TIMEOUT_S: Final = 15.0
MAX_LINE_BYTES: Final = 2**24
"""Of a service's output: behind a longer one nothing is read, and it stands still."""
REDIS_PORT: Final = 6379
DEFAULT_PORT: Final = "8080"  # the relay's; the client's commands go to it
_STYLES: Final = {"gateway": "magenta", "worker": "green", "relay": "cyan"}


class _Terminal(Console):
    def on_broken_pipe(self) -> None:
        """Who read our output has gone. Rich would end the program, and leave its services running."""
        self.quiet = True


_console: Final = _Terminal(highlight=False, soft_wrap=True)


class _ServiceError(Exception):
    """A service did not start, or ended by itself."""


class _Service:
    """A process whose lines are printed with its name in front."""

    def __init__(self, name: str, module: str, *args: str) -> None:
        self.name = name
        self._command = (sys.executable, "-u", "-m", module, *args)
        self._process: asyncio.subprocess.Process | None = None
        self._printing: asyncio.Task[None] | None = None

    async def start(self, environment: dict[str, str]) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
            limit=MAX_LINE_BYTES,
        )
        self._printing = asyncio.create_task(self._print(), name=f"print-{self.name}")

    async def ended(self) -> int:
        assert self._process is not None  # noqa: S101 - started before
        return await self._process.wait()

    async def stop(self) -> None:
        if self._process is None or self._printing is None:
            return
        if self._process.returncode is None:
            self._process.terminate()
            try:
                async with asyncio.timeout(STOP_TIMEOUT_S):
                    await self._process.wait()
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        await self._printing

    async def _print(self) -> None:
        assert self._process is not None  # noqa: S101 - started before
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        async for line in self._process.stdout:
            text = Text(f"{self.name:>7} │ ", style=_STYLES[self.name])
            text.append(line.decode(errors="replace").rstrip(), style="default")
            _say(text)


def up() -> int:
    """Runs until Ctrl-C or SIGTERM. Returns an exit code."""
    environment = dict(os.environ)
    environment.setdefault("DELTAWIRE_SHUTDOWN_GRACE_S", "2")
    redis: RedisServer | None = None
    try:
        for name, default in (("DELTAWIRE_PORT", DEFAULT_PORT), ("DELTAWIRE_WORKER_PORT", "8081")):
            _check_port(name, environment.setdefault(name, default))
        if not _is_set(environment, "DELTAWIRE_REDIS_URL"):
            redis = _start_redis()
            environment["DELTAWIRE_REDIS_URL"] = redis.url
        return asyncio.run(_run(environment, has_own_redis=redis is not None))
    except (NoRedisServerError, _ServiceError) as error:
        _say(Text(f"deltawire up: {error}", style="red"))
        return 1
    finally:
        if redis is not None:
            redis.stop()


def _say(text: Text) -> None:
    # A terminal that was closed must not keep us from stopping what we started.
    with suppress(OSError):
        _console.print(text)


def _is_set(environment: dict[str, str], name: str) -> bool:
    """Whether a secret is there, by itself or by its file."""
    return bool(environment.get(name) or environment.get(f"{name}_FILE"))


def _check_port(name: str, value: str) -> None:
    try:
        _bind(int(value))
    except (OSError, ValueError, OverflowError) as error:
        raise _ServiceError(f"port {value} cannot be used ({error}); set {name} to another one") from error


def _start_redis() -> RedisServer:
    """On Redis' own port, so that examples work as they stand; on any other if that one is taken."""
    port: int | None = REDIS_PORT
    try:
        _bind(REDIS_PORT)
    except OSError:
        port = None
    redis = RedisServer(port=port)
    redis.start()
    return redis


def _bind(port: int) -> None:
    """Raises OSError if somebody else has the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


async def _run(environment: dict[str, str], *, has_own_redis: bool) -> int:
    stopping = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, stopping.set)

    services = [_Service("relay", "deltawire_relay"), _Service("worker", "deltawire_worker")]
    has_own_gateway = not (
        _is_set(environment, "DELTAWIRE_UPSTREAM_BASE_URL") or _is_set(environment, "DELTAWIRE_UPSTREAMS")
    )
    if has_own_gateway:
        port = free_port()
        environment["DELTAWIRE_UPSTREAM_BASE_URL"] = f"http://127.0.0.1:{port}/v1"
        for name in ("NO_PROXY", "no_proxy"):  # nor is there a proxy on the way to it
            environment[name] = ",".join(filter(None, (environment.get(name), "127.0.0.1")))
        services.insert(0, _Service("gateway", "deltawire.gateway", "--port", str(port)))
    relay_url = f"http://127.0.0.1:{environment['DELTAWIRE_PORT']}"
    worker_url = f"http://127.0.0.1:{environment['DELTAWIRE_WORKER_PORT']}"
    try:
        for service in services:
            await service.start(environment)
        ends = {asyncio.create_task(service.ended()): service for service in services}
        stop = asyncio.create_task(stopping.wait())
        ready = asyncio.create_task(_ready(f"{relay_url}/readyz", f"{worker_url}/readyz"))
        done, _ = await asyncio.wait({*ends, stop, ready}, return_when=asyncio.FIRST_COMPLETED)
        if ready in done:
            ready.result()
            _say_hello(environment, relay_url, has_own_redis=has_own_redis, has_own_gateway=has_own_gateway)
            done, _ = await asyncio.wait({*ends, stop}, return_when=asyncio.FIRST_COMPLETED)
        for task in done & ends.keys():
            code = await task
            raise _ServiceError(f"the {ends[task].name} ended by itself (exit code {code})")  # type: ignore[index] # tasks of `ends` only
        return 0
    finally:
        if stopping.is_set():
            _say(Text("stopping: running jobs have a moment to finish", style="dim"))
        # The worker first: it gives up its streams while everything that they need is still there.
        for service in reversed(services):
            await service.stop()


async def _ready(*urls: str) -> None:
    """Returns when all answer 200. Raises _ServiceError after START_TIMEOUT_S."""
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            for url in urls:
                while not await asyncio.to_thread(_answers, url):  # noqa: ASYNC110 - another process, no event of ours
                    await asyncio.sleep(0.05)
    except TimeoutError as error:
        raise _ServiceError(f"not ready after {START_TIMEOUT_S:.0f} s; the lines above say why") from error


def _answers(url: str) -> bool:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # urllib's errors included
        return False


def _say_hello(
    environment: dict[str, str], relay_url: str, *, has_own_redis: bool, has_own_gateway: bool
) -> None:
    redis = environment.get("DELTAWIRE_REDIS_URL", "") if has_own_redis else "as configured"
    gateway = environment.get("DELTAWIRE_UPSTREAM_BASE_URL", "as configured")
    gateway += " (scripted)" if has_own_gateway else ""
    program = os.path.relpath(sys.argv[0]) if os.path.isabs(sys.argv[0]) else sys.argv[0]
    exports = ""  # what a second terminal cannot know
    if (port := environment["DELTAWIRE_PORT"]) != DEFAULT_PORT:
        exports += f"  export DELTAWIRE_PORT={port}\n"
    if _is_set(environment, "DELTAWIRE_API_KEYS"):
        exports += (
            "  export DELTAWIRE_API_KEY=…   (the relay wants one; with curl: -H 'Authorization: Bearer …')\n"
        )
    _say(
        Text.assemble(
            ("\ndeltawire is up", "bold green"),
            f"   relay {relay_url}   gateway {gateway}   redis {redis}\n\n",
            ("In a browser:\n", "bold"),
            f"  {relay_url}/\n\n",
            ("In a second terminal:\n", "bold"),
            exports,
            f'  {program} submit --follow "Write a haiku about streaming."\n',
            f"  curl -N {relay_url}/v1/jobs/JOB_ID/events\n",
            f"  {program} cancel JOB_ID\n\n",
            ("Ctrl-C stops everything" + (" and forgets all jobs.\n" if has_own_redis else ".\n"), "dim"),
        )
    )
