"""Connections that bring a job's messages to a program without an event loop."""

import socket
import threading
import time
from contextlib import ExitStack, closing, suppress

import httpx
from websockets.sync.client import ClientConnection, connect

from deltawire.sse_decoder import SseDecoder

from .calls import EVENT_STREAM_HEADERS, websocket_options, websocket_url
from .errors import WaitTimeoutError, refused
from .following import MAX_MESSAGE_BYTES, SILENCE_S, Following


class Deadline:
    """Until when a caller waits; None: for ever."""

    def __init__(self, timeout_s: float | None) -> None:
        self._timeout_s = timeout_s
        self._at = None if timeout_s is None else time.monotonic() + timeout_s

    def left_s(self) -> float | None:
        """Raises WaitTimeoutError where nothing is left."""
        if self._at is None:
            return None
        left_s = self._at - time.monotonic()
        if left_s <= 0:
            raise WaitTimeoutError(f"the job has not ended within {self._timeout_s} s")
        return left_s

    def limit(self, wait_s: float) -> float:
        """`wait_s`, or what is left of it. Raises as `left_s`."""
        left_s = self.left_s()
        return wait_s if left_s is None else min(wait_s, left_s)


class WebSocket:
    """One job's messages by WebSocket. Raises what is LOST."""

    def __init__(
        self, base_url: str, following: Following, headers: dict[str, str], timeout_s: float
    ) -> None:
        self._stack = ExitStack()
        opening = connect(
            websocket_url(base_url, following), **websocket_options(base_url, headers, timeout_s)
        )
        # By websockets 17 it connects when it is entered.
        self._connection: ClientConnection = self._stack.enter_context(opening)

    def receive(self, deadline: Deadline) -> bytes:
        return self._connection.recv(deadline.limit(SILENCE_S), decode=False)

    def close(self) -> None:
        self._stack.close()


class EventStream:
    """The same as server-sent events. Raises what is LOST."""

    def __init__(
        self,
        http: httpx.Client,
        following: Following,
        headers: dict[str, str],
        timeout_s: float,
        deadline: Deadline,
    ) -> None:
        request = http.build_request(
            "GET",
            following.path("events"),
            headers=headers | EVENT_STREAM_HEADERS,
            timeout=httpx.Timeout(timeout_s, read=deadline.limit(SILENCE_S)),
        )
        self._response = http.send(request, stream=True)
        if self._response.status_code != 200:
            with closing(self._response) as said:
                raise refused(said.status_code, said.headers, said.read(), "the relay")
        self._chunks = self._response.iter_raw()
        self._decoder = SseDecoder(MAX_MESSAGE_BYTES)
        self._lines: list[bytes] = []
        self._timer: threading.Timer | None = None
        if (left_s := deadline.left_s()) is not None:
            # httpx has one time-out for all reads of a response, and comments come while nothing happens.
            self._timer = threading.Timer(left_s, self._cut)
            self._timer.daemon = True
            self._timer.start()

    def receive(self, deadline: Deadline) -> bytes:
        deadline.left_s()
        while not self._lines:
            data = next(self._chunks, b"")
            if not data:
                raise EOFError("the event stream has ended")
            self._lines = self._decoder.feed(data)[::-1]
        return self._lines.pop()

    def close(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._response.close()

    def _cut(self) -> None:
        with suppress(OSError):
            self._response.extensions["network_stream"].get_extra_info("socket").shutdown(socket.SHUT_RDWR)
