"""The OpenAI door: `chat.completions` in, a job of ours behind it, OpenAI's chunks out (PROTOCOL.md §9)."""

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from deltawire.errors import WireError
from deltawire.keys import Keys
from deltawire.models import Model, read_models
from deltawire.scripts import Executor
from deltawire.tracing import read_traceparent

from .admissions import Admissions, Stay
from .auth import Gate, bearer_token
from .chat_request import read_chat_request
from .chat_stream import ChatAnswer, ChatStream
from .event_stream import HEADERS as EVENT_STREAM_HEADERS
from .event_stream import take_place, until_gone
from .http_app import error_answer, json_answer
from .http_body import idempotency_key, json_object
from .hubs import Hubs
from .jobs import Jobs
from .openai_errors import Failure
from .subscriber import Subscriber

MODELS_AGE_S: Final = 5.0
# OpenAI's clients ask again by themselves, as `Retry-After` tells them: their tries and ours would multiply.
RETRIES: Final[dict[str, Any]] = {"max_retries": 1, "max_retry_wait_s": 10}


class OpenAIApi:
    """The routes, and the answers that are on their way."""

    def __init__(
        self,
        gate: Gate,
        hubs: Hubs,
        jobs: Jobs,
        models: "Models",
        admissions: Admissions,
        *,
        abandon_grace_s: float | None,
    ) -> None:
        """`abandon_grace_s`: how long a job outlives its last reader; None: it is not cancelled."""
        self._gate = gate
        self._hubs = hubs
        self._jobs = jobs
        self._models = models
        self._admissions = admissions
        self._defaults = dict(RETRIES)
        if abandon_grace_s is not None:
            self._defaults |= {"on_abandon": "cancel", "abandon_grace_s": abandon_grace_s}
        self._is_draining = False
        self._open: dict[ChatStream | ChatAnswer, asyncio.Future[None]] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/v1/chat/completions", self.create_completion, methods=["POST"]),
            Route("/v1/models", self.list_models),
            Route("/v1/models/{model:path}", self.show_model),
        ]

    async def create_completion(self, request: Request) -> Response:
        principal = await self._gate.admit(bearer_token(request.headers.get("authorization")))
        principal.require("submit")
        principal.require("read")
        body = await json_object(request)
        self._gate.check_revoked(principal)
        asked = read_chat_request(body, self._defaults)
        if self._is_draining:
            raise shutting_down()
        job_id = self._jobs.new_id(principal, idempotency_key(request))
        sink = ChatStream(wants_usage=asked.wants_usage) if asked.is_streamed else ChatAnswer()
        place = take_place(request, principal)
        hub, opened, release = self._hubs.begin(job_id)
        subscriber = Subscriber(hub, sink, tenant=principal.tenant)

        # An answer that is under way may outlive its token.
        stay = Stay(principal, lambda error: sink.fail(Failure.of(error)))
        self._admissions.enter(stay, may_outlive=True)

        def close() -> None:
            place.release()
            self._admissions.leave(stay)
            subscriber.close()
            release()
            self._open.pop(sink).set_result(None)

        self._open[sink] = asyncio.get_running_loop().create_future()
        try:
            # The hub opens while the record is written; should it fail to, the job goes no further here.
            traceparent = read_traceparent(request.headers.get("traceparent"))
            entering = self._jobs.enter(job_id, asked.request, asked.options, principal, traceparent)
            _, submitted = await asyncio.gather(opened, entering)
            hub.subscribers.add(subscriber)
            await subscriber.open()
            # It is read before anybody writes: a job of this door is watched from its first moment.
            if asked.options.on_abandon == "cancel" and not hub.is_listening:
                await self._jobs.mark_watched(job_id)
            await self._jobs.send(job_id, submitted)
        except BaseException:
            close()
            raise
        headers = {"X-Job-Id": job_id, "X-Request-Id": job_id}
        if isinstance(sink, ChatStream):
            return ChatStreamResponse(sink, subscriber, headers, close=close)
        return ChatAnswerResponse(sink, self._jobs, headers, close=close)

    async def list_models(self, request: Request) -> Response:
        models = await self._models_for(request)
        return json_answer(200, {"object": "list", "data": models})

    async def show_model(self, request: Request) -> Response:
        name = request.path_params["model"]
        for model in await self._models_for(request):
            if model.get("id") == name:
                return json_answer(200, model)
        raise WireError("model_not_found", f"the model {name!r} does not exist", param="model")

    async def _models_for(self, request: Request) -> list[Model]:
        principal = await self._gate.admit(bearer_token(request.headers.get("authorization")))
        principal.require("read")
        if not principal.is_key:
            principal.require("submit")  # who may only look at a job needs no models
        return await self._models.read()

    async def drain(self, window_s: float) -> None:
        """Takes nothing new, and gives what is under way the window; the rest is told to try again."""
        self._is_draining = True
        if self._open:
            await asyncio.wait(tuple(self._open.values()), timeout=window_s)
        for sink in tuple(self._open):
            sink.fail(Failure.of(shutting_down()))


class ChatStreamResponse(Response):
    """Streams a job's chunks, or answers with the error that came before the first of them.

    The status waits for that, but not longer than for a keep-alive: proxies and browsers give up otherwise.
    """

    def __init__(
        self,
        stream: ChatStream,
        subscriber: Subscriber,
        headers: dict[str, str],
        *,
        close: Callable[[], None],
    ) -> None:
        super().__init__(headers=EVENT_STREAM_HEADERS | headers)
        del self.headers["content-length"]
        self._stream = stream
        self._subscriber = subscriber
        self._own_headers = headers
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        stream = self._stream
        try:
            with until_gone(receive, stream.end):
                data = await stream.take()
                if data:
                    stream.is_begun = True
                    await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                    await stream.pour(data, self._subscriber, send)
                elif stream.failure is not None:
                    failure = stream.failure
                    await error_answer(failure.error, failure.status, self._own_headers)(scope, receive, send)
        finally:
            self._close()


class ChatAnswerResponse(Response):
    """Waits for a job's end, and answers with its completion or its error."""

    def __init__(
        self, answer: ChatAnswer, jobs: Jobs, headers: dict[str, str], *, close: Callable[[], None]
    ) -> None:
        super().__init__(headers=headers)
        self._answer = answer
        self._jobs = jobs
        self._own_headers = headers
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self._answer
        try:
            with until_gone(receive, answer.end):
                await answer.wait()
                failure = answer.failure
                if failure is None:
                    if answer.event is None:
                        return  # the client has gone
                    completion = await self._jobs.completion(answer.event)
                    if completion is None:
                        failure = Failure.of(WireError("state_lost", "Redis has lost the completion"))
                if failure is not None:
                    response = error_answer(failure.error, failure.status, self._own_headers)
                else:
                    response = json_answer(200, completion, self._own_headers)
                await response(scope, receive, send)
        finally:
            self._close()


class Models:
    """What the workers say of their upstreams' models, asked for at most every MODELS_AGE_S."""

    def __init__(self, redis: Executor, keys: Keys) -> None:
        self._redis = redis
        self._keys = keys
        self._models: list[Model] = []
        self._read_at = float("-inf")

    async def read(self) -> list[Model]:
        """Raises RedisUnavailableError."""
        now = time.monotonic()
        if now - self._read_at > MODELS_AGE_S:
            self._models = await read_models(self._redis, self._keys)
            self._read_at = now
        return self._models


def shutting_down() -> WireError:
    return WireError("shutting_down", "this relay is shutting down; try again", retry_after_s=1)
