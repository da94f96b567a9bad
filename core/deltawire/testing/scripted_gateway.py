"""The scripted gateway on a thread of the tests' own process, so that they can tell it what to answer."""

import asyncio
import json
import threading
from collections import deque
from collections.abc import Mapping
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Final, Self

from deltawire.gateway import Gateway
from deltawire.gateway.script import BadRequestError, parse_request

STOP_TIMEOUT_S: Final = 10.0


class ScriptedGateway:
    """Answers what it was told, in that order; the last answer again and again.

    Told nothing, it makes something up. Deltas come as fast as they are read, unless a script has a `rate`. A
    request that brings a `script` of its own gets that. All methods may be called from any thread.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._answers: deque[dict[str, Any]] = deque()
        self._requests: list[dict[str, Any]] = []
        self._gateway = Gateway(rate=0, direct=self._direct)
        self._loop = asyncio.new_event_loop()
        self._is_told_to_stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="deltawire-gateway", daemon=True)
        self._is_ready: Future[None] = Future()

    @property
    def base_url(self) -> str:
        """What an OpenAI client takes for its `base_url`, ending in /v1."""
        return self._gateway.base_url

    @property
    def requests(self) -> list[dict[str, Any]]:
        """The bodies of all chat completions that were asked for in this test, the latest last."""
        with self._lock:
            return list(self._requests)

    def reply(self, text: str) -> None:
        """The next request, or all from now on, are answered with this text."""
        self.script({"text": text})

    def script(self, script: Mapping[str, Any]) -> None:
        """The next request, or all from now on, are answered so: see `deltawire.gateway.Script`.

        Raises ValueError for a script that there cannot be.
        """
        whole = {
            "model": "m",
            "messages": [{"role": "user", "content": ""}],
            "stream": True,
            "script": script,
        }
        try:
            parse_request(json.dumps(whole).encode())
        except BadRequestError as error:
            raise ValueError(error.message) from None
        with self._lock:
            self._answers.append(dict(script))

    def clear(self) -> None:
        """Forgets what it was told, and what it was asked."""
        with self._lock:
            self._answers.clear()
            self._requests.clear()

    def _direct(self, body: bytes) -> bytes:
        """The body with the script that is to be followed (`Gateway`)."""
        try:
            request = json.loads(body)
        except ValueError:
            request = None
        if not isinstance(request, dict):
            return body  # the gateway says what is wrong
        with self._lock:
            self._requests.append(request)
            if not self._answers or "script" in request:
                return body
            script = self._answers.popleft() if len(self._answers) > 1 else self._answers[0]
        return json.dumps(request | {"script": script}).encode()

    def __enter__(self) -> Self:
        self._thread.start()
        self._is_ready.result()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._loop.call_soon_threadsafe(self._is_told_to_stop.set)
        self._thread.join(STOP_TIMEOUT_S)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        try:
            await self._gateway.start()
        except BaseException as error:
            self._is_ready.set_exception(error)
            raise
        self._is_ready.set_result(None)
        try:
            await self._is_told_to_stop.wait()
        finally:
            await self._gateway.stop()
