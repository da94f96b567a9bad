"""How readers that have no queue are asked for streams: by lines `MODEL COUNT` on a TCP port."""

import asyncio
from collections.abc import Awaitable, Callable


async def serve(port: int, stream: Callable[[int, str], Awaitable[None]]) -> None:
    """Runs `stream(number, model)` for each that is asked for. Ends only by being cancelled."""
    tasks: list[asyncio.Future[None]] = []

    async def asked(reader: asyncio.StreamReader, _: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            model, count = line.decode().split()
            for _number in range(int(count)):
                tasks.append(asyncio.ensure_future(stream(len(tasks), model)))

    server = await asyncio.start_server(asked, "127.0.0.1", port)
    async with server:
        await server.serve_forever()


async def ask(port: int, model: str, count: int) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(f"{model} {count}\n".encode())
    await writer.drain()
    writer.close()
