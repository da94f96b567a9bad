"""Events to bytes and back. An event is encoded once, by its writer, and passed on verbatim.

Every event is one line of JSON that begins `{"type":"…","job_id":"…","sequence_number":N,`. A job id
holds neither quotes nor backslashes, so a relay reads type and number by position, unparsed.
"""

import json
import re
from collections.abc import Callable
from typing import Any, Final

import msgspec

from .events import LEFT_OUT, MAX_EVENT_BYTES, TERMINAL_STATUSES, Event, Output, TerminalEvent

_encoder: Final = msgspec.json.Encoder()
_decoder: Final[msgspec.json.Decoder[Event]] = msgspec.json.Decoder(Event)
_any_decoder: Final = msgspec.json.Decoder()

_NUMBER: Final = b'"sequence_number":'
MAX_DEPTH: Final = 100
# The last quote may be missing: else each one in an unclosed text would be tried as its beginning.
_TEXT: Final = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"?', re.DOTALL)
_TYPE_AT: Final = len(b'{"type":"')
_CHUNK: Final = b',"chunk":'
_DELTA: Final = b'{"type":"delta",'
_SNAPSHOT: Final = b'{"type":"snapshot",'
_TERMINAL: Final = frozenset(status.encode() for status in TERMINAL_STATUSES)


def encode(event: Event) -> bytes:
    """One line of JSON, without the line end."""
    return _encoder.encode(event)


def encode_terminal(event: TerminalEvent) -> bytes:
    """As `encode`, but an event that grows too large does without what its job's address still has.

    First without the parsed JSON, which stands in the completion as text; then without the completion. Usage
    or outputs of that size are no honest gateway's.
    """
    url = f"/v1/jobs/{event.job_id}"
    without: tuple[Callable[[], dict[str, Any]], ...] = (
        lambda: {"outputs": _unparsed(event.outputs)},
        lambda: {"completion": None, "completion_url": url},
        lambda: {"usage": None, "usage_source": "unavailable"},
        lambda: {"outputs": msgspec.UNSET},
    )
    line = _encoder.encode(event)
    for fields in without:
        if len(line) <= MAX_EVENT_BYTES:
            break
        event = msgspec.structs.replace(event, **fields())
        line = _encoder.encode(event)
    return line


def _unparsed(outputs: list[Output] | msgspec.UnsetType) -> list[Output] | msgspec.UnsetType:
    if isinstance(outputs, msgspec.UnsetType):
        return outputs
    return [
        msgspec.structs.replace(output, parsed=None, parse_error=LEFT_OUT)
        if output.parsed is not None
        else output
        for output in outputs
    ]


def encode_snapshot(
    job_id: str, sequence_number: int, *, attempt: int, created_at: float, fold: Any
) -> bytes:
    """The line that stands in a log for all events up to `sequence_number` (`fold`: a Fold's state)."""
    head = b'{"type":"snapshot","job_id":"%s","sequence_number":%d,' % (job_id.encode(), sequence_number)
    return head + b'"attempt":%d,"created_at":%.6f,"fold":%s}' % (attempt, created_at, _encoder.encode(fold))


def is_snapshot(line: bytes) -> bool:
    """Whether the line stands for all events up to its number. Only a log's first line can."""
    return line.startswith(_SNAPSHOT)


def decode_snapshot(line: bytes) -> Any:
    """The fold's state in a snapshot line. Raises msgspec.DecodeError."""
    return _any_decoder.decode(line)["fold"]


def decode(line: bytes) -> Event:
    """The inverse of `encode`. Raises msgspec.DecodeError on anything else."""
    try:
        return _decoder.decode(line)
    except UnicodeDecodeError as error:
        raise msgspec.DecodeError("not UTF-8") from error


def sequence_number_of(line: bytes) -> int:
    """The event's number, read by position. Raises ValueError where there is none."""
    start = line.index(_NUMBER) + len(_NUMBER)
    return int(line[start : line.index(b",", start)])


def type_of(line: bytes) -> bytes:
    """The event's type, read by position: b"delta"."""
    return line[_TYPE_AT : line.index(b'"', _TYPE_AT)]


def is_delta(line: bytes) -> bool:
    """Whether the line is a delta."""
    return line.startswith(_DELTA)


def chunk_of(delta: bytes) -> bytes:
    """The upstream's own bytes in a delta, read by position: the chunk is its last field."""
    return delta[delta.index(_CHUNK) + len(_CHUNK) : -1]


def is_terminal(line: bytes) -> bool:
    """Whether the line is a terminal event."""
    return type_of(line) in _TERMINAL


def delta_head(job_id: str) -> bytes:
    """What a delta of this job begins with, up to its number, behind which stands a comma."""
    return b'%s"job_id":"%s",%s' % (_DELTA, job_id.encode(), _NUMBER)


class DeltaEncoder:
    """Encodes the deltas of one attempt by joining bytes: the hot path makes no objects.

    The result equals `encode(Delta(...))` but for white space inside the chunk.
    """

    def __init__(self, job_id: str, attempt: int) -> None:
        self._head = delta_head(job_id)
        self._middle = b',"attempt":%d,"created_at":' % attempt

    def encode(self, sequence_number: int, created_at: float, chunk: bytes) -> bytes:
        return b'%s%d%s%.6f,"chunk":%s}' % (self._head, sequence_number, self._middle, created_at, chunk)


def read_chunk(payload: bytes) -> tuple[dict[str, Any], bytes]:
    """An upstream `data:` payload as (object, bytes to publish).

    The bytes are the upstream's own where they are valid UTF-8, strict JSON and one line; else they
    are encoded anew (bad UTF-8 and lone surrogates are replaced, NaN and infinities become null).
    Raises ValueError where no JSON object can be made of it, or one nested deeper than MAX_DEPTH.
    """
    if payload.count(b"{") + payload.count(b"[") > MAX_DEPTH and _depth(payload) > MAX_DEPTH:
        raise ValueError("nested too deeply")
    try:
        try:
            payload.decode()
            chunk = _any_decoder.decode(payload)
        except (UnicodeDecodeError, msgspec.DecodeError):
            return _mended(payload)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(chunk, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - it is the value of the text that is wrong
    if b"\n" in payload or b"\r" in payload:
        return chunk, _encoder.encode(chunk)
    return chunk, payload


def _depth(payload: bytes) -> int:
    """How deeply brackets nest. Those in texts do not count: a terminal's colours alone open hundreds."""
    depth = deepest = 0
    for byte in _TEXT.sub(b"", payload):
        if byte in b"{[":
            depth += 1
            deepest = max(deepest, depth)
        elif byte in b"}]":
            depth -= 1
    return deepest


def _mended(payload: bytes) -> tuple[dict[str, Any], bytes]:
    chunk = json.loads(payload.decode("utf-8", "replace"))
    if not isinstance(chunk, dict):
        raise ValueError("not a JSON object")  # noqa: TRY004 - as above
    # A lone surrogate cannot be encoded; what JSON does not know (NaN, Infinity) msgspec writes as null.
    text = json.dumps(chunk, ensure_ascii=False).encode("utf-8", "replace").decode()
    line = _encoder.encode(json.loads(text))
    return _any_decoder.decode(line), line
