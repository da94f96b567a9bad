"""What a receiver of webhooks believes (docs/webhooks.md)."""

import base64
import time
from typing import Final

import pytest

from deltawire.webhooks import InvalidWebhookError, verify
from deltawire_worker.webhook_endpoints import Webhook

OLD: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()
NEW: Final = "whsec_" + base64.b64encode(bytes(range(24))).decode()
OTHER: Final = "whsec_" + base64.b64encode(bytes(32)).decode()
BODY: Final = '{"type":"job.completed","data":{"id":"ä"}}'.encode()


def headers(secret: str, *, age_s: int = 0) -> dict[str, str]:
    """As the worker sends them."""
    webhook = Webhook(name="app", url="https://app.example.com/", secret=secret)
    return webhook.headers("msg_1", int(time.time()) - age_s, BODY)


@pytest.mark.parametrize(("signed", "known"), [(OLD, OLD), (f"{OLD} {NEW}", OLD), (NEW, f"{OLD} {NEW}")])
def test_what_is_signed_with_a_secret_of_ours_is_believed(signed: str, known: str) -> None:
    """Also while it is changed, on whichever side first."""
    assert verify(known, headers(signed), BODY)["data"] == {"id": "ä"}


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"webhook-id": "msg_2"}, "no signature"),
        ({"webhook-id": ""}, "lacks"),
        ({"webhook-timestamp": "now"}, "lacks"),
        ({"webhook-timestamp": "9" * 10_000}, "too old"),
        ({"webhook-signature": ""}, "no signature"),
        ({"webhook-signature": "v1,ä v2,=="}, "no signature"),
    ],
)
def test_what_was_changed_is_not_believed(change: dict[str, str], why: str) -> None:
    with pytest.raises(InvalidWebhookError, match=why):
        verify(OLD, headers(OLD) | change, BODY)


@pytest.mark.parametrize(
    ("secret", "age_s", "why"),
    [(OTHER, 0, "no signature"), (OLD, 400, "too old"), (OLD, -400, "too old")],
    ids=["another's", "late", "early"],
)
def test_what_is_not_ours_or_not_new_is_not_believed(secret: str, age_s: int, why: str) -> None:
    with pytest.raises(InvalidWebhookError, match=why):
        verify(OLD, headers(secret, age_s=age_s), BODY)


def test_a_changed_body_is_not_believed() -> None:
    with pytest.raises(InvalidWebhookError):
        verify(OLD, headers(OLD), BODY + b" ")
    with pytest.raises(InvalidWebhookError):
        verify(OLD, {}, BODY)


@pytest.mark.parametrize("secret", ["", "whsec_€"])
def test_a_secret_that_is_none_verifies_nothing(secret: str) -> None:
    with pytest.raises(ValueError, match=r"secret|ASCII"):
        verify(secret, headers(OLD), BODY)
