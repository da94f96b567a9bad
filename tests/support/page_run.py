"""Runs the code of one page, from top to bottom, as its reader would: see CONTRIBUTING.md."""

import asyncio
import configparser
import json
import os
import re
import shutil
import signal
import socket
import sys
import tomllib
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any, Final, Self

import yaml

from deltawire.gateway.server import DEFAULT_RATE
from deltawire.redis_server import free_port
from tests.support.chromium import chromium
from tests.support.code_blocks import Block, commands, missing
from tests.support.node import MODULES, NODE, need_openai_sdk
from tests.support.system import System

ROOT: Final = Path(__file__).parents[2]
BIN: Final = ROOT / ".venv" / "bin"
BLOCK_TIMEOUT_S: Final = 120.0
EXPECT_TIMEOUT_S: Final = 60.0
#: Where a reader's own servers are. Pages of the first and of 8000 are allowed origins.
PAGE_PORT: Final = 3000
READERS_PORTS: Final = (PAGE_PORT, 5000, 5555, 8000, 9000)
WEBHOOK_SECRET: Final = "whsec_" + "c2l4dGVlbiBieXRlcyBvZiBub3RoaW5nIG11Y2g="
_JOB_ID: Final = re.compile(r"\b[0-9a-f]{32}\b|\b[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}\b")
_PORT: Final = re.compile(
    r"""(
      (?:127\.0\.0\.1|localhost|0\.0\.0\.0|\[::1\]):
      | (?:127\.0\.0\.1|localhost)",\   # a pair in Python
      | (?:(?i:port)|http\.server)\W{1,4} | listen\(
    )
    (6379|8080|3000|5000|5555|8000|9000)\b""",
    re.VERBOSE,
)
#: Pages show what a worker answers in a second, which one on a busy machine does not.
PATIENT: Final = "import deltawire_relay.jobs; deltawire_relay.jobs.CANCEL_WAIT_S = 60"
#: What those leave who ran an example, besides its database.
_LEFT: Final = frozenset({"node_modules", "__pycache__"})
#: Programs that would change the machine, or whose work is done: what they are asked is checked, no more.
_STAND_INS: Final = {
    "make": f'exec {shutil.which("make")} -n -C {ROOT} "$@" >/dev/null',
    "deltawire": f"""case "$1" in
up|worker|relay|gateway) exec {BIN}/deltawire "$1" --help >/dev/null;;
*) exec {BIN}/deltawire "$@";;
esac""",
    "pip": f"""exec {BIN}/python -c '
import importlib.metadata, re, sys
assert sys.argv[1] == "install", sys.argv
for each in sys.argv[2:]:
    if not each.startswith(("-", ".")):
        importlib.metadata.distribution(re.match(r"[A-Za-z0-9_.-]+", each)[0])
' "$@" """,
    "npm": """case "$1" in
install|ci|run|pack) ;;
*) exit 1;;
esac
shift
for each; do
  case "$each" in
  -*|build|*/clients/js|./deltawire-*.tgz) ;;
  *) test -e "node_modules/$each" || exit 1;;
  esac
done""",
    "python": f'exec {BIN}/python "$@"',
    "python3": f'exec {BIN}/python "$@"',
    "node": f'exec {NODE} "$@"',
}


def _environment(text: str) -> None:
    """Raises ValueError where a line sets no variable."""
    for line in filter(None, text.splitlines()):
        if not re.match(r"#|[A-Z_]+=", line):
            raise ValueError(line)


PARSED: Final[dict[str, Callable[[str], Any]]] = {
    "json": json.loads,
    "yaml": lambda text: list(yaml.safe_load_all(text)),
    "toml": tomllib.loads,
    "ini": lambda text: configparser.ConfigParser(strict=False).read_string(text),
    "env": _environment,
}
SHOWN: Final = frozenset({"text", "diff"})
SHELLS: Final = frozenset({"sh", "console"})
SCRIPTS: Final = frozenset({"js", "javascript", "ts"})
LANGUAGES: Final = frozenset({"python", "html", *SHELLS, *SCRIPTS, *PARSED, *SHOWN})


class PageError(AssertionError):
    """A block does not do what its page says; the message has its output."""


class Site:
    """What pages find: a whole deltawire, another relay of it that wants keys, ports for readers' servers."""

    def __init__(self) -> None:
        self.ports = {port: free_port() for port in READERS_PORTS}
        origins = [
            f"http://{host}:{self.ports[port]}"
            for host in ("localhost", "127.0.0.1")
            for port in (3000, 8000)
        ]
        webhooks = f"""
[webhooks.billing]
url = "http://127.0.0.1:{self.ports[9000]}/hooks/deltawire"
secret = "{WEBHOOK_SECRET}"
"""
        self.system = System(
            relays=0,
            gateway_rate=DEFAULT_RATE,  # a reader's: a long story is one of a minute
            relay_environment={"DELTAWIRE_ALLOWED_ORIGINS": ",".join(origins), "DELTAWIRE_WEBHOOKS": "yes"},
            worker_environment={"DELTAWIRE_WEBHOOKS": webhooks},
        )
        self.keys = {"DELTAWIRE_JWT_SECRET": "0123456789abcdef0123456789abcdef"}
        self._with_keys = 0

    @property
    def relay_with_keys(self) -> int:
        """Its port. Started when it is first asked for."""
        if not self._with_keys:
            from deltawire.api_keys import new_api_key

            key, entry = new_api_key("backend", "default", ["submit", "read", "cancel", "tokens", "metrics"])
            self.keys["DELTAWIRE_API_KEY"] = key
            relay = self.system.launch_relay(
                {"DELTAWIRE_JWT_SECRET": self.keys["DELTAWIRE_JWT_SECRET"], "DELTAWIRE_API_KEYS": entry},
                before_main=PATIENT,
            )
            relay.wait_until_ready()
            self._with_keys = self.system.relay_ports[-1]
        return self._with_keys

    def __enter__(self) -> Self:
        self.system.start()
        try:
            self.system.launch_relay(before_main=PATIENT).wait_until_ready()
        except BaseException:
            self.system.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.system.stop()


class PageRun:
    """One page's directory, environment and processes. What it starts ends with `opened`."""

    def __init__(self, site: Site, directory: Path, *, with_keys: bool) -> None:
        self._directory = directory
        system = site.system
        relay = site.relay_with_keys if with_keys else system.relay_port
        redis_port = int(system.redis_url.rpartition(":")[2].partition("/")[0])
        self._ports = {**site.ports, 8080: relay, 6379: redis_port}
        self._relay_url = f"http://127.0.0.1:{relay}"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("DELTAWIRE_")}
        self.environment = {
            **inherited,
            "PATH": f"{directory}/.venv/bin:{BIN}:{inherited['PATH']}",
            "PYTHONPATH": ":".join(str(ROOT / each) for each in ("core", "worker", "relay", ".")),
            "PYTHONUNBUFFERED": "1",
            "DELTAWIRE_PUBLIC_URL": self._relay_url,
            "DELTAWIRE_REDIS_URL": system.redis_url,
            "DELTAWIRE_BROKER_URL": system.broker_url,
            "BROKER_URL": system.broker_url,
            "OPENAI_API_KEY": "any",
            "BILLING_HOOK_SECRET": WEBHOOK_SECRET,
            "NO_COLOR": "1",
            **(site.keys if with_keys else {}),
        }
        self._job_id = "JOB_ID"
        self._scripts = ""
        self._python: asyncio.subprocess.Process | None = None
        self._stack = AsyncExitStack()
        self._taken: set[int] = set()
        self._pages_url = ""

    @classmethod
    @asynccontextmanager
    async def opened(cls, site: Site, directory: Path, *, with_keys: bool) -> AsyncIterator[Self]:
        run = cls(site, directory, with_keys=with_keys)
        run._furnish()
        async with run._stack:
            yield run
        # What a program had started may outlive it for a moment, and must not be taken for the next page's.
        async with asyncio.timeout(EXPECT_TIMEOUT_S):
            while any(_listens(site.ports[port]) for port in run._taken):  # noqa: ASYNC110 - a kernel's
                await asyncio.sleep(0.01)

    def _furnish(self) -> None:
        """What a reader has in a clone, and in an environment where the packages are installed."""
        shims = self._directory / ".venv" / "bin"
        shims.mkdir(parents=True)
        lacking = {} if shutil.which("jq") else {"jq": "exec cat"}
        for name, script in {**_STAND_INS, **lacking}.items():
            (shims / name).write_text(f"#!/bin/sh\n{script}\n")
            (shims / name).chmod(0o755)
        for name in ("deploy", "clients"):
            (self._directory / name).symlink_to(ROOT / name)
        for path in (ROOT / "examples").glob("**/*"):
            is_left = path.suffix == ".sqlite3" or not _LEFT.isdisjoint(path.parts)
            if path.is_file() and not is_left:  # with our addresses, too
                copy = self._directory / path.relative_to(ROOT)
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_text(self.put(path.read_text()))
        modules = self._directory / "node_modules"
        modules.mkdir()
        (modules / "deltawire").symlink_to(ROOT / "clients" / "js")
        (modules / "openai").symlink_to(MODULES / "openai")
        (self._directory / "examples" / "openai" / "node_modules").symlink_to(MODULES)

    def put(self, text: str) -> str:
        """The code with our addresses in place of the page's."""
        text = _PORT.sub(lambda match: f"{match[1]}{self._ports[int(match[2])]}", text)
        return text.replace("https://relay.example.com", self._relay_url)

    async def run(self, block: Block, shown_output: Block | None) -> None:
        """Raises PageError where it does not do what the page says."""
        code = self.put(block.code)
        if 'from "openai"' in code or "make node" in code:
            need_openai_sdk()
        if block.language in PARSED:
            PARSED[block.language](code)
        if block.title:
            path = self._directory / block.title
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(code)
            if block.language == "python":
                compile(code, block.title, "exec")
            return
        if block.language in PARSED or block.language in SHOWN:
            return
        if "background" in block.said:
            await self._background(block, code)
            return
        expected = [self.put(block.said["expect"])] if "expect" in block.said else []
        if shown_output is not None:
            expected.append(shown_output.code)
        if block.language in SHELLS:
            said = ""
            for command, shown in commands(code, console=block.language == "console"):
                is_well, output = await self._shell(command)
                said += output
                self._check(block, is_well, output, [shown])
            self._check(block, "fails" not in block.said, said, expected)
        elif block.language == "python":
            self._check(block, *await self._run_python(block, code), expected)
        elif block.language == "html" or "browser" in block.said:
            await self._browse(block, code, expected)
        else:
            self._check(block, *await self._node(block, code), expected)

    def _check(self, block: Block, is_well: bool, output: str, expected: list[str]) -> None:
        ids = _JOB_ID.findall(output)
        self._job_id = ids[-1] if ids else self._job_id
        if is_well == ("fails" in block.said):
            what = "ended well" if is_well else "failed"
            raise PageError(f"line {block.line}: it {what}\n{output}")
        for each in expected:
            line = missing(each, output)
            if line is not None:
                raise PageError(f"line {block.line}: no {line!r} in its output\n{output}")

    async def _process(self, *command: str | Path) -> tuple[bool, str]:
        """Whether it ended with 0, and what it said."""
        process = await asyncio.create_subprocess_exec(
            *command,
            cwd=self.environment.get("PWD_OF_PAGE", self._directory),
            env=self.environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            async with asyncio.timeout(BLOCK_TIMEOUT_S):
                output, _ = await process.communicate()
        except TimeoutError:
            _end(process)
            raise PageError(f"not over after {BLOCK_TIMEOUT_S:g} s: {' '.join(map(str, command))}") from None
        return process.returncode == 0, output.decode(errors="replace")

    async def _shell(self, command: str) -> tuple[bool, str]:
        state = self._directory / ".environment"
        state.unlink(missing_ok=True)
        command = command.replace("JOB_ID", self._job_id) if not re.search(r"\bJOB_ID=", command) else command
        script = f"set -aeo pipefail\ntrap 'env -0 >{state}' EXIT\n{command}"
        well, output = await self._process("bash", "-c", script)
        if state.exists():
            pairs = (each.partition("=") for each in state.read_text().split("\0") if each)
            kept = {name: value for name, _, value in pairs if name not in ("_", "SHLVL", "OLDPWD")}
            self.environment = {**kept, "PWD_OF_PAGE": kept["PWD"]}
        return well, output

    async def _run_python(self, block: Block, code: str) -> tuple[bool, str]:
        log = self._directory / ".python"
        if self._python is None:
            self._python = await asyncio.create_subprocess_exec(
                *(sys.executable, ROOT / "tests" / "support" / "page_python.py", log),
                cwd=self._directory,
                env=self.environment,
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                start_new_session=True,
            )
            self._stack.push_async_callback(_ended, self._python)
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        before = log.stat().st_size if log.exists() else 0
        task = {"code": code, "name": f"<line {block.line}>", "environment": self.environment}
        self._python.stdin.write(json.dumps(task).encode() + b"\n")
        try:
            async with asyncio.timeout(BLOCK_TIMEOUT_S):
                answer = await self._python.stdout.readline()
        except TimeoutError:
            answer = b""
        output = log.read_bytes()[before:].decode(errors="replace")
        return (
            answer == b"true\n",
            output if answer else f"{output}\nnot over after {BLOCK_TIMEOUT_S:g} s, or dead",
        )

    async def _node(self, block: Block, code: str) -> tuple[bool, str]:
        if "continues" in block.said:
            code = self._scripts + code
        self._scripts = code
        path = self._directory / f".line-{block.line}.{'mts' if block.language == 'ts' else 'mjs'}"
        path.write_text(code)
        return await self._process(NODE, "--experimental-eventsource", "--no-warnings", path)

    async def _background(self, block: Block, code: str) -> None:
        """Starts it, and waits for the ports of ours that it names."""
        log = self._directory / f".line-{block.line}.log"
        if block.language in SHELLS:
            command: list[str | Path] = [
                "bash",
                "-c",
                "\n".join(each for each, _ in commands(code, console=block.language == "console")),
            ]
        else:
            program, suffix = (sys.executable, "py") if block.language == "python" else (NODE, "mjs")
            path = self._directory / f".line-{block.line}.{suffix}"
            path.write_text(code)
            command = [program, path]
        with log.open("wb") as output:
            process = await asyncio.create_subprocess_exec(
                *command,
                cwd=self.environment.get("PWD_OF_PAGE", self._directory),
                env=self.environment,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        self._stack.push_async_callback(_ended, process)
        ports = {int(match[2]) for match in _PORT.finditer(block.code)} & set(READERS_PORTS)
        self._taken |= ports
        for port in ports:
            try:
                async with asyncio.timeout(EXPECT_TIMEOUT_S):
                    while not (listens := _listens(self._ports[port])) and process.returncode is None:  # noqa: ASYNC110
                        await asyncio.sleep(0.05)
            except TimeoutError:
                listens = False
            if not listens:
                raise PageError(f"line {block.line}: nothing listens on {port}\n{log.read_text()}")

    async def _browse(self, block: Block, code: str, expected: list[str]) -> None:
        """A page, or a module in an empty one. Its output is its text and its console."""
        if not self._pages_url:
            self._pages_url = self._serve()
        name = f".line-{block.line}.html"
        if block.language != "html":
            if "continues" in block.said:
                code = self._scripts + code
            self._scripts = code
            main = _browser_main(ROOT / "clients" / "js" / "package.json")
            imports = json.dumps({"imports": {"deltawire": main}})
            code = (
                f'<!doctype html><title>A page</title><script type="importmap">{imports}</script><body>'
                f'<script type="module">\n{code}</script>'
            )
        (self._directory / name).write_text(code)
        async with chromium() as browser:
            page = await browser.new_page()
            said: list[str] = []
            errors: list[str] = []
            page.on("console", lambda message: said.append(message.text))
            page.on("pageerror", lambda error: errors.append(str(error)))
            await page.goto(f"{self._pages_url}/{name}")
            output = ""
            with suppress(TimeoutError):
                async with asyncio.timeout(EXPECT_TIMEOUT_S):
                    while not errors:
                        output = "\n".join([await page.inner_text("body"), *said])
                        if all(missing(each, output) is None for each in expected):
                            break
                        await asyncio.sleep(0.05)
        self._check(block, not errors, "\n".join([output, *said, *errors]), expected)

    def _serve(self) -> str:
        """The page's directory, on the port of pages; on another one if a server of the reader has that."""
        port = 0 if PAGE_PORT in self._taken else self._ports[PAGE_PORT]
        server = ThreadingHTTPServer(("127.0.0.1", port), partial(_Files, directory=str(self._directory)))
        thread = Thread(target=server.serve_forever, daemon=True)
        thread.start()
        self._stack.callback(thread.join)
        self._stack.callback(server.server_close)
        self._stack.callback(server.shutdown)
        return f"http://localhost:{server.server_port}"


class _Files(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


def _browser_main(package: Path) -> str:
    """The address of our module, for those who name it by its package."""
    found: Any = json.loads(package.read_text()) if package.exists() else {}
    exported = found.get("exports", found.get("main", "src/index.js"))
    while isinstance(exported, dict):
        exported = next(exported[name] for name in (".", "browser", "import", "default") if name in exported)
    return f"/node_modules/deltawire/{str(exported).removeprefix('./')}"


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


def _end(process: asyncio.subprocess.Process) -> None:
    """With what it has started: it leads a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


async def _ended(process: asyncio.subprocess.Process) -> None:
    _end(process)
    if process.stdin is not None:
        process.stdin.close()
    await process.wait()
