"""`python -m deltawire_worker`: takes jobs until SIGTERM (lets streams finish) or SIGQUIT (does not).

`--check` only looks at its settings and its upstreams.
"""

import errno
import logging
import os
import socket
import sys
import warnings

from deltawire.environment import ConfigurationError, Environment
from deltawire.errors import RedisUnavailableError
from deltawire.extras import needs
from deltawire.findings import read_arguments, run_check
from deltawire.log_format import configure

with needs("worker", "deltawire worker"):
    from celery.exceptions import CPendingDeprecationWarning
    from celery.platforms import SecurityWarning
    from celery.signals import setup_logging

    from .app import create_app
    from .check import check
    from .settings import Settings


def _leave_logging_alone(**_: object) -> None: ...


def _first_line(record: logging.LogRecord) -> bool:
    """Of a message that Celery cannot use it logs all, prompt included; its first line says enough."""
    if isinstance(record.msg, str) and isinstance(record.args, tuple):
        record.msg = record.msg.strip().partition("\n")[0]
        record.args = record.args[: record.msg.count("%") - 2 * record.msg.count("%%")]
    return True


def _without_traceback(record: logging.LogRecord) -> bool:
    """Celery's last word on a worker that cannot start: where it is no bug, the way to it says nothing."""
    error = record.exc_info[1] if record.exc_info else None
    if isinstance(error, RedisUnavailableError):
        variable = "DELTAWIRE_REDIS_URL"
    elif isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        variable = "DELTAWIRE_WORKER_PORT"
    else:
        return True
    record.msg, record.args, record.exc_info = "the worker cannot start: %s (%s)", (error, variable), None
    return True


def main() -> int:
    asked = read_arguments("deltawire_worker")
    if asked.is_check:
        return run_check(asked, check)
    try:
        settings = Settings.from_environment(Environment())
    except ConfigurationError as error:
        print(f"deltawire worker: {error}", file=sys.stderr)  # noqa: T201 - before logging is set up
        return 2
    configure(log_format=settings.log_format, level=settings.log_level)
    for name in ("celery", "kombu", "httpx"):
        logging.getLogger(name).setLevel("WARNING")
    # Celery warns root about pickle; this app takes JSON only.
    warnings.filterwarnings("ignore", category=SecurityWarning)
    logging.getLogger("celery.worker.consumer.consumer").addFilter(_first_line)
    logging.getLogger("celery.worker").addFilter(_without_traceback)
    # A receiver, any receiver, keeps Celery from setting up logging over ours.
    setup_logging.connect(_leave_logging_alone)
    # Gossip and mingle make every worker talk to every other; nothing here needs it.
    worker = create_app(settings).Worker(
        hostname=f"deltawire-{os.getpid()}@{socket.gethostname()}",
        without_gossip=True,
        without_mingle=True,
        quiet=True,
    )
    # On each lost connection it says what a future version will do; ours is set. Not earlier: to make a
    # worker is to have these warnings shown.
    warnings.filterwarnings("ignore", category=CPendingDeprecationWarning)
    worker.start()
    return int(worker.exitcode or 0)


if __name__ == "__main__":
    sys.exit(main())
