"""API keys: how one is made, written down and read (PROTOCOL.md §5).

A key's text is shown once, when it is made; only its SHA-256 is configured. Keys are random and 256 bits
long, so a plain hash is enough: there is nothing to guess.
"""

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from typing import Final, Literal, cast

import msgspec

from .environment import ConfigurationError
from .options import TENANT_RULE, is_tenant

Scope = Literal["read", "cancel", "submit", "list", "tokens", "metrics"]
SCOPES: Final[frozenset[Scope]] = frozenset({"read", "cancel", "submit", "list", "tokens", "metrics"})
KEY_PREFIX: Final = "dw_"
DEMO_KEY: Final = "dw_demo"
"""The key of docker-compose.yml as it comes. Everybody knows it, so it opens loopback only (`Gate`)."""


class ApiKey(msgspec.Struct, frozen=True):
    name: str
    tenant: str
    scopes: frozenset[Scope]
    sha256: bytes


def digest(key: str) -> bytes:
    return hashlib.sha256(key.encode()).digest()


def find_key(keys: Sequence[ApiKey], text: str) -> ApiKey | None:
    """The key whose text this is. All are compared, so that the time taken tells nothing."""
    value, found = digest(text), None
    for key in keys:
        if hmac.compare_digest(key.sha256, value):
            found = key
    return found


def new_api_key(name: str, tenant: str, scopes: Sequence[str]) -> tuple[str, str]:
    """A new key's text, to be handed out once, and its entry for DELTAWIRE_API_KEYS."""
    key = KEY_PREFIX + secrets.token_urlsafe(32)
    return key, f"{name}:{tenant}:{'+'.join(scopes)}:{digest(key).hex()}"


def parse_api_keys(text: str) -> tuple[ApiKey, ...]:
    """The keys in `name:tenant:scope+scope:sha256[,…]`. Raises ConfigurationError, also for none at all."""
    keys: list[ApiKey] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        parts = entry.split(":")
        if len(parts) != 4 or not all(parts):
            raise ConfigurationError(
                "DELTAWIRE_API_KEYS: an entry is name:tenant:scope+scope:sha256 (see `deltawire keys new`)"
            )
        name, tenant, scopes, sha256 = parts
        if not is_tenant(tenant):
            raise ConfigurationError(f"DELTAWIRE_API_KEYS: {name}: a tenant is {TENANT_RULE}")
        if unknown := set(scopes.split("+")) - SCOPES:
            raise ConfigurationError(
                f"DELTAWIRE_API_KEYS: {name} has unknown scopes {', '.join(sorted(unknown))}; "
                f"known are {', '.join(sorted(SCOPES))}"
            )
        try:
            value = bytes.fromhex(sha256)
        except ValueError:
            value = b""
        if len(value) != 32:
            raise ConfigurationError(f"DELTAWIRE_API_KEYS: {name}: a SHA-256 is 64 hexadecimal digits")
        keys.append(ApiKey(name, tenant, frozenset(cast("list[Scope]", scopes.split("+"))), value))
    if text and not keys:
        raise ConfigurationError("DELTAWIRE_API_KEYS holds no key")
    return tuple(keys)
