"""WebSocket close codes (PROTOCOL.md §6.5). 40xx: come back. 45xx: do not.

The private range 4000-4999 is RFC 6455 §7.4.2's.
"""

from enum import IntEnum


class CloseCode(IntEnum):
    """What we close with, besides 1000 after a one-job socket's terminal event."""

    DRAINING = 4001
    INTERNAL = 4003
    TOKEN_EXPIRED = 4005
    NO_PONG = 4012
    RATE_LIMITED = 4013
    BAD_TOKEN = 4500
    MALFORMED = 4501
    AUTHENTICATION_TIMEOUT = 4502
    FORBIDDEN = 4503
    CONNECTION_LIMIT = 4504
    SUBSCRIPTION_LIMIT = 4505
    UNKNOWN_JOB = 4507


def may_come_back(code: int) -> bool:
    """Whether a client that was closed with `code` should connect again (with backoff).

    1000 is a normal end; everything that the network or a proxy says (1001, 1006, 1011 to 1014)
    is passing.
    """
    return code != 1000 and not 4500 <= code < 4600
