"""A body of OpenAI's Responses API as a chat completion, or its refusal by name (PROTOCOL §5.11)."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.errors import WireError
from deltawire_relay.responses_request import ResponsesRequest, read_responses_request

Json = dict[str, Any]
BODY: Json = {"model": "m", "input": "hi", "background": True}
USAGE = {"include_usage": True}


def read(**fields: Any) -> ResponsesRequest:
    return read_responses_request({**BODY, **fields})


def test_a_text_is_a_message_of_the_user() -> None:
    asked = read()
    messages = [{"role": "user", "content": "hi"}]
    assert asked.request == {"model": "m", "messages": messages, "stream_options": USAGE}
    assert asked.response == {"model": "m"}
    assert not asked.is_streamed
    assert asked.options.on_abandon == "continue"


def test_every_parameter_has_its_name_there() -> None:
    schema = {"type": "object"}
    asked = read(
        instructions="Be brief.",
        stream=True,
        tools=[{"type": "function", "name": "f", "parameters": schema, "strict": True, "description": None}],
        tool_choice={"type": "function", "name": "f"},
        parallel_tool_calls=False,
        temperature=0.5,
        top_p=0.9,
        max_output_tokens=7,
        text={
            "format": {"type": "json_schema", "name": "a", "schema": schema, "strict": True},
            "verbosity": "low",
        },
        reasoning={"effort": "low", "summary": None},
        metadata={"chat": "7"},
        user="u",
        safety_identifier="s",
        prompt_cache_key="k",
        service_tier="flex",
        store=True,
        truncation="disabled",
        include=[],
        previous_response_id=None,
        stream_options={"include_obfuscation": False},
    )
    assert asked.request == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": True}}],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "temperature": 0.5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        },
        "verbosity": "low",
        "reasoning_effort": "low",
        "user": "u",
        "safety_identifier": "s",
        "prompt_cache_key": "k",
        "service_tier": "flex",
        "stream_options": USAGE,
    }
    assert asked.is_streamed
    assert asked.options.metadata == {"chat": "7"}
    # Neither the prompt nor who has asked is repeated.
    assert asked.response.keys() == {
        *("model", "tools", "tool_choice", "parallel_tool_calls", "temperature", "top_p"),
        *("max_output_tokens", "text", "reasoning", "service_tier"),
    }


def test_a_conversation_is_its_messages() -> None:
    """Calls belong to what the assistant said before them, results to their calls."""
    asked = read(
        input=[
            {"role": "developer", "content": "Be brief."},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {
                "type": "message",
                "id": "msg_1",
                "status": "completed",
                "role": "assistant",
                "content": [{"type": "output_text", "text": "b", "annotations": []}],
            },
            {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", "id": "fc_1"},
            {"type": "function_call", "call_id": "c2", "name": "g", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "c1", "output": "1"},
            {
                "type": "function_call_output",
                "call_id": "c2",
                "output": [{"type": "input_text", "text": "2"}],
            },
            {"type": "function_call", "call_id": "c3", "name": "f", "arguments": "{}"},
        ]
    )

    def call(call_id: str, name: str) -> Json:
        return {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}

    assert asked.request["messages"] == [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "tool_calls": [call("c1", "f"), call("c2", "g")]},
        {"role": "tool", "tool_call_id": "c1", "content": "1"},
        {"role": "tool", "tool_call_id": "c2", "content": "2"},
        {"role": "assistant", "content": None, "tool_calls": [call("c3", "f")]},
    ]


def test_parts_that_have_an_equal() -> None:
    content = [
        {"type": "input_text", "text": "what is it?"},
        {"type": "input_image", "image_url": "data:image/png;base64,AA", "detail": "low"},
        {"type": "input_image", "image_url": "https://example.com/a.png"},
    ]
    asked = read(
        input=[
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "refusal", "refusal": "no"}]},
        ]
    )
    assert [message["content"] for message in asked.request["messages"]] == [
        [
            {"type": "text", "text": "what is it?"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA", "detail": "low"}},
            {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}},
        ],
        [{"type": "refusal", "refusal": "no"}],
    ]


def test_options_and_what_only_the_gateway_knows() -> None:
    """Under `deltawire`: options, and fields of chat.completions that this API has no name for."""
    asked = read(deltawire={"priority": 3, "request": {"seed": 7, "model": "other"}}, metadata={"a": "b"})
    assert (asked.options.priority, asked.options.metadata) == (3, {"a": "b"})
    assert (asked.request["seed"], asked.request["model"]) == (7, "m")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"background": None}, "background"),
        ({"background": False}, "background"),
        ({"store": False}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt"),
        ({"include": ["reasoning.encrypted_content"]}, "include"),
        ({"truncation": "auto"}, "truncation"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_tool_calls": 1}, "max_tool_calls"),
        ({"stream_options": {"include_obfuscation": True}}, "stream_options"),
        ({"seed": 1}, "seed"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"style": "x"}}, "text.style"),
        ({"reasoning": {"summary": "auto"}}, "reasoning.summary"),
        ({"input": [{"type": "reasoning", "id": "rs_1"}]}, "input[0].type"),
        ({"input": [{"type": ["x"]}]}, "input[0].type"),
        ({"input": [{"role": "user", "content": [{"type": "input_file"}]}]}, "input[0].content[0].type"),
        ({"input": [{"role": "user", "content": [{"type": ["x"]}]}]}, "input[0].content[0].type"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0].type",
        ),
    ],
    ids=str,
)
def test_what_has_no_equal_is_refused_by_name(fields: Json, param: str) -> None:
    with pytest.raises(WireError) as refusal:
        read(**fields)
    assert (refusal.value.code, refusal.value.error.param) == ("unsupported_parameter", param)
    assert param in refusal.value.error.message


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"model": None}, "invalid_request", "model"),
        ({"input": None}, "invalid_request", "input"),
        ({"input": []}, "invalid_request", "input"),
        ({"input": ["hi"]}, "invalid_request", "input[0]"),
        ({"input": [{"content": "hi"}]}, "invalid_request", "input[0].role"),
        ({"input": [{"role": "user"}]}, "invalid_request", "input[0].content"),
        ({"input": [{"type": "function_call", "name": "f"}]}, "invalid_request", "input[0].arguments"),
        ({"input": [{"type": "function_call_output", "output": ""}]}, "invalid_request", "input[0].call_id"),
        ({"instructions": ["x"]}, "invalid_request", "instructions"),
        ({"tools": {}}, "invalid_request", "tools"),
        ({"tools": [{"type": "function"}]}, "invalid_request", "tools[0].name"),
        ({"text": "json"}, "invalid_request", "text"),
        ({"text": {"format": "json"}}, "invalid_request", "text.format"),
        ({"stream": "yes"}, "invalid_request", "stream"),
        ({"metadata": {"a": 1}}, "invalid_request", "metadata"),
        ({"deltawire": []}, "invalid_request", "deltawire"),
        ({"deltawire": {"request": 1}}, "invalid_request", "deltawire.request"),
        ({"deltawire": {"speed": 1}}, "unknown_option", "deltawire.speed"),
        ({"deltawire": {"restart": "always"}}, "invalid_request", "deltawire.restart"),
    ],
    ids=str,
)
def test_what_is_wrong_is_named(fields: Json, code: str, param: str) -> None:
    with pytest.raises(WireError) as refusal:
        read(**fields)
    assert (refusal.value.code, refusal.value.error.param) == (code, param)


def test_what_is_repeated_is_bounded() -> None:
    """Each reader gets it four times; a prompt may be as long as a body may."""
    assert len(read(instructions="x" * 1_000_000).request["messages"][0]["content"]) == 1_000_000
    with pytest.raises(WireError) as refusal:
        read(tools=[{"type": "function", "name": "f", "description": "x" * 262_144}])
    assert (refusal.value.code, refusal.value.error.param) == ("request_too_large", "tools")


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["type", "role", "content", "name", "format", "text"]), inner)
    ),
    max_leaves=8,
)
_names = st.sampled_from(
    ["input", "instructions", "tools", "tool_choice", "text", "reasoning", "metadata", "deltawire", "stream"]
)


@given(st.dictionaries(_names, _json))
def test_whatever_comes_is_taken_or_refused(fields: Json) -> None:
    try:
        read(**fields)
    except WireError as error:
        assert error.status == 400  # noqa: PT017 - it may be fine as well
