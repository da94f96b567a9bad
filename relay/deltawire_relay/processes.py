"""`GET /v1/processes`: what each process says of itself, heard while somebody asks (PROTOCOL.md §5.12)."""

import asyncio
from typing import Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire.errors import RedisUnavailableError
from deltawire.keys import Keys
from deltawire.vitals import INTERVAL_S, Vitals, listening

from .auth import Gate, bearer_token
from .http_app import json_answer

FIRST_LOOK_S: Final = 1.2 * INTERVAL_S
"""Until every process has said something."""
FORGET_AFTER_S: Final = 5.0
LISTEN_S: Final = 15.0
"""After the last question: a page asks again before that, and one that was closed costs no more."""
WAIT_S: Final = 5.0
RETRY_S: Final = 0.5


class Processes:
    """Listens on a connection of its own, which a relay that nobody asks does not have."""

    def __init__(self, url: str, keys: Keys, gate: Gate) -> None:
        self._url = url
        self._keys = keys
        self._gate = gate
        self._heard: dict[str, tuple[float, Vitals]] = {}
        self._wanted_until = 0.0
        self._is_wanted = asyncio.Event()
        self._has_heard = asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def routes(self) -> list[Route]:
        return [Route("/v1/processes", self.show)]

    async def show(self, request: Request) -> Response:
        principal = await self._gate.admit(bearer_token(request.headers.get("authorization")))
        principal.require("metrics")
        return json_answer(200, {"object": "list", "data": await self.latest()})

    async def latest(self) -> list[Vitals]:
        """Of each process that was heard of lately. The first to ask waits until all have had their turn.

        Raises RedisUnavailableError.
        """
        self._wanted_until = self._loop.time() + LISTEN_S
        self._is_wanted.set()
        try:
            async with asyncio.timeout(WAIT_S):
                await self._has_heard.wait()
        except TimeoutError:
            raise RedisUnavailableError("cannot listen to what processes say") from None
        # A process that comes again and again has another name each time; nobody reads that for ever.
        since = self._loop.time() - FORGET_AFTER_S
        self._heard = {name: each for name, each in self._heard.items() if each[0] > since}
        heard = (vitals for _, vitals in self._heard.values())
        return sorted(heard, key=lambda vitals: (vitals.kind, vitals.host, vitals.pid))

    async def keep(self) -> None:
        """Listens while it is wanted, until cancelled."""
        while True:
            await self._is_wanted.wait()
            try:
                async with listening(self._url, self._keys, self._hear, name="deltawire-relay-vitals"):
                    await asyncio.sleep(FIRST_LOOK_S)
                    self._has_heard.set()
                    while (left_s := self._wanted_until - self._loop.time()) > 0:  # noqa: ASYNC110 - it moves
                        await asyncio.sleep(left_s)
            except RedisUnavailableError:  # or one node of several: the next try may meet another
                await asyncio.sleep(RETRY_S)
            self._has_heard.clear()
            self._heard.clear()
            if self._loop.time() >= self._wanted_until:  # nobody has asked while the connection was closed
                self._is_wanted.clear()

    def _hear(self, vitals: Vitals) -> None:
        self._heard[vitals.name] = self._loop.time(), vitals
