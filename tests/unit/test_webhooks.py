"""What a worker counts of its webhooks."""

import asyncio
from unittest.mock import Mock

import pytest

from deltawire.background import in_background
from deltawire.log import JobLog
from deltawire.notices import BATCH, Notice, Notices
from deltawire_worker.webhook_endpoints import Webhook
from deltawire_worker.webhooks import RETRIES_S, Webhooks
from tests.support.system import eventually


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


async def test_a_webhook_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor looks at jobs, however many calls of it are due; what is not called now is due again later."""
    called: list[str] = []
    deaf = asyncio.Event()

    async def call(_: object, webhook: Webhook, *__: object) -> str:
        called.append(webhook.name)
        if webhook.name == "deaf":
            await deaf.wait()
        return "delivered"

    monkeypatch.setattr(Webhooks, "_call", staticmethod(call))
    hooks = [Webhook(name=name, url="https://a") for name in ("deaf", "good")]
    notices, log = Mock(spec=Notices), Mock(spec=JobLog)
    notices.notice.return_value = Notice(id="m", type="job.completed", tenant="a", body=b"{}", tries={})
    due = [[(f"j{n}", "deaf") for n in range(BATCH)] for _ in range(10)] + [[("j", "good"), ("j", "")]]
    notices.due.side_effect = lambda: (1, due.pop(0) if due else [])
    log.head.return_value.record = None
    async with in_background(Webhooks(hooks, log, notices).keep()):
        await eventually(lambda: "good" in called and notices.address.called, timeout_s=5)
    put_off = [pair for call in notices.put_off.call_args_list for pair in call.args[0]]
    assert len(put_off) + called.count("deaf") == 10 * BATCH
    assert called.count("deaf")
    assert {name for _, name in put_off} == {"deaf"}
