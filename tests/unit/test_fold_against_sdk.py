"""The fold is what the OpenAI SDK's own accumulation returns, where that is right.

Streams are made as OpenAI makes them. Where the SDK differs from the non-streaming call (see deltawire.fold)
the last tests say so, so that we hear when it changes.
"""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai._models import construct_type
from openai.lib.streaming.chat import ChatCompletionStreamState
from openai.types.chat import ChatCompletionChunk

from deltawire.fold import Fold
from deltawire.sse_decoder import SseDecoder
from tests.support.recorded_streams import RECORDED

Json = dict[str, Any]
TOP = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m", "system_fingerprint": "fp"}


def by_sdk(chunks: list[Json]) -> Json:
    state: ChatCompletionStreamState[None] = ChatCompletionStreamState()
    for chunk in copy.deepcopy(chunks):
        parsed = construct_type(type_=ChatCompletionChunk, value=chunk)
        assert isinstance(parsed, ChatCompletionChunk)
        state.handle_chunk(parsed)
    # Not get_final_completion(), which is this, but raises where an answer was cut off.
    return state.current_completion_snapshot.to_dict(mode="python")


def by_fold(chunks: list[Json]) -> Json:
    fold = Fold()
    for chunk in chunks:
        fold.add(chunk)
    completion = fold.completion()
    assert completion is not None
    return completion


def plain(value: Any) -> Any:  # JSON
    """Without nulls, which the one leaves out and the other keeps, and without what the SDK parses."""
    if isinstance(value, dict):
        return {
            name: plain(item)
            for name, item in value.items()
            if item is not None and name not in {"parsed", "parsed_arguments"}
        }
    return [plain(item) for item in value] if isinstance(value, list) else value


def without_index(completion: Json) -> Json:
    """A streaming field that the SDK leaves in tool calls; the non-streaming call has none."""
    for choice in completion["choices"]:
        for call in choice["message"].get("tool_calls") or ():
            del call["index"]
    return completion


def chunk(*choices: Json, **more: Any) -> Json:
    return {**TOP, "choices": list(choices), **more}


def choice(delta: Json, index: int = 0, **more: Any) -> Json:
    return {"index": index, "delta": delta, "finish_reason": None, **more}


_text = st.text(max_size=4)
_tokens = st.lists(
    st.fixed_dictionaries({"token": _text, "logprob": st.floats(-9, 0), "top_logprobs": st.just([])}),
    min_size=1,
    max_size=2,
)


@st.composite
def _deltas(draw: st.DrawFn) -> list[Json]:
    """A choice's pieces, without its index: as many kinds at once as no model would send."""
    pieces: list[Json] = [{"delta": {"role": "assistant", "content": draw(st.sampled_from(["", None]))}}]
    calls = 0
    begun: set[str] = set()
    for kind in draw(st.lists(st.sampled_from(_KINDS), max_size=12)):
        text = draw(_text)
        match kind:
            case "call":
                function = {"name": draw(st.text(min_size=1, max_size=4)), "arguments": text}
                call = {"index": calls, "id": f"call_{calls}", "type": "function", "function": function}
                pieces.append({"delta": {"tool_calls": [call]}})
                calls += 1
            case "arguments" if calls:
                indexes = draw(st.lists(st.integers(0, calls - 1), min_size=1, max_size=2))
                parts = [{"index": index, "function": {"arguments": text}} for index in indexes]
                pieces.append({"delta": {"tool_calls": parts}})
            case "arguments":
                pass
            case "function_call":
                name = {} if kind in begun else {"name": "legacy"}
                pieces.append({"delta": {kind: {**name, "arguments": text}}})
            case "audio":
                first = {} if kind in begun else {"id": "audio_1", "expires_at": 17}
                pieces.append({"delta": {kind: {**first, "data": text, "transcript": text}}})
            case "reasoning_details":
                first = {} if kind in begun else {"format": "f", "id": "r"}
                detail = {"index": 0, "type": "reasoning.text", "text": text, **first}
                pieces.append({"delta": {kind: [detail]}})
            case "annotations":
                if kind not in begun:
                    annotation = {"type": "url_citation", "url_citation": {"url": text}}
                    pieces.append({"delta": {kind: [annotation]}})
            case "content" | "refusal":
                logprobs = draw(st.none() | st.fixed_dictionaries({kind: _tokens}))
                pieces.append({"delta": {kind: text}, "logprobs": logprobs})
            case _:
                pieces.append({"delta": {kind: text}})
        begun.add(kind)
    reason = draw(st.sampled_from(["stop", "length", "tool_calls", "function_call", "content_filter"]))
    return [*pieces, {"delta": {}, "finish_reason": reason}]


_KINDS = (
    *("content", "refusal", "call", "arguments", "arguments", "function_call", "audio", "annotations"),
    *("reasoning_content", "reasoning", "reasoning_details", "x_vendor"),
)
_USAGE = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7, "x_cost": 0.5}


@st.composite
def streams(draw: st.DrawFn) -> list[Json]:
    """Choices begin in order, and go on in any."""
    waiting = [draw(_deltas()) for _ in range(draw(st.integers(1, 3)))]
    chunks: list[Json] = []
    begun = 0
    if draw(st.booleans()):
        chunks.append(chunk(prompt_filter_results=[{"prompt_index": 0}]))
    while any(waiting):
        open_choices = [index for index, pieces in enumerate(waiting) if pieces and index <= begun]
        index = draw(st.sampled_from(open_choices))
        piece = {"finish_reason": None, **waiting[index].pop(0)}
        begun += index == begun
        chunks.append(chunk({"index": index, **piece}, usage=None, obfuscation="xxx"))
    if draw(st.booleans()):
        chunks.append(chunk(usage=_USAGE))
    return chunks


@settings(max_examples=150, deadline=None)
@given(streams())
def test_it_is_the_sdks_accumulation(chunks: list[Json]) -> None:
    """Of every kind of delta there is, for several choices at once, and with the usage at the end."""
    assert plain(by_fold(chunks)) == plain(without_index(by_sdk(chunks)))


@pytest.mark.skipif(not RECORDED, reason="no recorded streams beside the repository")
@pytest.mark.parametrize("path", RECORDED, ids=lambda path: path.stem)
def test_recorded_streams_give_the_sdks_final_object(path: Path) -> None:
    """All that OpenAI has sent comes out as its SDK gives it."""
    chunks = [json.loads(payload) for payload in SseDecoder().feed(path.read_bytes()) if payload != b"[DONE]"]
    assert plain(by_fold(chunks)) == plain(without_index(by_sdk(chunks)))


def call(index: int, **more: Any) -> Json:
    return {
        "index": index,
        "id": "a",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
        **more,
    }


@pytest.mark.parametrize(
    ("chunks", "ours", "sdks"),
    [
        pytest.param(
            [chunk(choice({"role": "assistant"})), chunk(choice({"role": "assistant", "content": "x"}))],
            {"role": "assistant"},
            {"role": "assistantassistant"},
            id="a role in every chunk",
        ),
        pytest.param(
            [chunk(choice({"tool_calls": [call(0)]})), chunk(choice({"tool_calls": [call(0)]}))],
            {"tool_calls": [{"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}{}"}}]},
            {"tool_calls": [{**call(0), "id": "aa", "function": {"name": "ff", "arguments": "{}{}"}}]},
            id="an id and a name in every chunk",
        ),
        pytest.param(
            [chunk(choice({"x_number": 2})), chunk(choice({"x_number": 3}))],
            {"x_number": 3},
            {"x_number": 5},
            id="numbers",
        ),
    ],
)
def test_where_the_sdk_is_not_right(chunks: list[Json], ours: Json, sdks: Json) -> None:
    """The non-streaming call says these things once."""
    mine, theirs = by_fold(chunks)["choices"][0]["message"], by_sdk(chunks)["choices"][0]["message"]
    for name, value in ours.items():
        assert mine[name] == value
    for name, value in sdks.items():
        assert plain(theirs[name]) == value


def test_what_the_sdk_forgets() -> None:
    """A usage that a later chunk does not repeat, and a vendor field of a choice's later chunk."""
    chunks = [
        chunk(choice({"content": "x"})),
        chunk(choice({}, x_vendor="late"), usage=_USAGE),
        chunk(choice({}, finish_reason="stop")),
    ]
    mine, theirs = by_fold(chunks), by_sdk(chunks)
    assert (mine["usage"], theirs["usage"]) == (_USAGE, None)
    assert mine["choices"][0]["x_vendor"] == "late"
    assert "x_vendor" not in theirs["choices"][0]


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([chunk(choice({}, index=1)), chunk(choice({}))], id="choices out of order"),
        pytest.param(
            [chunk(choice({"annotations": [{"type": "url_citation"}]}))] * 2, id="lists without index"
        ),
        pytest.param(
            [chunk(choice({"tool_calls": []})), chunk(choice({"tool_calls": [{"id": "a", "function": {}}]}))],
            id="a tool call without index",
        ),
    ],
)
def test_where_the_sdk_raises(chunks: list[Json]) -> None:
    """The fold goes on."""
    by_fold(chunks)
    with pytest.raises((IndexError, KeyError, RuntimeError, TypeError, AssertionError, AttributeError)):
        by_sdk(chunks)
