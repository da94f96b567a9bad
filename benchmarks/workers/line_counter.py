"""The floor: reads each stream's bytes and counts line ends. Nothing is decoded, nothing is published.

python -m benchmarks.workers.line_counter PORT GATEWAY_PORT
"""

import asyncio
import sys
from typing import cast

import uvloop

from benchmarks.workers.asked import serve


class Counter(asyncio.Protocol):
    lines = 0  # of all

    def __init__(self, model: str) -> None:
        body = b'{"model":"%b","messages":[],"stream":true}' % model.encode()
        self._hello = b"POST /v1/chat/completions HTTP/1.1\r\ncontent-length: %d\r\n\r\n%b" % (
            len(body),
            body,
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        cast(asyncio.WriteTransport, transport).write(self._hello)

    def data_received(self, data: bytes) -> None:
        Counter.lines += data.count(b"\n")


async def main(port: int, gateway_port: int) -> None:
    async def stream(_: int, model: str) -> None:
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: Counter(model), "127.0.0.1", gateway_port)

    await serve(port, stream)


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))
