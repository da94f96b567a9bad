"""The estimate of what a completion has cost, where the upstream did not say."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deltawire.usage import ANSWER_TOKENS, LOW_DETAIL_TOKENS, MEDIA_TOKENS, MESSAGE_TOKENS, estimate

Json = dict[str, Any]


def prompt(*messages: Any, **more: Any) -> int:
    tokens: int = estimate({"messages": list(messages), **more}, None)["prompt_tokens"]
    return tokens


def user(content: Any) -> Json:
    return {"content": content}


def answer(**message: Any) -> int:
    tokens: int = estimate({}, {"choices": [{"message": message}]})["completion_tokens"]
    return tokens


def test_four_bytes_are_a_token() -> None:
    """Of UTF-8, so that scripts with more tokens for a character have them."""
    assert prompt() == ANSWER_TOKENS
    one = ANSWER_TOKENS + MESSAGE_TOKENS
    assert prompt(user("x" * 40)) == one + 10
    assert prompt(user("x" * 41)) == one + 11
    assert prompt(user("語" * 40)) == one + 30
    assert prompt(user("x"), user("x")) == 2 * prompt(user("x")) - ANSWER_TOKENS


def test_tools_and_schemas_are_part_of_the_prompt() -> None:
    """By their texts."""
    tool = {"type": "function", "function": {"name": "f" * 400, "parameters": {"type": "object"}}}
    for more in ({"tools": [tool]}, {"functions": [tool]}, {"response_format": {"json_schema": tool}}):
        assert 100 <= prompt(user("x"), **more) - prompt(user("x")) <= 130


def test_pictures_have_a_flat_rate() -> None:
    """Whatever their size; data URLs are no text."""
    url = {"url": "data:image/png;base64," + "x" * 1_000_000}
    text, picture = {"type": "text", "text": "x"}, {"type": "image_url", "image_url": url}
    low = {"type": "image_url", "image_url": {**url, "detail": "low"}}
    sound = {"type": "input_audio", "input_audio": {"data": "x" * 1_000_000}}
    without = prompt(user([text]))
    assert prompt(user([text, picture])) - without == MEDIA_TOKENS
    assert prompt(user([text, {"type": "image_url", "image_url": "https://x"}])) - without == MEDIA_TOKENS
    assert prompt(user([text, low])) - without == LOW_DETAIL_TOKENS
    assert prompt(user([text, sound])) - without == MEDIA_TOKENS


def test_all_that_the_model_has_written_counts() -> None:
    """Text, refusal, reasoning, calls and what it has said aloud; not the sound's bytes."""
    text = "x" * 400
    assert answer(content=text) == 100
    assert answer(refusal=text) == 100
    assert (
        answer(reasoning_content=text)
        == answer(reasoning=text)
        == answer(reasoning=text, reasoning_content=text)
    )
    assert answer(audio={"data": text * 10, "transcript": text}) == 100
    call = {"function": {"name": "f", "arguments": text}}
    assert 100 < answer(tool_calls=[call]) < 115
    assert 100 < answer(function_call=call["function"]) < 115
    two = {"choices": [{"message": {"content": text}}] * 2}
    assert estimate({}, two)["completion_tokens"] == 200


@pytest.mark.parametrize("choices", [True, {}, [None], [{"message": 5}], [{}]])
def test_choices_that_are_none(choices: Any) -> None:
    """Whatever it is, nothing was written."""
    assert estimate({}, {"choices": choices})["completion_tokens"] == 0


def test_nothing_has_come_back() -> None:
    """The prompt is paid all the same."""
    used = estimate({"messages": [user("x")]}, None)
    assert used["completion_tokens"] == 0
    assert used["prompt_tokens"] == used["total_tokens"] > 0


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                ["messages", "content", "type", "text", "image_url", "tools", "choices", "message", "detail"]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=15,
)


@settings(max_examples=100)
@given(st.dictionaries(st.sampled_from(["messages", "tools", "functions"]), _JSON), _JSON)
def test_it_never_raises_and_adds_up(request: Json, completion: Any) -> None:
    """Requests are strangers' JSON. Never negative, always whole, and the total is the sum."""
    used = estimate(request, completion if isinstance(completion, dict) else None)
    assert all(isinstance(tokens, int) and tokens >= 0 for tokens in used.values())
    assert used["total_tokens"] == used["prompt_tokens"] + used["completion_tokens"]


@pytest.mark.parametrize("depth", [2_000])
def test_a_request_as_deep_as_any(depth: int) -> None:
    """It is not walked by recursion."""
    value: Any = "xxxx"
    for _ in range(depth):
        value = [value]
    assert prompt(user(value), tools=value) > 0
