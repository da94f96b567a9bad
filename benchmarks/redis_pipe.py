"""Commands to Redis on one connection: what one turn of the loop sends leaves in one write."""

import asyncio
from collections import deque
from typing import Any

import hiredis


class RedisPipe(asyncio.Protocol):
    """`send` forgets the reply, `execute` awaits it. An error in a reply that nobody awaits ends the loop's
    peace: it is raised in the reader, where the loop reports it.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._reader = hiredis.Reader()
        self._packed: list[bytes] = []
        self._waiting: deque[asyncio.Future[Any] | None] = deque()
        self._transport: asyncio.Transport

    @classmethod
    async def connect(cls, port: int) -> "RedisPipe":
        _, pipe = await asyncio.get_running_loop().create_connection(cls, "127.0.0.1", port)
        return pipe

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport  # type: ignore[assignment] # a stream's, whatever its class

    def send(self, *args: str | bytes | float) -> None:
        self._put(args, None)

    async def execute(self, *args: str | bytes | float) -> Any:
        future = self._loop.create_future()
        self._put(args, future)
        return await future

    def _put(self, args: tuple[str | bytes | float, ...], future: asyncio.Future[Any] | None) -> None:
        if not self._packed:
            self._loop.call_soon(self._flush)
        self._packed.append(hiredis.pack_command(args))  # type: ignore[arg-type] # its stub means any length
        self._waiting.append(future)

    def _flush(self) -> None:
        packed, self._packed = self._packed, []
        if not self._transport.is_closing():  # else what is missing is counted as lost
            self._transport.write(b"".join(packed))

    def data_received(self, data: bytes) -> None:
        self._reader.feed(data)
        while self._waiting and (reply := self._reader.gets()) is not False:
            future = self._waiting.popleft()
            if future is not None:
                future.set_result(reply)
            elif isinstance(reply, Exception):
                raise reply

    def close(self) -> None:
        self._transport.close()
