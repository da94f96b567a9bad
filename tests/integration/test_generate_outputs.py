"""What a job's terminal event says of its cost, its tool calls and its JSON (PROTOCOL.md §2.3)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.integration.test_generate import Bench, open_bench, request

Json = dict[str, Any]
SCHEMA: Json = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
AS_JSON: Json = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}}}
TOOL: Json = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}


@pytest.fixture
async def bench(redis_url: str) -> AsyncIterator[Bench]:
    async with open_bench(redis_url) as bench:
        yield bench


async def last(bench: Bench, job_id: str = "job") -> Json:
    event: Json = (await bench.ended(job_id))[-1]
    return event


async def test_json_is_compared_with_its_schema(bench: Bench) -> None:
    """The object, or why there is none; the completion keeps the text."""
    never = {"type": "json_object", "schema": {"required": ["never"]}}  # which the gateway does not look at
    await bench.run("fine", request(fields=AS_JSON))
    await bench.run("wrong", request(fields={"response_format": never}))
    await bench.run("cut", request(fields=AS_JSON, fault="cut", after=1))
    for job_id, reason in (("fine", None), ("wrong", "not_valid"), ("cut", "incomplete")):
        event = await last(bench, job_id)
        text = event["completion"]["choices"][0]["message"]["content"]
        (output,) = event["outputs"]
        assert output["parsed"] == (None if reason else json.loads(text))
        assert (output["parse_error"] or {}).get("reason") == reason


async def test_a_worker_that_stops_while_it_compares_has_completed(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stream is over: nothing was stopped, and nothing is to be asked again."""
    comparing = asyncio.Event()
    outputs = bench.generator._structured_output.outputs

    async def slow(*args: Any) -> Any:
        if not comparing.is_set():
            comparing.set()
            await asyncio.Event().wait()  # strangers' schemas are before it
        return await outputs(*args)

    monkeypatch.setattr(bench.generator._structured_output, "outputs", slow)
    task = bench.start("job", request(deltas=3), {"restart": "always"})
    await comparing.wait()
    task.cancel()
    await asyncio.wait([task])
    assert (await last(bench))["type"] == "completed"


async def test_tool_calls_are_marked(bench: Bench) -> None:
    """Whole where the gateway said so; those of a stream that was cut off are not."""
    whole = {"tools": [TOOL], "tool_choice": "required"}
    await bench.run("whole", request(fields=whole))
    await bench.run("cut", request(fields=whole, fault="cut", after=3))
    assert [output["tool_calls"] for output in (await last(bench, "whole"))["outputs"]] == ["complete"]
    event = await last(bench, "cut")
    assert event["type"] == "incomplete"
    assert event["completion"]["choices"][0]["message"]["tool_calls"]
    assert [output["tool_calls"] for output in event["outputs"]] == ["incomplete"]


async def test_nothing_to_say_is_not_said(bench: Bench) -> None:
    """Plain text has no outputs."""
    await bench.run("job", request(deltas=3))
    assert "outputs" not in await last(bench)


async def test_usage_is_estimated_where_nobody_says_it(bench: Bench) -> None:
    """The caller wanted no usage; of the prompt, and of what came."""
    await bench.run(
        "job",
        request("x" * 400, deltas=20, delta_bytes=4, fields={"stream_options": {"include_usage": False}}),
    )
    event = await last(bench)
    assert (event["type"], event["usage_source"]) == ("completed", "estimated")
    usage = event["usage"]
    assert 100 < usage["prompt_tokens"] < 120
    assert usage["completion_tokens"] == 20
    assert usage["total_tokens"] == usage["prompt_tokens"] + 20


async def test_what_was_cancelled_is_paid(bench: Bench) -> None:
    """Its prompt, and what had come by then."""
    task = bench.start("job", request("x" * 400, deltas=10_000, rate=200))
    await bench.deltas("job", 3)
    await bench.log.cancel("job", reason="client")
    await task
    event = await last(bench)
    assert (event["type"], event["usage_source"]) == ("cancelled", "estimated")
    assert event["usage"]["prompt_tokens"] > 100
    assert event["usage"]["completion_tokens"] > 0


async def test_a_prompt_is_paid_even_if_nothing_came(bench: Bench) -> None:
    """The gateway had taken it."""
    await bench.run("job", request(fault="cut", after=0))
    event = await last(bench)
    assert (event["type"], event["usage_source"]) == ("failed", "estimated")
    assert event["usage"]["prompt_tokens"] > 0
    assert event["usage"]["completion_tokens"] == 0


async def test_what_was_refused_costs_nothing(bench: Bench) -> None:
    """Nor does what was never asked."""
    await bench.run("refused", request(status=400, fault="status"))
    await bench.run("unasked", request(), {"queue_timeout_s": 0.000_001})
    async with asyncio.timeout(20):
        for job_id in ("refused", "unasked"):
            event = await last(bench, job_id)
            assert (event["type"], event["usage"], event["usage_source"]) == ("failed", None, "unavailable")
