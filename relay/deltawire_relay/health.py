"""Liveness and readiness. `/healthz` touches no dependency; `/readyz` says whether to send work here."""

from starlette.requests import Request
from starlette.responses import Response

from .feed import Feed


class Health:
    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.is_draining = False

    async def healthz(self, _: Request) -> Response:
        return Response('{"status":"ok"}', media_type="application/json")

    async def readyz(self, _: Request) -> Response:
        if self.is_draining:
            return Response('{"status":"draining"}', 503, media_type="application/json")
        if not self._feed.is_connected:
            return Response('{"status":"redis_unavailable"}', 503, media_type="application/json")
        return Response('{"status":"ok"}', media_type="application/json")
