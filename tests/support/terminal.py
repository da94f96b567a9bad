"""`deltawire …` on a terminal: a real one, of the kernel's, whose keys the test presses."""

import asyncio
import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.support.system import STOP_TIMEOUT_S, WAIT_S, System

CTRL_C: Final = b"\x03"
CTRL_D: Final = b"\x04"
#: The program itself makes the terminal its own, since a fork between threads must do nothing.
PROGRAM: Final = """
import fcntl, sys, termios
fcntl.ioctl(2, termios.TIOCSCTTY, 0)
sys.argv[0] = "deltawire"
from deltawire.cli import main
main()
"""

#: The same without one.
PIPED: Final = "import sys; sys.argv[0] = 'deltawire'; from deltawire.cli import main; main()"
#: Colours and the like.
SGR: Final = re.compile(r"\x1b\[[0-9;]*m")


def environment_of(system: System | None, **more: str) -> dict[str, str]:
    """What a user's shell would have, and the system's address."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("DELTAWIRE_") and name not in {"NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE"}
    }
    url = {"DELTAWIRE_PUBLIC_URL": system.relay_url} if system else {}
    return {**kept, "TERM": "xterm-256color", **url, **more}


class Terminal:
    """One command on a terminal of its own, from its start to its end."""

    def __init__(
        self, *args: str, environment: dict[str, str], columns: int = 80, stdin: bytes | None = None
    ) -> None:
        """`stdin`: comes from a pipe, and not from the keys."""
        self._keys, screen = pty.openpty()
        fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *args],
            stdin=screen if stdin is None else subprocess.PIPE,
            stdout=screen,
            stderr=screen,
            env=environment,
            start_new_session=True,
        )
        os.close(screen)
        if stdin is not None:
            assert self.process.stdin is not None
            self.process.stdin.write(stdin)
            self.process.stdin.close()
        self.shown = ""
        self._data = b""
        os.set_blocking(self._keys, False)

    def press(self, keys: bytes) -> None:
        os.write(self._keys, keys)

    async def until(self, text: str | Callable[[str], object], *, timeout_s: float = WAIT_S) -> str:
        """All that was shown until the text is in it, or what is given says so."""
        is_there = (lambda shown: text in shown) if isinstance(text, str) else text
        deadline = time.monotonic() + timeout_s
        while not is_there(self.shown):
            is_over = not self.read()
            assert not is_over or is_there(self.shown), f"ended before {text!r}: {self.shown!r}"
            assert time.monotonic() < deadline, f"waited for {text!r}: {self.shown!r}"
            await asyncio.sleep(0.01)
        return self.shown

    async def ended(self, *, timeout_s: float = WAIT_S) -> int:
        """The exit code; all that it has shown is in `shown`."""
        deadline = time.monotonic() + timeout_s
        while self.read() or self.process.poll() is None:
            assert time.monotonic() < deadline, f"does not end: {self.shown!r}"
            await asyncio.sleep(0.01)
        return self.process.wait()

    def read(self) -> bool:
        """Takes what is there; false at the end."""
        try:
            while data := os.read(self._keys, 65_536):
                self._data += data  # a read may end within a character, or a line end
                self.shown = self._data.decode(errors="replace").replace("\r\n", "\n")
        except BlockingIOError:
            return True
        except OSError:  # EIO: nobody has the other side any more
            pass
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(STOP_TIMEOUT_S)
        os.close(self._keys)


async def piped(
    system: System | None, *args: str, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of `deltawire ARGS` without a terminal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PIPED, *args),
        env=environment_of(system, **(environment or {})),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def script(tmp_path: Path, **fields: Any) -> list[str]:
    """`--request` of what the scripted gateway is to do."""
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"script": fields}))
    return ["--request", str(path)]


async def job_of(terminal: Terminal) -> str:
    """The id that `submit --follow` says first."""
    shown = await terminal.until(lambda shown: re.search(r"job ([0-9a-f-]{32,36})\b", SGR.sub("", shown)))
    found = re.search(r"job ([0-9a-f-]{32,36})", SGR.sub("", shown))
    assert found
    return found[1]
