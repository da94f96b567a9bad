"""What the tests of the relay's hubs share."""

from functools import partial

import pytest

from deltawire_relay import hub as hub_module
from deltawire_relay import subscriber as subscriber_module
from deltawire_relay.tail import Tail
from tests.support.hub_readers import deltas


@pytest.fixture
def small_tail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tail of about three events and pages of two, so that little data takes the long ways."""
    monkeypatch.setattr(hub_module, "Tail", partial(Tail, max_bytes=3 * len(deltas(10, 10)[0])))
    for name in ("FIRST_PAGE_EVENTS", "PAGE_EVENTS"):
        monkeypatch.setattr(subscriber_module, name, 2)
