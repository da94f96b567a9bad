"""The fold is the `chat.completion` that the non-streaming call would have returned."""

import copy
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire.codec import (
    DeltaEncoder,
    encode_snapshot,
    is_snapshot,
    read_chunk,
    sequence_number_of,
    type_of,
)
from deltawire.events import Event
from deltawire.fold import Fold
from deltawire.log_fold import LogFold
from deltawire.sse_decoder import SseDecoder
from tests.support import sample_events as sample
from tests.support.recorded_streams import RECORDED
from tests.support.sample_events import text_chunk

Json = dict[str, Any]


def fold(*chunks: Json) -> Json:
    result = Fold()
    for chunk in chunks:
        result.add(chunk)
    completion = result.completion()
    assert completion is not None
    return completion


def choice_chunk(delta: Any, *, index: int = 0, **rest: Any) -> Json:  # odd shapes are welcome
    return {**text_chunk(""), "choices": [{"index": index, "delta": delta, **rest}]}


def message(*deltas: Any) -> Json:  # as above
    result: Json = fold(*(choice_chunk(delta) for delta in deltas))["choices"][0]["message"]
    return result


def test_a_look_at_tool_calls_shows_those_that_changed() -> None:
    """Each in its place, whole: who looks at every delta must not see thousands of calls each time."""

    def delta(*calls: Json) -> Json:
        return choice_chunk({"tool_calls": list(calls)})

    def call(index: int, arguments: str = "", **rest: Any) -> Json:
        return {"index": index, "function": {"arguments": arguments}, **rest}

    grown = Fold()
    assert grown.changed_tool_calls() == []
    grown.add(delta(*(call(index, id=f"c{index}") for index in range(3))))
    assert [place for place, _ in grown.changed_tool_calls()] == [0, 1, 2]
    assert grown.changed_tool_calls() == []
    for changed in delta(call(1, "{")), delta(call(1, "}", id="c1")), delta(call(1, " ", type="function")):
        grown.add(changed)
        assert [place for place, _ in grown.changed_tool_calls()] == [1]
    again = Fold.from_state(json.loads(json.dumps(grown.state())))
    again.add(delta(call(2, "x")))
    shown = again.changed_tool_calls()
    assert [place for place, _ in shown] == [0, 1, 2]
    assert [each["function"]["arguments"] for _, each in shown] == ["", "{} ", "x"]


def test_text_is_joined_into_a_completion() -> None:
    """Role once, content in order, the last finish_reason, and the object's name without `.chunk`."""
    chunks = [
        choice_chunk({"role": "assistant", "content": ""}, finish_reason=None),
        text_chunk("Hel"),
        text_chunk("lo"),
        choice_chunk({}, finish_reason="stop"),
    ]
    assert fold(*chunks) == {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_700_000_000,
        "model": "m",
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hello"},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": None,
    }


def test_nothing_folds_to_nothing() -> None:
    """Without a chunk there is no completion."""
    assert Fold().is_empty
    assert Fold().completion() is None
    assert Fold().finish_reasons() == []


def test_an_open_choice_has_no_finish_reason() -> None:
    """A fold can be looked at at any time; what is not finished says null."""
    result = Fold()
    result.add(text_chunk("a"))
    result.add(text_chunk("b", index=1, finish_reason="length"))
    assert result.finish_reasons() == [None, "length"]


def test_a_finish_reason_stays() -> None:
    """A later chunk with `finish_reason: null` (usage, filters) does not reopen a choice."""
    result = fold(text_chunk("a", finish_reason="stop"), text_chunk(""))
    assert result["choices"][0]["finish_reason"] == "stop"


def test_a_role_said_in_every_chunk_is_said_once() -> None:
    """Gateways that repeat the role do not make `assistantassistant`; without one it is `assistant`."""
    assert message({"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}) == {
        "role": "assistant",
        "content": "ab",
    }
    assert message({"role": "", "content": "a"}, {"role": "tool"})["role"] == "tool"
    assert message({"content": "a"})["role"] == "assistant"


def test_choices_are_kept_apart_and_in_order_of_index() -> None:
    """Interleaved choices fold each for itself, whichever came first."""
    result = fold(
        text_chunk("b1", index=1),
        text_chunk("a1", index=0),
        text_chunk("b2", index=1, finish_reason="length"),
        text_chunk("a2", index=0, finish_reason="stop"),
    )
    assert [
        (choice["index"], choice["message"]["content"], choice["finish_reason"])
        for choice in result["choices"]
    ] == [(0, "a1a2", "stop"), (1, "b1b2", "length")]


def test_tool_calls_come_in_pieces() -> None:
    """Arguments are joined by the call's index; `index` itself is a streaming field and goes."""
    assert message(
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call(0, "", id="c0", type="function", name="f")],
        },
        {"tool_calls": [call(0, '{"a"')]},
        {"tool_calls": [call(1, "", id="c1", type="function", name="g"), call(0, ":1}")]},
        {"tool_calls": [call(1, "{}")]},
    ) == {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c0", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}},
            {"id": "c1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


def call(index: int, arguments: str, *, name: str | None = None, **rest: str) -> Json:
    function = {"arguments": arguments} if name is None else {"name": name, "arguments": arguments}
    return {"index": index, **rest, "function": function}


def test_a_tool_call_said_again_whole_is_said_once() -> None:
    """Gateways that repeat id, type and name in each piece mean one call; a name in pieces is joined."""
    (tool_call,) = message(
        {"tool_calls": [call(0, "{", id="c", type="function", name="get")]},
        {"tool_calls": [call(0, "}", id="c", type="function", name="get")]},
        {"tool_calls": [call(0, "", name="_weather")]},
    )["tool_calls"]
    assert tool_call == {
        "id": "c",
        "type": "function",
        "function": {"name": "get_weather", "arguments": "{}"},
    }


def test_tool_calls_stand_in_order_of_index() -> None:
    """As choices do, and as the non-streaming call returns them, whichever piece came first."""
    tool_calls = message({"tool_calls": [call(1, "", id="c1")]}, {"tool_calls": [call(0, "", id="c0")]})[
        "tool_calls"
    ]
    assert [tool_call["id"] for tool_call in tool_calls] == ["c0", "c1"]


def test_a_legacy_function_call_is_joined() -> None:
    """`function_call`, deprecated but served, folds like a tool call."""
    assert message({"function_call": {"name": "f", "arguments": ""}}, {"function_call": {"arguments": "{}"}})[
        "function_call"
    ] == {"name": "f", "arguments": "{}"}


def test_a_refusal_is_joined_and_content_stays_null() -> None:
    """`content: null` is what the non-streaming call says beside a refusal."""
    assert message(
        {"role": "assistant", "content": None, "refusal": ""}, {"refusal": "I'm "}, {"refusal": "sorry"}
    ) == {"role": "assistant", "content": None, "refusal": "I'm sorry"}


def test_logprobs_are_appended() -> None:
    """Token entries follow each other; a null list stays null; `logprobs: null` changes nothing."""
    first, second = {"token": "a", "logprob": -1.5}, {"token": "b", "logprob": -0.5}
    result = fold(
        choice_chunk({"content": "a"}, logprobs={"content": [first], "refusal": None}),
        choice_chunk({}, logprobs=None),
        choice_chunk({"content": "b"}, logprobs={"content": [second], "refusal": None}),
    )
    assert result["choices"][0]["logprobs"] == {"content": [first, second], "refusal": None}


def test_usage_comes_in_a_chunk_without_choices() -> None:
    """With `stream_options.include_usage` the last chunk has usage only; the nulls before it say nothing."""
    usage = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}
    assert (
        fold(
            {**text_chunk("a"), "usage": None},
            {**text_chunk(""), "choices": [], "usage": usage},
            {**text_chunk(""), "choices": [], "usage": None},
        )["usage"]
        == usage
    )


def test_running_usage_is_replaced_not_added() -> None:
    """Gateways that send usage with every chunk send the total so far."""
    assert fold(
        {**text_chunk("a"), "usage": {"total_tokens": 1}}, {**text_chunk("b"), "usage": {"total_tokens": 2}}
    )["usage"] == {"total_tokens": 2}


def test_azures_empty_first_chunk() -> None:
    """Azure's first chunk has filters and empty id and model; the next chunk's stand, the filters stay."""
    filters = [{"prompt_index": 0, "content_filter_results": {}}]
    result = fold(
        {"id": "", "object": "", "created": 0, "model": "", "choices": [], "prompt_filter_results": filters},
        text_chunk("a"),
    )
    assert (result["id"], result["model"], result["created"]) == ("chatcmpl-1", "m", 1_700_000_000)
    assert result["object"] == "chat.completion"
    assert result["prompt_filter_results"] == filters


def test_the_first_id_stays() -> None:
    """A gateway that makes a new id for each chunk gets one completion with the first."""
    assert fold(text_chunk("a"), {**text_chunk("b"), "id": "other"})["id"] == "chatcmpl-1"


def test_vendor_fields_are_kept_everywhere() -> None:
    """Unknown fields survive at the top, in a choice and in a message; text in them is joined."""
    result = fold(
        {
            **choice_chunk({"reasoning_content": "be"}, stop_sequence="x"),
            "system_fingerprint": "fp",
            "x_groq": {},
        },
        {
            **choice_chunk({"reasoning_content": "cause", "n": 1}, stop_sequence=None),
            "system_fingerprint": None,
        },
    )
    assert (result["system_fingerprint"], result["x_groq"]) == ("fp", {})
    (choice,) = result["choices"]
    assert choice["stop_sequence"] == "x"
    assert choice["message"]["reasoning_content"] == "because"
    assert choice["message"]["n"] == 1


def test_nulls_say_nothing() -> None:
    """null where text has come does not erase it, and null alone stays null."""
    assert message({"content": "a", "x": None}, {"content": None}, {"content": "b"}) == {
        "role": "assistant",
        "content": "ab",
        "x": None,
    }


@pytest.mark.parametrize("index", [True, None, "1", 1.0, -1, 10**6, 10**30, []])
def test_an_index_that_is_none_is_0(index: Any) -> None:
    """Some gateways leave it out; an odd one would not pass as the index of an output."""
    (choice,) = fold(choice_chunk({"content": "a"}), choice_chunk({"content": "b"}, index=index))["choices"]
    assert choice["index"] == 0
    assert choice["message"]["content"] == "ab"


def test_more_pieces_than_are_kept_apart() -> None:
    """Text stays whole past the number of pieces at which it is joined in between."""
    pieces = [f"{number}," for number in range(3_000)]
    assert message(*({"content": piece} for piece in pieces))["content"] == "".join(pieces)


# Odd shapes: the vocabulary is real, the values are anything.
_NAMES = st.sampled_from(
    (
        *("id", "type", "role", "index", "content", "tool_calls", "function", "name", "arguments"),
        *("choices", "delta", "message", "finish_reason", "logprobs", "usage", "model", "object", "x"),
    )
)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_NAMES, inner, max_size=4),
    max_leaves=12,
)
_DELTAS = st.dictionaries(_NAMES, _JSON, max_size=4)
_CHOICES = st.fixed_dictionaries(
    {"delta": _DELTAS | _JSON}, optional={"index": _JSON, "finish_reason": _JSON, "message": _JSON}
)
_CHUNKS = st.dictionaries(_NAMES, _JSON, max_size=5) | st.fixed_dictionaries(
    {"choices": st.lists(_CHOICES, max_size=3)}, optional={"id": _JSON, "usage": _JSON}
)


@settings(max_examples=50)  # generating odd JSON is what takes the time
@given(st.lists(_CHUNKS, max_size=6))
def test_odd_shapes_never_raise(chunks: list[Json]) -> None:
    """Any JSON objects fold into something that can be encoded, and no chunk is changed by it."""
    before = copy.deepcopy(chunks)
    result = Fold()
    for chunk in chunks:
        result.add(chunk)
    msgspec.json.encode(result.completion())
    assert len(result.finish_reasons()) == len((result.completion() or {"choices": ()})["choices"])
    assert chunks == before


@settings(max_examples=50)  # generating odd JSON is what takes the time
@given(st.lists(_CHUNKS, max_size=6))
def test_looking_in_between_changes_nothing(chunks: list[Json]) -> None:
    """Folding any prefix, looking, and folding the rest equals folding all at once."""
    at_once, stepwise = Fold(), Fold()
    for chunk in chunks:
        at_once.add(copy.deepcopy(chunk))
        stepwise.add(copy.deepcopy(chunk))
        stepwise.completion()
        stepwise.completion()
    assert stepwise.completion() == at_once.completion()


@pytest.mark.parametrize("index", [None, "1", [0], {}])
def test_a_tool_call_whose_index_is_no_number_never_raises(index: Json) -> None:
    """Beside one that has an index, or none: the job must get its end."""
    fold = Fold()
    fold.add({"choices": [{"delta": {"tool_calls": [{"id": "a"}, {"index": index, "id": "b"}]}}]})
    completion = fold.completion()
    assert completion is not None
    assert [call["id"] for call in completion["choices"][0]["message"]["tool_calls"]] == ["a", "b"]


@pytest.mark.parametrize("value", [5, 1.5, True])
def test_tool_calls_that_are_no_list_never_raise(value: float) -> None:
    """`"tool_calls": true` is an odd shape like any other."""
    message({"content": "a", "tool_calls": value})


@pytest.mark.parametrize("value", [{"content": "whole"}, "whole", 5, [1]])
def test_a_message_in_a_chunk_does_not_replace_what_was_folded(value: Any) -> None:  # odd on purpose
    """A gateway that sends `message` beside `delta` neither loses the text so far nor raises."""
    result = fold(
        choice_chunk({"content": "a"}),
        choice_chunk({"content": "b"}, message=value),
        choice_chunk({"content": "c"}),
    )
    assert result["choices"][0]["message"]["content"] == "abc"


@pytest.mark.parametrize("depth", [500, 900])
def test_what_can_be_read_can_be_folded(depth: int) -> None:
    """A chunk is either refused by read_chunk or folds: nesting cannot end a stream in RecursionError."""
    payload = b'{"choices":[{"index":0,"delta":{"x":' + b'{"a":' * depth + b"1" + b"}" * depth + b"}}]}"
    try:
        chunk, _ = read_chunk(payload)
    except ValueError:
        return
    try:
        fold(chunk)
    except RecursionError:
        pytest.fail("nested too deeply for the fold", pytrace=False)  # its traceback takes seconds to print


def test_a_chunk_of_usage_alone_is_a_chunk() -> None:
    """`None if no chunk was added`: usage without id or choices is not nothing."""
    result = Fold()
    result.add({"choices": [], "usage": {"total_tokens": 3}})
    assert not result.is_empty
    assert result.completion() is not None


# What sloppy gateways send.


def pieces(*items: Any, **first: Any) -> list[Json]:  # odd shapes are welcome
    """The tool calls of a message whose deltas have these entries, one each."""
    result: list[Json] = message(first, *({"tool_calls": [item]} for item in items))["tool_calls"]
    return result


def whole(name: str, arguments: Any = "{}", **more: Any) -> Json:
    return {"type": "function", "function": {"name": name, "arguments": arguments}, **more}


@pytest.mark.parametrize("index", [{}, {"index": None}, {"index": 0}], ids=["without", "null", "always 0"])
@pytest.mark.parametrize("at_once", [True, False])
def test_whole_calls_under_one_index_or_none(index: Json, at_once: bool) -> None:
    """Gemini's, Ollama's: a new id is a new call, in a chunk of its own or not."""
    calls = [
        whole("f", '{"a":1}', id="a", **index),
        whole("f", "{}", id="b", **index),
        whole("g", id="c", **index),
    ]
    found = message({"tool_calls": calls})["tool_calls"] if at_once else pieces(*calls)
    assert [(call["id"], call["function"]["name"]) for call in found] == [("a", "f"), ("b", "f"), ("c", "g")]
    assert [call["function"]["arguments"] for call in found] == ['{"a":1}', "{}", "{}"]


@pytest.mark.parametrize("more", [{}, {"index": 0}, {"index": 0, "id": ""}, {"id": None}])
def test_whole_calls_without_an_id(more: Json) -> None:
    """Arguments that begin anew after whole ones are another call's."""
    found = pieces(whole("f", '{"a":"}"}', **more), whole("g", "{}", **more), whole("g", '{"b":2}', **more))
    assert [call["function"]["arguments"] for call in found] == ['{"a":"}"}', "{}", '{"b":2}']


def test_a_call_in_pieces_without_index() -> None:
    """What has neither index nor id nor name belongs to the last call."""
    more = {"function": {"arguments": ":1}"}, "id": "", "type": ""}
    assert pieces(
        whole("f", '{"a"', id="a"), more, whole("g", "", id="b"), {"function": {"arguments": "{}"}}
    ) == [
        whole("f", '{"a":1}', id="a"),
        whole("g", "{}", id="b"),
    ]


def test_pieces_that_name_their_call_by_id_find_it() -> None:
    """With an index for all or none, also when another call has begun in between."""
    for index in ({}, {"index": 0}):
        first, second = {"id": "a", **index}, {"id": "b", **index}
        found = pieces(
            whole("f", "{", **first),
            whole("g", "[", **second),
            {"function": {"arguments": "}"}, **first},
            {"function": {"arguments": "]"}, **second},
        )
        assert [call["function"]["arguments"] for call in found] == ["{}", "[]"]


def test_another_id_in_each_piece_does_not_make_another_call() -> None:
    """Poolside's: only a piece with a name begins one."""
    assert pieces(
        whole("f", "{", id="a", index=0),
        {"index": 0, "id": "x", "function": {"arguments": "}"}},
        {"index": 0, "id": "y", "function": {"name": "", "arguments": " "}},
    ) == [whole("f", "{} ", id="a")]


def test_the_same_id_under_two_indexes_is_two_calls() -> None:
    """llama.cpp's slip: where there are indexes they count."""
    assert len(pieces(whole("f", id="a", index=0), whole("f", id="a", index=1))) == 2


def test_names_that_are_repeated_beside_arguments_in_pieces() -> None:
    """Only whole arguments end a call, not what looks like their end."""
    found = pieces(whole("f", '{"a":{}', index=0), whole("f", '{"', index=0), whole("f", "}", index=0))
    assert [call["function"] for call in found] == [{"name": "f", "arguments": '{"a":{}{"}'}]


@pytest.mark.parametrize(
    ("arguments", "text"), [({"a": [1, None]}, '{"a":[1,null]}'), ({}, "{}"), (None, ""), ("", "")]
)
def test_arguments_are_a_text(arguments: Any, text: str) -> None:
    """Also where a gateway sends the object itself, or null for a function without parameters."""
    assert pieces(whole("f", arguments, index=0)) == [whole("f", text)]
    function_call = {"name": "f", "arguments": arguments}
    assert message({"function_call": function_call})["function_call"] == {"name": "f", "arguments": text}


def test_arguments_after_null() -> None:
    """null says nothing."""
    assert pieces(whole("f", None, index=0), {"index": 0, "function": {"arguments": "{}"}}) == [whole("f")]


@pytest.mark.parametrize("tool_calls", [None, []])
def test_no_tool_calls_said_in_every_chunk(tool_calls: Any) -> None:
    """They neither make one nor undo one."""
    assert not message({"content": "a", "tool_calls": tool_calls})["tool_calls"]
    assert pieces(whole("f", "", index=0), {"index": 0, "function": None}) == [whole("f", "")]
    assert message({"tool_calls": [whole("f", index=0)]}, {"tool_calls": tool_calls})["tool_calls"] == [
        whole("f")
    ]


def test_the_finish_reason_may_come_late_and_alone() -> None:
    """After the usage, without a delta; an empty text is none, and a later null does not undo it."""
    usage = {"total_tokens": 2}
    chunks = [
        text_chunk("a", finish_reason=""),
        {"choices": [], "usage": usage},
        {"choices": [{"index": 0, "finish_reason": "stop"}]},
        {"id": "", "object": "", "created": 0, "choices": [{"index": 0, "finish_reason": None}]},
    ]
    result = Fold()
    result.add(chunks[0])
    assert result.finish_reasons() == [None]
    completion = fold(*chunks)
    assert (completion["choices"][0]["finish_reason"], completion["usage"]) == ("stop", usage)


def test_chunks_with_nothing_in_them() -> None:
    """Null choices, null deltas, an empty object."""
    nothing: list[Json] = [
        {},
        {"choices": None},
        {"choices": [None]},
        {"choices": [{"index": 0, "delta": None}]},
    ]
    result = fold(*nothing, text_chunk("a"), *nothing)
    assert result["choices"][0]["message"] == {"role": "assistant", "content": "a"}
    assert fold({"choices": [{"index": 0, "delta": None, "finish_reason": "stop"}]})["choices"][0][
        "message"
    ] == {
        "role": "assistant",
        "content": None,
    }


@pytest.mark.parametrize("role", [None, ""])
def test_an_empty_role_is_the_assistants(role: Any) -> None:
    """Whether it comes first or in every chunk."""
    assert message({"role": role, "content": "a"}, {"role": role, "content": "b"})["role"] == "assistant"


def thinking(text: str) -> Json:
    return {"type": "thinking", "thinking": [{"type": "text", "text": text}]}


@pytest.mark.parametrize(
    ("contents", "content"),
    [
        pytest.param(
            [
                "",
                [thinking("Ok")],
                [thinking("ay")],
                [{"type": "text", "text": "A"}],
                [{"type": "text", "text": "B"}],
            ],
            [thinking("Okay"), {"type": "text", "text": "AB"}],
            id="parts only",
        ),
        pytest.param(
            [[thinking("Okay")], "A", "", "B", [thinking("so")]],
            [thinking("Okay"), {"type": "text", "text": "AB"}, thinking("so")],
            id="text after parts",
        ),
        pytest.param(["A", [thinking("Okay")], "B"], None, id="parts after text"),
        pytest.param(
            [[{"type": "image_url", "n": 1}], [{"type": "image_url", "n": 2}]], None, id="other parts"
        ),
    ],
)
def test_content_in_parts(contents: list[Any], content: Any) -> None:
    """Mistral's reasoning models: parts of a type that follow each other are one, and nothing is lost."""
    if content is None:
        content = [
            item for part in contents for item in (part if isinstance(part, list) else [_text_part(part)])
        ]
    assert message(*({"content": part} for part in contents))["content"] == content


def _text_part(text: str) -> Json:
    return {"type": "text", "text": text}


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": [], "x_groq": {"id": "r", "usage": {"total_tokens": 3}}},
        {"choices": [{"index": 0, "delta": {}, "usage": {"total_tokens": 3}}]},
    ],
    ids=["Groq", "Moonshot"],
)
def test_usage_in_other_places(chunk: Json) -> None:
    """It counts where there is none at the top, and is shown there."""
    result = fold(text_chunk("a"), {**chunk, "usage": {}})
    assert result["usage"] == {"total_tokens": 3}
    assert "usage" not in result["choices"][0]
    assert fold(chunk, {"usage": {"total_tokens": 4}, "choices": []})["usage"] == {"total_tokens": 4}


def test_usage_beside_the_last_text() -> None:
    """Not everybody sends a chunk of its own."""
    assert fold({**text_chunk("a"), "usage": {"total_tokens": 3}})["usage"] == {"total_tokens": 3}


def test_reasoning_details_are_joined_by_index_and_type() -> None:
    """OpenRouter repeats type and format in each piece, and numbers each type anew."""
    text = {"type": "reasoning.text", "format": "unknown", "index": 0}
    secret = {"type": "reasoning.encrypted", "format": "unknown", "index": 0, "data": "x"}
    details = [
        [{**text, "text": "a"}],
        [{**text, "text": "b"}],
        [secret],
        [{"index": 0, "type": "reasoning.text", "text": "c"}],
        [{"index": 1, "type": "reasoning.text", "text": "d"}],
        [{"index": 1, "type": "", "text": "e"}, {"index": 1, "text": "f"}],
    ]
    assert message(*({"reasoning_details": detail} for detail in details))["reasoning_details"] == [
        {**text, "text": "abc"},
        secret,
        {"index": 1, "type": "reasoning.text", "text": "def"},
    ]


def test_lists_of_a_choice_go_on() -> None:
    """vLLM's token ids come in pieces, as everything else does; filters are said anew."""
    result = fold(
        choice_chunk({}, token_ids=[1], content_filter_results={"hate": {"severity": "safe"}}),
        choice_chunk({}, token_ids=[2, 3], content_filter_results={"hate": {"severity": "low"}}),
    )["choices"][0]
    assert result["token_ids"] == [1, 2, 3]
    assert result["content_filter_results"] == {"hate": {"severity": "low"}}


def test_padding_is_no_part_of_the_answer() -> None:
    """OpenAI's `obfuscation`, Mistral's `p`."""
    assert {"obfuscation", "p"}.isdisjoint(fold({**text_chunk("a"), "obfuscation": "x", "p": "y"}))


def test_many_calls_and_pieces_take_linear_time() -> None:
    """Each piece finds its call at once; if it looked for it, this would take minutes."""
    result = Fold()
    for number in range(20_000):
        result.add(choice_chunk({"tool_calls": [whole("f", "{}", index=number, id=f"c{number}")]}))
    for number in range(20_000):
        result.add(choice_chunk({"tool_calls": [{"index": number, "function": {"arguments": " "}}]}))
    completion = result.completion()
    assert completion is not None
    assert len(completion["choices"][0]["message"]["tool_calls"]) == 20_000


# LogFold.


def test_a_log_folds_event_by_event() -> None:
    """Deltas are folded, other events only move the number; each comes back decoded."""
    result = LogFold()
    events: list[Event] = [
        sample.queued(),
        sample.in_progress(2),
        sample.delta(3, "a"),
        sample.delta(4, "b"),
        sample.completed(5),
    ]
    for event in events:
        assert result.add(sample.line(event)) == event
        assert result.sequence_number == event.sequence_number
    completion = result.completion()
    assert completion is not None
    assert completion["choices"][0]["message"]["content"] == "ab"


def test_restarted_discards_what_came_before() -> None:
    """The completion is the fold since the last `restarted`."""
    result = LogFold()
    for event in (sample.delta(1, "a"), sample.restarted(2)):
        result.add(sample.line(event))
    assert result.completion() is None
    result.add(sample.line(sample.delta(3, "b", attempt=2)))
    completion = result.completion()
    assert completion is not None
    assert completion["choices"][0]["message"]["content"] == "b"


def test_an_empty_log_folds_to_nothing() -> None:
    """No event: no completion, number 0."""
    assert LogFold().completion() is None
    assert LogFold().sequence_number == 0


# Streams recorded from OpenAI.


def _pieces(chunks: list[Json], index: int, name: str) -> list[str]:
    deltas = [c["delta"] for chunk in chunks for c in chunk["choices"] if c["index"] == index]
    return [delta[name] for delta in deltas if delta.get(name) is not None]


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_streams_fold_to_their_concatenation(path: Path) -> None:
    """Content, refusals, arguments and logprobs are what simple joining of each stream's pieces gives."""
    payloads = SseDecoder().feed(path.read_bytes())[:-1]
    encoder, result = DeltaEncoder("job", 1), LogFold()
    for number, payload in enumerate(payloads, 1):
        _, published = read_chunk(payload)
        assert published == payload
        result.add(encoder.encode(number, 1.0, published))
    completion, chunks = result.completion(), [json.loads(payload) for payload in payloads]
    assert completion is not None
    assert completion["object"] == "chat.completion"
    assert completion["choices"]
    for choice in completion["choices"]:
        index, final = choice["index"], choice["message"]
        for name in ("content", "refusal"):
            pieces = _pieces(chunks, index, name)
            assert final.get(name) == ("".join(pieces) if pieces else None)
        arguments: dict[int, str] = {}
        for delta_calls in _pieces(chunks, index, "tool_calls"):
            for piece in delta_calls:
                assert isinstance(piece, dict)
                at = piece["index"]
                arguments[at] = arguments.get(at, "") + piece["function"].get("arguments", "")
        tool_calls = final.get("tool_calls", [])
        assert [tool_call["function"]["arguments"] for tool_call in tool_calls] == list(arguments.values())
        assert all(json.loads(text) is not None for text in arguments.values())
        assert all(tool_call["id"] and tool_call["function"]["name"] for tool_call in tool_calls)
        assert choice["finish_reason"] in {"stop", "tool_calls", "length"}
        tokens = [
            entry["token"]
            for chunk in chunks
            for c in chunk["choices"]
            if c["index"] == index and c.get("logprobs")
            for entry in c["logprobs"].get("content") or c["logprobs"].get("refusal") or ()
        ]
        if choice["logprobs"] is not None:
            folded = choice["logprobs"]["content"] or choice["logprobs"]["refusal"]
            assert [entry["token"] for entry in folded] == tokens


@settings(max_examples=50)  # as above
@given(chunks=st.lists(_CHUNKS, max_size=6), data=st.data())
def test_a_fold_goes_on_from_a_snapshot(chunks: list[Json], data: st.DataObject) -> None:
    """Cut anywhere, written down and read again, a fold ends as if it had never been cut."""
    chunks = msgspec.json.decode(msgspec.json.encode(chunks))  # as they come: JSON knows no infinity
    cut = data.draw(st.integers(0, len(chunks)))
    whole, log = Fold(), LogFold()
    for chunk in chunks[:cut]:
        whole.add(copy.deepcopy(chunk))
    log.add(encode_snapshot("job", 7, attempt=1, created_at=1.5, fold=whole.state()))
    assert log.sequence_number == 7
    assert log.completion() == whole.completion()
    for chunk in chunks[cut:]:
        whole.add(copy.deepcopy(chunk))
        log.fold.add(copy.deepcopy(chunk))
    assert log.completion() == whole.completion()
    assert log.fold.finish_reasons() == whole.finish_reasons()


def test_a_log_can_begin_with_a_snapshot() -> None:
    """It stands for the events up to its number; those after it are added."""
    before = Fold()
    before.add(text_chunk("Hel"))
    result = LogFold()
    line = encode_snapshot("job", 3, attempt=1, created_at=1.5, fold=before.state())
    assert (is_snapshot(line), type_of(line), sequence_number_of(line)) == (True, b"snapshot", 3)
    assert result.add(line) is None
    result.add(sample.line(sample.delta(4, "lo")))
    assert result.sequence_number == 4
    completion = result.completion()
    assert completion is not None
    assert completion["choices"][0]["message"]["content"] == "Hello"


def test_a_state_costs_what_its_texts_do() -> None:
    """A writer takes one again and again: logprobs, which no text is in pieces of, are not walked through."""
    fold = Fold()
    entries = [{"token": "a", "top_logprobs": [{"token": "b"}] * 20} for _ in range(10)]
    fold.add({"choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": entries}}]})
    shown = fold.state()["choices"][0]["logprobs"]["content"]
    assert all(a is b for a, b in zip(shown, entries, strict=True))


def test_what_was_shown_does_not_grow() -> None:
    """Whatever is added afterwards."""
    fold = Fold()
    chunk = {
        "choices": [{"index": 0, "delta": {"content": "a"}, "logprobs": {"content": [1]}, "token_ids": [1]}]
    }
    fold.add(chunk)
    first = fold.completion()
    before = msgspec.json.encode(first)
    fold.add(chunk)
    assert msgspec.json.encode(first) == before
