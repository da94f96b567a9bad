"""Whether a gateway that refused is asked again, and when. Pure.

Only before the first delta: afterwards somebody may have read half an answer.
"""

from typing import Final

import msgspec

from .refusal import UpstreamError

FIRST_BACKOFF_S: Final = 0.5
MAX_BACKOFF_S: Final = 8.0
MAX_SLEEP_S: Final = 10.0
"""Longer waits are not slept through in a worker's slot."""
FREE_FROM_S: Final = 1.0
RETRIES_AFTER_GATEWAY_TIMEOUT: Final = 2
"""A 504 has cost its time already."""


class Wait(msgspec.Struct, frozen=True):
    """Sleep, then ask again."""

    delay_s: float


class Park(msgspec.Struct, frozen=True):
    """Give the slot to somebody else, and ask again later."""

    delay_s: float


class GiveUp(msgspec.Struct, frozen=True):
    """The failure is final."""


class Budget:
    """What an upstream's retries may add to its load: a bucket of tokens, one for each worker process.

    A retry takes a token, a stream that goes well puts a tenth of one back, up to MAX_TOKENS. So a gateway
    that is down gets a burst of retries and then one request a job; one that fails at times gets them all.
    (As gRPC's retry throttling, gRFC A6, and the retry quota of the AWS SDKs' "standard" mode.)
    """

    MAX_TOKENS: Final = 100
    SUCCESSES_FOR_A_TOKEN: Final = 10

    def __init__(self) -> None:
        self._successes = self.MAX_TOKENS * self.SUCCESSES_FOR_A_TOKEN

    def take(self) -> bool:
        """Pays for a retry; False: there is nothing left to pay with."""
        if self._successes < self.SUCCESSES_FOR_A_TOKEN:
            return False
        self._successes -= self.SUCCESSES_FOR_A_TOKEN
        return True

    def succeeded(self) -> None:
        self._successes = min(self._successes + 1, self.MAX_TOKENS * self.SUCCESSES_FOR_A_TOKEN)


def decide(
    error: UpstreamError,
    *,
    retries: int,
    max_retries: int,
    max_wait_s: float,
    waited_s: float,
    left_s: float,
    queue_left_s: float,
    budget: Budget,
    jitter: float,
) -> Wait | Park | GiveUp:
    """What follows a failure, after so many retries and so much waiting, with so much time left for the
    attempt and in the queue.

    Where the gateway says when to come again, that is when, or up to a tenth later, so that the jobs that it
    told so do not all come at once; else, or where it says "now", backoff doubles, with jitter between half
    of it and all of it. `jitter` is a random number from 0 to 1. Takes from the budget what it decides to
    spend; a rate limit that says when it ends is no sign of a gateway in trouble, and costs nothing.
    """
    may_retry = error.error.retryable if error.should_retry is None else error.should_retry
    if error.status_code == 504:
        max_retries = min(max_retries, RETRIES_AFTER_GATEWAY_TIMEOUT)
    if not may_retry or retries >= max_retries:
        return GiveUp()
    after_s = error.error.retry_after_s or 0.0
    if after_s > 0:
        delay_s = after_s * (1 + jitter / 10)
    else:
        delay_s = min(FIRST_BACKOFF_S * 2**retries, MAX_BACKOFF_S) * (1 + jitter) / 2
    is_long = delay_s > MAX_SLEEP_S
    if (
        waited_s + (after_s or delay_s) > max_wait_s
        or delay_s >= left_s
        or (is_long and delay_s >= queue_left_s)
    ):
        return GiveUp()
    is_told = error.code == "upstream_rate_limit" and after_s >= FREE_FROM_S
    if not is_told and not budget.take():
        return GiveUp()
    delay_s = round(delay_s, 3)
    return Park(delay_s) if is_long else Wait(delay_s)
