"""Webhooks, received: whether a message is ours (docs/webhooks.md). Pure but for the clock.

The other side is `deltawire_worker.webhook_endpoints`. Format and signature: Standard Webhooks
(https://www.standardwebhooks.com), version v1.
"""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Mapping
from typing import Any

from .errors import DeltawireError


class InvalidWebhookError(DeltawireError):
    """The message is not signed with this secret, is old, or is none at all: answer 401, and do nothing."""


def verify(
    secret: str, headers: Mapping[str, str], body: bytes, *, tolerance_s: float = 300.0
) -> dict[str, Any]:
    """The message, if it is ours and not older than `tolerance_s`. Raises InvalidWebhookError.

    `headers` find names in any case, as every framework's do, or in lower case. `body` is what came, to the
    byte. `secret` may be several with blanks between, while they are changed.
    """
    message_id, said_at = headers.get("webhook-id"), headers.get("webhook-timestamp", "")
    if not message_id or not (said_at.isascii() and said_at.isdecimal()):
        raise InvalidWebhookError("this is no webhook: it lacks webhook-id or webhook-timestamp")
    if abs(time.time() - int(said_at[:20])) > tolerance_s:
        raise InvalidWebhookError("the message is too old, or from the future")
    signed = f"{message_id}.{said_at}.".encode() + body
    expected = [b"v1," + base64.b64encode(hmac.digest(key, signed, hashlib.sha256)) for key in _keys(secret)]
    for signature in headers.get("webhook-signature", "").encode().split():
        if any(hmac.compare_digest(signature, one) for one in expected):
            message: dict[str, Any] = json.loads(body)
            return message
    raise InvalidWebhookError("no signature matches")


def _keys(secret: str) -> list[bytes]:
    """Raises ValueError where there is none: a mistake in the configuration, not a bad message."""
    keys = [base64.b64decode(one.removeprefix("whsec_"), validate=True) for one in secret.split()]
    if not keys:
        raise ValueError("no secret of the webhook is set")
    return keys
