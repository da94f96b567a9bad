"""The OpenAI SDKs' streaming helpers give the same final object through deltawire as from the gateway itself.

The gateway says the same bytes both ways: streams that are cut here, and recorded ones where they are.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx
import openai
import pytest
from openai.lib._parsing import parse_chat_completion
from openai.types.chat import ChatCompletion
from pydantic import BaseModel

from tests.support.cut_completion import cut
from tests.support.node import run_with_openai_sdk
from tests.support.openai_endpoint import Endpoint, door_of, gateway_of
from tests.support.recorded_streams import RECORDED
from tests.support.system import WAIT_S, System, show

Json = dict[str, Any]
WITH_USAGE = {"include_usage": True}


class Location(BaseModel):
    city: str
    temperature: float
    units: Literal["c", "f"]


class GetWeatherArgs(BaseModel):
    city: str
    country: str
    units: Literal["c", "f"] = "c"


class GetStockPrice(BaseModel):
    ticker: str
    exchange: str


class CityAndState(BaseModel):
    city: str
    state: str


WEATHER = openai.pydantic_function_tool(GetWeatherArgs)
STOCKS = openai.pydantic_function_tool(GetStockPrice, name="get_stock_price")
STRICT = openai.pydantic_function_tool(CityAndState, name="get_weather")
LOOSE: Json = {
    "type": "function",
    "function": {"name": "get_weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}


class Case(NamedTuple):
    """What the SDK is asked for, and what the gateway is made to say to it."""

    request: Json
    script: Json


def completion(*choices: Json) -> Json:
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1_764_000_000,
        "model": "gpt-5.4-2026-03-05",
        "service_tier": "default",
        "system_fingerprint": "fp_1",
        "choices": [{**choice, "index": i} for i, choice in enumerate(choices)],
        "usage": {
            "prompt_tokens": 14,
            "completion_tokens": 20,
            "total_tokens": 34,
            "completion_tokens_details": {"reasoning_tokens": 3},
        },
    }


def says(finish_reason: str = "stop", /, *, logprobs: Json | None = None, **message: Any) -> Json:
    message = {"role": "assistant", "content": None, "refusal": None, **message}
    return {"message": message, "logprobs": logprobs, "finish_reason": finish_reason}


def call(name: str, **arguments: str) -> Json:
    function = {"name": name, "arguments": json.dumps(arguments)}
    return {"id": f"call_{name}", "type": "function", "function": function}


def made(request: Json, *choices: Json) -> Case:
    whole = completion(*choices)
    # Not streamed, the gateway says it whole; deltawire asks for a stream in either case.
    return Case(request, {"chunks": cut(whole), "rate": 0, "body": json.dumps(whole)})


PLACES = [json.dumps({"city": "Österbro 🌊", "temperature": 7.5 + i, "units": "c"}) for i in range(3)]
TOKENS = [
    {"token": token, "logprob": -0.5, "bytes": list(token.encode()), "top_logprobs": []}
    for token in ("Whisper", " of", " tökens", "!")
]
EDINBURGH = call("GetWeatherArgs", city="Edinburgh", country="GB", units="c")
APPLE = call("get_stock_price", ticker="AAPL", exchange="NASDAQ")
SORRY = "I'm sorry, I can't assist with that request."

MADE = {
    "text": made({}, says(content="Whisper of tokens, word by word the river fills. 🌊")),
    "reasoning": made({}, says(content="Forty-two.", reasoning_content="Six by nine? Or six by seven.")),
    "one tool": made({"tools": [WEATHER]}, says("tool_calls", tool_calls=[EDINBURGH])),
    "parallel tools": made(
        {"tools": [WEATHER, STOCKS]}, says("tool_calls", content="Both.", tool_calls=[EDINBURGH, APPLE])
    ),
    "tool that is not strict": made(
        {"tools": [LOOSE]}, says("tool_calls", tool_calls=[call("get_weather", city="Oslo")])
    ),
    "legacy function": made(
        {"functions": [LOOSE["function"]]},
        says("function_call", function_call={"name": "get_weather", "arguments": '{"city": "Oslo"}'}),
    ),
    "structured output": made({"response_format": Location}, says(content=PLACES[0])),
    "structured output in three choices": made(
        {"response_format": Location, "n": 3}, *(says(content=place) for place in PLACES)
    ),
    "three choices": made({"n": 3}, *(says(content=text) for text in ("One.", "Two, a longer one.", "3"))),
    "refusal": made({"response_format": Location}, says(refusal=SORRY)),
    "logprobs": made(
        {"logprobs": True}, says(content="Whisper of tökens!", logprobs={"content": TOKENS, "refusal": None})
    ),
    "length": made({}, says("length", content="Whisper of")),
    "length in structured output": made({"response_format": Location}, says("length", content='{"ci')),
    "filtered": made({}, says("content_filter", content="Whisper of")),
    "filtered in structured output": made(
        {"response_format": Location}, says("content_filter", content='{"ci')
    ),
}

RECORDED_REQUESTS: dict[str, Json] = {
    "content-logprobs": {"logprobs": True},
    "json-object": {"response_format": {"type": "json_object"}},
    "json-schema": {"response_format": Location},
    "json-schema-three-choices": {"response_format": Location, "n": 3},
    "max-tokens-reached": {"response_format": Location, "max_tokens": 1},
    "non-strict-tools": {"tools": [LOOSE]},
    "one-tool": {"tools": [WEATHER]},
    "refusal": {"response_format": Location},
    "refusal-logprobs": {"response_format": Location, "logprobs": True},
    "strict-tools": {"tools": [STRICT]},
    "text": {},
    "two-tools": {"tools": [WEATHER, STOCKS]},
}


def recorded(path: Path) -> Case:
    events = path.read_text().split("\n\n")
    chunks = [event.removeprefix("data: ") for event in events if event.startswith("data: {")]
    return Case(RECORDED_REQUESTS[path.stem], {"chunks": chunks, "rate": 0})


CASES = {**MADE, **{f"recorded {path.stem}": recorded(path) for path in RECORDED}}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)
ASK: Json = {"model": "gpt-5.4", "messages": [{"role": "user", "content": "Say it."}]}
#: What the helpers raise instead of an object that cannot be whole.
CUT_SHORT = (openai.LengthFinishReasonError, openai.ContentFilterFinishReasonError)


@pytest.fixture
def gateway(system: System) -> Endpoint:
    return gateway_of(system)


@pytest.fixture
def door(system: System) -> Endpoint:
    return door_of(system)


def arguments(case: Case, **more: Any) -> Json:
    """What the Python SDK's methods take."""
    return {**ASK, **case.request, "extra_body": {"script": case.script}, **more}


def body(case: Case, **more: Any) -> Json:
    """The same as JSON."""
    made = {**ASK, **case.request, "script": case.script, **more}
    if (model := made.get("response_format")) is Location:
        schema = {"name": "Location", "strict": True, "schema": model.model_json_schema()}
        made["response_format"] = {"type": "json_schema", "json_schema": schema}
    return made


def outcome(final: ChatCompletion | Exception) -> tuple[str, Json]:
    """What came of it: the kind of object or error, and all that it holds."""
    if isinstance(final, Exception):
        held = getattr(final, "completion", None)  # in mid-stream; at the end it has none
        return type(final).__name__, held.model_dump(warnings=False) if held else {}
    # It warns of what it has parsed itself.
    return "ChatCompletion", final.model_dump(warnings=False)


def streamed(at: Endpoint, case: Case) -> ChatCompletion | Exception:
    """What the sync SDK's stream ends in."""
    with (
        at.sdk() as client,
        client.chat.completions.stream(**arguments(case, stream_options=WITH_USAGE)) as stream,
    ):
        try:
            return stream.get_final_completion()
        except CUT_SHORT as error:
            return error


def post(at: Endpoint, asked: Json) -> httpx.Response:
    return httpx.post(f"{at.base_url}/chat/completions", json=asked, timeout=WAIT_S, trust_env=False)


@each_case
def test_a_stream_ends_in_the_same_object(door: Endpoint, gateway: Endpoint, case: Case) -> None:
    """`chat.completions.stream(…).get_final_completion()`."""
    assert outcome(streamed(door, case)) == outcome(streamed(gateway, case))


@each_case
async def test_an_async_stream_does_too(door: Endpoint, gateway: Endpoint, case: Case) -> None:
    """The same of `AsyncOpenAI`."""
    final: ChatCompletion | Exception
    async with (
        door.async_sdk() as client,
        client.chat.completions.stream(**arguments(case, stream_options=WITH_USAGE)) as stream,
    ):
        try:
            final = await stream.get_final_completion()
        except CUT_SHORT as error:
            final = error
    assert outcome(final) == outcome(streamed(gateway, case))


@each_case
def test_not_streamed_it_is_the_sum_of_the_stream(door: Endpoint, gateway: Endpoint, case: Case) -> None:
    """`chat.completions.parse(…)`, which asks for one object."""
    whole: ChatCompletion | Exception
    is_loose = LOOSE in case.request.get("tools", ())  # which `parse` refuses
    with door.sdk() as client:
        completions = client.chat.completions
        try:
            whole = (completions.create if is_loose else completions.parse)(**arguments(case))
        except CUT_SHORT as error:
            whole = error
    here, there = outcome(whole), outcome(streamed(gateway, case))
    if isinstance(whole, Exception):
        assert here[0] == there[0]  # in mid-stream the SDK raises before the usage has come
    else:
        assert without_nulls(here[1]) == without_nulls(there[1])


def without_nulls(value: Any) -> Any:
    """Without what says nothing, and without the `index` of chunks that the SDK leaves in tool calls."""
    if isinstance(value, list):
        return [without_nulls(each) for each in value]
    if not isinstance(value, dict):
        return value
    kept = {name: without_nulls(each) for name, each in value.items() if each is not None}
    return {name: each for name, each in kept.items() if not (name == "index" and "function" in value)}


@pytest.mark.parametrize("case", MADE.values(), ids=MADE)
def test_not_streamed_it_is_what_the_gateway_says_whole(door: Endpoint, case: Case) -> None:
    """In every field, what is null and what is missing included; though deltawire asked for a stream."""
    assert post(door, body(case)).json() == json.loads(case.script["body"])


FINAL_COMPLETIONS = """
import OpenAI from "openai";
import { text } from "node:stream/consumers";
const [at, requests] = JSON.parse(await text(process.stdin));
const client = new OpenAI({ apiKey: at[1], baseURL: at[0], maxRetries: 0 });
const finals = requests.map((body) => client.chat.completions.stream(body).finalChatCompletion());
const outcomes = (await Promise.allSettled(finals)).map(
  ({ value, reason }) => value ?? [reason.constructor.name, reason.message],
);
process.stdout.write(JSON.stringify(outcomes));
"""


async def test_the_node_sdk_has_the_same_objects(door: Endpoint, gateway: Endpoint) -> None:
    """`chat.completions.stream(…).finalChatCompletion()`, of all of them at a time."""
    bodies = [body(case, stream_options=WITH_USAGE) for case in CASES.values()]
    here, there = [
        json.loads(await run_with_openai_sdk(FINAL_COMPLETIONS, json.dumps([at, bodies])))
        for at in (door, gateway)
    ]
    assert dict(zip(CASES, here, strict=True)) == dict(zip(CASES, there, strict=True))
    assert {final[0] for final in here if isinstance(final, list)} == {error.__name__ for error in CUT_SHORT}


RUN_TOOLS = """
import OpenAI from "openai";
import { text } from "node:stream/consumers";
const [at, body, weather] = JSON.parse(await text(process.stdin));
const client = new OpenAI({ apiKey: at[1], baseURL: at[0], maxRetries: 0 });
const asked = [];
weather.function.parse = JSON.parse;
weather.function.function = (given) => { asked.push(given); return "7 degrees"; };
const runner = client.chat.completions.runTools({ ...body, stream: true, tools: [weather] });
process.stdout.write(JSON.stringify([await runner.finalContent(), asked]));
"""


async def test_the_node_sdk_runs_tools(door: Endpoint, gateway: Endpoint) -> None:
    """`chat.completions.runTools(…)`: a call, its result, and what the model makes of that."""
    asks = {**ASK, "script": {"rate": 0}}
    here, there = [
        json.loads(await run_with_openai_sdk(RUN_TOOLS, json.dumps([at, asks, WEATHER])))
        for at in (door, gateway)
    ]
    assert here == there
    text, asked = here
    assert text
    assert set(asked[0]) == {"city", "country", "units"}


PARSED = {name: case for name, case in CASES.items() if case.request.get("response_format") is Location}


@pytest.mark.parametrize("case", PARSED.values(), ids=PARSED)
async def test_deltawire_parses_what_the_sdk_parses(system: System, door: Endpoint, case: Case) -> None:
    """The job's `outputs` have the SDK's `parsed` of each choice, and none where the SDK has none."""
    answer = post(door, body(case))
    completion = ChatCompletion.model_validate(answer.json())
    outputs = (await show(system, answer.headers["x-job-id"]))["outputs"]
    try:
        parsed = parse_chat_completion(
            chat_completion=completion, response_format=Location, input_tools=openai.omit
        )
    except CUT_SHORT:
        assert [output["parsed"] for output in outputs] == [None]
    else:
        by_sdk = [choice.message.parsed for choice in parsed.choices]
        assert [output["parsed"] for output in outputs] == [each and each.model_dump() for each in by_sdk]
