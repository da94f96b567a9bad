"""What all HTTP routes have in common: the shape of answers and errors, CORS, Host and Origin checks."""

import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deltawire.errors import Error, RedisUnavailableError, WireError

from .auth import Gate
from .limits import Limits

EXPOSED_HEADERS: Final = ["X-Job-Id", "X-Request-Id", "Retry-After", "Retry-After-Ms", "X-Should-Retry"]

_log = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode


def http_app(routes: Sequence[BaseRoute], gate: Gate, limits: Limits | None = None) -> ASGIApp:
    """The ASGI application, errors, CORS, Host and Origin checks included. Routes find `app.state.limits`."""
    handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
        WireError: _on_wire_error,
        RedisUnavailableError: _on_redis_unavailable,
        HTTPException: _on_http_exception,
        ClientDisconnect: _on_client_disconnect,
        Exception: _on_exception,
    }
    app = Starlette(routes=routes, exception_handlers=handlers)
    app.router.redirect_slashes = False  # a redirect would lead to whatever name stands in Host
    app.state.limits = limits or Limits()
    # Around Starlette, whose answer to what nobody expected is outside of its own middleware.
    cors = CORSMiddleware(
        app,
        allow_origins=gate.origins.exact,
        allow_origin_regex=gate.origins.pattern,
        allow_methods=["GET", "POST", "DELETE"],
        # Any that a listed origin's page may want to send: SDKs add some of their own in each release, and
        # what counts here, the key, no browser sends by itself.
        allow_headers=["*"],
        expose_headers=EXPOSED_HEADERS,
        max_age=600,
    )
    return _Doorkeeper(cors, gate)


def route(path: str, **methods: Callable[[Request], Awaitable[Response]]) -> Route:
    """One route for all methods of a path: of several, Starlette's 405 would name those of one."""

    async def endpoint(request: Request) -> Response:
        return await methods["GET" if request.method == "HEAD" else request.method](request)

    return Route(path, endpoint, methods=list(methods))


def json_answer(status: int, value: Any, headers: Mapping[str, str] | None = None) -> Response:
    """`value`: anything that msgspec encodes."""
    return Response(_encode(value), status, headers, media_type="application/json")


def error_answer(error: Error, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """An error in the one shape, with the headers that tell clients when, and whether, to try again.

    `X-Should-Retry` and `Retry-After-Ms` are what OpenAI's SDKs go by; by the status alone they would try
    again what cannot help.
    """
    response = json_answer(status, {"error": error}, headers)
    response.headers["X-Should-Retry"] = "true" if error.retryable else "false"
    if error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
        response.headers["Retry-After-Ms"] = str(round(error.retry_after_s * 1_000))
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


class _Doorkeeper:
    """Checks Host and Origin before anything else sees the request. The probes answer everybody.

    Prometheus calls us by any name: where there are keys its own lets it in, even one that is no secret.
    """

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in {"/healthz", "/readyz"}:
            request = Request(scope)
            try:
                if scope["path"] != "/metrics" or not self._gate.needs_credentials:
                    self._gate.check_host(request.headers.get("host"))
                self._gate.check_origin(request.headers.get("origin"), request.headers.get("host"))
            except WireError as error:
                await error_answer(error.error, error.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


async def _on_wire_error(_: Request, error: WireError) -> Response:
    return error_answer(error.error, error.status)


async def _on_redis_unavailable(_: Request, __: RedisUnavailableError) -> Response:
    error = WireError("redis_unavailable", "the relay cannot reach Redis; try again", retry_after_s=1)
    return error_answer(error.error, error.status)


async def _on_http_exception(request: Request, exception: HTTPException) -> Response:
    code = "method_not_allowed" if exception.status_code == 405 else "not_found"
    error = WireError(code, f"{request.method} {request.url.path}: {exception.detail}")
    return error_answer(error.error, error.status, exception.headers)  # Allow


async def _on_client_disconnect(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # which nobody reads


async def _on_exception(request: Request, exception: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=exception)
    error = WireError("internal_error", "something failed here; try again")
    return error_answer(error.error, error.status)
