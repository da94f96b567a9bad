"""Follows a job to its end, or until who watches has enough of it."""

import asyncio
import os
import signal
import sys
import termios
import tty
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing, contextmanager, suppress
from types import FrameType
from typing import Any, Final

import typer

from deltawire.client import AsyncJob, JobUnavailableError
from deltawire.events import Event, TerminalEvent
from deltawire.messages import Snapshot

from .exit_codes import OF_STATUS, ExitCode
from .page import JsonPage, Page, TextPage
from .printing import say

QUESTION: Final = "c: cancel the job   d: detach, the job goes on   any other key: go on watching "


async def follow(job: AsyncJob, starting_after: int, *, as_json: bool) -> ExitCode:
    """Prints a job from there to its end. Raises JobUnavailableError, typer.Exit where nobody reads it.

    The first Ctrl-C asks what it means, where there is a terminal to ask; the second one, the first without a
    terminal, and SIGTERM detach: the job goes on, and how to come back is said.
    """
    page: Page = JsonPage(starting_after) if as_json else TextPage(starting_after)
    go = asyncio.Event()
    go.set()
    events = job.events(starting_after, merge=not as_json)
    with Interrupts() as interrupts:
        reading = asyncio.create_task(_print(events, page, go), name="reading")
        try:
            while await interrupts.come_before(reading):
                number = interrupts.take()
                go.clear()
                page.pause()
                if number != signal.SIGINT or await _is_to_detach(job, interrupts):
                    _say_how_to_go_on(job.id, page.position)
                    return ExitCode.INTERRUPTED if number == signal.SIGINT else ExitCode.TERMINATED
                go.set()
            code = reading.result()
            return OF_STATUS[(await job.retrieve())["status"]] if code is None else code
        except JobUnavailableError:
            page.pause()
            if page.position > starting_after:
                _say_how_to_go_on(job.id, page.position)
            raise
        finally:
            reading.cancel()
            with suppress(asyncio.CancelledError, JobUnavailableError, typer.Exit):
                await reading
            page.pause()


async def _print(events: AsyncGenerator[Event | Snapshot], page: Page, go: asyncio.Event) -> ExitCode | None:
    async with aclosing(events):
        async for event in events:
            await go.wait()
            page.show(event)
            if isinstance(event, TerminalEvent):
                return OF_STATUS[event.status]
    return None  # there was nothing after where we began


async def _is_to_detach(job: AsyncJob, interrupts: "Interrupts") -> bool:
    """Asks, and cancels if that is wanted. Watching goes on then: the end is still to come."""
    if interrupts.has_cancelled:
        return True
    with _keys() as keyboard:
        if keyboard is None:
            return True
        sys.stderr.write(QUESTION)
        sys.stderr.flush()
        key = asyncio.create_task(_key(keyboard), name="key")
        is_again = await interrupts.come_before(key)
        if is_again:
            interrupts.take()
            key.cancel()
        answer = "d" if is_again else key.result()
        sys.stderr.write("\n")
    if answer == "c":
        interrupts.has_cancelled = True
        await job.cancel("cli")
    return answer == "d"


def _say_how_to_go_on(job_id: str, position: int) -> None:
    say((f"the job goes on: deltawire tail {job_id} --starting-after {position}", "dim"))
    say((f"or stop it:       deltawire cancel {job_id}", "dim"))


class Interrupts:
    """Ctrl-C and SIGTERM as something to wait for: while this is open they do not end the process.

    Unless the first of two was never taken, since the loop is stuck in a write to a pipe that nobody reads:
    then the second one ends it as if nothing were here.
    """

    has_cancelled = False

    def __enter__(self) -> "Interrupts":
        self._loop = asyncio.get_running_loop()
        self._came = asyncio.Event()
        self._number: int | None = None
        self._before: dict[signal.Signals, Any] = {  # whatever a handler may be
            number: signal.signal(number, self._come) for number in (signal.SIGINT, signal.SIGTERM)
        }
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _come(self, number: int, _frame: FrameType | None) -> None:
        if self._number is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._number = number
        self._loop.call_soon_threadsafe(self._came.set)

    async def come_before(self, task: asyncio.Task[Any]) -> bool:
        """Whether one comes before the task is done; where it has failed that is raised."""
        coming = asyncio.create_task(self._came.wait(), name="interrupts")
        try:
            await asyncio.wait({coming, task}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            coming.cancel()
        if task.done():
            task.result()
        return not task.done()

    def take(self) -> int:
        """Which signal it was."""
        number = self._number
        self._number = None
        self._came.clear()
        return number or signal.SIGINT


@contextmanager
def _keys() -> Iterator[int | None]:
    """The terminal, giving single keys without showing them; None where nobody is there to be asked.

    It is standard error's: standard input may be where the prompt came from.
    """
    keyboard = _terminal()
    if keyboard is None:
        yield None
        return
    before = termios.tcgetattr(keyboard)
    try:
        tty.setcbreak(keyboard)
        yield keyboard
    finally:
        termios.tcsetattr(keyboard, termios.TCSADRAIN, before)
        os.close(keyboard)


def _terminal() -> int | None:
    if not (sys.stdout.isatty() and sys.stderr.isatty()):
        return None  # what reads the pipe (less) may be using the terminal
    try:
        keyboard = os.open(os.ttyname(sys.stderr.fileno()), os.O_RDWR | os.O_NOCTTY)
        if os.tcgetpgrp(keyboard) == os.getpgrp():  # in the background it would stop us
            return keyboard
        os.close(keyboard)
    except OSError:
        pass
    return None


async def _key(keyboard: int) -> str:
    """The next key, in lower case; d where the terminal has gone."""
    loop = asyncio.get_running_loop()
    pressed = loop.create_future()

    def ready() -> None:
        loop.remove_reader(keyboard)
        pressed.set_result(None)

    loop.add_reader(keyboard, ready)
    try:
        await pressed
        return os.read(keyboard, 1).decode(errors="replace").lower() or "d"
    except OSError:
        return "d"
    finally:
        loop.remove_reader(keyboard)
