"""`deltawire`: the command line. Needs the extra `cli`."""

import os
import sys


def main() -> None:
    try:
        import rich  # noqa: F401 - to say clearly what is missing
        import typer  # noqa: F401
    except ImportError:
        sys.exit("the command line needs a few packages more: pip install 'deltawire[cli]'")
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
