"""The configured webhooks: where the ends of jobs are told, and how that is signed. Pure but for files.

They are the operator's, in DELTAWIRE_WEBHOOKS: no job names an address. Format, headers and signatures are
those of Standard Webhooks (https://www.standardwebhooks.com), version v1.
"""

import base64
import hashlib
import hmac
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import httpx
import msgspec

from deltawire.environment import ConfigurationError, Environment
from deltawire.events import TERMINAL_STATUSES
from deltawire.options import TENANT_RULE, is_tenant
from deltawire.tables import read_tables

EXAMPLE: Final = """\
[webhooks.billing]
url = "https://billing.example.com/hooks/deltawire"
secret_env = "BILLING_HOOK_SECRET"       # or secret_file = "/run/secrets/billing", or secret = "whsec_…"
tenants = ["acme"]                       # by default those of all tenants
events = ["completed", "failed"]         # by default all four; the others are incomplete and cancelled
"""
PREFIX: Final = "whsec_"
SECRET_BYTES: Final = range(24, 65)

_LOOPBACK: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_NAME_OF: Final = "DELTAWIRE_WEBHOOKS"


class Webhook(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One address. `secret` is one or, while they are changed, several, with blanks between."""

    name: str
    url: str
    secret: str = ""
    secret_env: str = ""
    secret_file: str = ""
    tenants: list[str] | None = None
    events: list[str] | None = None
    allow_http: bool = False

    def __repr__(self) -> str:
        return f"Webhook({self.name!r})"  # addresses of webhooks are often secrets themselves

    def wants(self, kind: str, tenant: str) -> bool:
        """Whether it is to hear of this end; `kind` as `job.completed`."""
        is_right_kind = self.events is None or kind.removeprefix("job.") in self.events
        return is_right_kind and (self.tenants is None or tenant in self.tenants)

    def headers(self, notice_id: str, now: int, body: bytes) -> dict[str, str]:
        """Those of one try, signed with each secret."""
        said = f"{notice_id}.{now}.".encode() + body
        signatures = (hmac.digest(_key(secret), said, hashlib.sha256) for secret in self.secret.split())
        return {
            "content-type": "application/json",
            "webhook-id": notice_id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(
                f"v1,{base64.b64encode(signature).decode()}" for signature in signatures
            ),
        }


def read_webhooks(environment: Environment) -> tuple[Webhook, ...]:
    """Those that are configured. Raises ConfigurationError that says what to change, and no secret."""
    if not environment.secret(_NAME_OF):
        return ()
    return tuple(
        _checked(where, webhook, environment)
        for where, webhook in read_tables(environment, _NAME_OF, "webhooks", Webhook)
    )


def _checked(where: str, webhook: Webhook, environment: Environment) -> Webhook:
    webhook = msgspec.structs.replace(webhook, secret=_secret(where, webhook, environment))
    if problem := _problem(webhook):
        raise ConfigurationError(f"{where}: {problem}")
    return webhook


def _secret(where: str, webhook: Webhook, environment: Environment) -> str:
    ways = [way for way in ("secret", "secret_env", "secret_file") if getattr(webhook, way)]
    if len(ways) != 1:
        raise ConfigurationError(f"{where}: set one of secret, secret_env and secret_file")
    if webhook.secret_env:
        return environment.text(webhook.secret_env)
    if webhook.secret_file:
        try:
            return Path(webhook.secret_file).read_text().strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigurationError(f"{where}: secret_file cannot be read: {type(error).__name__}") from None
    return webhook.secret


def _problem(webhook: Webhook) -> str:
    """What is wrong with the values of a webhook; empty if nothing is."""
    secrets = webhook.secret.split()
    if not secrets or not all(secret.startswith(PREFIX) and _is_key(secret) for secret in secrets):
        return f"a secret is {PREFIX} and the base64 of 24 to 64 random bytes: openssl rand -base64 32"
    try:
        parts = urlsplit(webhook.url)
        host, is_right = parts.hostname or "", (parts.port or 1) > 0
        httpx.URL(webhook.url)  # who calls it knows some rules more, for names above all
    except (ValueError, httpx.InvalidURL):
        host, is_right = "", False
    if not is_right or not host or parts.scheme not in {"http", "https"} or not webhook.url.isprintable():
        return "url must be a URL (https://…)"
    if parts.username is not None or parts.fragment or " " in webhook.url:
        return "url must hold neither credentials, blanks nor a fragment"
    if parts.scheme == "http" and host not in _LOOPBACK and not webhook.allow_http:
        return "url must be https; for a network that you trust set allow_http = true"
    if webhook.events is not None and (unknown := sorted(set(webhook.events) - TERMINAL_STATUSES)):
        return f"events: there is no {unknown[0]!r}; known are {', '.join(sorted(TERMINAL_STATUSES))}"
    if webhook.tenants is not None and not all(map(is_tenant, webhook.tenants)):
        return f"tenants: each is {TENANT_RULE}"
    return ""


def _is_key(secret: str) -> bool:
    try:
        return len(_key(secret)) in SECRET_BYTES
    except ValueError:
        return False


def _key(secret: str) -> bytes:
    return base64.b64decode(secret.removeprefix(PREFIX), validate=True)
