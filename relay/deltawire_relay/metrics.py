"""What a relay counts: of its hubs, for each to add to, and of its HTTP answers; and the route that tells."""

import time
from collections.abc import Awaitable, Iterator, Sequence
from typing import Any, Final

from prometheus_client.core import Metric
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deltawire.metrics import CONTENT_TYPE, Histogram, Registry, counter_family, exposition, histogram_family

from .auth import Gate, bearer_token

SAMPLED_EVERY_S: Final = 1.0
NO_ROUTE: Final = "none"

_CREATED_AT: Final = b',"created_at":'


class HubMetrics:
    """Plain numbers of all hubs, for them to add to."""

    def __init__(self) -> None:
        self.delivered = 0
        """To subscribers that have left."""
        self.repairs = dict.fromkeys(("gap", "tail", "reconnect", "standby", "overflow", "state_lost"), 0)
        self.log_reads = self.snapshots = 0
        self.delays = Histogram()

    def written(self, line: bytes) -> None:
        """An event has just been written to all who are up to it."""
        begin = line.find(_CREATED_AT) + len(_CREATED_AT)
        created_at = float(line[begin : line.index(b",", begin)])
        self.delays.observe(max(0.0, time.time() - created_at))

    def collect(self) -> Iterator[Metric]:
        yield histogram_family(
            "deltawire_publish_to_write_seconds",
            "From a delta's created_at until it is written to all who are up to it.",
            {(): self.delays},
        )
        yield counter_family(
            "deltawire_repairs_total", "Losses that readers did not notice.", self.repairs, ["kind"]
        )
        yield counter_family(
            "deltawire_log_reads_total", "Pages of logs that were read for readers.", self.log_reads
        )
        yield counter_family(
            "deltawire_snapshots_total", "Snapshots that were made for readers.", self.snapshots
        )


class HttpMetrics:
    """Counts the answers of an ASGI app by their routes. What no route takes is one of them."""

    def __init__(self, app: ASGIApp, routes: Sequence[Route]) -> None:
        self._app = app
        self._paths = {route.endpoint: route.path for route in routes}
        self._requests: dict[tuple[str, ...], int] = {}
        self._seconds: dict[tuple[str, ...], Histogram] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        asked_at = time.monotonic()

        def counted(
            message: Message,
        ) -> Awaitable[None]:  # no coroutine of its own for each piece of a stream
            if message["type"] == "http.response.start":
                self._note(scope, message["status"], asked_at)
            return send(message)

        await self._app(scope, receive, counted)

    def _note(self, scope: Scope, status: int, asked_at: float) -> None:
        endpoint: Any = scope.get("endpoint")  # which Starlette has left there; none where no route fits
        path = self._paths.get(endpoint, NO_ROUTE)
        key = path, f"{status // 100}xx"
        self._requests[key] = self._requests.get(key, 0) + 1
        self._seconds.setdefault((path,), Histogram()).observe(time.monotonic() - asked_at)

    def collect(self) -> Iterator[Metric]:
        yield counter_family("deltawire_http_requests_total", "Answers.", self._requests, ["route", "status"])
        yield histogram_family(
            "deltawire_http_request_seconds",
            "From a request to the head of its answer.",
            self._seconds,
            ["route"],
        )


def metrics_route(registry: Registry, gate: Gate) -> Route:
    """`GET /metrics`, for whoever has the scope."""

    async def show(request: Request) -> Response:
        gate.authenticate(bearer_token(request.headers.get("authorization"))).require("metrics")
        return Response(exposition(registry), headers={"Content-Type": CONTENT_TYPE})

    return Route("/metrics", show)
