"""What one subscriber sees of one job, checked as it comes (PROTOCOL §4.1 to §4.3); the sums over many."""

import json
import time
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

TERMINAL: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})
ON_ITS_WAY_S: Final = 1.0


class FaultClock:
    """When faults struck."""

    def __init__(self) -> None:
        self.struck: list[float] = []

    def strike(self) -> None:
        self.struck.append(time.monotonic())

    def waited_s(self, since: float, now: float) -> float:
        """How much of a silence a fault explains: all of it from the fault on; 0 if there was none.

        What was on its way when the fault struck still comes, so the silence may begin a little later.
        """
        index = bisect_right(self.struck, since - ON_ITS_WAY_S)
        return now - max(self.struck[index], since) if index < len(self.struck) else 0.0


class Ledger:
    """One subscription, over all of its connections. `position` is the cursor to resume from."""

    def __init__(self, job_id: str, clock: FaultClock) -> None:
        self.job_id = job_id
        self.position = 0
        self.deltas = 0
        self.ending: str | None = None  # "completed", "failed:worker_lost", …
        self.refusal: str | None = None
        self.seen: dict[int, int] = {}  # number -> hash of the line
        self.base = 0  # a snapshot stands for the events up to here
        self.events = 0
        self.doubled = 0
        self.out_of_order = 0
        self.snapshots = 0
        self.unannounced = 0
        self.restarts = 0
        self.longest_wait_s = 0.0
        self.longest_silence_s = 0.0
        self._clock = clock
        self._is_told = False  # that a snapshot comes
        self._heard_at = time.monotonic()
        self._is_running = False

    @property
    def is_over(self) -> bool:
        return self.ending is not None or self.refusal is not None

    def subscribed(self, *, recovered: bool) -> None:
        self._is_told = not recovered

    def snapshot(self, number: int) -> None:
        self.snapshots += 1
        self.unannounced += not self._is_told
        self._is_told = False
        self._hear()
        self.base = self.position = number
        self.seen.clear()

    def event(self, kind: str, number: int, line: bytes) -> None:
        self._hear()
        self.events += 1
        if self.ending is not None or number in self.seen or number <= self.base:
            self.doubled += 1
            return
        if self._is_told and kind in TERMINAL:
            # Of a job that Redis has lost there may be nothing left but its end (PROTOCOL §6.3).
            self._is_told = False
            self.snapshots += 1
            self.base = number - 1
        self.seen[number] = hash(line)
        if number <= self.position:
            self.out_of_order += 1  # one that seemed to be lost
            return
        self.position = number
        self.deltas += kind == "delta"
        self.restarts += kind == "restarted"
        self._is_running = kind != "queued"
        if kind in TERMINAL:
            self.ending = f"failed:{json.loads(line)['error']['code']}" if kind == "failed" else kind

    def refused(self, code: str) -> None:
        """The relay says that nothing will come any more. That is no terminal event."""
        self.refusal = code

    def stop(self) -> None:
        """Whoever has not seen the end has waited until now."""
        if self.ending is None:
            self._hear()

    def lost(self, log: Mapping[int, int] | None) -> int:
        """How many events it misses, as against the log (None: the log is gone; then up to its position)."""
        expected = range(self.base + 1, self.position + 1) if log is None else log
        return sum(number > self.base and number not in self.seen for number in expected)

    def changed(self, log: Mapping[int, int] | None) -> int:
        """How many of its events are not what the log has under their numbers, from its first one on."""
        if not log:
            return 0
        first = min(log)
        return sum(log.get(number) != digest for number, digest in self.seen.items() if number >= first)

    def _hear(self) -> None:
        now = time.monotonic()
        self.longest_wait_s = max(self.longest_wait_s, self._clock.waited_s(self._heard_at, now))
        if self._is_running:
            self.longest_silence_s = max(self.longest_silence_s, now - self._heard_at)
        self._heard_at = now


def check_log(lines: Sequence[bytes], *, completion: bool = True) -> list[str]:
    """What is wrong with a whole log of a job that is over, in words; `completion`: it is the deltas' sum."""
    events: list[dict[str, Any]] = [json.loads(line) for line in lines]
    if not events:
        return ["an empty log"]
    job_id, wrong = events[0]["job_id"], []
    first = events[0]["sequence_number"]
    if [event["sequence_number"] for event in events] != list(range(first, first + len(events))):
        wrong.append("numbers have holes")
    if [event["type"] in TERMINAL for event in events] != [False] * (len(events) - 1) + [True]:
        wrong.append("not one terminal event, the last")
    attempts = [event["attempt"] for event in events]
    if attempts != sorted(attempts):
        wrong.append("a stale attempt has written")
    discarded = 0
    for event in events:
        if event["type"] == "restarted":
            discarded = event["discard_through"]
            if discarded != event["sequence_number"] - 1:
                wrong.append("discard_through is not the event before")
    if completion and first == 1 and (folded := events[-1].get("completion")):
        text = "".join(
            choice["delta"].get("content") or ""
            for event in events[discarded:]
            if event["type"] == "delta"
            for choice in event["chunk"]["choices"]
        )
        if (folded["choices"][0]["message"]["content"] or "") != text:
            wrong.append("the completion is not the sum of the deltas")
    return [f"{job_id}: {what}" for what in wrong]


@dataclass
class Figures:
    """One row: a scenario's sums. `broken` says in words what must not be."""

    scenario: str
    seed: int
    jobs: int = 0
    subscribers: int = 0
    events: int = 0
    lost: int = 0
    doubled: int = 0
    out_of_order: int = 0
    changed: int = 0
    unended: int = 0
    snapshots: int = 0
    unannounced: int = 0
    restarts: int = 0
    longest_wait_s: float = 0.0
    longest_silence_s: float = 0.0
    seconds: float = 0.0
    faults: int = 0
    endings: dict[str, int] = field(default_factory=dict)
    broken: list[str] = field(default_factory=list)

    def add(self, ledgers: Iterable[Ledger], logs: Mapping[str, Mapping[int, int] | None]) -> None:
        """Adds up what subscribers have seen, with the logs in Redis as the oracle."""
        for ledger in ledgers:
            ledger.stop()
            log = logs.get(ledger.job_id)
            self.subscribers += 1
            self.events += ledger.events
            self.lost += ledger.lost(log)
            self.doubled += ledger.doubled
            self.out_of_order += ledger.out_of_order
            self.changed += ledger.changed(log)
            self.unended += ledger.ending is None
            self.snapshots += ledger.snapshots
            self.unannounced += ledger.unannounced
            self.restarts += ledger.restarts
            self.longest_wait_s = max(self.longest_wait_s, ledger.longest_wait_s)
            self.longest_silence_s = max(self.longest_silence_s, ledger.longest_silence_s)
            ending = ledger.ending or f"none:{ledger.refusal or 'still waiting'}"
            self.endings[ending] = self.endings.get(ending, 0) + 1

    def judge(self, *, max_wait_s: float | None = None, snapshots: bool = False) -> None:
        """Notes every promise that the sums break. `snapshots`: the fault may cost some, announced."""
        for name in ("lost", "doubled", "out_of_order", "changed", "unended", "unannounced"):
            if count := getattr(self, name):
                self.broken.append(f"{count} {name}")
        if self.snapshots and not snapshots:
            self.broken.append(f"{self.snapshots} snapshots")
        if max_wait_s is not None and self.longest_wait_s > max_wait_s:
            self.broken.append(f"waited {self.longest_wait_s:.1f} s, allowed are {max_wait_s:.0f} s")
