"""Bytes on the wire: SSE events, how they are cut into writes, HTTP heads and chunks. Pure.

SSE as in the WHATWG HTML standard, section 9.2; HTTP/1.1 as in RFC 9112.
"""

import contextlib
from collections.abc import Iterable
from http import HTTPStatus
from itertools import pairwise

import msgspec

from deltawire.gateway.script import Split

DONE = b"[DONE]"
LAST_CHUNK = b"0\r\n\r\n"

_REASONS = {status.value: status.phrase for status in HTTPStatus}


def encode_event(payload: bytes, split: Split | None = None) -> bytes:
    """One SSE event with `payload` as its data; each line of it is a `data:` line."""
    if split == "multiline":
        # Line feeds between JSON tokens mean nothing to JSON, and that is what the lines join with.
        with contextlib.suppress(msgspec.DecodeError):  # [DONE], or what a script calls a chunk
            payload = msgspec.json.format(payload, indent=2)
    end = b"\r\n" if split == "crlf" else b"\n"
    return b"data: " + payload.replace(b"\n", end + b"data: ") + end + end


def encode_comment(split: Split | None = None) -> bytes:
    return b": keep-alive\r\n\r\n" if split == "crlf" else b": keep-alive\n\n"


def cut_event(event: bytes, split: Split | None = None) -> list[bytes]:
    """The pieces in which an event is written; they join to it again."""
    match split:
        case "byte":
            return [event[i : i + 1] for i in range(len(event))]
        case "utf8":
            # 0b10xxxxxx continues a character: one ends in a piece of its own before each such byte.
            inside = [i for i, byte in enumerate(event) if byte & 0xC0 == 0x80]
            return [event[start:end] for start, end in pairwise([0, *inside, len(event)])]
        case _:
            return [event]


def encode_chunk(data: bytes) -> bytes:
    """One chunk of a chunked body. `data` must not be empty: an empty chunk would end the body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def encode_head(status: int, headers: Iterable[tuple[str, str]]) -> bytes:
    """Status line and headers. The values must hold no line ends; Latin-1 is what HTTP can carry."""
    lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Unknown')}"]
    lines += [f"{name}: {value}" for name, value in headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1", "replace")
