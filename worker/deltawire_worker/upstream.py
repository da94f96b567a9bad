"""The upstream: an OpenAI-compatible gateway, read over httpx.

What it says when it refuses is `refusal.py`'s to read.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from functools import lru_cache
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, Protocol, cast
from urllib.request import getproxies

import httpx
import msgspec

from deltawire.codec import read_chunk
from deltawire.events import MAX_EVENT_BYTES
from deltawire.sse_decoder import ErrorData, EventTooLargeError, SseDecoder

from .http_transport import BodyStream, StreamTransport
from .refusal import UpstreamError, error_in_chunk, error_object, refusal, said_in_answer, said_in_stream
from .upstreams import Upstream
from .whole_answer import form_of, read_whole

CONNECT_TIMEOUT_S: Final = 10.0
WRITE_TIMEOUT_S: Final = 30.0
MAX_IDLE_CONNECTIONS: Final = 1_000  # those that short jobs have just left; seconds later they are closed
MODELS_TIMEOUT_S: Final = 10.0
MAX_ERROR_BYTES: Final = 65_536
MAX_MODELS_BYTES: Final = 4_194_304
# Room for what an event adds around the chunk.
MAX_CHUNK_BYTES: Final = MAX_EVENT_BYTES - 1_024
DONE: Final = b"[DONE]"
DRAIN_TIMEOUT_S: Final = 0.25
PAGE_TIMEOUT_S: Final = 5.0
INFLATED_BYTES: Final = 65_536

Chunk = tuple[dict[str, Any], bytes]
"""A chat.completion.chunk, and the bytes of it to publish."""


def request_body(request: dict[str, Any], upstream: Upstream, model: str | None = None) -> bytes:
    """The job's request as it goes upstream: streamed, with usage unless the caller said otherwise.

    `model` stands in the place of the request's, which may be an alias of ours.
    """
    body = {**request, "stream": True}
    if model is not None:
        body["model"] = model
    if upstream.stream_options:
        body["stream_options"] = {"include_usage": True, **(request.get("stream_options") or {})}
    for name in ("deltawire", *(() if upstream.stream_options else ("stream_options",)), *upstream.omit):
        body.pop(name, None)
    return msgspec.json.encode(body)


class Stream:
    """One streaming answer, handed on in batches: each is what arrived at once."""

    def __init__(self, source: "Source", media_type: str = "", secrets: Collection[str] = ()) -> None:
        self._source = source
        self._media_type = media_type
        self._secrets = secrets
        self._decoder = SseDecoder(MAX_CHUNK_BYTES)
        self._is_event_stream = False  # as far as is known
        self._has_chunks = False
        self._ending: bytes | UpstreamError | None = None
        self.is_done = False
        """Whether it has said that it was all, by [DONE] or by coming in one piece."""

    async def read(self, take: Callable[[list[Chunk]], bool]) -> bool:
        """Calls `take` with each batch at once, most of them within the loop's read of the socket.

        Returns False at [DONE] or at the end of the body (an answer in one piece is one batch), True once
        `take` has returned False, to be called again for what comes then. Raises UpstreamError; what came
        before it has been handed out.
        """

        def feed(data: bytes) -> bool:
            batch, self._ending = self._read(data)
            if batch:
                self._has_chunks = True
                return take(batch) and self._ending is None
            return self._ending is None

        try:
            is_paused = False
            if not self._is_event_stream:
                head = await self._head()
                if head is None:
                    return False
                if not isinstance(head, bytes):
                    self.is_done = True
                    take([head])
                    return False
                self._is_event_stream = True
                is_paused = not feed(head)
            if not is_paused:
                is_paused = await self._source.push(feed)
            if is_paused and self._ending is None:
                return True
            if self._ending is None:
                self._ending = self._read(b"")[1]  # an event that was too large says so at the next look
            if isinstance(self._ending, UpstreamError):
                raise self._ending
            if self._ending is DONE:
                self.is_done = True
                await _drain(self._source)
        except httpx.RequestError:
            pass  # the connection broke: the caller judges by what has come so far, as with a clean end
        return False

    async def _head(self) -> bytes | Chunk | None:
        """The first bytes of an event stream, or the chunk that an answer in one piece amounts to.

        None: there is nothing. Raises UpstreamError for anything else.
        """
        head, form = b"", None

        def look(data: bytes) -> bool:
            nonlocal head, form
            head += data
            if form is None:
                form = form_of(head, self._media_type)
            return form not in {"events", "other"} and len(head) <= MAX_CHUNK_BYTES

        await self._source.push(look)
        if form == "events":
            return head
        if len(head) > MAX_CHUNK_BYTES and form != "other":
            raise _too_large()
        if not head.strip():
            return None
        error, chunk = read_whole(head) if form == "whole" else (None, None)
        if error:
            raise said_in_answer(error, secrets=self._secrets)
        if chunk is None:
            raise UpstreamError(
                "upstream_not_streaming",
                "the gateway answered with something else than a stream",
                status_code=200,
            )
        line = msgspec.json.encode(chunk)
        if len(line) > MAX_CHUNK_BYTES:
            raise _too_large()
        return chunk, line

    def _read(self, data: bytes) -> tuple[list[Chunk], bytes | UpstreamError | None]:
        """The chunks that `data` completes, and what ends the stream after them: DONE or an error."""
        batch: list[Chunk] = []
        try:
            for payload in self._decoder.feed(data):
                if payload[:1] != b"{":
                    said = payload.strip()
                    if said == DONE:
                        return batch, DONE
                    if not said:
                        continue
                if payload.__class__ is ErrorData:
                    return batch, self._error(_in_error_event(payload), batch)
                chunk, line = read_chunk(payload)
                # A search of bytes first: it is cheaper than to look into each chunk.
                if b'"error"' in payload and (error := error_in_chunk(chunk)):
                    return batch, self._error(error, batch)
                if len(line) > MAX_CHUNK_BYTES:  # by being mended
                    return batch, _too_large()
                batch.append((chunk, line))
        except EventTooLargeError:
            return batch, _too_large()
        except ValueError:
            return batch, UpstreamError("upstream_malformed", "the gateway sent a chunk that is not JSON")
        return batch, None

    def _error(self, error: Any, batch: list[Chunk]) -> UpstreamError:  # whatever JSON the gateway sent
        say = said_in_stream if batch or self._has_chunks else said_in_answer
        return say(error, secrets=self._secrets)


def _in_error_event(payload: bytes) -> Any:
    """The error object in the data of an `event: error`, which may be a text."""
    try:
        answer = msgspec.json.decode(payload)
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        return None
    return error_object(answer) or answer


async def _drain(source: "Source") -> None:
    """Reads the end of the body, so that the connection can be used again; it should come at once."""
    with suppress(TimeoutError, httpx.RequestError):
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            await source.push(lambda _: True)


class UpstreamClient:
    """Opens streams. One for a worker process."""

    def __init__(self) -> None:
        # Our transport knows no proxies; where one is configured, httpx's own takes over.
        has_proxies = bool({"http", "https", "all"} & getproxies().keys())
        self._transport = None if has_proxies else StreamTransport(max_idle_connections=MAX_IDLE_CONNECTIONS)
        self._client = httpx.AsyncClient(
            transport=self._transport,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=MAX_IDLE_CONNECTIONS),
            headers={"Accept": "text/event-stream", "Accept-Encoding": "identity", "User-Agent": "deltawire"},
            # None is taken: it would go with everybody's requests from then on.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def open(
        self, upstream: Upstream, body: bytes, *, job_id: str, traceparent: str = ""
    ) -> AsyncIterator[Stream]:
        """Sends the request and checks the answer. Leaving the context closes the connection at once.

        The deadlines for the first delta and after are the caller's. Raises UpstreamError.
        """
        headers = {"Content-Type": "application/json", "X-Client-Request-Id": job_id}
        if traceparent:
            headers["Traceparent"] = traceparent
        request = self._request("POST", upstream, "/chat/completions", headers, body)
        response = await self._send(request)
        source = source_of(response)
        try:
            if not 200 <= response.status_code < 300:
                page = await _page(response, MAX_ERROR_BYTES)
                raise refusal(
                    response.status_code, response.headers, page, secrets=upstream.secrets, now=time.time()
                )
            stream = Stream(source, media_type_of(response), upstream.secrets)
            # The prompt, and 4 KB of headers: nobody needs them as long as the stream goes on.
            del request, response, headers, body
            yield stream
        finally:
            await source.aclose()

    async def models(self, upstream: Upstream) -> list[Any]:
        """What its own `GET /models` lists, unchecked. Raises UpstreamError and TimeoutError."""
        async with asyncio.timeout(MODELS_TIMEOUT_S):
            request = self._request("GET", upstream, "/models", {"Accept": "application/json"})
            response = await self._send(request)
            try:
                page = await _page(response, MAX_MODELS_BYTES)
            finally:
                await response.aclose()
        with suppress(msgspec.DecodeError, RecursionError, UnicodeDecodeError):
            answer = msgspec.json.decode(page)
            if (
                response.status_code == 200
                and isinstance(answer, dict)
                and isinstance(answer.get("data"), list)
            ):
                models: list[Any] = answer["data"]
                return models
        raise UpstreamError(
            "upstream_malformed", "the gateway lists no models", status_code=response.status_code
        )

    def _request(
        self, method: str, upstream: Upstream, path: str, headers: dict[str, str], body: bytes | None = None
    ) -> httpx.Request:
        headers = {**headers, **upstream.headers}
        if upstream.api_key:
            is_bearer = upstream.auth_header.lower() == "authorization"
            headers[upstream.auth_header] = f"Bearer {upstream.api_key}" if is_bearer else upstream.api_key
        url = _url(upstream.base_url + path, tuple(upstream.query.items()))
        return self._client.build_request(method, url, content=body, headers=headers)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            if self._transport is not None:
                # What httpx does besides is of no use here: redirects, cookies, and a line in the log.
                return await self._transport.handle_async_request(request)
            return await self._client.send(request, stream=True)
        except httpx.ConnectTimeout as error:
            message = f"no connection to the gateway within {CONNECT_TIMEOUT_S:.0f} s"
            raise UpstreamError("connect_timeout", message) from error
        except httpx.TransportError as error:
            message = f"the gateway cannot be reached ({type(error).__name__})"
            raise UpstreamError("upstream_unreachable", message) from error


@lru_cache(1_000)
def _url(url: str, query: tuple[tuple[str, str], ...]) -> httpx.URL:
    return httpx.URL(url).copy_merge_params(query) if query else httpx.URL(url)


class Source(Protocol):
    """The bytes of a body: the transport's own BodyStream, or what makes any response look like it."""

    async def push(self, sink: Callable[[bytes], bool]) -> bool:
        """Calls `sink` with each piece as it arrives. True: it returned False, and wants no more for now."""

    async def aclose(self) -> None:
        """Ends the response."""


class _Pieces:
    """The body of a response as httpx gives it: of a proxy's transport, or compressed."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._body = _body(response)

    async def push(self, sink: Callable[[bytes], bool]) -> bool:
        async for piece in self._body:
            if not sink(piece):
                return True
        return False

    async def aclose(self) -> None:
        await self._body.aclose()
        await self._response.aclose()


def source_of(response: httpx.Response) -> Source:
    """The body of a response that is streamed."""
    body = response.extensions.get("body_stream")
    return body if isinstance(body, BodyStream) and not _coding_of(response) else _Pieces(response)


def media_type_of(response: httpx.Response) -> str:
    content_type: str = response.headers.get("Content-Type", "")
    return content_type.partition(";")[0].strip().lower()


def _coding_of(response: httpx.Response) -> str:
    """The body's coding, if it is one that we read."""
    coding: str = response.headers.get("Content-Encoding", "").strip().lower()
    return coding if coding in {"gzip", "x-gzip", "deflate"} else ""


async def _page(response: httpx.Response, max_bytes: int) -> bytes:
    """As much of a body as is of interest, and as came."""
    body = b""
    async with aclosing(_body(response)) as source:
        # The status says enough.
        with suppress(httpx.HTTPError, TimeoutError):
            async with asyncio.timeout(PAGE_TIMEOUT_S):
                async for piece in source:
                    body += piece
                    if len(body) > max_bytes:
                        break
    return body


def _body(response: httpx.Response) -> AsyncGenerator[bytes]:
    """The body as it is meant. We ask for no coding; gzip and deflate are read all the same."""
    source = cast("AsyncGenerator[bytes]", response.aiter_raw())
    return _inflated(source) if _coding_of(response) else source


async def _inflated(source: AsyncGenerator[bytes]) -> AsyncGenerator[bytes]:
    """A compressed body, in pieces of INFLATED_BYTES at the most: a few bytes can stand for gigabytes."""
    inflater = zlib.decompressobj(32 + zlib.MAX_WBITS)  # gzip, or zlib as "deflate" means
    is_first = True
    async with aclosing(source):
        async for data in source:
            while True:
                try:
                    piece = inflater.decompress(data, INFLATED_BYTES)
                except zlib.error as error:
                    if not is_first:
                        raise httpx.DecodingError("the gateway's compression is broken") from error
                    inflater = zlib.decompressobj(-zlib.MAX_WBITS)  # as some mean it
                    is_first = False
                    continue
                is_first = False
                if piece:
                    yield piece
                data = inflater.unconsumed_tail  # noqa: PLW2901 - what is left of it
                if not data and len(piece) < INFLATED_BYTES:
                    break
                await asyncio.sleep(0)


def _too_large() -> UpstreamError:
    return UpstreamError(
        "upstream_event_too_large", f"the gateway sent more than {MAX_CHUNK_BYTES} bytes at once"
    )
