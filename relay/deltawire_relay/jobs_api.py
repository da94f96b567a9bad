"""The HTTP door: routes are thin, the use cases are in `jobs.py` (PROTOCOL.md §5)."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any, Final

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from deltawire.errors import RedisUnavailableError, WireError

from .auth import Gate, Principal, bearer_token
from .event_stream import HEADERS as EVENT_STREAM_HEADERS
from .event_stream import EventStream, EventStreamResponse
from .health import Health
from .hubs import Hubs
from .inbound import subscription
from .jobs import Jobs, check_job_id
from .settings import Settings
from .subscriber import Subscriber

MAX_BODY_BYTES: Final = 10_485_760
_MAX_KEY_CHARACTERS: Final = 255

_log = logging.getLogger(__name__)
_encode: Final = msgspec.json.Encoder().encode


class JobsApi:
    """The routes, and the event streams that are open."""

    def __init__(self, settings: Settings, gate: Gate, hubs: Hubs, jobs: Jobs, health: Health) -> None:
        self._settings = settings
        self._gate = gate
        self._hubs = hubs
        self._jobs = jobs
        self._health = health
        self.event_streams: set[EventStream] = set()

    def app(self) -> ASGIApp:
        """The ASGI application, errors, CORS, Host and Origin checks included."""
        routes = [
            Route("/healthz", self._health.healthz),
            Route("/readyz", self._health.readyz),
            Route("/v1/jobs", self.create_job, methods=["POST"]),
            Route("/v1/jobs/{job_id}", self.show_job),
            Route("/v1/jobs/{job_id}/events", self.show_events),
            Route("/v1/jobs/{job_id}/cancel", self.cancel_job, methods=["POST"]),
        ]
        handlers: dict[Any, Callable[[Request, Any], Awaitable[Response]]] = {
            WireError: _on_wire_error,
            RedisUnavailableError: _on_redis_unavailable,
            HTTPException: _on_http_exception,
            ClientDisconnect: _on_client_disconnect,
            Exception: _on_exception,
        }
        cors = Middleware(
            CORSMiddleware,
            allow_origins=self._settings.allowed_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "Idempotency-Key", "Last-Event-ID"],
            max_age=600,
        )
        app = Starlette(routes=routes, exception_handlers=handlers, middleware=[cors])
        return _Doorkeeper(app, self._gate)

    def _principal(self, request: Request) -> Principal:
        return self._gate.authenticate(bearer_token(request.headers.get("authorization")))

    async def create_job(self, request: Request) -> Response:
        principal = self._principal(request)
        body = await _json_object(request)
        key = request.headers.get("idempotency-key")
        if key is not None and not 0 < len(key) <= _MAX_KEY_CHARACTERS:
            raise WireError(
                "invalid_request", "an Idempotency-Key has 1 to 255 characters", param="Idempotency-Key"
            )
        job_id, status = await self._jobs.create(body, principal, key)
        base = f"{self._settings.public_url}/v1/jobs/{job_id}"
        urls = {
            "self": base,
            "events": f"{base}/events",
            "websocket": _websocket_url(f"{base}/ws"),
            "cancel": f"{base}/cancel",
        }
        return _json(202, {"id": job_id, "object": "job", "status": status, "urls": urls})

    async def show_job(self, request: Request) -> Response:
        principal = self._principal(request)
        return _json(200, await self._jobs.describe(request.path_params["job_id"], principal))

    async def cancel_job(self, request: Request) -> Response:
        principal = self._principal(request)
        body = await _json_object(request, may_be_empty=True)
        reason = body.get("reason", "client")
        if not isinstance(reason, str) or len(reason) > _MAX_KEY_CHARACTERS:
            raise WireError(
                "invalid_request", "reason must be a text of at most 255 characters", param="reason"
            )
        result = await self._jobs.cancel(request.path_params["job_id"], principal, reason=reason)
        answer = {
            "status": result.status,
            "cancelled_from": result.cancelled_from,
            "delivered": result.delivered,
        }
        return _json(200, answer)

    async def show_events(self, request: Request) -> Response:
        principal = self._principal(request)
        principal.require("read")
        job_id = check_job_id(request.path_params["job_id"])
        position = _position(request)
        asked = subscription(job_id, request.url.query)
        if request.method == "HEAD":
            return Response(headers=EVENT_STREAM_HEADERS)
        hub, release = await self._hubs.acquire(job_id)
        stream = EventStream()
        subscriber = Subscriber(hub, stream, tenant=principal.tenant, position=position, merge=asked.merge)
        try:
            if position and subscriber.has_ended and position <= hub.tail.top:
                release()
                return Response(status_code=204)  # which is what stops an EventSource
            hub.subscribers.add(subscriber)
            self.event_streams.add(stream)

            def close() -> None:
                self.event_streams.discard(stream)
                release()

            response = EventStreamResponse(stream, subscriber, release=close)
            await subscriber.open(mode=asked.mode)
        except BaseException:
            self.event_streams.discard(stream)
            subscriber.close()
            release()
            raise
        return response


class _Doorkeeper:
    """Checks Host and Origin before anything else sees the request. The probes answer everybody."""

    def __init__(self, app: ASGIApp, gate: Gate) -> None:
        self._app = app
        self._gate = gate

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in {"/healthz", "/readyz"}:
            request = Request(scope)
            try:
                self._gate.check_host(request.headers.get("host"))
                self._gate.check_origin(request.headers.get("origin"), request.headers.get("host"))
            except WireError as error:
                await _error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _position(request: Request) -> int:
    """Where the client stands: Last-Event-ID beats starting_after."""
    name, text = "Last-Event-ID", request.headers.get("last-event-id")
    if not text:
        name, text = "starting_after", request.query_params.get("starting_after", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 15:
        raise WireError("invalid_request", f"{name} must be a sequence number", param=name)
    return int(text)


def _websocket_url(url: str) -> str:
    return "ws" + url.removeprefix("http") if url.startswith("http") else url


async def _json_object(request: Request, *, may_be_empty: bool = False) -> dict[str, Any]:
    """The body. Raises WireError for another media type (a form on another site, say), size or shape."""
    body = bytearray()
    if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
        raise WireError("request_too_large", f"a body has at most {MAX_BODY_BYTES} bytes")
    async for piece in request.stream():
        body += piece
        if len(body) > MAX_BODY_BYTES:
            raise WireError("request_too_large", f"a body has at most {MAX_BODY_BYTES} bytes")
    if not body and may_be_empty:
        return {}
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise WireError("unsupported_media_type", "send Content-Type: application/json")
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise WireError("invalid_json", f"the body is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WireError("invalid_request", "the body must be a JSON object")
    return value


def _json(status: int, value: Any) -> Response:  # anything that msgspec encodes
    return Response(_encode(value), status, media_type="application/json")


def _error_response(error: WireError) -> Response:
    response = _json(error.status, {"error": error.error})
    if error.error.retry_after_s is not None:
        response.headers["Retry-After"] = str(max(1, round(error.error.retry_after_s)))
    if error.status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response


async def _on_wire_error(_: Request, error: WireError) -> Response:
    return _error_response(error)


async def _on_redis_unavailable(_: Request, __: RedisUnavailableError) -> Response:
    return _error_response(
        WireError("redis_unavailable", "the relay cannot reach Redis; try again", retry_after_s=1)
    )


async def _on_http_exception(request: Request, error: HTTPException) -> Response:
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    response = _error_response(WireError(code, f"{request.method} {request.url.path}: {error.detail}"))
    response.headers.update(error.headers or {})  # Allow
    return response


async def _on_client_disconnect(_: Request, __: ClientDisconnect) -> Response:
    return Response(status_code=400)  # which nobody reads


async def _on_exception(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _error_response(WireError("internal_error", "something failed here; try again"))
