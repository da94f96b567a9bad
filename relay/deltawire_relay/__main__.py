"""`python -m deltawire_relay`: serves until SIGTERM or SIGINT. `--check` only looks at its settings."""

import asyncio
import gc
import logging
import sys

from deltawire.environment import ConfigurationError, Environment
from deltawire.errors import RedisUnavailableError
from deltawire.extras import needs
from deltawire.findings import read_arguments, run_check
from deltawire.log_format import configure

with needs("relay", "deltawire relay"):
    from .check import check
    from .open_files import raise_limit
    from .server import serve
    from .settings import Settings


def main() -> int:
    asked = read_arguments("deltawire_relay")
    if asked.is_check:
        return run_check(asked, check)
    try:
        settings = Settings.from_environment(Environment())
    except ConfigurationError as error:
        print(f"deltawire relay: {error}", file=sys.stderr)  # noqa: T201 - before logging is set up
        return 2
    for name in ("uvicorn", "websockets"):
        logging.getLogger(name).setLevel("WARNING")
    configure(log_format=settings.log_format, level=settings.log_level)
    raise_limit()
    gc.freeze()  # what was imported is no garbage: else each full collection holds up the loop to walk it
    try:
        import uvloop

        runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    except ImportError:
        runner = asyncio.Runner()
    with runner:
        try:
            runner.run(serve(settings))
        except RedisUnavailableError as error:
            print(f"deltawire relay: {error} (DELTAWIRE_REDIS_URL)", file=sys.stderr)  # noqa: T201 - the last word
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
