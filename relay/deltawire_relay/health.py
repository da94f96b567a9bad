"""Liveness and readiness. `/healthz` touches no dependency; `/readyz` says whether to send work here."""

from typing import Final

from starlette.requests import Request
from starlette.responses import Response

from .feed import Feed

DEGRADED_AFTER_S: Final = 3.0
UNREADY_AFTER_S: Final = 30.0


class Health:
    """Ready while events are delivered and commands answered, and for `unready_after_s` beyond that.

    All relays share a Redis: a short outage must not take every one of them out of the balancer.
    """

    def __init__(self, feed: Feed, *, unready_after_s: float) -> None:
        self._feed = feed
        self._unready_after_s = unready_after_s
        self.is_draining = False

    async def healthz(self, _: Request) -> Response:
        return _status("ok")

    async def readyz(self, _: Request) -> Response:
        if self.is_draining:
            return _status("draining", 503)
        down_s = self._feed.silent_s
        if down_s >= self._unready_after_s:
            return _status("redis_unavailable", 503)
        return _status("ok" if down_s < DEGRADED_AFTER_S else "degraded")


def _status(status: str, code: int = 200) -> Response:
    return Response(f'{{"status":"{status}"}}', code, media_type="application/json")
