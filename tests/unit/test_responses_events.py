"""A job's log as Responses tell it: always the same events, with the same numbers (PROTOCOL §5.11)."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from openai import omit
from openai.lib.streaming.responses._responses import ResponseStreamState
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from deltawire.codec import encode_snapshot
from deltawire.errors import WireError
from deltawire.events import Delta, Failed, Incomplete, IncompleteDetails, Retrying, TerminalEvent
from deltawire.fold import Fold
from deltawire.options import Options
from deltawire.outputs import judge, text_of
from deltawire.record import Record
from deltawire_relay.responses_api import ResponseStream
from deltawire_relay.responses_events import Translator, response_object
from deltawire_relay.tail import Batch
from tests.support.sample_events import CREATED_AT, cancelled, completed, in_progress, line, queued, restarted

Json = dict[str, Any]
USAGE = {
    "prompt_tokens": 3,
    "completion_tokens": 5,
    "total_tokens": 8,
    "prompt_tokens_details": {"cached_tokens": 2},
    "completion_tokens_details": {"reasoning_tokens": 4},
}
EVENTS: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)


def record(status: str = "queued", **said: Any) -> Record:
    response = msgspec.json.encode({"model": "m", **said})
    options = Options(metadata={"chat": "7"})
    return Record(
        status=status, attempt=1, created_at=CREATED_AT, tenant="t", options=options, response=response
    )


def chunk(finish_reason: str | None = None, *, index: int | None = 0, **delta: Any) -> Json:
    choice = {"index": index, "delta": delta, "finish_reason": finish_reason}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m2", "choices": [choice]}


def call(index: int, arguments: str = "", **fields: Any) -> Json:
    function = {"arguments": arguments, **({"name": fields.pop("name")} if "name" in fields else {})}
    return chunk(tool_calls=[{"index": index, "function": function, **fields}])


def log_of(chunks: Sequence[Json], kind: str = "completed", reason: str = "length") -> list[bytes]:
    """The lines of a job's log, as its worker writes them."""
    lines = [line(queued()), line(in_progress(2)), line(in_progress(3))]
    fold = Fold()
    for number, each in enumerate(chunks, 4):
        fold.add(each)
        raw = msgspec.Raw(json.dumps(each).encode())
        lines.append(
            line(Delta(job_id="job", sequence_number=number, attempt=1, created_at=CREATED_AT, chunk=raw))
        )
    return [*lines, line(terminal(len(lines) + 1, fold, kind, reason))]


def terminal(number: int, fold: Fold, kind: str, reason: str) -> TerminalEvent:
    event: TerminalEvent = cancelled(number) if kind == "cancelled" else completed(number)
    shared = {name: getattr(event, name) for name in event.__struct_fields__}
    if kind == "incomplete":
        event = Incomplete(**shared, incomplete_details=IncompleteDetails(reason))  # type: ignore[arg-type] # a word
    elif kind == "failed":
        error = WireError("upstream_rate_limit", "slow down").error
        event = Failed(**shared, error=error, source="upstream", status_code=429)
    whole = fold.completion()
    outputs = judge(whole, {}, is_over=kind in {"completed", "incomplete"})
    return msgspec.structs.replace(
        event, completion=whole, outputs=outputs or msgspec.UNSET, usage_source="provider", usage=USAGE
    )


def told(lines: Sequence[bytes]) -> tuple[list[Json], Json]:
    translator = Translator("job", record())
    events = [event for each in lines for event in translator.add(each)]
    return events, translator.response


def types(events: Sequence[Json]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


class Sdk:
    """OpenAI's own accumulation, and what its types say of each event."""

    def __init__(self) -> None:
        self.state: ResponseStreamState[None] = ResponseStreamState(input_tools=omit, text_format=omit)

    def read(self, events: Sequence[Json]) -> "Sdk":
        for event in events:
            self.state.handle_event(EVENTS.validate_python(event))
        return self

    @property
    def output(self) -> list[Json]:
        """What deltas added up to."""
        snapshot = self.state._ResponseStreamState__current_snapshot  # type: ignore[attr-defined]
        return [item.to_dict() for item in snapshot.output]


HELLO = [chunk(role="assistant", content=""), chunk(content="Hel"), chunk(content="lo"), chunk("stop")]


def test_text_is_told_as_the_api_does() -> None:
    """Created, queued, under way, an item, its part, its pieces, and then all of them as a whole."""
    events, response = told(log_of(HELLO))
    assert types(events) == [
        *("created", "queued", "in_progress", "output_item.added", "content_part.added"),
        *("output_text.delta", "output_text.delta"),
        *("output_text.done", "content_part.done", "output_item.done", "completed"),
    ]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["delta"] for event in events if "delta" in event] == ["Hel", "lo"]
    assert events[-1]["response"] == response
    assert [event["response"]["status"] for event in events[:3]] == ["queued", "queued", "in_progress"]
    whole = Response.model_validate(response)
    assert (whole.output_text, whole.status, whole.model) == ("Hello", "completed", "m")
    assert (whole.id, whole.metadata, whole.error) == ("resp_job", {"chat": "7"}, None)
    assert whole.usage is not None
    assert whole.usage.to_dict() == {
        "input_tokens": 3,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 8,
    }
    assert whole.completed_at == whole.created_at == int(CREATED_AT)


def test_a_refusal_is_a_part_of_its_own() -> None:
    events, response = told(log_of([chunk(refusal="I "), chunk(refusal="won't"), chunk("stop")]))
    assert types(events)[4:-1] == [
        *("content_part.added", "refusal.delta", "refusal.delta"),
        *("refusal.done", "content_part.done", "output_item.done"),
    ]
    assert response["output"][0]["content"] == [{"type": "refusal", "refusal": "I won't"}]
    Sdk().read(events)


def test_calls_side_by_side() -> None:
    """Each is an item; what a gateway says of them in turns lands where it belongs."""
    events, response = told(
        log_of(
            [
                chunk(content="Let me see."),
                call(0, id="call_a", name="f"),
                call(1, '{"x"', id="call_b", name="g"),
                call(0, "{}"),
                call(1, ":1}"),
                chunk("tool_calls"),
            ]
        )
    )
    kinds = ["message", "function_call", "function_call"]
    assert [item["type"] for item in response["output"]] == kinds
    assert [(item["call_id"], item["name"], item["arguments"]) for item in response["output"][1:]] == [
        ("call_a", "f", "{}"),
        ("call_b", "g", '{"x":1}'),
    ]
    done = [event for event in events if event["type"].endswith("arguments.done")]
    assert [(event["output_index"], event["arguments"]) for event in done] == [(1, "{}"), (2, '{"x":1}')]
    assert Sdk().read(events).output[1]["arguments"] == "{}"


def test_half_a_call_never_looks_whole() -> None:
    events, response = told(
        log_of([call(0, '{"x"', id="call_a", name="f"), chunk("length")], kind="incomplete")
    )
    assert response["output"][0]["status"] == "incomplete"
    assert "function_call_arguments.done" not in types(events)
    assert types(events)[-2:] == ["output_item.done", "incomplete"]


def test_a_call_is_told_once_it_has_a_name() -> None:
    """Arguments that came before it come with it; where a gateway gives no id, it gets one."""
    events, response = told(log_of([call(0, "{"), call(0, "}", name="f"), chunk("tool_calls")]))
    assert types(events)[3:5] == ["output_item.added", "function_call_arguments.delta"]
    assert events[4]["delta"] == "{}"
    assert response["output"][0]["call_id"] == "call_job_0"


@pytest.mark.parametrize(
    ("reason", "said"), [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_an_answer_that_was_cut_off(reason: str, said: str) -> None:
    events, response = told(log_of(HELLO, "incomplete", reason))
    assert response["status"] == "incomplete"
    assert response["incomplete_details"] == {"reason": said}
    assert response["output"][0]["status"] == "incomplete"
    assert types(events)[-4:-1] == ["output_text.done", "content_part.done", "output_item.done"]
    Sdk().read(events)


@pytest.mark.parametrize(
    ("kind", "reason", "code"),
    [("failed", "", "upstream_rate_limit"), ("incomplete", "idle_timeout", "idle_timeout")],
)
def test_a_failure_has_its_error_and_the_text_so_far(kind: str, reason: str, code: str) -> None:
    """Nothing is told as done; what the API has no word for is a failure."""
    events, response = told(log_of(HELLO, kind, reason))
    assert types(events)[-2:] == ["output_text.delta", "failed"]
    assert (response["status"], response["error"]["code"]) == ("failed", code)
    assert response["error"]["message"]
    assert response["incomplete_details"] is None
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "Hello"


def test_a_cancelled_one_ends_by_the_event_that_there_is() -> None:
    """The API has none for it: the status says it."""
    events, response = told(log_of(HELLO, "cancelled"))
    assert types(events)[-2:] == ["output_text.delta", "incomplete"]
    assert response["status"] == "cancelled"
    assert response["error"] is response["incomplete_details"] is None
    assert response["output"][0]["status"] == "incomplete"
    Sdk().read(events)


def test_an_estimate_is_no_usage() -> None:
    lines = log_of(HELLO)
    lines[-1] = lines[-1].replace(b'"usage_source":"provider"', b'"usage_source":"estimated"')
    assert told(lines)[1]["usage"] is None


def test_odd_chunks_are_skipped() -> None:
    """As in the fold: an upstream's slip ends nothing."""
    odd: list[Any] = [{"choices": None}, {"choices": [None, 1]}, {"choices": [{"delta": None}]}, {}]
    odd += [chunk(content=7), chunk(tool_calls="x"), chunk(tool_calls=[None, {"function": 1}])]
    odd += [chunk(index=1, content="another"), chunk(index=None, content="first")]
    odd += [chunk(content=[{"type": "text", "text": "!"}, {"type": "thinking"}])]
    events, response = told(log_of([*odd, chunk("stop")]))
    assert response["output"][0]["content"][0]["text"] == "first!"
    Sdk().read(events)


@pytest.mark.parametrize("odd", [5, 1.5, True, ["a"], {"name": 1}, None])
def test_a_call_has_texts_only(odd: Any) -> None:
    """What a gateway sends in their place is left out; raised, it would hold up all readers of the relay."""
    call_without = {"index": 0, "id": "call_a", "function": {"name": odd, "arguments": "{}"}}
    call_with = {"index": 1, "id": "call_b", "function": {"name": "f", "arguments": odd}}
    goes_on = {"index": 1, "function": {"arguments": "x"}}
    chunks = [chunk(tool_calls=[call_without, call_with]), chunk(tool_calls=[goes_on]), chunk("stop")]
    events, response = told(log_of(chunks))
    assert [item["name"] for item in response["output"]] == ["f"]
    assert isinstance(response["output"][0]["arguments"], str)
    assert Sdk().read(events).output[0]["arguments"] == response["output"][0]["arguments"]


def test_what_says_nothing_is_nothing() -> None:
    """Asking again is no event of the API, nor is a second beginning, nor an answer without a word."""
    lines = log_of([chunk("stop")])
    again = Retrying(
        job_id="job",
        sequence_number=3,
        attempt=1,
        created_at=CREATED_AT,
        next_try=2,
        reason="upstream_busy",
        delay_s=1,
    )
    lines[2] = line(again)
    events, response = told(lines)
    assert types(events) == ["created", "queued", "in_progress", "completed"]
    assert response["output"] == []


def test_what_was_said_cannot_be_taken_back() -> None:
    """No job of this door starts again after a delta; should one, it is an error, never other text."""
    translator = Translator("job", record())
    with pytest.raises(WireError, match="state_lost"):
        translator.add(line(restarted(3)))


def test_a_snapshot_still_tells_the_response() -> None:
    """Its single deltas are gone, and with them the numbers, but what came of them is the same."""
    chunks = [*HELLO[:3], call(0, "{}", id="call_a", name="f"), chunk("tool_calls")]
    lines = log_of(chunks)
    fold = Fold()
    for each in chunks[:4]:
        fold.add(each)
    snapshot = encode_snapshot("job", 7, attempt=1, created_at=1.0, fold=fold.state())
    assert told([snapshot, *lines[7:]])[1] == told(lines)[1]


def test_a_snapshot_in_the_midst_of_calls() -> None:
    """They go on behind it by their indexes, which a completion has no more."""
    chunks = [
        *[call(index, '{"a":', id=f"call_{index}", name="f") for index in range(2)],
        *[call(index, "1}") for index in range(2)],
        chunk("tool_calls"),
    ]
    lines = log_of(chunks)
    fold = Fold()
    for each in chunks[:2]:
        fold.add(each)
    snapshot = encode_snapshot("job", 5, attempt=1, created_at=1.0, fold=fold.state())
    assert told([snapshot, *lines[5:]])[1] == told(lines)[1]


def test_it_repeats_what_it_was_asked_for() -> None:
    """But for the prompt, of which instructions are a part."""
    tools = [{"type": "function", "name": "f"}]
    response = response_object("job", record(tools=tools, temperature=0.5))
    assert (response["tools"], response["temperature"], response["top_p"]) == (tools, 0.5, None)
    assert response["instructions"] is None


# The same always.

_texts = st.text(max_size=5)
_chunks = st.lists(
    st.one_of(
        st.builds(lambda text: chunk(content=text), _texts),
        st.builds(lambda text: chunk(refusal=text), _texts),
        st.builds(lambda index, text: chunk(index=index, content=text), st.integers(0, 2), _texts),
        st.builds(lambda index: call(index, id=f"call_{index}", name=f"f{index}"), st.integers(0, 2)),
        st.builds(call, st.integers(0, 2), _texts),
        st.builds(lambda n: call(0, "{}", id=f"whole_{n}", name="whole"), st.integers(0, 9)),
        st.just(chunk(role="assistant", content=None)),
        st.just({"choices": [], "usage": USAGE}),
    ),
    max_size=20,
)
_kinds = st.sampled_from(["completed", "incomplete", "failed", "cancelled"])


@given(_chunks, _kinds, st.data())
def test_any_reader_gets_the_rest_of_the_same_events(
    chunks: list[Json], kind: str, data: st.DataObject
) -> None:
    """However the log is cut into batches, and wherever they have left off."""
    lines = log_of([*chunks, chunk("stop")], kind)
    events, response = told(lines)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["response"] == response
    after = data.draw(st.integers(-1, len(events) - 1))
    cuts = sorted(data.draw(st.sets(st.integers(1, len(lines) - 1)))) if len(lines) > 1 else []
    hub: Any = SimpleNamespace(job_id="job", record=record("completed"))  # a later look at the same record
    stream = ResponseStream(hub, after)
    for start, end in zip([0, *cuts], [*cuts, len(lines)], strict=True):
        stream.write_batch(Batch(start, lines[start:end]))
    payload = b"".join(stream._pending).decode()
    read = [message.split("\n") for message in payload.removesuffix("\n\n").split("\n\n") if message]
    rest = [json.loads(data.removeprefix("data: ")) for _, data in read]
    assert rest == json.loads(json.dumps(events[after + 1 :]))
    assert [name for name, _ in read] == [f"event: {event['type']}" for event in rest]


def test_an_error_comes_behind_what_it_ends() -> None:
    """Its number is that of the last event, so that one must have been sent."""
    hub: Any = SimpleNamespace(job_id="job", record=record())
    stream = ResponseStream(hub, -1)
    stream.write_batch(Batch(0, [line(queued()), line(in_progress(2)), line(restarted(3))]))
    messages = b"".join(stream._pending).decode().removesuffix("\n\n").split("\n\n")
    read = [json.loads(message.split("data: ")[1]) for message in messages]
    assert [(event["type"], event["sequence_number"]) for event in read] == [
        ("response.created", 0),
        ("response.queued", 1),
        ("response.in_progress", 2),
        ("error", 2),
    ]


@given(_chunks, _kinds)
def test_it_adds_up_to_the_completion(chunks: list[Json], kind: str) -> None:
    """What is streamed, what the last event has, and what chat.completions would have said are one thing."""
    chunks = [*chunks, chunk("stop")]
    events, response = told(log_of(chunks, kind))
    fold = Fold()
    for each in chunks:
        fold.add(each)
    message: Json = next(c["message"] for c in fold.completion()["choices"] if c["index"] == 0)  # type: ignore[index]
    parts = {p["type"]: p for item in response["output"] for p in item.get("content", ())}
    assert parts.get("output_text", {"text": ""})["text"] == text_of(message)
    assert parts.get("refusal", {"refusal": ""})["refusal"] == (message.get("refusal") or "")
    called = [call["function"] for call in message.get("tool_calls") or ()]
    calls = [(each["name"], each["arguments"]) for each in called if each.get("name")]
    functions = [item for item in response["output"] if item["type"] == "function_call"]
    assert sorted((item["name"], item["arguments"]) for item in functions) == sorted(calls)
    if kind != "failed":  # whose codes are ours
        streamed = Sdk().read(events).output
        assert [_said(item) for item in streamed] == [_said(item) for item in response["output"]]


def _said(item: Json) -> Any:
    """What deltas say of an item; the SDK does not add up refusals."""
    texts = [part["text"] for part in item.get("content", ()) if part["type"] == "output_text"]
    return item["id"], item.get("call_id"), item.get("arguments"), texts
