"""The upstream: an OpenAI-compatible gateway, read over httpx.

What it says when it refuses is `refusal.py`'s to read.
"""

import asyncio
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Collection
from contextlib import aclosing, asynccontextmanager, suppress
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Any, Final, cast
from urllib.request import getproxies

import httpx
import msgspec

from deltawire.codec import read_chunk
from deltawire.events import MAX_EVENT_BYTES
from deltawire.sse_decoder import ErrorData, EventTooLargeError, SseDecoder

from .http_transport import StreamTransport
from .refusal import UpstreamError, error_in_chunk, error_object, refusal, said_in_answer, said_in_stream
from .upstreams import Upstream
from .whole_answer import form_of, read_whole

CONNECT_TIMEOUT_S: Final = 10.0
WRITE_TIMEOUT_S: Final = 30.0
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
    """One streaming answer. Iterate `batches`; each batch is what arrived since the last one."""

    def __init__(self, response: httpx.Response, secrets: Collection[str] = ()) -> None:
        self._response = response
        self._secrets = secrets
        self._decoder = SseDecoder(MAX_CHUNK_BYTES)
        self._has_chunks = False
        self.is_done = False
        """Whether it has said that it was all, by [DONE] or by coming in one piece."""

    async def batches(self) -> AsyncGenerator[list[Chunk]]:
        """Ends at [DONE] or at the end of the body. An answer in one piece is one batch.

        Raises UpstreamError; what came before it has been handed out.
        """
        async with aclosing(_body(self._response)) as source:
            try:
                head = await self._head(source)
                if head is None:
                    return
                if not isinstance(head, bytes):
                    self.is_done = True
                    yield [head]
                    return
                data: bytes | None = head
                ending: bytes | UpstreamError | None = None
                while data is not None and ending is None:
                    batch, ending = self._read(data)
                    if batch:
                        self._has_chunks = True
                        yield batch
                    if ending is None:
                        data = await anext(source, None)
                if ending is None:
                    ending = self._read(b"")[1]  # an event that was too large says so at the next look
                if isinstance(ending, UpstreamError):
                    raise ending
                if ending is DONE:
                    self.is_done = True
                    await _drain(source)
            except httpx.RequestError:
                pass  # the connection broke: the caller judges by what has come so far, as with a clean end

    async def _head(self, source: AsyncIterator[bytes]) -> bytes | Chunk | None:
        """The first bytes of an event stream, or the chunk that an answer in one piece amounts to.

        None: there is nothing. Raises UpstreamError for anything else.
        """
        head, form = b"", None
        media_type = self._response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        async for data in source:
            head += data
            if form is None:
                form = form_of(head, media_type)
            if form == "events":
                return head
            if form == "other" or len(head) > MAX_CHUNK_BYTES:
                break
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


async def _drain(source: AsyncIterator[bytes]) -> None:
    """Reads the end of the body, so that the connection can be used again; it should come at once."""
    with suppress(TimeoutError, httpx.RequestError):
        async with asyncio.timeout(DRAIN_TIMEOUT_S):
            async for _ in source:
                pass


class UpstreamClient:
    """Opens streams. One for a worker process."""

    def __init__(self) -> None:
        # Our transport knows no proxies; where one is configured, httpx's own takes over.
        transport = None if {"http", "https", "all"} & getproxies().keys() else StreamTransport()
        self._client = httpx.AsyncClient(
            transport=transport,
            timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S, write=WRITE_TIMEOUT_S),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=100),
            headers={"Accept": "text/event-stream", "Accept-Encoding": "identity", "User-Agent": "deltawire"},
            # None is taken: it would go with everybody's requests from then on.
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
        )

    async def aclose(self) -> None:
        await self._client.aclose()

    @asynccontextmanager
    async def open(self, upstream: Upstream, body: bytes, *, job_id: str) -> AsyncIterator[Stream]:
        """Sends the request and checks the answer. Leaving the context closes the connection at once.

        The deadlines for the first delta and after are the caller's. Raises UpstreamError.
        """
        headers = {"Content-Type": "application/json", "X-Client-Request-Id": job_id}
        request = self._request("POST", upstream, "/chat/completions", headers, body)
        response = await self._send(request)
        try:
            if not 200 <= response.status_code < 300:
                page = await _page(response, MAX_ERROR_BYTES)
                raise refusal(
                    response.status_code, response.headers, page, secrets=upstream.secrets, now=time.time()
                )
            yield Stream(response, upstream.secrets)
        finally:
            await response.aclose()

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
        url = httpx.URL(upstream.base_url + path)
        if upstream.query:
            url = url.copy_merge_params(upstream.query)
        return self._client.build_request(method, url, content=body, headers=headers)

    async def _send(self, request: httpx.Request) -> httpx.Response:
        try:
            return await self._client.send(request, stream=True)
        except httpx.ConnectTimeout as error:
            message = f"no connection to the gateway within {CONNECT_TIMEOUT_S:.0f} s"
            raise UpstreamError("connect_timeout", message) from error
        except httpx.TransportError as error:
            message = f"the gateway cannot be reached ({type(error).__name__})"
            raise UpstreamError("upstream_unreachable", message) from error


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
    coding = response.headers.get("Content-Encoding", "").strip().lower()
    return _inflated(source) if coding in {"gzip", "x-gzip", "deflate"} else source


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
