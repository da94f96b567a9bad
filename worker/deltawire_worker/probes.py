"""The worker's own port: liveness, readiness and metrics, for containers, balancers and Prometheus."""

import asyncio
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final
from urllib.parse import urlsplit

import msgspec

from deltawire.api_keys import ApiKey, find_key
from deltawire.errors import WireError
from deltawire.loopback import is_loopback
from deltawire.metrics import CONTENT_TYPE

REQUEST_TIMEOUT_S: Final = 5.0
MAX_LINE_BYTES: Final = 8_192
MAX_HEADERS: Final = 100
JSON: Final = "application/json"

Headers = dict[bytes, bytes]
"""By their names in lower case."""


class Probes:
    """`/healthz` says that the loop turns, `/readyz` that Redis can be reached, `/metrics` what was counted.

    The last one wants a key with the scope `metrics`; without any configured it is for this machine only.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        is_ready: Callable[[], bool],
        metrics: Callable[[], bytes],
        api_keys: Sequence[ApiKey] = (),
    ) -> None:
        self._host = host
        self._port = port
        self._is_ready = is_ready
        self._metrics = metrics
        self._api_keys = api_keys
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Raises OSError if the port is taken."""
        self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=MAX_LINE_BYTES)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                method, path, _ = (await reader.readline()).split(b" ", 2)
                headers = await _headers(reader)
                status, media_type, body = self._answer(method, path.partition(b"?")[0], headers)
                lines = [
                    f"HTTP/1.1 {status.value} {status.phrase}",
                    f"Content-Type: {media_type}",
                    f"Content-Length: {len(body)}",
                    "Connection: close",
                ]
                if status is HTTPStatus.UNAUTHORIZED:
                    lines.append("WWW-Authenticate: Bearer")
                elif status is HTTPStatus.METHOD_NOT_ALLOWED:
                    lines.append("Allow: GET, HEAD")
                writer.write("\r\n".join([*lines, "\r\n"]).encode())
                writer.write(b"" if method == b"HEAD" else body)
                await writer.drain()
        except (OSError, ValueError, TimeoutError):
            pass  # a peer that is no prober
        finally:
            writer.close()

    def _answer(self, method: bytes, path: bytes, headers: Headers) -> tuple[HTTPStatus, str, bytes]:
        """Status, media type and body."""
        if method not in {b"GET", b"HEAD"}:
            return _refusal(WireError("method_not_allowed", "this port answers GET and HEAD"))
        if path == b"/metrics":
            try:
                self._authorize(headers)
            except WireError as error:
                return _refusal(error)
            return HTTPStatus.OK, CONTENT_TYPE, self._metrics()
        status = self._status(path)
        return status, JSON, f'{{"status":"{status.phrase.lower()}"}}'.encode()

    def _status(self, path: bytes) -> HTTPStatus:
        if path == b"/healthz":
            return HTTPStatus.OK
        if path == b"/readyz":
            return HTTPStatus.OK if self._is_ready() else HTTPStatus.SERVICE_UNAVAILABLE
        return HTTPStatus.NOT_FOUND

    def _authorize(self, headers: Headers) -> None:
        """Raises WireError."""
        if not self._api_keys:
            # A page whose name was bound to this machine after it had loaded (DNS rebinding) sends that name.
            if not (is_loopback(self._host) and is_loopback(_hostname(headers))):
                raise WireError(
                    "forbidden",
                    "without API keys metrics are for this machine only: set DELTAWIRE_API_KEYS (with a key "
                    "that has the scope `metrics`), or DELTAWIRE_HOST=127.0.0.1 and ask there",
                )
            return
        scheme, _, token = headers.get(b"authorization", b"").decode("latin-1").partition(" ")
        if scheme.lower() != "bearer" or not token.strip():
            raise WireError("missing_credentials", "send an API key: Authorization: Bearer dw_…")
        key = find_key(self._api_keys, token.strip())
        if key is None:
            raise WireError("invalid_credentials", "this API key is not known here")
        if "metrics" not in key.scopes:
            raise WireError("forbidden", "this credential has no 'metrics' scope")


def _refusal(error: WireError) -> tuple[HTTPStatus, str, bytes]:
    return HTTPStatus(error.status), JSON, msgspec.json.encode({"error": error.error})


def _hostname(headers: Headers) -> str:
    try:
        return urlsplit(f"//{headers.get(b'host', b'').decode('latin-1')}").hostname or ""
    except ValueError:  # "[evil]" and the like
        return ""


async def _headers(reader: asyncio.StreamReader) -> Headers:
    """Raises ValueError for too many, or too long ones."""
    headers: Headers = {}
    for _ in range(MAX_HEADERS):
        line = (await reader.readline()).strip()
        if not line:
            return headers
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip()
    raise ValueError("too many headers")
