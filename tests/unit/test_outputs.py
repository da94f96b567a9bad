"""What the terminal event says can be relied on: whole tool calls, and the JSON that was asked for."""

from typing import Any

import msgspec
import pytest

from deltawire.codec import MAX_DEPTH, decode, encode_terminal
from deltawire.events import LEFT_OUT, MAX_EVENT_BYTES, Completed, Output, Timings
from deltawire.outputs import MAX_TEXT_BYTES, judge, parse, parsed_again, read_request

Json = dict[str, Any]
JSON_OBJECT: Json = {"response_format": {"type": "json_object"}}
JSON_SCHEMA: Json = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {}}}}


def completion(*choices: Json) -> Json:
    return {"choices": [{"index": index, **choice} for index, choice in enumerate(choices)]}


def choice(reason: Any, content: Any = None, **message: Any) -> Json:  # odd shapes are welcome
    return {"finish_reason": reason, "message": {"role": "assistant", "content": content, **message}}


def call(arguments: Any = "{}", name: Any = "f") -> Json:
    return {"id": "a", "type": "function", "function": {"name": name, "arguments": arguments}}


CUSTOM = {"id": "a", "type": "custom", "custom": {"name": "f", "input": "free text"}}
BY_NAME: Json = {"tool_choice": {"type": "function", "function": {"name": "f"}}}
BY_CUSTOM_NAME: Json = {"tool_choice": {"type": "custom", "custom": {"name": "f"}}}
BY_LEGACY_NAME: Json = {"function_call": {"name": "f"}}


@pytest.mark.parametrize(
    ("reason", "calls", "request_", "mark"),
    [
        ("tool_calls", [call()], {}, "complete"),
        ("tool_calls", [call('{"a":1}'), call()], {}, "complete"),
        ("function_call", [call()], {}, "complete"),
        ("tool_calls", [call("")], {}, "complete"),
        ("tool_calls", [CUSTOM], {}, "complete"),
        ("tool_calls", [call('{"a":')], {}, "incomplete"),
        ("tool_calls", [call(), call('{"a"')], {}, "incomplete"),
        ("tool_calls", [call("[]")], {}, "incomplete"),
        ("tool_calls", [call(name="")], {}, "incomplete"),
        ("tool_calls", [call(name=None)], {}, "incomplete"),
        ("tool_calls", [call(5)], {}, "incomplete"),
        ("tool_calls", [None], {}, "incomplete"),
        ("tool_calls", [{"id": "a"}], {}, "incomplete"),
        ("tool_calls", [{**call("{"), **CUSTOM}], {}, "incomplete"),
        ("tool_calls", [{**CUSTOM, "custom": {"name": "f"}}], {}, "incomplete"),
        ("length", [call()], {}, "incomplete"),
        ("content_filter", [call()], {}, "incomplete"),
        (None, [call()], {}, "incomplete"),
        (["tool_calls"], [call()], {}, "incomplete"),
        ("stop", [call()], {}, "incomplete"),
        ("stop", [call()], {"tool_choice": "required"}, "incomplete"),
        ("stop", [call()], {"tool_choice": "f"}, "incomplete"),
        ("stop", [call()], {"function_call": "auto"}, "incomplete"),
        ("stop", [call()], {"tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "incomplete"),
        ("stop", [call()], BY_NAME, "complete"),
        ("stop", [call()], BY_LEGACY_NAME, "complete"),
        ("stop", [CUSTOM], BY_CUSTOM_NAME, "complete"),
        ("stop", [call("")], BY_NAME, "incomplete"),
        ("stop", [call('{"a"')], BY_NAME, "incomplete"),
        ("stop", [call(name="g")], BY_NAME, "incomplete"),
    ],
)
def test_when_tool_calls_are_whole(reason: Any, calls: list[Any], request_: Json, mark: str) -> None:
    """The gateway says so, or the request has named the tool; and half of one never looks whole."""
    assert judge(completion(choice(reason, tool_calls=calls)), request_) == [
        Output(index=0, tool_calls=mark)  # type: ignore[arg-type] # one of two
    ]


def test_a_legacy_function_call_is_a_call() -> None:
    """It has the same marks."""
    whole, half = {"name": "f", "arguments": "{}"}, {"name": "f", "arguments": "{"}
    assert judge(completion(choice("function_call", function_call=whole)), {})[0].tool_calls == "complete"
    assert judge(completion(choice("function_call", function_call=half)), {})[0].tool_calls == "incomplete"
    assert judge(completion(choice("stop", function_call=whole)), BY_LEGACY_NAME)[0].tool_calls == "complete"


def test_arguments_may_be_larger_than_json_that_is_parsed() -> None:
    """They are not repeated in the event."""
    large = '{"a":"' + "x" * MAX_TEXT_BYTES + '"}'
    assert judge(completion(choice("tool_calls", tool_calls=[call(large)])), {})[0].tool_calls == "complete"


def test_choices_are_judged_each_for_itself() -> None:
    """Those that call nothing have no entry."""
    whole, cut = choice("tool_calls", tool_calls=[call()]), choice("length", tool_calls=[call()])
    outputs = judge(completion(whole, choice("stop", "text"), cut), {})
    assert [(output.index, output.tool_calls) for output in outputs] == [(0, "complete"), (2, "incomplete")]


@pytest.mark.parametrize("value", [True, 5, {"a": 1}])
def test_calls_that_are_no_list_are_not_whole(value: Any) -> None:
    """Nor does a legacy call beside them make them so."""
    legacy = {"name": "f", "arguments": "{}"}
    done = completion(choice("function_call", tool_calls=value, function_call=legacy))
    assert judge(done, {})[0].tool_calls == "incomplete"


@pytest.mark.parametrize("value", [None, [], {}, False])
def test_no_calls(value: Any) -> None:
    """`tool_calls: []` calls nothing."""
    assert judge(completion(choice("stop", "text", tool_calls=value)), {}) == []


def test_nothing_is_complete_that_was_ended_from_outside() -> None:
    """A job that was cancelled, or has failed, whatever its choices have said before."""
    done = completion(choice("tool_calls", tool_calls=[call()]), choice("stop", "{}"))
    first, second = judge(done, JSON_OBJECT, is_over=False)
    assert first.tool_calls == "incomplete"
    assert second.parsed is None
    assert second.parse_error is not None
    assert second.parse_error.reason == "incomplete"


@pytest.mark.parametrize("request_", [None, {}, JSON_OBJECT])
def test_no_completion_no_outputs(request_: Json | None) -> None:
    """Whatever was asked for."""
    assert judge(None, request_) == []


def reason_of(
    reason: Any, content: Any = None, request_: Json = JSON_OBJECT, **message: Any
) -> tuple[Any, Any]:
    (output,) = judge(completion(choice(reason, content, **message)), request_)
    if output.parse_error is not None:
        assert 0 < len(output.parse_error.message) <= 500
    return output.parsed, output.parse_error and output.parse_error.reason


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a":[1,2.5,"x",null]}', ({"a": [1, 2.5, "x", None]}, None)),
        (' \n{"a":1}\n', ({"a": 1}, None)),
        ("[1]", (None, "not_valid")),
        ("null", (None, "not_valid")),
        ('{"a":', (None, "not_json")),
        ('{"a":1} and more', (None, "not_json")),
        ('```json\n{"a":1}\n```', (None, "not_json")),
        ("", (None, "not_json")),
        (None, (None, "not_json")),
        ('{"a":NaN}', (None, "not_json")),
        ('{"a":1e999}', (None, "not_json")),
        ('{"a":"\ud800"}', ({"a": "?"}, None)),
        ('{"a":"' + "x" * MAX_TEXT_BYTES + '"}', (None, "too_large")),
        ('{"a":' * 101 + "1" + "}" * 101, (None, "too_large")),
        ('{"a":' * 50_000, (None, "too_large")),
        (
            [
                {"type": "thinking", "thinking": []},
                {"type": "text", "text": '{"a":'},
                {"type": "text", "text": "1}"},
            ],
            ({"a": 1}, None),
        ),
    ],
)
def test_json_objects(text: Any, expected: tuple[Any, Any]) -> None:
    """Parsed as a whole and strictly; what does not parse says why, and never raises."""
    assert reason_of("stop", text) == expected


def test_brackets_in_texts_are_no_depth() -> None:
    """A program as a text is as flat as any text."""
    value = {"code": "{[" * 500, "deep": 1}
    assert reason_of("stop", msgspec.json.encode(value).decode()) == (value, None)
    nested = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse(nested)[1] is None


def test_any_json_will_do_for_a_schema() -> None:
    """Whether it keeps to the schema is for the worker to say."""
    assert reason_of("stop", "[1]", JSON_SCHEMA) == ([1], None)


@pytest.mark.parametrize("reason", ["length", "model_length", "content_filter", None, 5, []])
def test_what_was_cut_off_is_not_parsed(reason: Any) -> None:
    """Even if it happens to parse."""
    assert reason_of(reason, '{"a":1}') == (None, "incomplete")


@pytest.mark.parametrize("reason", ["stop", "eos_token", "end_turn"])
def test_an_end_by_any_other_name_is_an_end(reason: str) -> None:
    """Such a job has completed, so its JSON is whole."""
    assert reason_of(reason, '{"a":1}') == ({"a": 1}, None)


def test_a_refusal_is_not_parsed() -> None:
    """It says so, whatever else there is."""
    assert reason_of("stop", None, refusal="I cannot") == (None, "refused")


def test_calls_instead_of_json() -> None:
    """A choice that calls a tool owes no text."""
    assert reason_of("tool_calls", None, tool_calls=[call()]) == (None, None)
    assert reason_of("stop", None, {**JSON_OBJECT, **BY_NAME}, tool_calls=[call()]) == (None, None)
    assert reason_of("length", None, tool_calls=[call()]) == (None, "incomplete")


@pytest.mark.parametrize(
    "response_format",
    [None, "json_object", [], {"type": "text"}, {"type": ["json_object"]}, {"type": "grammar"}],
)
def test_no_json_was_asked_for(response_format: Any) -> None:
    """Then there is no entry."""
    assert judge(completion(choice("stop", "{}")), {"response_format": response_format}) == []


def test_the_request_of_a_record() -> None:
    """None where it is gone, or was no object."""
    assert read_request(b'{"model":"m"}') == {"model": "m"}
    assert (read_request(None), read_request(b"null"), read_request(b"[]")) == (None, None, None)


# Events that are too large.


def event(text: str, parsed: Any, **more: Any) -> Completed:
    return Completed(
        job_id="job",
        sequence_number=7,
        attempt=1,
        created_at=1.0,
        completion=completion(choice("stop", text)),
        timings=Timings(queued_s=None, first_delta_s=None, total_s=1.0),
        outputs=[Output(index=0, tool_calls="complete", parsed=parsed)],
        **{"usage": {"total_tokens": 1}, "usage_source": "provider", **more},
    )


def shortened(full: Completed) -> Completed:
    line = encode_terminal(full)
    assert len(line) <= MAX_EVENT_BYTES
    result = decode(line)
    assert isinstance(result, Completed)
    return result


def test_what_a_large_event_does_without() -> None:
    """First the parsed JSON, then the completion, then what no honest gateway makes large."""
    fits = event("x", {"a": 1})
    assert shortened(fits) == fits

    large = shortened(event("x" * 150_000, ["x" * 150_000]))
    assert large.completion == completion(choice("stop", "x" * 150_000))
    assert large.outputs == [Output(index=0, tool_calls="complete", parse_error=LEFT_OUT)]

    larger = shortened(event("x" * 300_000, ["x" * 300_000]))
    assert (larger.completion, larger.completion_url) == (None, "/v1/jobs/job")
    assert larger.outputs == large.outputs
    assert larger.usage == {"total_tokens": 1}

    used = shortened(event("x", [1], usage={"x": "x" * 300_000}))
    assert (used.completion, used.usage, used.usage_source) == (None, None, "unavailable")

    many = [Output(index=index, tool_calls="incomplete") for index in range(10_000)]
    assert shortened(msgspec.structs.replace(fits, outputs=many)).outputs is msgspec.UNSET


def test_what_was_left_out_is_parsed_again() -> None:
    """From the text; but what was wrong stays wrong."""
    done = completion(choice("stop", '{"a":1}'), choice("stop", '{"a":2}'))
    wrong = judge(completion(choice("length"), choice("length")), JSON_OBJECT)[1]
    left_out = Output(index=0, tool_calls="complete", parse_error=LEFT_OUT)
    assert parsed_again([left_out, wrong], done) == [
        Output(index=0, tool_calls="complete", parsed={"a": 1}),
        wrong,
    ]
    assert parsed_again([left_out], None) == [left_out]
