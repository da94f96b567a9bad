"""JSON is compared with its schema, in a process, so that no stranger's schema holds up a worker."""

import asyncio
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from deltawire.ending import AsCancelled, AsCompleted, AsFailed, Ending
from deltawire.errors import WireError
from deltawire.events import Output, ParseError
from deltawire.fold import Fold
from deltawire.record import CancelRequest
from deltawire_worker.structured_output import StructuredOutput

Json = dict[str, Any]
SCHEMA: Json = {
    "type": "object",
    "properties": {"name": {"type": "string", "enum": ["secret"]}, "list/s": {"items": {"type": "integer"}}},
    "required": ["name"],
}
FINE = '{"name":"secret"}'


@pytest.fixture
def structured() -> Iterator[StructuredOutput]:
    yield StructuredOutput()
    gc.collect()


def folded(*texts: str, reason: str = "stop") -> Fold:
    fold = Fold()
    for index, text in enumerate(texts):
        fold.add({"choices": [{"index": index, "delta": {"content": text}, "finish_reason": reason}]})
    return fold


async def compare(
    structured: StructuredOutput, schema: Any, text: str, ending: Ending | None = None
) -> tuple[Any, str | None, str]:
    request = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}}
    (output,) = await structured.outputs(ending or AsCompleted(), folded(text), request)
    if output.parse_error is None:
        return output.parsed, None, ""
    assert output.parsed is None
    assert len(output.parse_error.message) <= 500
    return None, output.parse_error.reason, output.parse_error.message


def doubling(levels: int) -> Json:
    """A schema of a few KB that asks for 2**levels comparisons."""
    defs: Json = {"0": {"type": "string"}}
    for level in range(levels):
        defs[f"{level + 1}"] = {"allOf": [{"$ref": f"#/$defs/{level}"}] * 2}
    return {"$defs": defs, "$ref": f"#/$defs/{levels}"}


async def test_what_keeps_to_its_schema_is_handed_over(structured: StructuredOutput) -> None:
    """Parsed, with no error; each choice for itself, and texts that are no JSON say so."""
    assert await compare(structured, SCHEMA, FINE) == ({"name": "secret"}, None, "")
    request = {"response_format": {"type": "json_schema", "json_schema": {"schema": SCHEMA}}}
    outputs = await structured.outputs(AsCompleted(), folded(FINE, "{}", "no"), request)
    assert [output.parse_error and output.parse_error.reason for output in outputs] == [
        None,
        "not_valid",
        "not_json",
    ]
    assert [output.parsed for output in outputs] == [{"name": "secret"}, None, None]


@pytest.mark.parametrize(
    ("text", "where", "keyword"),
    [
        ("{}", "the whole", "required"),
        ('{"name":"x"}', "/name", "enum"),
        ('{"name":"secret","list/s":[1,"x"]}', "/list~1s/1", "type"),
        ("[]", "the whole", "type"),
    ],
)
async def test_what_does_not_keep_to_it_says_where(
    structured: StructuredOutput, text: str, where: str, keyword: str
) -> None:
    """By a JSON pointer into the text, and a keyword; what else the schema says is the request's."""
    _, reason, message = await compare(structured, SCHEMA, text)
    assert reason == "not_valid"
    assert message == f"{where} does not keep to the schema's '{keyword}'"


async def test_json_object_with_a_schema_beside_it(structured: StructuredOutput) -> None:
    """llama.cpp's and Together's way to say it."""
    request = {"response_format": {"type": "json_object", "schema": SCHEMA}}
    (output,) = await structured.outputs(AsCompleted(), folded("{}"), request)
    assert output.parse_error is not None
    assert output.parse_error.reason == "not_valid"


async def test_nothing_is_fetched(structured: StructuredOutput, tmp_path: Path) -> None:
    """Neither over the network nor from files; nobody even connects."""
    file = tmp_path / "schema.json"
    file.write_text("{}")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/schema"
        for schema in (
            {"$ref": url},
            {"$schema": url},
            {"$id": url, "$ref": "other"},
            {"$ref": file.as_uri()},
            {"$dynamicRef": url},
        ):
            assert (await compare(structured, schema, "{}"))[1] == "invalid_schema", schema
        with pytest.raises(BlockingIOError):
            listener.accept()


@pytest.mark.parametrize(
    "schema",
    [
        [],
        5,
        "x",
        {"type": "objct"},
        {"type": 5},
        {"pattern": "("},
        {"pattern": "(?=a)"},
        {"$ref": "#/nowhere"},
    ],
)
async def test_schemas_that_are_none(structured: StructuredOutput, schema: Any) -> None:
    """The caller's to mend; the text stays in the completion."""
    assert (await compare(structured, schema, "{}"))[1] == "invalid_schema"


async def test_the_draft_is_the_schemas(structured: StructuredOutput) -> None:
    """By `$schema`; 2020-12 where it does not say."""
    schema = {"prefixItems": [{"type": "string"}]}  # unknown to draft 7
    assert (await compare(structured, schema, "[1]"))[1] == "not_valid"
    draft_7 = {"$schema": "http://json-schema.org/draft-07/schema#", **schema}
    assert (await compare(structured, draft_7, "[1]"))[1] is None


async def test_a_pattern_takes_linear_time(structured: StructuredOutput) -> None:
    """One that a backtracking engine would try for ever on."""
    text = '"' + "a" * 100_000 + '!"'
    assert (await compare(structured, {"pattern": "^(a+)+$"}, text))[1] == "not_valid"


async def test_work_without_end_is_given_up(structured: StructuredOutput) -> None:
    """The loop goes on meanwhile, and whoever comes after is served."""
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    ticking = asyncio.create_task(tick())
    endless = asyncio.create_task(compare(structured, doubling(60), '"x"'))
    await asyncio.sleep(0)
    after = asyncio.create_task(compare(structured, SCHEMA, FINE))
    assert (await endless)[1] == "too_large"
    assert ticks > 10
    assert (await after)[1] is None
    ticking.cancel()


async def test_a_schema_is_given_up_once_for_all_choices(
    structured: StructuredOutput, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hundred of them would keep everybody else from the process, and the job from its end."""
    asked = 0
    ask = structured._process.ask

    def counting(question: bytes) -> ParseError | None:
        nonlocal asked
        asked += 1
        return ask(question)

    monkeypatch.setattr(structured._process, "ask", counting)
    request = {"response_format": {"type": "json_schema", "json_schema": {"schema": doubling(60)}}}
    outputs = await structured.outputs(AsCompleted(), folded(*['"x"'] * 9, "no"), request)
    assert [output.parse_error and output.parse_error.reason for output in outputs] == [
        *["too_large"] * 9,
        "not_json",
    ]
    assert asked == 1


async def test_its_process_leaves_no_core(structured: StructuredOutput) -> None:
    """It dies of its limits, with other people's answers in its memory."""
    await compare(structured, SCHEMA, FINE)
    process = structured._process._process
    assert process is not None
    assert resource.prlimit(process.pid, resource.RLIMIT_CORE) == (0, 0)


async def test_a_schema_that_is_too_large(structured: StructuredOutput) -> None:
    """It is not even sent."""
    assert (await compare(structured, {"enum": ["x" * (4 << 20)]}, "{}"))[1] == "too_large"


async def test_a_process_that_was_killed_is_started_anew(structured: StructuredOutput) -> None:
    """Between two questions nobody notices."""
    assert (await compare(structured, SCHEMA, FINE))[1] is None
    process = structured._process._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert (await compare(structured, SCHEMA, FINE))[1] is None


async def test_a_process_that_cannot_start_does_not_end_the_worker() -> None:
    """Nor one that answers nothing."""
    assert (await compare(StructuredOutput([sys.executable, "-c", ""]), SCHEMA, FINE))[1] == "too_large"
    assert (await compare(StructuredOutput(["/nowhere"]), SCHEMA, FINE))[1] == "too_large"


@pytest.mark.parametrize(
    "ending",
    [
        AsFailed(WireError("worker_lost", "x"), "worker"),
        AsCancelled(CancelRequest(), 1.0, None),
    ],
)
async def test_jobs_that_did_not_end_well(structured: StructuredOutput, ending: Ending) -> None:
    """Nothing of theirs is parsed, and no process is started for them."""
    assert (await compare(structured, SCHEMA, FINE, ending))[1] == "incomplete"
    assert structured._process._process is None


async def test_requests_without_a_schema_start_no_process(structured: StructuredOutput) -> None:
    """Nor do those whose record is gone."""
    fold = folded("{}")
    plain = {"response_format": {"type": "json_object"}}
    assert await structured.outputs(AsCompleted(), fold, plain) == [Output(index=0, parsed={})]
    assert await structured.outputs(AsCompleted(), fold, {}) == []
    assert await structured.outputs(AsCompleted(), fold, None) == []
    assert await structured.outputs(AsCompleted(), Fold(), plain) == []
    assert structured._process._process is None


async def test_its_process_ends_with_it(structured: StructuredOutput) -> None:
    """Nobody has to close it."""
    other = StructuredOutput()
    await compare(other, SCHEMA, FINE)
    process = other._process._process
    assert process is not None
    del other
    gc.collect()
    assert process.poll() is not None
