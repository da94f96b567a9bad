"""The HTTP door: routes are thin, the use cases are in `jobs.py` (PROTOCOL.md §5)."""

from contextlib import ExitStack

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire.errors import WireError
from deltawire.events import STATUSES
from deltawire.options import parse_options
from deltawire.tracing import read_traceparent

from .admissions import Admissions, Stay
from .auth import Gate, Principal, bearer_token
from .event_stream import HEADERS as EVENT_STREAM_HEADERS
from .event_stream import EventStream, EventStreamResponse, say_goodbye, take_place
from .health import Health
from .http_app import json_answer, route
from .http_body import MAX_KEY_CHARACTERS, idempotency_key, json_object, sequence_number
from .hubs import Hubs
from .inbound import subscription
from .job_list import MAX_LIMIT, Wanted
from .jobs import Jobs, check_job_id
from .settings import Settings
from .subscriber import Subscriber
from .tokens_api import TTL_S, Mint


class JobsApi:
    """The routes, and the event streams that are open."""

    def __init__(
        self,
        settings: Settings,
        gate: Gate,
        hubs: Hubs,
        jobs: Jobs,
        health: Health,
        *,
        admissions: Admissions,
        mint: Mint | None,
    ) -> None:
        """`mint` None: jobs come without a token."""
        self._settings = settings
        self._gate = gate
        self._admissions = admissions
        self._mint = mint
        self._hubs = hubs
        self._jobs = jobs
        self._health = health
        self._event_streams: set[EventStream] = set()
        self._drains_within_s: float | None = None  # once it drains

    def routes(self) -> list[Route]:
        return [
            Route("/healthz", self._health.healthz),
            Route("/readyz", self._health.readyz),
            route("/v1/jobs", GET=self.list_jobs, POST=self.create_job),
            route("/v1/jobs/{job_id}", GET=self.show_job, DELETE=self.delete_job),
            Route("/v1/jobs/{job_id}/events", self.show_events),
            Route("/v1/jobs/{job_id}/cancel", self.cancel_job, methods=["POST"]),
        ]

    async def _principal(self, request: Request) -> Principal:
        return await self._gate.admit(bearer_token(request.headers.get("authorization")))

    async def _reader(self, request: Request) -> Principal:
        """Who reads events: an EventSource sends no header, so that its ticket stands in the URL."""
        tickets = request.query_params.getlist("ticket")
        if not tickets or "authorization" in request.headers:
            return await self._principal(request)
        self._gate.check_site(request.headers.get("origin"), request.headers.get("sec-fetch-site"))
        return await self._gate.admit(", ".join(tickets), is_ticket=True)  # two of them fit nothing

    async def create_job(self, request: Request) -> Response:
        principal = await self._principal(request)
        body = await json_object(request)
        self._gate.check_revoked(principal)
        traceparent = read_traceparent(request.headers.get("traceparent"))
        job_id, status = await self._jobs.create(body, principal, idempotency_key(request), traceparent)
        base = f"{self._settings.public_url}/v1/jobs/{job_id}"
        urls = {
            "self": base,
            "events": f"{base}/events",
            "websocket": _websocket_url(f"{base}/ws"),
            "cancel": f"{base}/cancel",
        }
        token = None
        if self._mint is not None:
            options = parse_options(body.get("options"), from_http=True)
            ttl_s = max(TTL_S, options.queue_timeout_s + options.timeout_s)
            token = self._mint.for_submitter(principal, job_id, ttl_s)
        answer = {"id": job_id, "object": "job", "status": status, "token": token, "urls": urls}
        return json_answer(202, answer, {"Cache-Control": "no-store"})

    async def show_job(self, request: Request) -> Response:
        principal = await self._principal(request)
        return json_answer(200, await self._jobs.describe(request.path_params["job_id"], principal))

    async def list_jobs(self, request: Request) -> Response:
        principal = await self._principal(request)
        return json_answer(200, await self._jobs.list(_wanted(request), principal))

    async def delete_job(self, request: Request) -> Response:
        principal = await self._principal(request)
        job_id = request.path_params["job_id"]
        await self._jobs.delete(job_id, principal)
        return json_answer(200, {"id": job_id, "object": "job.deleted", "deleted": True})

    async def cancel_job(self, request: Request) -> Response:
        principal = await self._principal(request)
        body = await json_object(request, may_be_empty=True)
        self._gate.check_revoked(principal)
        reason = body.get("reason", "client")
        if not isinstance(reason, str) or len(reason) > MAX_KEY_CHARACTERS:
            raise WireError(
                "invalid_request", "reason must be a text of at most 255 characters", param="reason"
            )
        result = await self._jobs.cancel(request.path_params["job_id"], principal, reason=reason)
        answer = {
            "status": result.status,
            "cancelled_from": result.cancelled_from,
            "delivered": result.delivered,
        }
        return json_answer(200, answer)

    async def show_events(self, request: Request) -> Response:
        principal = await self._reader(request)
        job_id = check_job_id(request.path_params["job_id"])
        principal.may(job_id, "read")
        position = _position(request)
        asked = subscription(job_id, request.url.query)
        if request.method == "HEAD":
            return Response(headers=EVENT_STREAM_HEADERS)
        with ExitStack() as held:  # until the response has it
            held.callback(take_place(request, principal).release)
            stream = EventStream()
            self._event_streams.add(stream)
            held.callback(self._event_streams.discard, stream)
            if self._drains_within_s is not None:
                say_goodbye(stream, self._drains_within_s)
            stay = Stay(principal, stream.put_out)
            self._admissions.enter(stay)
            held.callback(self._admissions.leave, stay)
            hub, release = await self._hubs.acquire(job_id)
            held.callback(release)
            subscriber = Subscriber(
                hub, stream, tenant=principal.tenant, position=position, merge=asked.merge
            )
            if position and subscriber.has_ended and position <= hub.tail.top:
                return Response(status_code=204)  # which is what stops an EventSource
            held.callback(subscriber.close)
            hub.subscribers.add(subscriber)
            await subscriber.open(mode=asked.mode)
            return EventStreamResponse(stream, subscriber, release=held.pop_all().close)

    async def drain(self, window_s: float) -> None:
        """Says goodbye to the event streams, which come back later; also to those that begin from now on."""
        self._drains_within_s = window_s
        for stream in tuple(self._event_streams):
            say_goodbye(stream, window_s)


def _wanted(request: Request) -> Wanted:
    """The page that a query asks for. Raises WireError."""
    query = request.query_params
    limit, status, order = query.get("limit", "20"), query.get("status") or None, query.get("order", "desc")
    if not limit.isascii() or not limit.isdigit() or len(limit) > 3 or not 1 <= int(limit) <= MAX_LIMIT:
        raise WireError("invalid_request", f"limit must be 1 to {MAX_LIMIT}", param="limit")
    if status is not None and status not in STATUSES:
        raise WireError("invalid_request", f"status must be one of {', '.join(STATUSES)}", param="status")
    if order not in ("asc", "desc"):
        raise WireError("invalid_request", "order must be asc or desc", param="order")
    return Wanted(
        limit=int(limit), after=query.get("after") or None, status=status, descending=order == "desc"
    )


def _position(request: Request) -> int:
    """Where the client stands: Last-Event-ID beats starting_after, which must be a number all the same."""
    position = sequence_number("starting_after", request.query_params.get("starting_after", "0"))
    last = request.headers.get("last-event-id")
    return sequence_number("Last-Event-ID", last) if last else position


def _websocket_url(url: str) -> str:
    return "ws" + url.removeprefix("http") if url.startswith("http") else url
