"""How a process that a test has started is ended."""

import subprocess
from typing import Any, Final

STOP_TIMEOUT_S: Final = 60.0


def end(process: "subprocess.Popen[Any]", timeout_s: float = STOP_TIMEOUT_S) -> None:
    """By SIGTERM and, as the last resort, SIGKILL. Idempotent."""
    if process.poll() is None:
        process.terminate()
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
