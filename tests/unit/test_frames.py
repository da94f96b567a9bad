"""Ready-made frames are the library's own bytes, so that writing past it changes nothing on the wire."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode

from deltawire.errors import WireError
from deltawire.messages import CancelResult, ErrorMessage, Heartbeat, Subscribed
from deltawire.sse_decoder import SseDecoder
from deltawire_relay.frames import PING, event_stream_message, message_frame, text_frame

EDGES = (0, 1, 125, 126, 127, 65_535, 65_536, 65_537)


@pytest.mark.parametrize("size", EDGES)
def test_a_text_frame_equals_the_librarys(size: int) -> None:
    """Around each edge of the length field the bytes equal those of websockets (RFC 6455 §5.2)."""
    payload = b"x" * size
    assert text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


@given(st.text())
def test_any_text_is_framed_as_the_library_would(text: str) -> None:
    """The equality holds for every text."""
    payload = text.encode()
    assert text_frame(payload) == Frame(Opcode.TEXT, payload).serialize(mask=False)


def test_the_ping_equals_the_librarys() -> None:
    """An empty, unmasked ping (RFC 6455 §5.5.2)."""
    assert Frame(Opcode.PING, b"").serialize(mask=False) == PING


def test_an_event_stream_message_reads_back() -> None:
    """`id` and `data`, ended by a blank line; without a number there is no id (PROTOCOL §7)."""
    assert event_stream_message(b'{"a":1}', 7) == b'id: 7\ndata: {"a":1}\n\n'
    assert event_stream_message(b'{"a":1}') == b'data: {"a":1}\n\n'
    assert SseDecoder().feed(event_stream_message(b"{}", 1) + event_stream_message(b"[]")) == [b"{}", b"[]"]


def test_control_messages_have_their_fields_on_the_wire() -> None:
    """Fields that are always there are never left out; `request_id` is there only if it was given."""
    subscribed = Subscribed(
        job_id="j",
        status="unknown",
        attempt=0,
        earliest_sequence_number=0,
        latest_sequence_number=0,
        recovered=True,
    )
    assert message_frame(subscribed)[2:].endswith(
        b'{"type":"subscribed","job_id":"j","status":"unknown","attempt":0,"earliest_sequence_number":0,'
        b'"latest_sequence_number":0,"recovered":true}'
    )
    result = CancelResult(job_id="j", status="unknown", cancelled_from=None, delivered=False, request_id="r")
    assert message_frame(result)[2:].endswith(
        b'{"type":"cancel_result","request_id":"r","job_id":"j","status":"unknown","cancelled_from":null,'
        b'"delivered":false}'
    )
    assert message_frame(Heartbeat(positions={}))[2:] == b'{"type":"heartbeat","positions":{}}'


def test_an_error_has_one_shape() -> None:
    """All six fields of an error are always there (PROTOCOL §8)."""
    frame = message_frame(ErrorMessage(error=WireError("forbidden", "no").error))
    assert b'"error":{"message":"no","type":"permission_error"' in frame
    for field in (b'"param"', b'"code"', b'"retryable"', b'"retry_after_s"'):
        assert field in frame
    assert b"job_id" not in frame
