"""What a worker counts of its webhooks."""

from unittest.mock import Mock

from deltawire.log import JobLog
from deltawire.notices import Notices
from deltawire_worker.webhooks import RETRIES_S, Webhooks


def test_what_is_counted() -> None:
    """One series for each result, from the start, and how many ends wait."""
    webhooks = Webhooks([], Mock(spec=JobLog), Mock(spec=Notices))
    calls, pending = webhooks.collect()
    assert {sample.name for sample in calls.samples} == {"deltawire_webhooks_total"}
    assert {sample.labels["result"]: sample.value for sample in calls.samples} == {
        "delivered": 0,
        "failed": 0,
        "gone": 0,
        "given_up": 0,
    }
    assert [(sample.name, sample.value) for sample in pending.samples] == [("deltawire_webhooks_pending", 0)]


def test_a_webhook_is_called_for_a_day() -> None:
    """And what is kept for it lives for two."""
    assert 86_400 <= sum(RETRIES_S) <= 100_000
