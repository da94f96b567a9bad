"""Who may do what: credentials, and the floor that holds without any (PROTOCOL.md §5)."""

import ipaddress
from collections.abc import Sequence
from typing import Final
from urllib.parse import urlsplit

import msgspec

from deltawire.api_keys import DEMO_KEY, SCOPES, ApiKey, Scope, digest, find_key
from deltawire.errors import WireError


class Principal(msgspec.Struct, frozen=True):
    """Who is asking. `tenant` None sees all tenants: the local user of a relay without keys."""

    name: str
    tenant: str | None
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Raises WireError `forbidden`."""
        if scope not in self.scopes:
            raise WireError("forbidden", f"this credential has no {scope!r} scope")


LOCAL: Final = Principal("local", None, SCOPES)


class Gate:
    """Decides about requests. Pure: headers in, a principal or a WireError out."""

    def __init__(self, api_keys: Sequence[ApiKey], allowed_origins: Sequence[str]) -> None:
        self._api_keys = api_keys
        self._allowed_origins = frozenset(allowed_origins)
        self._has_secret = bool(api_keys) and all(key.sha256 != digest(DEMO_KEY) for key in api_keys)

    @property
    def needs_credentials(self) -> bool:
        return bool(self._api_keys)

    def authenticate(self, token: str | None) -> Principal:
        """The principal of a token. Raises `missing_credentials` or `invalid_credentials`."""
        if not self._api_keys:
            return LOCAL
        if not token:
            raise WireError("missing_credentials", "send an API key: Authorization: Bearer dw_…")
        found = find_key(self._api_keys, token)
        if found is None:
            raise WireError("invalid_credentials", "this API key is not known here")
        return Principal(found.name, found.tenant, found.scopes)

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
            raise WireError(
                "host_not_allowed",
                "without an API key of its own the relay answers to localhost and 127.0.0.1 only",
            )

    def check_origin(self, origin: str | None, host: str | None) -> None:
        """A browser's page must be ours (same host) or listed in DELTAWIRE_ALLOWED_ORIGINS, by exact name."""
        if origin is None or origin in self._allowed_origins:
            return
        if host and origin in {f"http://{host}", f"https://{host}"}:
            return
        raise WireError("origin_not_allowed", "this Origin is not in DELTAWIRE_ALLOWED_ORIGINS")


def is_loopback(host: str) -> bool:
    """Whether an address or name means this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bearer_token(authorization: str | None) -> str | None:
    """The token of an Authorization header, or None (RFC 6750 §2.1)."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() or None if scheme.lower() == "bearer" else None
