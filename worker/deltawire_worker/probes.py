"""The worker's own port: liveness and readiness, for containers and balancers."""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Final

REQUEST_TIMEOUT_S: Final = 5.0


class Probes:
    """`/healthz` says that the loop turns; `/readyz` that Redis can be reached."""

    def __init__(self, host: str, port: int, *, is_ready: Callable[[], bool]) -> None:
        self._host = host
        self._port = port
        self._is_ready = is_ready
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises OSError if the port is taken."""
        self._server = await asyncio.start_server(self._answer, self._host, self._port, limit=8_192)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                line = await reader.readline()
                while (await reader.readline()).strip():
                    pass
                status = self._status(line.split(b" ")[1:2])
                body = f'{{"status":"{status.phrase.lower()}"}}'.encode()
                writer.write(
                    b"HTTP/1.1 %d %s\r\nContent-Type: application/json\r\nContent-Length: %d\r\n"
                    b"Connection: close\r\n\r\n%s" % (status, status.phrase.encode(), len(body), body)
                )
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # a peer that is no prober
        finally:
            writer.close()

    def _status(self, path: list[bytes]) -> HTTPStatus:
        if path == [b"/healthz"]:
            return HTTPStatus.OK
        if path == [b"/readyz"]:
            return HTTPStatus.OK if self._is_ready() else HTTPStatus.SERVICE_UNAVAILABLE
        return HTTPStatus.NOT_FOUND
