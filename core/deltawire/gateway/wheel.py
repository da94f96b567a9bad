"""Coalesced timers: many deadlines, one timer of the loop."""

import asyncio
from heapq import heappop, heappush
from math import ceil
from typing import Protocol

TICK_S = 0.005


class Timed(Protocol):
    """What a wheel wakes. Hashed by identity."""

    def wake(self, now: float) -> None:
        """Its deadline has passed; `now` is never before it."""


class TimerWheel:
    """Wakes each `Timed` once per `add`, at the first tick at or after its deadline (loop time).

    A thousand streams that are due within 5 ms of each other cost one wake-up of the loop and no heap
    operation of their own. Each is in the wheel at most once: `add` replaces the deadline it had.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._slots: dict[int, dict[Timed, None]] = {}
        self._order: list[int] = []
        self._slot_of: dict[Timed, int] = {}
        self._handle: asyncio.TimerHandle | None = None
        self._armed_for = 0

    def add(self, timed: Timed, deadline: float) -> None:
        self._add(timed, ceil(deadline / TICK_S))

    def add_soon(self, timed: Timed) -> None:
        """Wake in the next turn of the loop, so that others get theirs in between."""
        self._add(timed, int(self._loop.time() / TICK_S))

    def remove(self, timed: Timed) -> None:
        """Forget it; it is not woken after this. Nothing happens if it is not in the wheel."""
        slot = self._slot_of.pop(timed, None)
        members = self._slots.get(slot) if slot is not None else None
        if members is not None:
            members.pop(timed, None)

    def close(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        self._slots.clear()
        self._slot_of.clear()
        self._order.clear()

    def _add(self, timed: Timed, slot: int) -> None:
        if timed in self._slot_of:
            self.remove(timed)
        self._slot_of[timed] = slot
        members = self._slots.get(slot)
        if members is not None:
            members[timed] = None
            return
        self._slots[slot] = {timed: None}
        heappush(self._order, slot)
        self._arm()

    def _arm(self) -> None:
        while self._order and not self._slots[self._order[0]]:
            del self._slots[heappop(self._order)]  # all of its members were removed
        if not self._order:
            return
        first = self._order[0]
        if self._handle is not None:
            if self._armed_for <= first:
                return
            self._handle.cancel()
        self._armed_for = first
        self._handle = self._loop.call_at(first * TICK_S, self._turn)

    def _turn(self) -> None:
        self._handle = None
        # The loop may call a timer a clock's resolution early.
        now = max(self._loop.time(), self._armed_for * TICK_S)
        # All slots are taken out before any member is woken: what a wake adds waits for the next turn.
        due = []
        while self._order and self._order[0] * TICK_S <= now:
            slot = heappop(self._order)
            due.append((slot, self._slots.pop(slot)))
        for slot, members in due:
            for timed in members:
                if self._slot_of.get(timed) != slot:
                    continue  # removed, or given a new deadline, by one that was woken before it
                del self._slot_of[timed]
                try:
                    timed.wake(now)
                except Exception as error:  # noqa: BLE001 - an outer edge: one must not stop the others
                    self._loop.call_exception_handler(
                        {"message": "a timer of the scripted gateway failed", "exception": error}
                    )
        self._arm()
