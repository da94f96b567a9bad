"""What a terminal gets to see of what others have written."""

import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.cli.page import Piece, pieces_of
from deltawire.cli.printing import printable
from deltawire.events import Delta
from deltawire.messages import Snapshot
from tests.support.sample_events import CREATED_AT


def delta(said: dict[str, object], index: int = 0) -> Delta:
    chunk = msgspec.Raw(msgspec.json.encode({"choices": [{"index": index, "delta": said}]}))
    return Delta(job_id="j", sequence_number=3, attempt=1, created_at=CREATED_AT, chunk=chunk)


@given(st.text())
def test_no_control_character_reaches_a_terminal(text: str) -> None:
    """But line ends and tabs. What is no control character stays as it is."""
    shown = printable(text)
    assert {each for each in shown if unicodedata.category(each) == "Cc"} <= {"\n", "\t"}
    assert "\u202e" not in shown
    plain = [each for each in text if unicodedata.category(each) not in {"Cc", "Cf"}]
    assert not set(plain) - set(shown)


def test_signs_stand_for_control_characters() -> None:
    """So that it can be seen that there was one."""
    assert printable("a\x1b[2J\x07\x7f\x9b\r\n\tb") == "a␛[2J␇␡�\n\tb"


@pytest.mark.parametrize(
    ("said", "pieces"),
    [
        ({"content": "a"}, [Piece("text", "a")]),
        ({"content": None, "role": "assistant"}, []),
        ({"refusal": "no"}, [Piece("text", "no")]),
        ({"reasoning": "hm", "reasoning_content": "hm"}, [Piece("reasoning", "hm")]),
        (
            {"content": [{"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]}]},
            [Piece("reasoning", "hm")],
        ),
        ({"content": [{"type": "text", "text": "a"}]}, [Piece("text", "a")]),
        (
            {"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": "{"}}]},
            [Piece("call", "f", starts_call=True), Piece("call", "{")],
        ),
        ({"tool_calls": [{"index": 0, "custom": {}}]}, []),
    ],
)
def test_what_a_delta_adds(said: dict[str, object], pieces: list[Piece]) -> None:
    """Text, thoughts and calls of the first choice, by the names that gateways have for them."""
    assert list(pieces_of(delta(said))) == pieces
    assert list(pieces_of(delta(said, index=1))) == []


def test_a_snapshot_has_its_pieces_too() -> None:
    """And one without a completion has none."""
    whole = {"choices": [{"index": 0, "message": {"content": "so far"}}]}
    assert list(pieces_of(Snapshot(job_id="j", sequence_number=9, completion=whole))) == [
        Piece("text", "so far")
    ]
    assert list(pieces_of(Snapshot(job_id="j", sequence_number=9, completion=None))) == []
