"""Who may do what: credentials, and the floor that holds without any (PROTOCOL.md §5.1)."""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterable, Sequence
from functools import lru_cache
from typing import Final, Protocol
from urllib.parse import urlsplit

import msgspec
from prometheus_client.core import CounterMetricFamily, Metric

from deltawire.api_keys import DEMO_KEY, SCOPES, ApiKey, Scope, digest, find_key
from deltawire.errors import WireError
from deltawire.loopback import is_loopback
from deltawire.tokens import Capability, Token, UnknownKeyError, covers

from .origins import Origins

RESULTS: Final = (
    *("key", "token", "ticket"),
    *("missing_credentials", "invalid_credentials", "token_expired", "token_revoked", "unknown_key"),
    *("origin_not_allowed", "host_not_allowed"),
)


class Principal(msgspec.Struct, frozen=True):
    """Who is asking. `tenant` None sees all tenants: the local user of a relay without keys."""

    name: str
    tenant: str | None
    scopes: frozenset[Scope]
    is_key: bool = True
    """Whether it came by an API key: then it has no end, and what follows says nothing."""
    jobs: tuple[str, ...] = ("*",)
    token_id: str | None = None
    issued_at: float = 0.0
    expires_at: float = 0.0

    @property
    def subject(self) -> str:
        """The `sub` of a token, or the name of a key."""
        return self.name

    def require(self, scope: Scope) -> None:
        """Raises WireError `forbidden`."""
        if scope not in self.scopes:
            raise WireError("forbidden", f"this credential has no {scope!r} scope")

    @property
    def counted_as(self) -> tuple[str, str] | None:
        """Whose connections they are; None: nobody's (`Limits` leaves out API keys)."""
        return None if self.tenant is None else (self.tenant, self.name)

    def covers(self, job_id: str) -> bool:
        """Whether the job is one of those that the credential is for, if it is the tenant's."""
        return covers(self.jobs, job_id)

    def may(self, job_id: str, scope: Scope) -> None:
        """Raises WireError `forbidden`, or `unknown_job` for a job that the credential is not for.

        Whether the job is of this tenant, its record says.
        """
        self.require(scope)
        if not self.covers(job_id):
            raise WireError("unknown_job", f"there is no job {job_id}", param="job_id")

    def may_follow(self, other: "Principal") -> bool:
        """Whether it may take the place of `other` on an open connection."""
        return (self.tenant, self.name, self.is_key) == (other.tenant, other.name, other.is_key)


LOCAL: Final = Principal("local", None, SCOPES)


class Verifier(Protocol):
    """Knows the keys that tokens are signed with."""

    def verify(self, text: str, now: float) -> Token:
        """Raises WireError, an UnknownKeyError where `refresh` may help."""

    async def refresh(self) -> None:
        """Looks for new keys, if it has not lately. Raises WireError `internal_error` if it never saw any."""


class Gate:
    """Decides about requests. Pure: headers in, a principal or a WireError out."""

    def __init__(
        self,
        api_keys: Sequence[ApiKey],
        allowed_origins: Sequence[str],
        *,
        verifier: Verifier | None = None,
        revoked: Container[Principal] = (),
        now: Callable[[], float] = time.time,
    ) -> None:
        """`verifier` None: no tokens are taken."""
        self.origins = Origins(allowed_origins)
        self.results: Counter[str] = Counter()
        self._api_keys = api_keys
        self._verifier = verifier
        self._revoked = revoked
        self._now = now
        is_known_to_all = any(key.sha256 == digest(DEMO_KEY) for key in api_keys)
        self._has_secret = self.needs_credentials and not is_known_to_all

    @property
    def needs_credentials(self) -> bool:
        return bool(self._api_keys) or self._verifier is not None

    def authenticate(self, token: str | None, *, is_ticket: bool = False) -> Principal:
        """The principal of an API key or a token; with `is_ticket` of a token that may stand in a URL.

        Raises WireError: 401, or an UnknownKeyError where `admit` may do better.
        """
        try:
            principal = self._authenticate(token, is_ticket)
        except WireError as error:
            self.results["unknown_key" if isinstance(error, UnknownKeyError) else error.code] += 1
            raise
        self.results["ticket" if is_ticket else "key" if principal.is_key else "token"] += 1
        return principal

    async def admit(self, token: str | None, *, is_ticket: bool = False) -> Principal:
        """As `authenticate`, but a token of a key that is not known makes it look for new keys first."""
        try:
            return self.authenticate(token, is_ticket=is_ticket)
        except UnknownKeyError:
            assert self._verifier is not None  # noqa: S101 - who has raised it
            await self._verifier.refresh()
        return self.authenticate(token, is_ticket=is_ticket)

    def _authenticate(self, token: str | None, is_ticket: bool) -> Principal:
        if not self.needs_credentials:
            return LOCAL
        if not token:
            raise WireError("missing_credentials", "send an API key or a token: Authorization: Bearer …")
        if not is_ticket and (key := find_key(self._api_keys, token)) is not None:
            return Principal(key.name, key.tenant, key.scopes)
        if self._verifier is None:
            raise WireError("invalid_credentials", "this API key is not known here")
        principal, fault = _bearer(self._verifier.verify(token, self._now()), is_ticket)
        if fault is not None:
            raise WireError("invalid_credentials", fault)
        self.check_revoked(principal)
        return principal

    def check_revoked(self, principal: Principal) -> None:
        """Again, for one that was let in and has had to be waited for. Raises WireError `token_revoked`."""
        if principal in self._revoked:
            raise WireError("token_revoked", "this token was revoked")

    def check_host(self, host: str | None) -> None:
        """Without a secret, only a loopback name will do, so that a page that rebinds its name gets nothing.

        With keys any name will do, since such a page has none; the demo's key is no secret.
        """
        if self._has_secret:
            return
        try:
            name = urlsplit(f"//{host or ''}").hostname or ""
        except ValueError:  # "[evil]" and the like
            name = ""
        if not is_loopback(name):
            self.results["host_not_allowed"] += 1
            raise WireError(
                "host_not_allowed",
                "without an API key of its own the relay answers to localhost and 127.0.0.1 only",
            )

    def check_origin(self, origin: str | None, host: str | None, *, has_header: bool = True) -> None:
        """A browser's page must be ours (same host) or allowed by DELTAWIRE_ALLOWED_ORIGINS.

        No Origin is no browser, so its credential is in a header, which browsers cannot send everywhere.
        """
        if origin is None:
            if has_header or not self.needs_credentials:
                return
            message = "without an Origin the credential comes in the Authorization header"
        elif origin in self.origins or (host and origin in {f"http://{host}", f"https://{host}"}):
            return
        else:
            message = f"the Origin {origin} is not in DELTAWIRE_ALLOWED_ORIGINS"
        self.results["origin_not_allowed"] += 1
        raise WireError("origin_not_allowed", message)

    def check_site(self, origin: str | None, site: str | None) -> None:
        """For a ticket in a GET's URL: a page of our own sends no Origin with it, and others' images neither.

        `site` is Sec-Fetch-Site, which all browsers send to what they trust (Fetch Metadata).
        """
        if origin is None and site not in {None, "same-origin", "none"}:
            self.check_origin(None, None, has_header=False)

    def collect(self) -> Iterable[Metric]:
        family = CounterMetricFamily(
            "deltawire_authentications",
            "Credentials that were shown: what they were, or why they were refused.",
            labels=["result"],
        )
        for result in RESULTS:
            family.add_metric([result], self.results[result])
        yield family


def _bearer(token: Token, is_ticket: bool) -> tuple[Principal, str | None]:
    """The principal, and why it may not come by a URL if it does."""
    claims = token.claims
    principal = Principal(
        claims.sub,
        claims.tenant,
        _scopes(tuple(claims.cap)),
        is_key=False,
        jobs=claims.jobs,
        token_id=token.id,
        issued_at=claims.iat,
        expires_at=claims.exp,
    )
    return principal, token.ticket_fault() if is_ticket else None


@lru_cache(64)
def _scopes(capabilities: tuple[Capability, ...]) -> frozenset[Scope]:
    """One set for all who may do the same: ten thousand connections have one each."""
    return frozenset(capabilities)


def bearer_token(authorization: str | None) -> str | None:
    """The token of an Authorization header, or None (RFC 6750 §2.1)."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
