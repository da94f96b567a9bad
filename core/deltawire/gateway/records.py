"""What the gateway remembers of its requests: when, and who ended them. Never prompts, never keys."""

from collections import OrderedDict, deque
from hashlib import blake2b
from typing import Literal

import msgspec
from msgspec import Struct

from deltawire.gateway.script import ChatRequest

MAX_RECORDS = 10_000
MAX_ID_CHARS = 512

Closer = Literal["client", "server"]


class RequestRecord(Struct, kw_only=True):
    """One `POST /v1/chat/completions`, refused ones included. Times are Unix seconds.

    Either `finished_at` is set, when the last byte was handed to the transport, or the connection went
    first: then `closed_by` says who closed it ("server": a scripted `cut`, `reset` or the gateway's stop)
    and `closed_at` when that was noticed. Both are null while it is going on.
    `concurrent` counts the requests that were being answered when it came, itself included.
    """

    id: str
    client_request_id: str | None
    model: str | None
    received_at: float
    first_byte_at: float | None = None
    finished_at: float | None = None
    closed_by: Closer | None = None
    closed_at: float | None = None
    sent_deltas: int = 0
    total_deltas: int = 0
    authorized: bool = True
    concurrent: int = 0


class Ledger:
    """The last 10,000 records, oldest first, and the totals since the start."""

    def __init__(self) -> None:
        self._records: deque[RequestRecord] = deque(maxlen=MAX_RECORDS)
        self.open_requests = 0
        self.requests = 0
        self.deltas_sent = 0

    def open(self, record: RequestRecord) -> None:
        self.requests += 1
        self.open_requests += 1
        record.concurrent = self.open_requests
        self._records.append(record)

    def finish(self, record: RequestRecord, now: float) -> None:
        self.open_requests -= 1
        record.finished_at = now

    def close(self, record: RequestRecord, by: Closer, now: float) -> None:
        self.open_requests -= 1
        record.closed_by = by
        record.closed_at = now

    def find(self, client_request_id: str | None = None) -> list[RequestRecord]:
        """All records, or those with this `X-Client-Request-Id`."""
        if client_request_id is None:
            return list(self._records)
        return [r for r in self._records if r.client_request_id == client_request_id[:MAX_ID_CHARS]]

    def clear(self) -> int:
        """Forget the records, not the totals; how many there were."""
        count = len(self._records)
        self._records.clear()
        return count


class FaultCounter:
    """Which requests of a script with `fail_first` meet its fault. Remembers digests of 10,000 scripts."""

    def __init__(self) -> None:
        self._seen: OrderedDict[bytes, int] = OrderedDict()

    def meets_fault(self, request: ChatRequest, client_request_id: str | None) -> bool:
        """Whether this request, which is counted by the call, is to fail."""
        script = request.script
        if script.fail_first is None:
            return script.fault is not None
        same = ("prompt", request.prompt) if client_request_id is None else ("id", client_request_id)
        key = blake2b(msgspec.json.encode((script, same)), digest_size=16).digest()
        count = self._seen.pop(key, 0) + 1
        self._seen[key] = count
        if len(self._seen) > MAX_RECORDS:
            self._seen.popitem(last=False)
        return count <= script.fail_first
