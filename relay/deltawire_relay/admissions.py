"""Who is connected by a token, and until when: connections end with it, or when it is revoked.

API keys have no end, so that connections by key are not here. One look a second serves all.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from itertools import chain
from typing import Final, Protocol

from prometheus_client.core import Metric

from deltawire.errors import WireError
from deltawire.metrics import counter_family, gauge_family
from deltawire.tokens import LEEWAY_S

from .auth import Principal
from .revoked import Revoked

LOOK_INTERVAL_S: Final = 1.0
NEVER: Final = 2**63

_log = logging.getLogger(__name__)


class Holder(Protocol):
    """Something that lasts, and was let in by a token."""

    @property
    def principal(self) -> Principal | None: ...
    @property
    def put_out(self) -> Callable[[WireError], None]:
        """To be called once its token is good no more. It leaves the admissions, now or soon."""


class Stay:
    """A holder that is no more than that."""

    def __init__(self, principal: Principal, put_out: Callable[[WireError], None]) -> None:
        self.principal: Principal | None = principal
        self.put_out = put_out


class Admissions:
    """Holders by the second in which their token ends, so that each comes and goes at no cost."""

    def __init__(self, revoked: Revoked) -> None:
        self.expired = 0
        self.revoked = 0
        self._revoked = revoked
        self._by_second: dict[int, set[Holder]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._by_second.values()))

    def enter(self, holder: Holder, *, may_outlive: bool = False) -> None:
        """From now on it hears when its token ends; with `may_outlive` only when it is revoked."""
        principal = holder.principal
        if principal is not None and not principal.is_key:
            second = NEVER if may_outlive else _second(principal)
            self._by_second.setdefault(second, set()).add(holder)

    def leave(self, holder: Holder) -> None:
        """Idempotent. Its principal must be the one with which it entered."""
        principal = holder.principal
        if principal is None or principal.is_key:
            return
        for second in (_second(principal), NEVER):
            holders = self._by_second.get(second)
            if holders is not None:
                holders.discard(holder)
                if not holders:
                    del self._by_second[second]

    async def keep(self) -> None:
        """Until cancelled: puts out those whose token has ended."""
        while True:
            await asyncio.sleep(LOOK_INTERVAL_S)
            self.expire(time.time())

    def expire(self, now: float) -> None:
        due = [second for second in self._by_second if second <= now]
        error = WireError("token_expired", "the token has expired; get another one")
        self.expired += _put_out(chain.from_iterable([*map(self._by_second.pop, due)]), error)

    def put_out_revoked(self) -> None:
        """After something was revoked."""
        holders = [
            holder
            for holder in chain.from_iterable(self._by_second.values())
            if holder.principal is not None and holder.principal in self._revoked
        ]
        self.revoked += _put_out(holders, WireError("token_revoked", "the token was revoked"))

    def collect(self) -> Iterable[Metric]:
        yield gauge_family(
            "deltawire_token_connections", "Connections and streams that were let in by a token.", len(self)
        )
        yield counter_family(
            "deltawire_token_ends_total",
            "Connections and streams that ended with their token.",
            {"expired": self.expired, "revoked": self.revoked},
            ["reason"],
        )


def _second(principal: Principal) -> int:
    return int(principal.expires_at + LEEWAY_S) + 1


def _put_out(holders: Iterable[Holder], error: WireError) -> int:
    count = 0
    for holder in holders:
        count += 1
        try:
            holder.put_out(error)
        except Exception:  # noqa: BLE001 - what is wrong with one must not let the others stay
            _log.exception("a connection could not be ended with its token")
    return count
