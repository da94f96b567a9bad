"""Server-sent events, the reading side: bytes in, payloads out. No I/O.

The grammar is WHATWG HTML §9.2.6 (event stream interpretation): lines end in CR, LF or CRLF; a leading
BOM is ignored; comments and unknown fields are ignored; several `data` lines are joined by LF; an event
is dispatched by a blank line, and one that the end of the stream cuts off is not dispatched at all.
`event`, `id` and `retry` carry nothing in the streams that we read, so only the data comes out.
"""

from typing import Final

_BOM: Final = b"\xef\xbb\xbf"


class EventTooLargeError(ValueError):
    """One event is larger than the bound given to the decoder."""


class SseDecoder:
    """Feed it bytes, split anywhere; it hands out the data of each whole event, in order."""

    def __init__(self, max_event_bytes: int = 262_144) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = b""  # an unfinished line
        self._data: list[bytes] = []  # the data lines of an unfinished event
        self._data_bytes = 0
        self._after_cr = False  # the last byte was a CR; an LF now belongs to it
        self._at_start = True

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes.

        Raises EventTooLargeError; the decoder is of no use after that.
        """
        data = self._line + self._with_lf(data)
        if self._at_start:
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._line = data
                return []
            self._at_start = False
            data = data.removeprefix(_BOM)
        lines = data.split(b"\n")
        self._line = lines.pop()
        if len(self._line) + self._data_bytes > self._max_event_bytes:
            raise EventTooLargeError(f"an event of more than {self._max_event_bytes} bytes")
        payloads: list[bytes] = []
        for line in lines:
            if not line:
                if self._data:
                    payloads.append(self._data[0] if len(self._data) == 1 else b"\n".join(self._data))
                    self._data = []
                    self._data_bytes = 0
            elif line.startswith(b"data:"):
                value = line[6:] if line[5:6] == b" " else line[5:]
                self._data_bytes += len(value)
                if self._data_bytes > self._max_event_bytes:
                    raise EventTooLargeError(f"an event of more than {self._max_event_bytes} bytes")
                self._data.append(value)
            elif line == b"data":
                self._data.append(b"")
        return payloads

    def _with_lf(self, data: bytes) -> bytes:
        """`data` with LF for every line end; a CRLF may be split between two calls."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data
