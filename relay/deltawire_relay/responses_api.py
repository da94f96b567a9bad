"""OpenAI's Responses in background mode: a job behind each, resumed and cancelled (PROTOCOL.md §5.11)."""

import asyncio
from collections.abc import Callable, Coroutine
from contextlib import ExitStack
from functools import partial
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire.errors import WireError
from deltawire.keys import is_job_id
from deltawire.log import Submitted
from deltawire.messages import Snapshot, Subscribed
from deltawire.record import Record
from deltawire.tracing import read_traceparent

from .admissions import Admissions, Stay
from .auth import Gate, Principal, bearer_token
from .event_stream import ByteStream, EventStreamResponse, take_place
from .http_app import json_answer, route
from .http_body import idempotency_key, json_object, sequence_number
from .hub import Hub
from .hubs import Hubs
from .jobs import Jobs
from .openai_api import shutting_down
from .responses_events import PREFIX, Translator, response_object
from .responses_request import read_responses_request, unsupported
from .subscriber import Subscriber
from .tail import Batch


class ResponsesApi:
    """The routes, and the streams that are open."""

    def __init__(self, gate: Gate, hubs: Hubs, jobs: Jobs, admissions: Admissions) -> None:
        self._gate = gate
        self._hubs = hubs
        self._jobs = jobs
        self._admissions = admissions
        self._is_draining = False
        self._open: set[ResponseStream] = set()

    def routes(self) -> list[Route]:
        return [
            Route("/v1/responses", self.create_response, methods=["POST"]),
            route("/v1/responses/{response_id}", GET=self.show_response, DELETE=self.delete_response),
            Route("/v1/responses/{response_id}/cancel", self.cancel_response, methods=["POST"]),
        ]

    async def create_response(self, request: Request) -> Response:
        principal = await self._principal(request)
        principal.require("submit")
        principal.require("read")
        body = await json_object(request)
        self._gate.check_revoked(principal)
        asked = read_responses_request(body)
        if self._is_draining:
            raise shutting_down()
        job_id = self._jobs.new_id(principal, idempotency_key(request))
        traceparent = read_traceparent(request.headers.get("traceparent"))
        what = asked.request, asked.options, principal, traceparent
        enter = partial(self._jobs.enter, job_id, *what, response=asked.response)
        if asked.is_streamed:
            ends_unread = asked.options.on_abandon == "cancel"
            return await self._stream(request, principal, job_id, enter=enter, ends_unread=ends_unread)
        await self._jobs.send(job_id, await enter())
        return await self._answer(job_id, await self._jobs.response(job_id, principal))

    async def show_response(self, request: Request) -> Response:
        principal, job_id, record = await self._known(request, "read")
        query = request.query_params
        for name in ("include", "include_obfuscation"):
            if query.get(name, "false") != "false" or query.getlist(f"{name}[]"):
                raise unsupported(name, "leave it out")
        after, stream = query.get("starting_after"), query.get("stream", "false")
        position = -1 if after is None else sequence_number("starting_after", after)
        if stream not in ("true", "false"):
            raise WireError("invalid_request", "stream must be true or false", param="stream")
        if stream == "false" or request.method == "HEAD":
            return await self._answer(job_id, record)
        if self._is_draining:
            raise shutting_down()
        return await self._stream(request, principal, job_id, starting_after=position)

    async def cancel_response(self, request: Request) -> Response:
        principal, job_id, _ = await self._known(request, "read", "cancel")
        await self._jobs.cancel(job_id, principal, reason="client")
        return await self._answer(job_id, await self._jobs.response(job_id, principal))

    async def delete_response(self, request: Request) -> Response:
        principal, job_id, _ = await self._known(request, "cancel")
        await self._jobs.delete(job_id, principal)
        return json_answer(200, {"id": PREFIX + job_id, "object": "response", "deleted": True})

    async def drain(self, _: float) -> None:
        """All that is under way goes on elsewhere, from the number that it has come to."""
        self._is_draining = True
        for stream in tuple(self._open):
            stream.fail(shutting_down())

    async def _principal(self, request: Request) -> Principal:
        return await self._gate.admit(bearer_token(request.headers.get("authorization")))

    async def _known(self, request: Request, *scopes: Any) -> tuple[Principal, str, Record]:
        """Who asks, for which Response. Raises WireError."""
        principal = await self._principal(request)
        response_id = request.path_params["response_id"]
        job_id = response_id.removeprefix(PREFIX)
        for scope in scopes:
            principal.may(job_id, scope)
        if job_id == response_id or not is_job_id(job_id):
            raise WireError("unknown_job", f"there is no response {response_id}", param="response_id")
        return principal, job_id, await self._jobs.response(job_id, principal)

    async def _answer(self, job_id: str, record: Record) -> Response:
        """The Response as it is; what has come of it once it has ended: the same that its last event said."""
        response = response_object(job_id, record)
        if record.is_terminal:
            translator = Translator(job_id, record)
            async for page in self._jobs.pages(job_id):
                for line in page:
                    translator.add(line)
            if not translator.is_over:
                raise WireError("state_lost", "Redis has lost the response")
            response = translator.response
        return json_answer(200, response, _headers(job_id))

    async def _stream(
        self,
        request: Request,
        principal: Principal,
        job_id: str,
        *,
        starting_after: int = -1,
        enter: Callable[[], Coroutine[Any, Any, Submitted]] | None = None,
        ends_unread: bool = False,
    ) -> Response:
        """The events of a job; of one that is to be made, if `enter` makes its record.

        `ends_unread`: it is to end when nobody reads it any more.
        """
        with ExitStack() as held:  # until the response has it
            held.callback(take_place(request, principal).release)
            hub, opened, release = self._hubs.begin(job_id)
            held.callback(release)
            stream = ResponseStream(hub, starting_after)
            self._open.add(stream)
            held.callback(self._open.discard, stream)
            stay = Stay(principal, stream.fail)
            self._admissions.enter(stay)
            held.callback(self._admissions.leave, stay)
            subscriber = Subscriber(hub, stream, tenant=principal.tenant)
            held.callback(subscriber.close)
            submitted = None
            if enter is None:
                await opened
            else:  # the hub opens while the record is written
                _, submitted = await asyncio.gather(opened, enter())
            hub.subscribers.add(subscriber)
            await subscriber.open()
            if submitted is not None:
                if ends_unread and not hub.is_listening:
                    await self._jobs.mark_watched(job_id)
                await self._jobs.send(job_id, submitted)
            release_all = held.pop_all().close
            return EventStreamResponse(
                stream, subscriber, release=release_all, first=b": deltawire\n\n", headers=_headers(job_id)
            )


class ResponseStream(ByteStream):
    """A sink that writes the events of a Response; always from the first, of which it leaves out some."""

    via = "responses"

    def __init__(self, hub: Hub, starting_after: int) -> None:
        super().__init__()
        self._hub = hub
        self._last = starting_after
        self._translator: Translator | None = None

    def write_batch(self, batch: Batch) -> None:
        if self._translator is None:
            assert self._hub.record is not None  # noqa: S101 - a subscriber without one is given nothing
            self._translator = Translator(self._hub.job_id, self._hub.record)
        data = []
        failure: WireError | None = None
        try:
            for line in batch.lines:
                for event in self._translator.add(line):
                    if event["sequence_number"] > self._last:
                        self._last = event["sequence_number"]
                        data.append(_message(event))
        except WireError as error:
            failure = error
        if data:
            self.write(b"".join(data))
        if failure is not None:
            self.fail(failure)

    def write_message(self, message: Subscribed | Snapshot) -> None:
        if isinstance(message, Snapshot):
            # Text that was folded up makes other events, with other numbers.
            gone = "the log does not go back far enough to stream; without stream=true the text is here"
            self.fail(WireError("state_lost", gone))

    def ended(self, _: Subscriber) -> None:
        if self._translator is not None and self._last >= self._translator.number:
            # Redis has lost what the client had (PROTOCOL.md §4): it must not wait for an end that was told.
            self.fail(WireError("state_lost", "the response has ended before this number; retrieve it"))
        self.end()

    def refused(self, _: Subscriber, error: WireError) -> None:
        self.fail(error)

    def fail(self, error: WireError) -> None:
        """The stream ends, the Response does not: the number is that of the last event, to go on from."""
        said = error.error
        event = {"type": "error", "code": said.code, "message": said.message, "param": said.param}
        # OpenAI's SDKs raise for what has an `error`.
        self.write(_message({**event, "sequence_number": self._last, "error": said}))
        self.end()


def _message(event: dict[str, Any]) -> bytes:
    return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))


def _headers(job_id: str) -> dict[str, str]:
    return {"X-Job-Id": job_id, "X-Request-Id": job_id, "Cache-Control": "no-store"}
