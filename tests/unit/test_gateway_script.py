"""The scripted gateway's pure part: requests read, answers planned, bytes laid out."""

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deltawire.gateway.answer import Reply
from deltawire.gateway.plan import Plan, make_plan
from deltawire.gateway.prose import HAIKU, compose, find_topic, say_at_length, say_whole, tokenize
from deltawire.gateway.records import MAX_RECORDS, FaultCounter, Ledger, RequestRecord
from deltawire.gateway.sample import sample
from deltawire.gateway.script import BadRequestError, Script, parse_request
from deltawire.gateway.wire import cut_event, encode_chunk, encode_event

DEMO_PROMPT = "Write a haiku about streaming."


def body(*, script: dict[str, Any] | None = None, prompt: str = DEMO_PROMPT, **fields: Any) -> bytes:
    message = {"role": "user", "content": prompt}
    request = {"model": "gpt-5.4", "messages": [message], "stream": True, **fields}
    return json.dumps(request if script is None else {**request, "script": script}).encode()


def plan(rate: float = 20.0, **fields: Any) -> Plan:
    made = make_plan(parse_request(body(**fields)), completion_id="chatcmpl-1", created=1, rate=rate)
    assert isinstance(made, Plan)
    return made


def reply(**fields: Any) -> Reply:
    made = make_plan(parse_request(body(**fields)), completion_id="chatcmpl-1", created=1, rate=20.0)
    assert isinstance(made, Reply)
    return made


def text_of(made: Plan) -> bytes:
    return b"".join(write for step in made.steps() for write in step.writes)


def events_of(made: Plan) -> list[Any]:
    """The data of all events, [DONE] as a string."""
    blocks = text_of(made).replace(b"\r\n", b"\n").decode().split("\n\n")
    assert blocks.pop() == ""
    data = ["\n".join(line.removeprefix("data: ") for line in block.split("\n")) for block in blocks]
    return [item if item == "[DONE]" else json.loads(item) for item in data]


def content_of(made: Plan, index: int = 0) -> str:
    choices = (choice for event in events_of(made) if event != "[DONE]" for choice in event["choices"])
    return "".join(c["delta"].get("content") or "" for c in choices if c["index"] == index)


def refusal(raw: bytes) -> BadRequestError:
    with pytest.raises(BadRequestError) as caught:
        parse_request(raw)
    return caught.value


class TestRequests:
    """A request is read strictly where it matters, and the error names the field."""

    @pytest.mark.parametrize("raw", [b"", b"{", b"\xff", b"[]", b'"x"', b"null"])
    def test_what_is_no_json_object_is_refused(self, raw: bytes) -> None:
        assert refusal(raw).param is None

    @pytest.mark.parametrize("name", ["model", "messages"])
    def test_a_missing_field_is_named(self, name: str) -> None:
        fields = json.loads(body())
        del fields[name]
        error = refusal(json.dumps(fields).encode())
        assert (error.param, error.code) == (name, "missing_required_parameter")

    @pytest.mark.parametrize(
        ("fields", "param"),
        [
            ({"messages": []}, "messages"),
            ({"messages": [{"content": "no role"}]}, "messages"),
            ({"model": 1}, "model"),
            ({"n": 0}, "n"),
            ({"max_tokens": 0}, "max_tokens"),
            ({"stream": "yes"}, "stream"),
            ({"tools": [{"function": {}}]}, "tools"),
            ({"tool_choice": "required"}, "tool_choice"),
            ({"tool_choice": {"function": {"name": "absent"}}}, "tool_choice"),
            ({"response_format": {"type": "xml"}}, "response_format"),
            ({"script": []}, "script"),
            ({"script": {"rate": -1}}, "script.rate"),
            ({"script": {"fault": "flood"}}, "script.fault"),
            ({"script": {"retry_after": "1\r\nX: y", "fault": "status"}}, "script.retry_after"),
            ({"script": {"after": 3}}, "script.after"),
            ({"script": {"text": "a", "deltas": 1, "delta_bytes": 1}}, "script.text"),
            ({"stream": False, "script": {"fault": "stall"}}, "script.fault"),
            ({"script": {"chunks": [1]}}, "script.chunks"),
            ({"stream": False, "script": {"chunks": ["{}"]}}, "script.chunks"),
            ({"script": {"chunks": ["{}"], "fault": "json"}}, "script.chunks"),
            ({"script": {"chunks": [], "text": "a"}}, "script.text"),
            ({"script": {"chunks": [], "fault": "no_finish_reason"}}, "script.fault"),
            ({"script": {"body": "{}", "fault": "stall"}}, "script.fault"),
            ({"script": {"content_type": "text/plain"}}, "script.content_type"),
            ({"script": {"status": 429}}, "script.status"),
            ({"script": {"status": 200, "fault": "status"}}, "script.status"),
            ({"script": {"status": 204, "body": ""}}, "script.status"),
            ({"script": {"headers": {"X-A": "1\r\nX-B: 2"}}}, "script.headers"),
            ({"script": {"headers": {"Content-Length": "1"}}}, "script.headers"),
        ],
    )
    def test_a_wrong_field_is_named(self, fields: dict[str, Any], param: str) -> None:
        assert refusal(body(**fields)).param == param

    def test_an_unknown_script_key_is_named(self) -> None:
        error = refusal(body(script={"speed": 3}))
        assert "'speed'" in error.message
        assert error.param == "script.speed"

    def test_every_script_field_is_documented_in_its_docstring(self) -> None:
        for field in msgspec.structs.fields(Script):
            assert f"`{field.name}`" in (Script.__doc__ or "")

    def test_nulls_and_unknown_fields_are_accepted(self) -> None:
        request = parse_request(body(n=None, temperature=0.5, script={"rate": None}))
        assert request.n is None
        assert request.script == Script()

    def test_the_prompt_is_the_last_user_message_in_text_or_parts(self) -> None:
        parts = [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]
        messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": None}]
        assert parse_request(body(messages=messages)).prompt == "a"


class TestSpeech:
    """What is said is deterministic, readable, and cut as the script wants."""

    def test_the_demo_prompt_gets_its_haiku(self) -> None:
        assert content_of(plan()) == HAIKU
        assert len(HAIKU.splitlines()) == 3

    def test_the_topic_is_mentioned(self) -> None:
        assert "the history of bread" in compose("Tell me about the history of bread, please.")
        assert find_topic("") == "streaming"
        assert find_topic("What is the capital of France?") == "France"

    def test_a_long_text_takes_about_a_minute(self) -> None:
        """Time to reload a page and to press Stop, with nothing but a prompt."""
        assert len(tokenize(compose("Tell me a long story about rivers."))) in range(900, 1400)
        assert len(tokenize(compose("Tell me a story about rivers along the way."))) < 200

    def test_the_same_request_gets_the_same_bytes(self) -> None:
        assert text_of(plan(prompt="Why is the sky blue?")) == text_of(plan(prompt="Why is the sky blue?"))

    @given(st.text())
    def test_tokens_join_to_the_text(self, text: str) -> None:
        assert "".join(tokenize(text)) == text

    def test_tokens_are_words_with_leading_blanks(self) -> None:
        assert tokenize("Whisper of tokens, now") == ("Whisper", " of", " tokens", ",", " now")

    @given(st.text(), st.integers(1, 40))
    def test_what_must_stay_whole_stays_whole(self, text: str, size: int) -> None:
        by_count = say_whole(text, deltas=size)
        assert by_count.text == text
        assert by_count.count <= size
        by_bytes = say_whole(text, delta_bytes=size)
        assert by_bytes.text == text
        assert all(len(piece.encode()) <= size or len(piece) == 1 for piece in by_bytes)

    @given(st.text(), st.integers(0, 300), st.integers(1, 300))
    def test_deltas_have_exactly_the_count_and_bytes_asked_for(
        self, prompt: str, deltas: int, delta_bytes: int
    ) -> None:
        pieces = list(say_at_length(compose(prompt), deltas=deltas, delta_bytes=delta_bytes))
        assert [len(piece.encode()) for piece in pieces] == [delta_bytes] * deltas

    def test_a_long_stream_is_repetition_and_costs_no_memory(self) -> None:
        speech = say_at_length("one two", deltas=1_000_000)
        assert speech.count == 1_000_000
        assert len(speech.pieces) == 3
        assert speech.cut_to(5).text == "one two\n\none two"

    def test_unicode_is_spoken_on_request(self) -> None:
        for made in (plan(script={"unicode": True}), plan(prompt="some emoji"), plan(prompt="Größe")):
            assert not content_of(made).isascii()


class TestAnswers:
    """Chunks and completions are OpenAI's."""

    def test_a_stream_opens_with_a_role_and_ends_with_reason_usage_and_done(self) -> None:
        first, *_, last, usage, done = events_of(plan(stream_options={"include_usage": True}))
        assert first["choices"][0]["delta"] == {"role": "assistant", "content": "", "refusal": None}
        assert first["usage"] is None
        assert last["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
        assert usage["choices"] == []
        assert usage["usage"]["completion_tokens"] == len(tokenize(HAIKU))
        assert done == "[DONE]"
        assert list(first)[:6] == ["id", "object", "created", "model", "system_fingerprint", "choices"]

    def test_without_include_usage_no_chunk_has_usage(self) -> None:
        assert b"usage" not in text_of(plan())

    def test_the_stream_adds_up_to_the_completion(self) -> None:
        completion = json.loads(reply(stream=False, n=3).body)
        made = plan(n=3)
        for choice in completion["choices"]:
            assert choice["message"]["content"] == content_of(made, choice["index"])
        assert completion["object"] == "chat.completion"
        assert completion["usage"]["completion_tokens"] == made.total_deltas

    def test_choices_take_turns(self) -> None:
        made = plan(n=2, script={"text": "a b c"})
        indexes = [e["choices"][0]["index"] for e in events_of(made) if e != "[DONE]"]
        assert indexes == [0, 1] * 5

    @pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
    def test_a_limit_ends_in_length(self, name: str) -> None:
        made = plan(**{name: 2})
        assert content_of(made) == "Whisper of"
        assert events_of(made)[-2]["choices"][0]["finish_reason"] == "length"

    def test_a_tool_is_called_in_pieces(self) -> None:
        schema = {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer"}}}
        tools = [{"type": "function", "function": {"name": n, "parameters": schema}} for n in ("a", "b")]
        made = plan(tools=tools, tool_choice={"type": "function", "function": {"name": "b"}})
        first, *deltas, last, _ = events_of(made)
        call = first["choices"][0]["delta"]["tool_calls"][0]
        assert (call["index"], call["type"], call["function"]) == (
            0,
            "function",
            {"name": "b", "arguments": ""},
        )
        pieces = [d["choices"][0]["delta"]["tool_calls"][0]["function"]["arguments"] for d in deltas]
        assert len(pieces) > 3
        assert set(json.loads("".join(pieces))) == {"city", "days"}
        assert last["choices"][0]["finish_reason"] == "tool_calls"
        whole = json.loads(reply(stream=False, tools=tools).body)["choices"][0]
        assert whole["message"]["tool_calls"][0]["function"]["name"] == "a"
        assert whole["message"]["content"] is None

    def test_tools_are_left_alone_when_told_or_when_their_result_is_there(self) -> None:
        tools = [{"type": "function", "function": {"name": "a"}}]
        assert content_of(plan(tools=tools, tool_choice="none")) == HAIKU
        messages = [{"role": "user", "content": DEMO_PROMPT}, {"role": "tool", "content": "1"}]
        assert content_of(plan(tools=tools, messages=messages)) == HAIKU

    def test_structured_answers_fit_their_schema(self) -> None:
        assert json.loads(content_of(plan(response_format={"type": "json_object"}))) == {"topic": "streaming"}
        schema = {
            "$defs": {"when": {"type": "string", "format": "date"}},
            "type": "object",
            "properties": {
                "name": {"type": "string", "minLength": 20},
                "kind": {"enum": ["x", "y"]},
                "count": {"type": ["null", "integer"], "minimum": 7},
                "tags": {"type": "array", "items": {"type": "string"}, "minItems": 2},
                "when": {"$ref": "#/$defs/when"},
                "ok": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
            },
        }
        form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
        value = json.loads(content_of(plan(response_format=form)))
        assert len(value["name"]) == 20
        assert (value["kind"], value["count"], value["ok"]) == ("x", 7, True)
        assert value["when"] == "2026-01-31"
        assert value["tags"] == ["streaming"] * 2

    def test_a_schema_that_contains_itself_ends(self) -> None:
        node: dict[str, Any] = {"$ref": "#/$defs/n"}
        schema = {"$defs": {"n": {"type": "object", "properties": dict.fromkeys("abcdef", node)}}, **node}
        assert len(json.dumps(sample(schema, "t"))) < 100_000
        assert sample({"$ref": "#"}, "t") is not None

    def test_too_much_to_send_whole_is_refused(self) -> None:
        with pytest.raises(BadRequestError):
            reply(stream=False, script={"deltas": 1_000_000, "delta_bytes": 1000})


class TestFaults:
    """Each fault does what the docstring of `Script` says."""

    @pytest.mark.parametrize(
        ("fault", "ending"),
        [
            ("stall", "hold"),
            ("cut", "close"),
            ("reset", "abort"),
            ("error", "finish"),
            ("no_done", "finish"),
            ("no_finish_reason", "finish"),
            ("comments", "close"),
        ],
    )
    def test_the_ending(self, fault: str, ending: str) -> None:
        assert plan(script={"fault": fault}).ending == ending

    @pytest.mark.parametrize("fault", ["stall", "cut", "reset"])
    def test_interruptions_count_content_deltas(self, fault: str) -> None:
        assert text_of(plan(script={"fault": fault, "after": 0})) == b""
        made = plan(script={"fault": fault, "after": 2})
        assert content_of(made) == "Whisper of"
        assert len(events_of(made)) == 3
        assert sum(step.deltas for step in made.steps()) == 2
        assert content_of(plan(script={"fault": fault, "after": 1000})) == HAIKU

    def test_an_error_comes_as_data(self) -> None:
        *_, last = events_of(plan(script={"fault": "error", "after": 1, "status": 429}))
        assert last["error"]["code"] == "rate_limit_exceeded"
        assert len(events_of(plan(script={"fault": "error"}))) == 1

    def test_comments_go_on_at_the_rate(self) -> None:
        steps = plan(script={"fault": "comments", "after": 1}, rate=10.0).steps()
        assert [next(steps).deltas for _ in range(2)] == [0, 1]
        first, second = next(steps), next(steps)
        assert first.writes == [b": keep-alive\n\n"]
        assert (first.at_s, second.at_s) == pytest.approx((0.1, 0.2))

    def test_no_done_and_no_finish_reason(self) -> None:
        assert events_of(plan(script={"fault": "no_done"}))[-1]["choices"][0]["finish_reason"] == "stop"
        *events, done = events_of(plan(script={"fault": "no_finish_reason"}))
        assert done == "[DONE]"
        assert {e["choices"][0]["finish_reason"] for e in events} == {None}

    def test_a_reset_tears_an_event(self) -> None:
        assert plan(script={"fault": "reset"}).torn.startswith(b"data: {")

    def test_status_html_and_json_come_whole(self) -> None:
        limited = reply(
            script={"fault": "status", "status": 429, "retry_after": "Wed, 21 Oct 2015 07:28:00 GMT"}
        )
        assert limited.headers == (("Retry-After", "Wed, 21 Oct 2015 07:28:00 GMT"),)
        assert set(json.loads(limited.body)["error"]) == {"message", "type", "param", "code"}
        page = reply(script={"fault": "html", "status": 503, "first_delta_s": 2})
        assert (page.status, page.content_type, page.at_s) == (503, "text/html", 2)
        assert json.loads(reply(script={"fault": "json"}).body)["object"] == "chat.completion"

    def test_fail_first_counts_per_script_and_id_or_prompt(self) -> None:
        counter = FaultCounter()
        request = parse_request(body(script={"fault": "status", "fail_first": 2}))
        assert [counter.meets_fault(request, "a") for _ in range(3)] == [True, True, False]
        assert [counter.meets_fault(request, None) for _ in range(3)] == [True, True, False]
        assert counter.meets_fault(request, "b")
        other = parse_request(body(script={"fault": "html", "fail_first": 2}))
        assert counter.meets_fault(other, "a")
        always = parse_request(body(script={"fault": "html"}))
        assert all(counter.meets_fault(always, "a") for _ in range(3))


class TestVerbatim:
    """What the script says word for word is sent so, and nothing besides."""

    def test_chunks_are_events_in_turn_then_done(self) -> None:
        made = plan(script={"chunks": ['{ "a": 1 }', {"b": [2.5, "é"]}, "not JSON", "two\nlines", ""]})
        assert (
            text_of(made)
            == (
                'data: { "a": 1 }\n\ndata: {"b":[2.5,"é"]}\n\ndata: not JSON\n\n'
                "data: two\ndata: lines\n\ndata: \n\ndata: [DONE]\n\n"
            ).encode()
        )
        assert made.total_deltas == 5
        assert text_of(plan(script={"chunks": [], "fault": "no_done"})) == b""

    def test_chunks_are_due_at_the_rate_and_interrupted_like_deltas(self) -> None:
        chunks = ["{}"] * 3
        steps = list(plan(script={"chunks": chunks, "rate": 10, "first_delta_s": 3}).steps())
        assert [step.at_s for step in steps] == pytest.approx([3, 3.1, 3.2, 3.3])
        for fault in ("stall", "cut", "reset"):
            assert text_of(plan(script={"chunks": chunks, "fault": fault, "after": 2})).count(b"{}") == 2
        assert plan(script={"chunks": ["1", "2"], "fault": "reset", "after": 1}).torn == b"data: 2\n\n"
        assert plan(script={"chunks": ["1"], "fault": "reset", "after": 9}).torn == b"data: [DONE]\n\n"
        *_, last = events_of(plan(script={"chunks": chunks, "fault": "error", "after": 1}))
        assert last["error"]["type"] == "server_error"

    @pytest.mark.parametrize("split", ["byte", "utf8", "crlf", "multiline", "coalesce"])
    def test_chunks_can_be_split(self, split: str) -> None:
        chunks = ['{"a": "é流🌊"}', "[1, 2]", "not JSON"]
        made = text_of(plan(script={"chunks": chunks, "split": split})).replace(b"\r\n", b"\n")
        *events, done, rest = made.decode().split("\n\n")
        data = ["\n".join(line.removeprefix("data: ") for line in event.split("\n")) for event in events]
        assert [json.loads(item) for item in data[:2]] == [{"a": "é流🌊"}, [1, 2]]
        assert (data[2], done, rest) == ("not JSON", "data: [DONE]", "")

    @pytest.mark.parametrize("stream", [True, False])
    def test_a_body_is_the_whole_answer(self, stream: bool) -> None:
        whole = reply(stream=stream, script={"body": "hällo", "first_delta_s": 2})
        assert (whole.status, whole.content_type, whole.body) == (200, "application/json", "hällo".encode())
        assert whole.at_s == 2
        script = {"body": "", "status": 302, "content_type": "text/plain", "headers": {"Location": "/v1"}}
        moved = reply(stream=stream, script=script)
        assert (moved.status, moved.content_type, moved.body) == (302, "text/plain", b"")
        assert moved.headers == (("Location", "/v1"),)

    def test_a_body_beside_chunks_is_for_requests_without_stream(self) -> None:
        script = {"chunks": ["{}"], "body": '{"object": "chat.completion"}'}
        assert text_of(plan(script=script)) == b"data: {}\n\ndata: [DONE]\n\n"
        assert reply(stream=False, script=script).body == script["body"].encode()  # type: ignore[attr-defined]
        assert reply(script={**script, "fault": "json"}).body.startswith(b'{"object')

    def test_a_body_of_an_error_is_not_what_comes_after_it(self) -> None:
        fault = {"fault": "status", "status": 503, "body": "[]", "retry_after": 1, "headers": {"X-A": "b"}}
        script = parse_request(body(script={**fault, "fail_first": 1})).script
        failed = reply(script=fault)
        assert (failed.status, failed.body) == (503, b"[]")
        assert failed.headers == (("Retry-After", "1"), ("X-A", "b"))
        spared = script.without_fault()
        assert (spared.fault, spared.body, spared.headers) == (None, None, {})
        stalling = parse_request(body(script={"fault": "stall", "chunks": ["{}"], "body": "{}"})).script
        assert stalling.without_fault().body == "{}"


class TestTimes:
    """Deltas are due at the rate, and time never goes back."""

    def test_deltas_are_due_at_the_rate(self) -> None:
        made = plan(script={"rate": 10, "first_delta_s": 3, "deltas": 5})
        assert [s.at_s for s in made.steps() if s.deltas] == pytest.approx([3, 3.1, 3.2, 3.3, 3.4])
        assert [s.at_s for s in made.steps()][-1] == pytest.approx(3.5)

    def test_no_rate_is_at_once(self) -> None:
        assert {s.at_s for s in plan(script={"rate": 0, "deltas": 100}).steps()} == {0.0}

    @given(
        st.fixed_dictionaries(
            {
                "split": st.sampled_from([None, "byte", "utf8", "crlf", "multiline", "coalesce"]),
                "fault": st.sampled_from([None, "stall", "cut", "error", "no_done"]),
                "rate": st.sampled_from([0, 1, 20, 333.3]),
                "deltas": st.integers(0, 30),
            }
        )
    )
    def test_no_step_is_due_before_its_predecessor(self, script: dict[str, Any]) -> None:
        times = [step.at_s for step in plan(script=script).steps()]
        assert times == sorted(times)


class TestShapes:
    """Splits change the layout of the bytes, never what they say."""

    @pytest.mark.parametrize("split", ["byte", "utf8", "crlf", "multiline", "coalesce"])
    def test_a_split_says_the_same(self, split: str) -> None:
        script = {"unicode": True, "deltas": 40}
        assert events_of(plan(script={**script, "split": split})) == events_of(plan(script=script))

    def writes(self, **script: Any) -> Iterator[bytes]:
        return (write for step in plan(script=script).steps() for write in step.writes)

    def test_byte_writes_are_single_bytes(self) -> None:
        assert {len(write) for write in self.writes(split="byte")} == {1}

    def test_utf8_writes_end_inside_every_character(self) -> None:
        event = encode_event('{"a":"é流🌊x"}'.encode())
        pieces = cut_event(event, "utf8")
        assert b"".join(pieces) == event
        assert len(pieces) == 1 + 1 + 2 + 3
        whole = cut_event(encode_event(b'{"a":"x"}'), "utf8")
        assert len(whole) == 1

    def test_crlf_and_multiline(self) -> None:
        crlf = text_of(plan(script={"split": "crlf"}))
        assert crlf.count(b"\n") == crlf.count(b"\r\n")
        event = next(self.writes(split="multiline"))
        lines = event.split(b"\n")
        assert len(lines) > 10
        assert all(line.startswith(b"data: ") for line in lines[:-2])

    def test_coalesced_writes_hold_eight_events(self) -> None:
        first = next(self.writes(split="coalesce"))
        assert first.count(b"data: ") == 8
        made = plan(script={"split": "coalesce"})
        assert sum(step.deltas for step in made.steps()) == made.total_deltas

    def test_a_large_event_split_by_bytes_is_many_bounded_steps(self) -> None:
        script = {"split": "byte", "deltas": 1, "delta_bytes": 5000}
        assert max(len(step.writes) for step in plan(script=script).steps()) == 512

    def test_chunks_are_http_chunks(self) -> None:
        assert encode_chunk(b"x" * 26) == b"1a\r\n" + b"x" * 26 + b"\r\n"


class TestLedger:
    """Records are bounded and count what is open."""

    def record(self, name: str = "a") -> RequestRecord:
        return RequestRecord(id="req_1", client_request_id=name, model="m", received_at=1.0)

    def test_open_requests_are_counted(self) -> None:
        ledger = Ledger()
        first, second = self.record(), self.record("b")
        ledger.open(first)
        ledger.open(second)
        assert (first.concurrent, second.concurrent) == (1, 2)
        ledger.close(first, "client", 2.0)
        ledger.finish(second, 3.0)
        assert ledger.open_requests == 0
        assert (first.closed_by, first.closed_at, first.finished_at) == ("client", 2.0, None)
        assert ledger.find("b") == [second]

    def test_old_records_go(self) -> None:
        ledger = Ledger()
        for i in range(MAX_RECORDS + 1):
            ledger.open(self.record(str(i)))
        assert len(ledger.find()) == MAX_RECORDS
        assert ledger.find("0") == []
        assert ledger.clear() == MAX_RECORDS
