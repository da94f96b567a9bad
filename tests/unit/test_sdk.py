"""What the SDK decides without any connection."""

import json
import os
from typing import Annotated, Any, Generic, Literal, TypeVar, get_args

import msgspec
import pytest
from pydantic import BaseModel, Field
from websockets.exceptions import ConnectionClosedError, InvalidURI
from websockets.frames import Close

import deltawire
from deltawire.client import calls, following
from deltawire.client.errors import refused
from deltawire.client.following import Following
from deltawire.client.reading import TextReader, fold_of, text_of
from deltawire.client.result import Result, result_of_event
from deltawire.errors import WireError
from deltawire.events import Timings
from deltawire.fold import Fold
from deltawire.keys import RANDOM_KEY
from deltawire.messages import ErrorMessage, Goodbye, Heartbeat, Snapshot, Subscribed
from tests.support.sample_events import completed, delta, line, restarted, text_chunk

BREAK = ConnectionClosedError(None, None)
TIMINGS = Timings(queued_s=0.1, first_delta_s=0.2, total_s=0.3)


def closed(code: int) -> ConnectionClosedError:
    return ConnectionClosedError(Close(code, ""), None)


def said(code: str, **fields: Any) -> bytes:
    return msgspec.json.encode(ErrorMessage(error=WireError(code, "no", **fields).error))


def test_a_cursor_follows_what_comes_once() -> None:
    """What is known already is dropped, several deltas in one are taken as a whole."""
    reader = Following("job", starting_after=1, merge=True)
    assert reader.path("ws") == "/v1/jobs/job/ws?starting_after=1&merge=true"
    assert reader.take(line(delta(1))) is None
    merged = msgspec.structs.replace(delta(4), first_sequence_number=2)
    assert reader.take(line(merged)) == merged
    assert reader.position == 4
    assert reader.take(b'{"type":"of_a_later_version","job_id":"job"}') is None
    assert reader.take(msgspec.json.encode(Heartbeat(positions={"job": 4}))) is None
    assert not reader.is_over
    assert reader.take(line(completed(5))) is not None
    assert reader.is_over


def test_a_snapshot_is_asked_for_until_it_has_come() -> None:
    """Afterwards the rest is, from where it stands."""
    reader = Following("job", snapshot=True)
    assert "mode=snapshot" in reader.path("events")
    reader.lost(BREAK, 0.0)
    assert "mode=snapshot" in reader.path("events")
    reader.take(msgspec.json.encode(Snapshot(job_id="job", sequence_number=7, completion=None)))
    assert reader.path("events") == "/v1/jobs/job/events?starting_after=7"


@pytest.mark.parametrize("position", [3, 12])
def test_what_is_left_of_a_lost_log_is_its_end(position: int) -> None:
    """Where there is nothing to make a snapshot of, the terminal event comes at once (PROTOCOL §6.3)."""
    reader = Following("job", starting_after=position)
    end = line(completed(9))
    reader.take(msgspec.json.encode(subscribed(recovered=False)))
    assert reader.take(end) is not None
    assert (reader.position, reader.is_over) == (9, True)


def test_what_leads_elsewhere_is_no_relay() -> None:
    """A redirect, also one that the WebSocket's library would follow, is no passing failure."""
    with pytest.raises(deltawire.ServerError, match="elsewhere"):
        Following("job").lost(InvalidURI("http://there/", "scheme isn't ws or wss"), 0.0)
    with pytest.raises(deltawire.ServerError, match="302"):
        Following("job").lost(refused(302, {}, b"", "the relay"), 0.0)


@pytest.mark.parametrize("status", [200, 204])
def test_an_end_that_no_relay_tells_is_not_asked_for_again(status: int) -> None:
    """What became of a job that has ended is JSON; 204 says that there are no more events."""
    reader = Following("job")
    reader.lost(refused(204, {}, b"", "the relay"), 0.0)
    assert reader.is_over
    with pytest.raises(deltawire.ServerError):
        reader.lost(deltawire.ServerError("this is no answer of a relay", status=status), 0.0)


def test_a_message_that_is_too_large_is_not_asked_for_again() -> None:
    """It would not become smaller."""
    with pytest.raises(deltawire.ServerError, match="bytes"):
        Following("job").lost(ConnectionClosedError(None, Close(1009, "")), 0.0)


@pytest.mark.parametrize("credential", ["dw_key\n", "a\r\nX-Evil: b", "ключ"])
def test_what_no_header_can_hold_is_not_shown(credential: str) -> None:
    """Libraries would have the secret in their message."""
    with deltawire.Client(api_key=credential) as client:
        with pytest.raises(deltawire.AuthenticationError) as caught:
            client.retrieve("job")
        for transport in get_args(calls.Transport):
            client._transport = transport
            with pytest.raises(deltawire.AuthenticationError):
                list(client.events("job"))
    assert credential.strip() not in str(caught.value)


def subscribed(*, recovered: bool) -> Subscribed:
    return Subscribed(
        job_id="job",
        status="failed",
        attempt=1,
        earliest_sequence_number=1,
        latest_sequence_number=9,
        recovered=recovered,
    )


def test_it_waits_as_it_is_told() -> None:
    """By a goodbye, by an error, by `Retry-After`; else for a little, then for longer, up to a bound."""
    reader = Following("job")
    reader.take(msgspec.json.encode(Goodbye(code=4001, retry_after_s=7)))
    assert reader.lost(closed(4001), 0.0) == 7
    reader.take(said("rate_limited", retry_after_s=9))
    assert reader.lost(closed(4013), 0.0) == 9
    answer = refused(503, {"Retry-After": "8"}, b"<html>", "the relay")
    assert reader.lost(answer, 0.0) == 8
    assert 0 <= reader.lost(BREAK, 0.0) <= following.BACKOFF_MAX_S


def an_answer(
    status: int, code: str = "", retry_after_s: float | None = None
) -> deltawire.JobUnavailableError:
    """Of a relay, or of a proxy in its place."""
    told = {} if retry_after_s is None else {"Retry-After": f"{retry_after_s:.0f}"}
    wire = WireError(code, "no", retry_after_s=retry_after_s).error if code else None
    return refused(status, told, msgspec.json.encode({"error": wire}), "the relay")


NO_ANSWER = deltawire.UnreachableError("it broke")


@pytest.mark.parametrize(
    ("error", "told_s"),
    [
        (NO_ANSWER, 0),
        (an_answer(429), 0),
        (an_answer(429, retry_after_s=3), 3),
        (an_answer(429, "tenant_queue_full", 2), 2),
        (an_answer(408, "request_timeout"), 0),
        (an_answer(500, "internal_error"), 0),
        (an_answer(502), 0),
        (an_answer(503), 0),
        (an_answer(503, retry_after_s=7), 7),
        (an_answer(503, "redis_unavailable", 1), 1),
        (an_answer(503, "queue_unavailable"), 0),
        (an_answer(503, "shutting_down", 10), 10),
        (an_answer(504), 0),
        # Time mends none of these, whatever the status says.
        (an_answer(429, "subscription_limit"), None),
        (an_answer(502, "upstream_not_streaming"), None),
        (an_answer(400, "invalid_request"), None),
        (an_answer(401, "token_expired"), None),
        (an_answer(404, "unknown_job"), None),
        (an_answer(422, "idempotency_conflict"), None),
        (an_answer(413), None),
        (an_answer(302), None),
        (deltawire.ServerError("this is no relay", status=200), None),
        # Who asked would not wait for so long.
        (an_answer(503, retry_after_s=11), None),
        (an_answer(429, "tenant_queue_full", 10.5), None),
    ],
    ids=str,
)
def test_a_command_is_sent_again_where_that_may_help(
    error: deltawire.JobUnavailableError, told_s: float | None
) -> None:
    """As its answer says, and after what it says; a proxy's answer is told by its status."""
    tries = calls.Tries(calls.retrieval("job"), max_retries=2, max_wait_s=10)
    if told_s is None:
        with pytest.raises(type(error)) as caught:
            tries.failed(error)
        assert caught.value is error
    else:
        wait_s = tries.failed(error)
        assert wait_s is not None
        assert told_s <= wait_s <= max(told_s, 0.2)


@pytest.mark.parametrize("max_retries", [-1, 0, 1, 5])
def test_a_command_is_not_sent_more_often_than_one_wants(max_retries: int) -> None:
    """Each wait may be twice as long as the one before."""
    tries = calls.Tries(calls.cancellation("job", "r"), max_retries=max_retries, max_wait_s=10)
    for failures in range(max_retries):
        assert 0 <= (tries.failed(NO_ANSWER) or 0) <= 0.2 * 2**failures
    with pytest.raises(deltawire.UnreachableError, match="it broke"):
        tries.failed(NO_ANSWER)


def test_what_a_lost_answer_has_erased_is_erased() -> None:
    """Not where it was never there, as far as one knows."""
    gone = an_answer(404, "unknown_job")
    tries = calls.Tries(calls.deletion("job"), max_retries=2, max_wait_s=10)
    with pytest.raises(deltawire.NotFoundError):
        tries.failed(gone)
    tries.failed(NO_ANSWER)
    assert tries.failed(gone) is None


def test_each_submission_has_a_key() -> None:
    """The caller's, or one that no other has; its repeats have the same."""
    first, second = (calls.submission({}, None, None) for _ in range(2))
    assert first.headers_with("k")["Idempotency-Key"].startswith(RANDOM_KEY)
    assert first.headers["Idempotency-Key"] != second.headers["Idempotency-Key"]
    assert calls.submission({}, None, "mine").headers == {"Idempotency-Key": "mine"}
    assert calls.submission({}, None, "").headers == {"Idempotency-Key": ""}  # which the relay refuses


def test_patience_begins_with_the_first_failure_and_ends() -> None:
    """Something good that comes renews it; errors, whatever they promise, do not."""
    reader = Following("job")
    reader.take(line(delta(1)))
    reader.lost(BREAK, 1_000.0)
    reader.lost(BREAK, 1_000.0 + following.GIVE_UP_AFTER_S)
    reader.take(line(delta(2)))
    reader.lost(BREAK, 2_000.0)
    reader.take(said("redis_unavailable", retry_after_s=1))
    with pytest.raises(deltawire.UnreachableError):
        reader.lost(closed(4003), 2_001.0 + following.GIVE_UP_AFTER_S)


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (4500, deltawire.AuthenticationError),
        (4502, deltawire.AuthenticationError),
        (4503, deltawire.PermissionDeniedError),
        (4501, deltawire.InvalidRequestError),
        (4504, deltawire.RateLimitError),
        (4507, deltawire.NotFoundError),
        (4599, deltawire.ServerError),
    ],
)
def test_a_code_that_says_not_to_come_back_is_an_error(code: int, kind: type[Exception]) -> None:
    """Also where the error before it was lost (PROTOCOL §6.5)."""
    with pytest.raises(kind, match=str(code)):
        Following("job").lost(closed(code), 0.0)


@pytest.mark.parametrize("loss", [closed(4005), refused(401, {}, b"", "the relay")])
def test_a_credential_is_renewed_once_between_good_messages(loss: Exception) -> None:
    """4005, 401: with a new one at once; where that is refused, too, it is over. Without one, at once."""
    reader = Following("job", renews=True)
    assert reader.lost(loss, 0.0) == 0
    reader.take(line(delta(1)))
    assert reader.lost(loss, 0.0) == 0
    with pytest.raises(deltawire.AuthenticationError):
        reader.lost(loss, 0.0)
    with pytest.raises(deltawire.AuthenticationError):
        Following("job").lost(loss, 0.0)


def test_a_normal_close_without_a_word_is_the_end() -> None:
    """The job had ended where the caller began."""
    reader = Following("job", starting_after=9)
    reader.lost(closed(1000), 0.0)
    assert reader.is_over


@pytest.mark.parametrize("line", [b"", b"hello", b'{"type":"delta"}', b'{"type":"delta","job_id":"\xff"}'])
def test_what_is_no_message_is_an_error(line: bytes) -> None:
    """Somebody else answers there."""
    with pytest.raises(deltawire.ServerError):
        Following("job").take(line)


def test_an_address_is_a_url() -> None:
    """Told at once, and not by the first request."""
    with pytest.raises(ValueError, match="localhost:8080"):
        deltawire.Client("localhost:8080")
    with pytest.raises(ValueError, match="websockets"):
        deltawire.Client(transport="websockets")  # type: ignore[arg-type] # what is tested


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://", "http://h:99999", "http://h:port", "http://h/?x=1", "http://h/#x"]
)
def test_what_is_no_address_is_told_at_once(url: str) -> None:
    """And not as somebody else's error, in the middle of a stream."""
    with pytest.raises(ValueError, match="relay"):
        deltawire.Client(url)


@pytest.mark.parametrize("proxy", ["http://127.0.0.1:1", "socks5://127.0.0.1:1"])
def test_no_proxy_stands_before_this_machine(proxy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """To a proxy of the environment's it is another one."""
    for name in ("ALL_PROXY", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, proxy)
    for url in ("http://127.0.0.1:8080", "http://localhost:8080", "http://[::1]:8080/prefix"):
        assert not calls.http_options(url, 1.0)["trust_env"]
        assert calls.websocket_options(url, {}, 1.0)["proxy"] is None
        with deltawire.Client(url) as client:
            assert not client._http._mounts
    assert calls.http_options("http://relay.example.com", 1.0)["trust_env"]
    assert calls.websocket_options("http://relay.example.com", {}, 1.0)["proxy"] is True


def test_a_forked_process_has_connections_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would read the answers that are its parent's."""
    with deltawire.Client() as client:
        parents = client._http
        assert client._http is parents
        with monkeypatch.context() as child:
            child.setattr(os, "getpid", lambda: -1)
            assert client._http is not parents
            client.close()
        assert client._http is parents
        assert not parents.is_closed


def test_an_answer_that_is_no_relays_is_told_by_its_status() -> None:
    """A proxy's page, say."""
    assert type(refused(404, {}, b"<html>", "there")) is deltawire.NotFoundError
    assert type(refused(418, {}, b"", "there")) is deltawire.InvalidRequestError
    told = refused(502, {"Retry-After": "soon"}, b'{"error": "no"}', "there")
    assert (type(told), told.error, told.status, told.retry_after_s) == (
        deltawire.ServerError,
        None,
        502,
        None,
    )


def snapshot(text: str, number: int = 5) -> Snapshot:
    fold = Fold()
    fold.add(text_chunk(text))
    return Snapshot(job_id="job", sequence_number=number, completion=fold.completion())


def test_text_is_told_once_whatever_brings_it() -> None:
    """A snapshot in mid-stream gives what is missing, a new attempt begins anew."""
    reader = TextReader()
    assert reader.add(delta(1, "one ")) == "one "
    assert reader.add(snapshot("one two ")) == "two "
    assert reader.add(delta(6, "three")) == "three"
    assert reader.add(completed(7)) == ""
    assert reader.add(restarted(8)) == ""
    assert reader.add(snapshot("uno")) == "uno"
    # One that was missed began anew, too.
    assert reader.add(snapshot("eins, zwei", number=90)) == "eins, zwei"
    assert reader.add(delta(91, ", drei")) == ", drei"


def test_text_in_parts_is_text() -> None:
    """Mistral's reasoning models send content as a list; other choices are not the first."""
    parts = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "Ha"}]
    chunk = {"choices": [{"index": 1, "delta": {"content": "no"}}, {"index": 0, "delta": {"content": parts}}]}
    event = msgspec.structs.replace(delta(1), chunk=msgspec.Raw(json.dumps(chunk).encode()))
    assert list(text_of(event)) == ["Ha"]
    empty = msgspec.structs.replace(delta(1), chunk=msgspec.Raw(b'{"choices":[]}'))
    assert list(text_of(empty)) == list(text_of(completed(2))) == []


@pytest.mark.parametrize(
    "chunk",
    [
        {"choices": choices}
        for choices in (
            None,
            5,
            "x",
            {"a": 1},
            [None],
            [{"delta": "x"}],
            [{"delta": ["x"]}],
            [{"delta": {"content": 5}}],
        )
    ]
    + [{"choices": [{"delta": {"tool_calls": calls}}]} for calls in (5, "x", {"a": 1}, [None], ["x"])],
    ids=repr,
)
def test_odd_chunks_are_passed_over(chunk: dict[str, Any]) -> None:
    """A gateway's slip, passed on as it came, must not end the reading; nor a snapshot of what came of it."""
    event = msgspec.structs.replace(delta(1), chunk=msgspec.Raw(json.dumps(chunk).encode()))
    reader, fold = TextReader(), Fold()
    assert reader.add(event) == ""
    fold.add(chunk)
    assert reader.add(Snapshot(job_id="job", sequence_number=1, completion=fold.completion())) == ""
    assert fold_of(fold.completion()).completion() == fold.completion()


def test_a_fold_goes_on_from_a_snapshot() -> None:
    """As if it had seen every delta: text, and the calls that were begun."""
    chunks: list[dict[str, Any]] = [
        text_chunk("one "),
        _tool_chunk(0, "a", "first", '{"x"'),
        _tool_chunk(1, "b", "second", '{"y"'),
        {
            "choices": [
                {"index": 0, "delta": {"tool_calls": [{"index": 0, "function": {"arguments": ":1}"}}]}}
            ]
        },
        {
            "choices": [
                {"index": 0, "delta": {"tool_calls": [{"index": 1, "function": {"arguments": ":2}"}}]}}
            ]
        },
        text_chunk("two", finish_reason="tool_calls"),
    ]
    whole = Fold()
    for chunk in chunks:
        whole.add(chunk)
    for cut in range(len(chunks) + 1):
        begun = Fold()
        for chunk in chunks[:cut]:
            begun.add(chunk)
        resumed = fold_of(begun.completion())
        for chunk in chunks[cut:]:
            resumed.add(chunk)
        assert resumed.completion() == whole.completion()


T = TypeVar("T")


class Item(BaseModel):
    sku: str
    note: str | None = None


class Page(BaseModel, Generic[T]):
    items: list[T]


class Order(BaseModel):
    """What was ordered."""

    first: Item
    rest: list[Item] = []


def test_a_models_schema_is_strict() -> None:
    """As OpenAI wants it: all required, nothing else allowed, no defaults; the request stays as it was."""
    request = {"model": "m", "messages": []}
    made = calls.with_model(request, Order)["response_format"]
    assert (made["type"], made["json_schema"]["name"], made["json_schema"]["strict"]) == (
        "json_schema",
        "Order",
        True,
    )
    schema = made["json_schema"]["schema"]
    for one in (schema, schema["$defs"]["Item"]):
        assert one["required"] == list(one["properties"])
        assert one["additionalProperties"] is False
    assert "default" not in json.dumps(schema)
    assert "response_format" not in request
    assert calls.with_model(request, None) == request


def test_a_schema_has_a_name_that_upstreams_take() -> None:
    """A generic's has brackets, and may be long."""
    made = calls.with_model({}, Page[Item])["response_format"]["json_schema"]
    assert made["name"] == "Page_Item_"


def test_nothing_stands_beside_a_reference() -> None:
    """What is said there is moved to where it points."""
    root: dict[str, Any] = {"$defs": {"Item": {"type": "string"}}}
    described = {"$ref": "#/$defs/Item", "description": "one"}
    assert calls.strict(described, root) == {"type": "string", "description": "one"}
    # One that holds itself is described once.
    root["$defs"]["Item"] = {"type": "object", "properties": {"inner": described}}
    inner = calls.strict(described, root)["properties"]["inner"]
    assert inner == {"$ref": "#/$defs/Item"}


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Pet(BaseModel):
    oneOf: Annotated[Cat | Dog, Field(discriminator="kind")]  # noqa: N815 - a name like the keyword's


def test_a_union_is_one_that_strict_mode_knows() -> None:
    """pydantic says `oneOf` and `discriminator`, neither of which it takes."""
    schema = calls.with_model({}, Pet)["response_format"]["json_schema"]["schema"]
    assert schema["properties"]["oneOf"] == {
        "anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}],
        "title": "Oneof",
    }


def test_names_of_properties_are_no_keywords() -> None:
    """Nor are values."""
    schema = {
        "type": "object",
        "properties": {"default": {"type": "string", "enum": ["default"], "default": "x"}},
    }
    made = calls.strict(schema, schema)
    assert made["properties"] == {"default": {"type": "string", "enum": ["default"]}}
    assert made["required"] == ["default"]


def test_an_id_is_one_segment_of_a_path() -> None:
    """Whatever a stranger has put into it."""
    assert Following("a/b?c#d").path("ws") == "/v1/jobs/a%2Fb%3Fc%23d/ws?starting_after=0"
    assert calls.retrieval("../jobs").path == "/v1/jobs/..%2Fjobs"
    assert calls.cancellation("a/b", "no").path == "/v1/jobs/a%2Fb/cancel"


def result(message: dict[str, Any], output: dict[str, Any], **fields: Any) -> Result:
    job = {
        "id": "job",
        "status": "completed",
        "completion": {"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]},
        "usage": None,
        "usage_source": "unavailable",
        "timings": TIMINGS,
        "outputs": [{"index": 0, **output}],
    }
    return msgspec.convert(job | fields, Result)


def test_all_kinds_of_tool_calls_are_given() -> None:
    """Functions, those of the old API, and custom tools with free text."""
    calls = [
        {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x":1}'}},
        {"id": "2", "type": "function", "function": {"name": "g", "arguments": ""}},
        {"id": "3", "type": "custom", "custom": {"name": "c", "input": "free"}},
    ]
    message = {"tool_calls": calls, "function_call": {"name": "old", "arguments": "{}"}}
    given = result(message, {"tool_calls": "complete"}).tool_calls
    assert [(call.id, call.name, call.parsed) for call in given] == [
        ("1", "f", {"x": 1}),
        ("2", "g", {}),
        ("3", "c", None),
        ("", "old", {}),
    ]
    assert given[2].arguments == "free"
    assert result(message, {"tool_calls": "incomplete"}).tool_calls == []


def test_a_refusal_is_no_answer() -> None:
    """Nor is what was cut off."""
    refusing = result({"content": None, "refusal": "I cannot."}, {})
    assert refusing.refusal == "I cannot."
    with pytest.raises(deltawire.OutputError, match="I cannot") as caught:
        refusing.parse(Item)
    assert caught.value.reason == "refused"
    with pytest.raises(deltawire.OutputError) as caught:
        result({"content": '{"sku":"1"}'}, {}, status="incomplete").parse(Item)
    assert caught.value.reason == "incomplete"
    with pytest.raises(deltawire.OutputError) as caught:
        _ = result({}, {"parse_error": {"reason": "not_json", "message": "no"}}).parsed
    assert caught.value.reason == "not_json"


def test_a_result_without_an_answer_is_empty() -> None:
    """A job that failed before its first delta."""
    empty = result_of_event(msgspec.structs.replace(completed(1), completion=None), {})
    assert (empty.text, empty.refusal, empty.tool_calls, empty.parsed) == ("", None, [], None)


def test_a_webhooks_job_is_a_result() -> None:
    """What is not a job that has ended is told as such."""
    assert result({"content": "Ha"}, {}) == Result.from_job(
        msgspec.to_builtins(result({"content": "Ha"}, {}))
    )
    with pytest.raises(ValueError, match="no job that has ended"):
        Result.from_job({"id": "job", "status": "queued", "timings": None})


def test_defaults_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that the command line has, too."""
    for name in ("DELTAWIRE_PUBLIC_URL", "DELTAWIRE_PORT", "DELTAWIRE_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    with deltawire.Client() as client:
        assert (client.base_url, client._credential(None)) == ("http://127.0.0.1:8080", None)
    monkeypatch.setenv("DELTAWIRE_PORT", "9000")
    monkeypatch.setenv("DELTAWIRE_API_KEY", "dw_key")
    with deltawire.Client() as client:
        assert (client.base_url, client._credential(None)) == ("http://127.0.0.1:9000", "dw_key")
    monkeypatch.setenv("DELTAWIRE_PUBLIC_URL", "https://relay.example.com/")
    with deltawire.Client(api_key="dw_other") as client:
        assert (client.base_url, client._credential(None)) == ("https://relay.example.com", "dw_other")
        assert client._credential("a.job.token") == "a.job.token"


def _tool_chunk(index: int, call_id: str, name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    call = {"index": index, "id": call_id, "type": "function", "function": function}
    return {"choices": [{"index": 0, "delta": {"tool_calls": [call]}}]}
