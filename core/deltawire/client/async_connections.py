"""Connections that bring a job's messages to a program with an event loop."""

import asyncio
from contextlib import aclosing
from typing import Self

import httpx
from websockets.asyncio.client import ClientConnection, connect

from deltawire.sse_decoder import SseDecoder

from .calls import EVENT_STREAM_HEADERS, websocket_options, websocket_url
from .errors import refused
from .following import MAX_MESSAGE_BYTES, SILENCE_S, Following


class WebSocket:
    """One job's messages by WebSocket. Raises what is LOST."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._waits_since: float | None = None
        self._watch = self._loop.call_later(SILENCE_S, self._look)

    @classmethod
    async def open(
        cls, base_url: str, following: Following, headers: dict[str, str], timeout_s: float
    ) -> Self:
        url = websocket_url(base_url, following)
        return cls(await connect(url, **websocket_options(base_url, headers, timeout_s)))

    async def receive(self) -> bytes:
        self._waits_since = self._loop.time()
        try:
            return await self._connection.recv(decode=False)
        finally:
            self._waits_since = None

    async def close(self) -> None:
        self._watch.cancel()
        await self._connection.close()

    def _look(self) -> None:
        """Cuts a connection that says nothing. One timer for all messages, since each has to be cheap."""
        now = self._loop.time()
        since = now if self._waits_since is None else self._waits_since
        if now - since >= SILENCE_S:
            self._connection.transport.abort()
        else:
            self._watch = self._loop.call_at(since + SILENCE_S, self._look)


class EventStream:
    """The same as server-sent events. Raises what is LOST."""

    def __init__(self, response: httpx.Response) -> None:
        self._response = response
        self._chunks = response.aiter_raw()
        self._decoder = SseDecoder(MAX_MESSAGE_BYTES)
        self._lines: list[bytes] = []

    @classmethod
    async def open(
        cls, http: httpx.AsyncClient, following: Following, headers: dict[str, str], timeout_s: float
    ) -> Self:
        request = http.build_request(
            "GET",
            following.path("events"),
            headers=headers | EVENT_STREAM_HEADERS,
            timeout=httpx.Timeout(timeout_s, read=SILENCE_S),
        )
        response = await http.send(request, stream=True)
        if response.status_code != 200:
            async with aclosing(response):
                raise refused(response.status_code, response.headers, await response.aread(), "the relay")
        return cls(response)

    async def receive(self) -> bytes:
        while not self._lines:
            data = await anext(self._chunks, b"")
            if not data:
                raise EOFError("the event stream has ended")
            self._lines = self._decoder.feed(data)[::-1]
        return self._lines.pop()

    async def close(self) -> None:
        await self._response.aclose()
