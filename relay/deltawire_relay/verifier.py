"""The keys that tokens are signed with: configured ones, and those that an issuer publishes (JWKS)."""

import asyncio
import hashlib
import logging
import time
import urllib.request
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from prometheus_client.core import Metric

from deltawire.errors import WireError
from deltawire.metrics import counter_family, gauge_family
from deltawire.tokens import Key, Token, read_jwks, verify

REFRESH_INTERVAL_S: Final = 300.0
RETRY_INTERVAL_S: Final = 10.0
"""The least between two fetches, whatever tokens come: anybody can make up the name of a key."""
FETCH_TIMEOUT_S: Final = 5.0
MAX_JWKS_BYTES: Final = 1_048_576
MAX_VERIFIED: Final = 8_192

_log = logging.getLogger(__name__)


class TokenVerifier:
    """Verifies, and remembers what it has verified: clients come back with the same token, all at once."""

    def __init__(
        self, keys: Sequence[Key], *, audience: str, issuer: str | None, jwks: "Jwks | None" = None
    ) -> None:
        self._own_keys = tuple(keys)
        self._keys = self._own_keys
        self._audience = audience
        self._issuer = issuer
        self._jwks = jwks
        self._verified: dict[bytes, Token] = {}
        if jwks is not None:
            jwks.on_keys = self._take

    def _take(self, keys: tuple[Key, ...]) -> None:
        self._keys = (*self._own_keys, *keys)
        self._verified.clear()  # perhaps by a key that is withdrawn

    def verify(self, text: str, now: float) -> Token:
        """Raises WireError; see `tokens.verify`."""
        name = hashlib.sha256(text.encode()).digest()
        token = self._verified.get(name)
        if token is None or now >= token.claims.exp:
            token = verify(text, self._keys, now=now, audience=self._audience, issuer=self._issuer)
            if len(self._verified) >= MAX_VERIFIED:
                del self._verified[next(iter(self._verified))]
            self._verified[name] = token
        return token

    async def refresh(self) -> None:
        if self._jwks is not None:
            await self._jwks.refresh()


class Jwks:
    """A JSON Web Key Set at a configured URL; never at one that a token names.

    While it cannot be had, the keys that there are stay good.
    """

    def __init__(self, url: str, *, fetch: Callable[[str], bytes] | None = None) -> None:
        self.on_keys: Callable[[tuple[Key, ...]], None] = lambda _: None
        self.fetches = 0
        self.failures = 0
        self._url = url
        self._fetch = fetch or fetch_jwks
        self._keys: tuple[Key, ...] | None = None
        self._fetching: asyncio.Task[None] | None = None
        self._fetched_at = float("-inf")

    async def keep(self) -> None:
        """Until cancelled: fetches at once and then every REFRESH_INTERVAL_S, so that withdrawn keys go."""
        try:
            while True:
                await self.fetch()
                await asyncio.sleep(REFRESH_INTERVAL_S if self._keys is not None else RETRY_INTERVAL_S)
        finally:
            if self._fetching is not None:
                self._fetching.cancel()

    async def refresh(self) -> None:
        """Fetches, unless that was done a moment ago. Raises WireError if there never was a set."""
        if self._fetching is not None or time.monotonic() - self._fetched_at >= RETRY_INTERVAL_S:
            await self.fetch()
        if self._keys is None:
            raise WireError("internal_error", "the keys for tokens cannot be had; try again")

    async def fetch(self) -> None:
        """One fetch for all who wait for it. Does not raise."""
        if self._fetching is None:
            self._fetched_at = time.monotonic()
            self._fetching = asyncio.create_task(self._fetch_once(), name="jwks")
        await asyncio.shield(self._fetching)

    async def _fetch_once(self) -> None:
        self.fetches += 1
        try:
            async with asyncio.timeout(2 * FETCH_TIMEOUT_S):
                keys = read_jwks(await asyncio.to_thread(self._fetch, self._url))
        except Exception as error:  # noqa: BLE001 - whatever an issuer answers, the keys that there are stay
            self.failures += 1
            _log.warning("cannot fetch DELTAWIRE_JWT_JWKS_URL: %s", type(error).__name__)
        else:
            if not keys:
                _log.warning("DELTAWIRE_JWT_JWKS_URL has no key for RS256 or EdDSA with a kid")
            self._keys = keys
            self.on_keys(keys)
        finally:
            self._fetching = None

    def collect(self) -> Iterable[Metric]:
        results = {"ok": self.fetches - self.failures, "failed": self.failures}
        yield counter_family("deltawire_jwks_fetches_total", "Fetches of the key set.", results, ["result"])
        yield gauge_family("deltawire_jwks_keys", "Keys of the key set.", len(self._keys or ()))


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """The keys come from where the operator says, and from nowhere else."""

    def redirect_request(self, *_: object) -> None:
        return None


def fetch_jwks(url: str) -> bytes:
    """Blocks. Raises whatever urllib does, and ValueError. The settings see to it that the URL is HTTP's."""
    deadline = time.monotonic() + FETCH_TIMEOUT_S
    data = bytearray()
    with urllib.request.build_opener(_NoRedirects).open(url, timeout=FETCH_TIMEOUT_S) as response:
        while piece := response.read1(65_536):
            data += piece
            if len(data) > MAX_JWKS_BYTES or time.monotonic() > deadline:
                raise ValueError("a key set that has no end")
    return bytes(data)
