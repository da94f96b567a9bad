"""What each service process says of itself once a second, for `deltawire top`, `doctor` and the console.

It is published and not kept: nobody has to clean up after a process that died, and where nobody listens it
costs a command a second.
"""

import asyncio
import os
import socket
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, Literal

import hiredis
import msgspec

from . import __version__
from .errors import RedisUnavailableError
from .keys import Keys
from .redis_connection import RedisConnection, RedisLink
from .scripts import Executor

INTERVAL_S: Final = 1.0

Kind = Literal["worker", "relay"]


class Vitals(msgspec.Struct, frozen=True, kw_only=True):
    """Of one process at one moment. Counts that only grow end in `_total`; times are Unix seconds."""

    kind: Kind
    name: str
    host: str
    pid: int
    version: str
    started_at: float
    at: float
    counts: dict[str, float]


async def tell(
    redis: Executor, keys: Keys, kind: Kind, name: str, read: Callable[[], Mapping[str, float]]
) -> None:
    """Publishes what `read` says, and how late the loop was, every INTERVAL_S until cancelled."""
    loop = asyncio.get_running_loop()
    started_at, late_s = time.time(), 0.0
    while True:
        vitals = Vitals(
            kind=kind,
            name=name,
            host=socket.gethostname(),
            pid=os.getpid(),
            version=__version__,
            started_at=started_at,
            at=time.time(),
            counts={**read(), "loop_late_s": round(late_s, 4)},
        )
        # Others warn where it fails; who looks sees that this process is silent.
        with suppress(RedisUnavailableError, hiredis.ReplyError):
            await redis.execute("PUBLISH", keys.vitals, msgspec.json.encode(vitals))
        due = loop.time() + INTERVAL_S
        await asyncio.sleep(INTERVAL_S)
        late_s = loop.time() - due


@asynccontextmanager
async def listening(
    url: str, keys: Keys, hear: Callable[[Vitals], None], *, name: str = "deltawire-cli"
) -> AsyncIterator[None]:
    """Calls `hear` with what every process says, meanwhile; a lost connection is made anew.

    Raises RedisUnavailableError where there is none at the start.
    """
    decoder = msgspec.json.Decoder(Vitals)

    def take(push: list[Any]) -> None:
        if push[0] == b"message":
            # Another version's, or of whoever may publish: raised here it would end the connection.
            with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                hear(decoder.decode(push[2]))

    async def subscribe(connection: RedisConnection) -> None:
        connection.push("SUBSCRIBE", keys.vitals)

    link = RedisLink(url, name=name, on_connected=subscribe, on_push=take)
    await link.start()
    try:
        yield
    finally:
        await link.close()
