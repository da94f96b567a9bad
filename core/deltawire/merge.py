"""Adjacent text deltas as one event, for folds and for readers that lag and asked for it (PROTOCOL.md §6.6).

Pure: lines in, lines out. The fold of what comes out is the fold of what went in. Chunks are compared
and joined as bytes: JSON strings join like the texts that they stand for.
"""

import re
from collections.abc import Iterable, Iterator
from operator import itemgetter
from typing import Any, Final, NamedTuple

import msgspec

from .events import MAX_EVENT_BYTES

TEXT_FIELDS: Final = ("content", "refusal", "reasoning_content", "reasoning")

_DELTA: Final = re.compile(
    rb'(\{"type":"delta","job_id":"[^"]*","sequence_number":)(\d+)(,"attempt":\d+,"created_at":)([^,]+),"chunk":(.*)\}',
    re.DOTALL,
)
# A quote inside of a JSON string has a backslash before it, so this finds fields only, never text.
_TEXT: Final = re.compile(
    rb'("(?:%s|obfuscation)"\s*:\s*")([^"\\]*(?:\\.[^"\\]*)*)"' % "|".join(TEXT_FIELDS).encode(), re.DOTALL
)
_QUOTE: Final = ord('"')  # bytes are sought in bytes by way of an exception
_INSIDE: Final = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)  # of a string
_ROOM: Final = 64  # for `first_sequence_number`, and for numbers that grow longer


def merge(lines: Iterable[bytes], *, max_bytes: int = MAX_EVENT_BYTES) -> Iterator[bytes]:
    """The events with each run of deltas that differ in their text only as one, of at most `max_bytes`.

    What has no such neighbour comes out verbatim.
    """
    run: _Run | None = None
    rest = iter(lines)
    line = next(rest, None)
    while line is not None:
        delta = _read(line)
        if run is None or delta is None or not run.takes(delta, max_bytes):
            if run is not None:
                yield run.line()
            run = None if delta is None else _Run(line, delta)
            if run is None:
                yield line
        line = next(rest, None) if run is None else run.take_alike(rest, max_bytes)
    if run is not None:
        yield run.line()


class _Delta(NamedTuple):
    """A delta's line in pieces; `fixed` is its chunk without the texts, `keys` is what stands before each."""

    head: bytes
    number: bytes
    middle: bytes
    created_at: bytes
    chunk: bytes
    fixed: list[bytes]
    keys: list[bytes]
    texts: list[bytes]


def _read(line: bytes) -> _Delta | None:
    """None for what cannot be merged: no delta, or one without text."""
    found = _DELTA.fullmatch(line)
    if found is None:
        return None
    head, number, middle, created_at, chunk = found.groups()
    pieces = _TEXT.split(chunk)
    if len(pieces) == 1:
        return None
    return _Delta(head, number, middle, created_at, chunk, pieces[0::3], pieces[1::3], pieces[2::3])


class _Run:
    """Deltas that become one."""

    def __init__(self, line: bytes, first: _Delta) -> None:
        self._line = line
        self._first = first
        self._number, self._created_at = first.number, first.created_at  # of the last
        self._texts = [[text] for text in first.texts]
        self._size = len(line) + _ROOM
        self._is_plain: bool | None = None

    def takes(self, delta: _Delta, max_bytes: int) -> bool:
        """Whether the delta is now part of the run."""
        first = self._first
        size = self._size + sum(map(len, delta.texts))
        if (
            size > max_bytes
            or delta.fixed != first.fixed
            or delta.keys != first.keys
            or delta.middle != first.middle
            or delta.head != first.head
        ):
            return False
        if self._is_plain is None:  # and with it all that look the same
            self._is_plain = _is_plain(first)
        if self._is_plain:
            self._size = size
            self._number, self._created_at = delta.number, delta.created_at
            for texts, text in zip(self._texts, delta.texts, strict=True):
                texts.append(text)
        return self._is_plain

    def take_alike(self, lines: Iterator[bytes], max_bytes: int) -> bytes | None:
        """As `takes`, quickly, for what nearly all lines are: the same around one text, or two.

        Returns the first that it does not take, or None at the end.
        """
        first, count = self._first, len(self._texts)
        if not self._is_plain or count > 2:
            return next(lines, None)
        between = b'"%s%s' % (first.fixed[1], first.keys[1]) if count == 2 else b""
        before, after = b',"chunk":%s%s' % (first.fixed[0], first.keys[0]), b'"%s}' % first.fixed[-1]
        # Number and time are as wide as the last ones, so that all else stands where it stood.
        number = slice(len(first.head), len(first.head) + len(self._number))
        middle = slice(number.stop, number.stop + len(first.middle))
        created_at = slice(middle.stop, middle.stop + len(self._created_at))
        inside = slice(created_at.stop + len(before), -len(after))
        read_fixed = itemgetter(
            slice(number.start), middle, slice(created_at.stop, inside.start), slice(inside.stop, None)
        )
        fixed = (first.head, first.middle, before, after)
        fixed_size = inside.start + len(between) + len(after)
        room = max_bytes - self._size
        texts = self._texts[0]
        taken = b""
        for line in lines:
            size = len(line) - fixed_size
            if read_fixed(line) != fixed or not 0 <= size <= room:
                break
            text = line[inside]
            if between:
                text, found, second = text.partition(between)
                if not found or (_QUOTE in second and not _INSIDE.fullmatch(second)):
                    break
            if _QUOTE in text and not _INSIDE.fullmatch(text):
                break
            if between:
                self._texts[1].append(second)
            texts.append(text)
            room -= size
            taken = line
        else:
            line = None
        if taken:
            self._number, self._created_at = taken[number], taken[created_at]
            self._size = max_bytes - room
        return line

    def line(self) -> bytes:
        first = self._first
        if self._number == first.number:
            return self._line
        joined = [first.fixed[0]]
        for key, texts, fixed in zip(first.keys, self._texts, first.fixed[1:], strict=True):
            text = texts[-1] if key.startswith(b'"obfuscation"') else b"".join(texts)
            joined += (key, text, b'"', fixed)
        return b'%s%s%s%s,"first_sequence_number":%s,"chunk":%s}' % (
            *(first.head, self._number, first.middle, self._created_at),
            *(first.number, b"".join(joined)),
        )


def _is_plain(delta: _Delta) -> bool:
    """Whether the chunk adds plain text to one open choice and says nothing else that adds up.

    A field that the fold sets (a role, a fingerprint) may be there, since it is the same all through the run.
    """
    if any(b"\\" in piece for piece in delta.fixed):
        return False  # an escaped name would hide a field from `_TEXT`
    chunk: dict[str, Any] = msgspec.json.decode(delta.chunk)
    match chunk:
        case {"choices": [{"delta": {**added}, **choice}]}:
            pass
        case _:
            return False
    texts = [added.pop(name) for name in TEXT_FIELDS if isinstance(added.get(name), str)]
    found = len(texts) + isinstance(chunk.get("obfuscation"), str)
    return (
        found == len(delta.keys)  # else there is a text elsewhere, or twice
        and len(texts) > 0
        and all(chunk.get(name) is None for name in ("usage", "error"))
        and all(choice.get(name) is None for name in ("finish_reason", "logprobs"))
        and all(
            value is None
            or isinstance(value, bool | int | float)
            or (name == "role" and isinstance(value, str))
            for name, value in added.items()
        )
    )
