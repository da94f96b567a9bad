"""Server-sent events, the reading side: bytes in, payloads out. No I/O.

The grammar is WHATWG HTML §9.2.6 (event stream interpretation): lines end in CR, LF or CRLF; a leading
BOM is ignored; comments and unknown fields are ignored; several `data` lines are joined by LF; an event
is dispatched by a blank line, and one that the end of the stream cuts off is not dispatched at all.
`id` and `retry` carry nothing in the streams that we read, and `event` only where it is `error`: so the data
comes out alone, then as ErrorData. A field `error`, which is llama.cpp's own, is data of such an event.
"""

from typing import Final

_BOM: Final = b"\xef\xbb\xbf"


class ErrorData(bytes):
    """The data of an event whose type is `error`."""


class EventTooLargeError(ValueError):
    """One event is larger than the bound given to the decoder."""


class SseDecoder:
    """Feed it bytes, split anywhere; it hands out the data of each whole event, in order."""

    def __init__(self, max_event_bytes: int = 262_144) -> None:
        self._max_event_bytes = max_event_bytes
        self._line = b""  # an unfinished line
        self._data: list[bytes] = []  # the data lines of an unfinished event
        self._size = 0  # of that event so far
        self._is_error = False
        self._is_too_large = False
        self._after_cr = False  # the last byte was a CR; an LF now belongs to it
        self._at_start = True

    def feed(self, data: bytes) -> list[bytes]:
        """The payloads that `data` completes.

        Raises EventTooLargeError once those before the event at fault have been handed out; the decoder is
        of no use after that.
        """
        if self._is_too_large:
            raise EventTooLargeError(f"an event of more than {self._max_event_bytes} bytes")
        data = self._line + self._with_lf(data)
        if self._at_start:
            if len(data) < len(_BOM) and _BOM.startswith(data):
                self._line = data
                return []
            self._at_start = False
            data = data.removeprefix(_BOM)
        lines = data.split(b"\n")
        self._line = lines.pop()
        payloads: list[bytes] = []
        max_line = self._max_event_bytes + len(b"data: ")
        for line in lines:
            if self._size + len(line) > max_line:  # a comment, too: where a line was cut decides nothing
                self._is_too_large = True
                break
            if not line:
                if self._data:
                    payload = self._data[0] if len(self._data) == 1 else b"\n".join(self._data)
                    payloads.append(ErrorData(payload) if self._is_error else payload)
                    self._data = []
                    self._size = 0
                self._is_error = False
            elif line.startswith(b"data:"):
                self._add(line[6:] if line[5:6] == b" " else line[5:])
            elif line == b"data":
                self._add(b"")
            elif line.startswith((b"event:", b"error:")):
                self._look_for_error(line)
            if self._is_too_large:
                break
        if self._size + len(self._line) > max_line:
            self._is_too_large = True
        return payloads if payloads or not self._is_too_large else self.feed(b"")

    def _look_for_error(self, line: bytes) -> None:
        said = line[6:].strip(b" ")
        if line.startswith(b"event:"):
            self._is_error = said == b"error"
        elif said.startswith(b"{"):
            self._is_error = True
            self._add(said)

    def _add(self, value: bytes) -> None:
        self._data.append(value)
        self._size += len(value) + (len(self._data) > 1)  # the LF that will join them
        self._is_too_large = self._size > self._max_event_bytes

    def _with_lf(self, data: bytes) -> bytes:
        """`data` with LF for every line end; a CRLF may be split between two calls."""
        if self._after_cr and data:
            self._after_cr = False
            data = data.removeprefix(b"\n")
        if b"\r" in data:
            self._after_cr = data.endswith(b"\r")
            data = data.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        return data
