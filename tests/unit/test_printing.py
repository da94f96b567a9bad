"""What a terminal gets to see of what others have written."""

import unicodedata

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.cli.page import STYLES, Piece, pieces_of, summary
from deltawire.cli.printing import printable
from deltawire.events import Delta
from deltawire.messages import Snapshot
from tests.support.sample_events import CREATED_AT, completed

FIELDS = st.sampled_from(
    [
        *("choices", "index", "delta", "content", "text", "thinking", "refusal", "reasoning"),
        *("tool_calls", "function", "name", "arguments"),
    ]
)


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


json = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | st.sampled_from(["", "f"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(FIELDS, inner, max_size=4),
    max_leaves=20,
)


@given(st.dictionaries(FIELDS, json))
def test_odd_shapes_are_passed_over(chunk: dict[str, object]) -> None:
    """What a gateway sends is passed on as it is: a slip of its must not end the watching of a job."""
    event = msgspec.structs.replace(delta({}), chunk=msgspec.Raw(msgspec.json.encode(chunk)))
    for kind, text, _ in pieces_of(event):
        assert kind in STYLES
        assert isinstance(text, str)


def test_calls_without_a_function_are_passed_over() -> None:
    """The fold keeps whatever a gateway has sent."""
    calls: list[object] = [None, {"custom": {}}, {"function": "f"}, {"function": {"name": "g"}}]
    choice = {"index": 0, "message": {"content": None, "tool_calls": calls}}
    ended = msgspec.structs.replace(completed(3), completion={"choices": [choice]})
    assert str(summary(ended)[1]).endswith(", calls g")


def test_a_snapshot_has_its_pieces_too() -> None:
    """And one without a completion has none."""
    whole = {"choices": [{"index": 0, "message": {"content": "so far"}}]}
    assert list(pieces_of(Snapshot(job_id="j", sequence_number=9, completion=whole))) == [
        Piece("text", "so far")
    ]
    assert list(pieces_of(Snapshot(job_id="j", sequence_number=9, completion=None))) == []
