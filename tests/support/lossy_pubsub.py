"""Loses published messages on their way from Redis to a subscriber: a filter for the replies of a `TcpProxy`.

RESP3 pushes look like `>3 $7 message $… channel $… payload`, a line end after each; a sharded one says
`smessage`. Nothing else of what Redis says is touched.
"""

import random
from collections.abc import Callable
from typing import Final

_TERMINAL: Final = tuple(
    b'{"type":"%s",' % kind for kind in (b"completed", b"incomplete", b"failed", b"cancelled")
)
_MESSAGES: Final = (b">3\r\n$7\r\nmessage\r\n", b">3\r\n$8\r\nsmessage\r\n")
_LINES: Final = frozenset(b"+-:_,#(")
_BULKS: Final = frozenset(b"$!=")
_AGGREGATES: Final = {ord("*"): 1, ord("~"): 1, ord(">"): 1, ord("%"): 2}


def value_end(data: bytes | bytearray, start: int) -> int | None:
    """Where the RESP value that begins at `start` ends; None if it is not all there."""
    values = 1
    while values:
        line_end = data.find(b"\r\n", start)
        if line_end < 0:
            return None
        kind, values = data[start], values - 1
        if kind in _LINES:
            start = line_end + 2
        elif kind in _BULKS:
            size = int(data[start + 1 : line_end])
            start = line_end + 2 + (size + 2 if size >= 0 else 0)
        else:
            values += max(0, int(data[start + 1 : line_end])) * _AGGREGATES[kind]
            start = line_end + 2
        if start > len(data):
            return None
    return start


class Losses:
    """Which messages are lost: a `share` of all, and a `share_of_last` of those that end a job, by dice."""

    def __init__(self, randomness: random.Random, share: float, share_of_last: float) -> None:
        self._randomness = randomness
        self._share = share
        self._share_of_last = share_of_last
        self.on_loss: Callable[[], None] = lambda: None
        self.lost = 0
        self.lost_last = 0

    def is_lost(self, push: bytes) -> bool:
        is_last = any(kind in push for kind in _TERMINAL)
        is_lost = self._randomness.random() < (self._share_of_last if is_last else self._share)
        if is_lost:
            self.on_loss()
        self.lost += is_lost
        self.lost_last += is_lost and is_last
        return is_lost

    def new_filter(self) -> "LossyPubSub":
        """One for each connection."""
        return LossyPubSub(self)


class LossyPubSub:
    """Takes pieces as they come, passes whole values on, but for the messages that are lost."""

    def __init__(self, losses: Losses) -> None:
        self._losses = losses
        self._data = bytearray()

    def __call__(self, data: bytes) -> bytes:
        self._data += data
        passed, start = bytearray(), 0
        while start < len(self._data) and (end := value_end(self._data, start)) is not None:
            value = bytes(self._data[start:end])
            if not (value.startswith(_MESSAGES) and self._losses.is_lost(value)):
                passed += value
            start = end
        del self._data[:start]
        return bytes(passed)
