"""The upstream: an OpenAI-compatible gateway, read over httpx.

What a gateway says when it refuses is turned into an error of ours here. Of its page and headers nothing
goes further than the status, OpenAI's type and code, and a message where it is meant for the caller.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager, suppress
from typing import Any, Final, cast
from urllib.request import getproxies

import httpx
import msgspec

from deltawire.codec import read_chunk
from deltawire.errors import WireError
from deltawire.events import MAX_EVENT_BYTES
from deltawire.sse_decoder import EventTooLargeError, SseDecoder

from .http_transport import StreamTransport

CONNECT_TIMEOUT_S: Final = 10.0
WRITE_TIMEOUT_S: Final = 30.0
MAX_ERROR_BYTES: Final = 65_536
MAX_MESSAGE_CHARACTERS: Final = 500
# Room for what an event adds around the chunk.
MAX_CHUNK_BYTES: Final = MAX_EVENT_BYTES - 1_024
DONE: Final = b"[DONE]"
DRAIN_TIMEOUT_S: Final = 0.25

Chunk = tuple[dict[str, Any], bytes]
"""A chat.completion.chunk, and the bytes of it to publish."""


class Upstream(msgspec.Struct, frozen=True):
    """A configured gateway. `base_url` ends before `/chat/completions`."""

    name: str
    base_url: str
    api_key: str = ""

    def __repr__(self) -> str:
        return f"Upstream({self.name!r}, {self.base_url!r})"


class UpstreamError(WireError):
    """The gateway refused, failed or could not be reached. `status_code` is its HTTP status, if any."""

    def __init__(
        self, code: str, message: str, *, status_code: int | None = None, retry_after_s: float | None = None
    ) -> None:
        super().__init__(code, message, retry_after_s=retry_after_s)
        self.status_code = status_code


def request_body(request: dict[str, Any]) -> bytes:
    """The job's request as it goes upstream: streamed, with usage unless the caller said otherwise."""
    stream_options = {"include_usage": True, **(request.get("stream_options") or {})}
    return msgspec.json.encode({**request, "stream": True, "stream_options": stream_options})


class Stream:
    """One streaming answer. Iterate `batches`; each batch is what arrived since the last one."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._decoder = SseDecoder(MAX_CHUNK_BYTES)

    async def batches(self) -> AsyncGenerator[list[Chunk]]:
        """Ends at [DONE] or at the end of the body.

        Raises UpstreamError; what came before it has been handed out.
        """
        encoded = self._response.headers.get("Content-Encoding", "identity") != "identity"
        source = self._response.aiter_bytes() if encoded else self._response.aiter_raw()
        async with aclosing(cast("AsyncGenerator[bytes]", source)):
            try:
                async for data in source:
                    batch, ending = self._read(data)
                    if batch:
                        yield batch
                    if isinstance(ending, UpstreamError):
                        raise ending
                    if ending is DONE:
                        await _drain(source)
                        return
                _, ending = self._read(b"")  # an event that was too large says so at the next look
                if isinstance(ending, UpstreamError):
                    raise ending
            except httpx.RequestError:
                # The connection broke: the caller judges by what has come so far, as with a clean end.
                return

    def _read(self, data: bytes) -> tuple[list[Chunk], bytes | UpstreamError | None]:
        """The chunks that `data` completes, and what ends the stream after them: DONE or an error."""
        batch: list[Chunk] = []
        try:
            for payload in self._decoder.feed(data):
                if payload == DONE:
                    return batch, DONE
                if payload:
                    chunk, line = read_chunk(payload)
                    if error := chunk.get("error"):
                        return batch, _error_event(error)
                    if len(line) > MAX_CHUNK_BYTES:  # by being mended
                        return batch, _too_large()
                    batch.append((chunk, line))
        except EventTooLargeError:
            return batch, _too_large()
        except ValueError:
            return batch, UpstreamError("upstream_malformed", "the gateway sent a chunk that is not JSON")
        return batch, None


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
        if upstream.api_key:
            headers["Authorization"] = f"Bearer {upstream.api_key}"
        request = self._client.build_request(
            "POST", f"{upstream.base_url}/chat/completions", content=body, headers=headers
        )
        try:
            response = await self._client.send(request, stream=True)
        except httpx.ConnectTimeout as error:
            message = f"no connection to the gateway within {CONNECT_TIMEOUT_S:.0f} s"
            raise UpstreamError("connect_timeout", message) from error
        except httpx.TransportError as error:
            message = f"the gateway cannot be reached ({type(error).__name__})"
            raise UpstreamError("upstream_unreachable", message) from error
        try:
            if response.status_code != 200:
                raise await _refusal(response, upstream.api_key)
            media_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
            if media_type != "text/event-stream":
                raise UpstreamError(
                    "upstream_not_streaming",
                    f"the gateway answered {media_type or 'no media type'} instead of text/event-stream",
                    status_code=200,
                )
            yield Stream(response)
        finally:
            await response.aclose()


async def _refusal(response: httpx.Response, api_key: str = "") -> UpstreamError:
    """The error for an answer that is not 200."""
    body = b""
    try:
        async for piece in response.aiter_bytes():
            body += piece
            if len(body) > MAX_ERROR_BYTES:
                break
    except httpx.HTTPError:
        pass  # the status says enough
    status = response.status_code
    retry_after_s = None
    if status == 429:
        code, message = "upstream_rate_limit", "the gateway's rate limit is reached"
        retry_after_s = _seconds(response.headers.get("Retry-After"))
    elif status in {401, 403}:
        # What it says here may hold a part of the key.
        code, message = "upstream_authentication", "the gateway refuses our credentials"
    elif 400 <= status < 500:
        code, message = "upstream_invalid_request", "the gateway refuses the request"
        said = _message(body)
        if said and not (api_key and api_key in said):
            message = f"{message}: {said}"
    else:
        code, message = "upstream_server_error", f"the gateway answered {status}"
        retry_after_s = _seconds(response.headers.get("Retry-After"))
    return UpstreamError(code, message, status_code=status, retry_after_s=retry_after_s)


def _message(body: bytes) -> str:
    """`error.message` of an error in OpenAI's shape; empty for anything else."""
    try:
        message = msgspec.json.decode(body)["error"]["message"]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError, KeyError, TypeError):
        return ""
    return message[:MAX_MESSAGE_CHARACTERS] if isinstance(message, str) else ""


def _seconds(retry_after: str | None) -> float | None:
    """Retry-After as delay-seconds (RFC 9110 §10.2.3); None for anything else."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if 0 <= seconds < float("inf") else None


def _too_large() -> UpstreamError:
    return UpstreamError(
        "upstream_event_too_large", f"the gateway sent more than {MAX_CHUNK_BYTES} bytes at once"
    )


def _error_event(error: Any) -> UpstreamError:  # whatever JSON the gateway sent
    message = "the gateway sent an error in mid-stream"
    code = error.get("code") or error.get("type") if isinstance(error, dict) else None
    if isinstance(code, str):
        message = f"{message} ({code[:64]})"
    return UpstreamError("upstream_error_event", message)
