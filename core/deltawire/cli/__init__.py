"""`deltawire`: the command line. Needs the extra `cli`."""

import os
import sys

from deltawire.extras import needs


def main() -> None:
    with needs("cli", "the command line"):
        from .commands import app
    from .exit_codes import ExitCode

    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 - `>&-` has closed it
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a terminal that is not UTF-8 is no reason to stop
    try:
        try:
            app()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # `| head` has enough; what is left in the buffer must not fail at the exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(ExitCode.PIPE_CLOSED)
