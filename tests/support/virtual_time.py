"""An event loop whose clock jumps: an hour of waiting costs milliseconds. For code without sockets.

    @virtual_time
    async def test_keepalive() -> None:
        await asyncio.sleep(3600)

Only what asks the loop for the time is virtual (`sleep`, `timeout`, `call_later`); `time.time()` is not.
While a thread is at work (an executor's, getaddrinfo) the clock stands, however long that takes.
"""

import asyncio
import functools
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, Final, TypeVar

THREAD_TIMEOUT_S: Final = 60.0
T = TypeVar("T")


class WaitsForEverError(RuntimeError):
    """Nothing is ready, no timer is set, and no thread reports back: the code under test hangs."""


class _JumpingSelector(selectors.DefaultSelector):
    """Looks once, without blocking; when nothing is ready, the wait itself is what passes."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.threads = 0  # at work

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if ready or timeout == 0:
            return ready
        if timeout is None or self.threads:  # only a thread can wake the loop, or will before any timer
            if not (ready := super().select(THREAD_TIMEOUT_S)):
                raise WaitsForEverError("nothing is ready, and no timer is set or a thread does not end")
            return ready
        self.now += timeout
        return []


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its clock begins at 0 and advances only to the next timer, at once, when nothing is ready."""

    def __init__(self) -> None:
        self._virtual = _JumpingSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now

    def run_in_executor(self, executor: Any, func: Callable[..., T], *args: Any) -> "asyncio.Future[T]":  # type: ignore[override] # asyncio has TypeVarTuples
        future = super().run_in_executor(executor, func, *args)
        self._virtual.threads += 1
        future.add_done_callback(self._thread_is_done)
        return future

    def _thread_is_done(self, _: "asyncio.Future[Any]") -> None:
        self._virtual.threads -= 1

    async def shutdown_default_executor(self, timeout: float | None = None) -> None:
        """Without its time-out (Python 3.12's), which would be over at once."""
        await super().shutdown_default_executor()


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run` on a virtual clock."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)


def virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Makes an async test a plain one that runs on a virtual clock."""

    @functools.wraps(test)
    def on_virtual_clock(*args: Any, **kwargs: Any) -> None:  # whatever fixtures the test takes
        run(test(*args, **kwargs))

    return on_virtual_clock
