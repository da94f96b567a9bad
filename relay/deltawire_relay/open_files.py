"""How many connections the system lets this process have."""

import logging
from typing import Final

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]

# Ten thousand viewers, with room for what else a process opens.
WANTED: Final = 10_240
# For Redis, the broker, the loop, modules, a listening socket, and what is accepted and refused in one turn.
RESERVED: Final = 128

_log = logging.getLogger(__name__)


def hard_limit() -> int:
    """To how many it can be raised; -1 for no limit."""
    if resource is None:
        return -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1]


def raise_limit() -> None:
    """Raises the soft limit on open files to the hard one, and warns where that is little.

    The soft limit is low for the sake of `select`, which nothing here uses.
    """
    if resource is None:
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    except (OSError, ValueError) as error:  # macOS, where the hard limit is no limit
        _log.debug("the limit on open files stays at %d: %s", soft, error)
    if soft != resource.RLIM_INFINITY and soft < WANTED:
        _log.warning(
            "at most %d open files, and so fewer viewers; the limit may be raised (ulimit -n, LimitNOFILE=)",
            soft,
        )


def room() -> int | None:
    """How many connections there may be under the soft limit; None: it is no limit."""
    if resource is None:
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return None if soft == resource.RLIM_INFINITY else max(1, soft - RESERVED)
