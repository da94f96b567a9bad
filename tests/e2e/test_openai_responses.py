"""OpenAI's own SDKs, as they are: responses in the background, resumed, cancelled (PROTOCOL §5.11)."""

import asyncio
import json
import random
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from openai import OpenAI
from openai.types.responses import Response
from pydantic import BaseModel

from deltawire.gateway.prose import HAIKU
from tests.support.node import run_with_openai_sdk
from tests.support.openai_endpoint import Endpoint
from tests.support.relay_process import Keyring
from tests.support.system import WAIT_S, System, gateway_records

KEYS = Keyring(app=("acme", ("submit", "read", "cancel")))
KEY = KEYS["app"]
PROMPT = "Write a haiku about streaming."
#: Minutes of it, so that there is something to cut, however slow the machine is.
LONG = {"deltas": 6_000, "rate": 20}
TERMINAL = {"response.completed", "response.incomplete", "response.failed"}


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Two relays, which want a key."""
    with System(relays=2, relay_environment={"DELTAWIRE_API_KEYS": KEYS.text}) as system:
        yield system


def door(system: System, relay: int = 0) -> Endpoint:
    return Endpoint(f"http://127.0.0.1:{system.relay_ports[relay]}/v1", KEY)


@pytest.fixture
def clients(system: System) -> Iterator[list[OpenAI]]:
    """One for each relay."""
    with door(system, 0).sdk() as first, door(system, 1).sdk() as second:
        yield [first, second]


def scripted(**script: Any) -> dict[str, Any]:
    """What the gateway is to do."""
    return {"deltawire": {"request": {"script": script}}}


def text_of(events: list[Any]) -> str:
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


def check_whole(events: list[Any]) -> Response:
    """Numbers without a hole or a repeat, and one end, the last."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type in TERMINAL for event in events] == [False] * (len(events) - 1) + [True]
    response: Response = events[-1].response
    return response


async def run(*command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


async def test_the_programs_resume_and_cancel(system: System) -> None:
    """Those of examples/openai lose their connection, go on, and cancel another one."""
    at = door(system)
    said = [
        await run(sys.executable, "-c", at.example("background.py")),
        await run_with_openai_sdk(at.example("background.mjs")),
    ]
    # The second is what the gateway's closing takes longer than the second for which a cancel waits.
    assert set(said) <= {f"{HAIKU}\ncancelled\n", f"{HAIKU}\nin_progress\n"}


async def test_the_readme_does_what_it_says(system: System) -> None:
    """Its own lines: a stream that is left, and resumed."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "responses." in code]
    at = door(system)
    code = code.replace("http://127.0.0.1:8080/v1", at.base_url).replace('"any"', f'"{at.api_key}"')
    assert await run(sys.executable, "-c", code) == f"{HAIKU}\ncompleted\n"


def test_a_stream_that_is_cut_again_and_again(clients: list[OpenAI]) -> None:
    """Each event comes once, whichever relay goes on with it; what is told in the end is what is there."""
    events: list[Any] = []
    stream = clients[0].responses.create(
        model="gpt-5.4", input=PROMPT, background=True, stream=True, extra_body=scripted(deltas=60, rate=200)
    )
    dice = random.Random(7)
    for turn in range(100):
        with stream:
            for _, event in zip(range(dice.randint(1, 8)), stream, strict=False):
                events.append(event)
        if events[-1].type in TERMINAL:
            break
        stream = clients[turn % 2].responses.retrieve(
            events[0].response.id, stream=True, starting_after=events[-1].sequence_number
        )
    response = check_whole(events)
    assert response.status == "completed"
    assert response.output_text == text_of(events)
    for client in clients:
        assert client.responses.retrieve(response.id) == response
        assert list(client.responses.retrieve(response.id, stream=True)) == events


async def test_a_relay_is_killed_in_mid_stream(system: System) -> None:
    """The client sees its connection break, and goes on from its number at another relay, to its end."""
    events: list[Any] = []
    async with door(system, 0).async_sdk() as first, door(system, 1).async_sdk() as second:
        stream = await first.responses.create(
            model="gpt-5.4",
            input=PROMPT,
            background=True,
            stream=True,
            extra_body=scripted(**LONG),
        )

        async def read(stream: Any) -> None:
            async for event in stream:
                events.append(event)
                if len(events) == 20:
                    system.relays[0].stop(at_once=True)
                elif len(events) == 60:
                    await second.responses.cancel(events[0].response.id)

        with pytest.raises(openai.APIConnectionError):
            await read(stream)
        last, response_id = events[-1].sequence_number, events[0].response.id
        await read(await second.responses.retrieve(response_id, stream=True, starting_after=last))
        response = check_whole(events)
        assert response.output_text == text_of(events)
        assert await second.responses.retrieve(response_id) == response
    await asyncio.to_thread(system.launch_relay(in_place_of=0).wait_until_ready)


async def long_stream(client: openai.AsyncOpenAI) -> AsyncIterator[list[Any]]:
    """The events so far of a response that takes its time, each time that one has come."""
    stream = await client.responses.create(
        model="gpt-5.4", input=PROMPT, background=True, stream=True, extra_body=scripted(**LONG)
    )
    events: list[Any] = []
    async for event in stream:
        events.append(event)
        yield events


async def test_it_is_cancelled_while_it_streams(system: System) -> None:
    """By another client; the reader hears of it, the gateway's connection is closed."""
    async with door(system).async_sdk() as client:
        async for events in long_stream(client):
            if len(events) == 10:
                cancelled = await client.responses.cancel(events[0].response.id)
        response = check_whole(events)
        # A cancel waits a second for the end.
        assert cancelled == response or cancelled.status == "in_progress"
        assert response.status == "cancelled"
        assert response.output_text == text_of(events)
        assert await client.responses.cancel(response.id) == response
        async with asyncio.timeout(WAIT_S):
            while True:
                (record,) = await gateway_records(system, response.id.removeprefix("resp_"))
                if record["closed_by"]:
                    break
        assert record["closed_by"] == "client"
        assert record["sent_deltas"] < record["total_deltas"]


async def test_it_is_polled(system: System) -> None:
    """As the API's own guide has it."""
    async with door(system).async_sdk() as client:
        response = await client.responses.create(
            model="gpt-5.4", input=PROMPT, background=True, metadata={"chat": "7"}
        )
        assert response.status in {"queued", "in_progress"}  # a worker may have it by now
        async with asyncio.timeout(WAIT_S):
            while response.status in {"queued", "in_progress"}:
                await asyncio.sleep(0.05)
                response = await client.responses.retrieve(response.id)
    assert (response.status, response.output_text, response.metadata) == ("completed", HAIKU, {"chat": "7"})
    assert response.usage is not None
    assert response.usage.total_tokens == response.usage.input_tokens + response.usage.output_tokens


class Weather(BaseModel):
    city: str


TOOL: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather of a city.",
    "parameters": {**Weather.model_json_schema(), "additionalProperties": False},
    "strict": True,
}


def test_tools_are_called_and_answered(clients: list[OpenAI]) -> None:
    """The SDK's own helper adds it up and parses it; the next turn has what the first one said."""
    asked: Any = [{"role": "user", "content": "How is the weather in Paris?"}]
    with clients[0].responses.stream(
        model="gpt-5.4", input=asked, tools=[TOOL], tool_choice="required", background=True
    ) as stream:
        first = stream.get_final_response()
    (call,) = first.output
    assert call.type == "function_call"
    assert call.parsed_arguments == json.loads(call.arguments)
    assert call.status == "completed"
    asked += [
        call.model_dump(exclude={"parsed_arguments"}),
        {"type": "function_call_output", "call_id": call.call_id, "output": "sunny"},
    ]
    with clients[1].responses.stream(
        model="gpt-5.4", input=asked, tools=[TOOL], tool_choice="none", background=True
    ) as stream:
        assert stream.get_final_response().output_text


def test_structured_output_is_parsed(clients: list[OpenAI]) -> None:
    with clients[0].responses.stream(
        model="gpt-5.4", input="Which city?", text_format=Weather, background=True
    ) as stream:
        response = stream.get_final_response()
    assert isinstance(response.output_parsed, Weather)
    with clients[1].responses.stream(response_id=response.id, text_format=Weather, starting_after=3) as again:
        assert min(event.sequence_number for event in again) == 4
        assert again.get_final_response().output_parsed == response.output_parsed


def test_a_gateway_that_refuses(clients: list[OpenAI]) -> None:
    """It has failed, and says so; the error is ours, or the gateway's own."""
    events = list(
        clients[0].responses.create(
            model="gpt-5.4",
            input=PROMPT,
            background=True,
            stream=True,
            extra_body=scripted(fault="status", status=400),
        )
    )
    response = check_whole(events)
    assert response.status == "failed"
    assert response.error is not None
    assert response.error.message
    assert clients[1].responses.retrieve(response.id) == response


def test_what_cannot_be_done_is_refused(clients: list[OpenAI]) -> None:
    with pytest.raises(openai.BadRequestError) as refusal:
        clients[0].responses.create(
            model="gpt-5.4", input=PROMPT, background=True, tools=[{"type": "web_search"}]
        )
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "tools[0].type")
    with pytest.raises(openai.BadRequestError) as refusal:
        clients[0].responses.create(model="gpt-5.4", input=PROMPT)
    assert (refusal.value.code, refusal.value.param) == ("unsupported_parameter", "background")
    with pytest.raises(openai.NotFoundError):
        clients[0].responses.retrieve("resp_nobody")


IN_NODE = """
import OpenAI from "openai";
const [first, second] = %s.map((baseURL) => new OpenAI({ baseURL, apiKey: "%s", maxRetries: 0 }));
const events = [];
async function read(stream, howMany) {
  for await (const event of stream) {
    events.push(event);
    if (--howMany === 0) break;  // which closes the connection
  }
}
const body = { model: "gpt-5.4", input: "%s", background: true, stream: true };
await read(await first.responses.create({ ...body, ...%s }), 7);
const id = events[0].response.id;
const after = () => ({ stream: true, starting_after: events.at(-1).sequence_number });
await read(await second.responses.retrieve(id, after()), 5);
if (%s) await first.responses.cancel(id);
await read(await first.responses.retrieve(id, after()));
const shown = await second.responses.retrieve(id);
const addedUp = async () => (await second.responses.stream({ response_id: id }).finalResponse()).output_text;
const added_up = shown.status === "completed" ? await addedUp() : null;
console.log(JSON.stringify({ events, shown, added_up }));
"""


@pytest.mark.parametrize("cancels", [False, True])
async def test_the_node_sdk(system: System, cancels: bool) -> None:
    """Begun at one relay, dropped, resumed at another, dropped again, and read, or cancelled, to its end."""
    urls = json.dumps([door(system, 0).base_url, door(system, 1).base_url])
    script = json.dumps(scripted(**(LONG if cancels else {"deltas": 40, "rate": 200})))
    code = IN_NODE % (urls, KEY, PROMPT, script, json.dumps(cancels))
    said = json.loads(await run_with_openai_sdk(code))
    events = said["events"]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert events[-1]["type"] == ("response.incomplete" if cancels else "response.completed")
    shown = said["shown"]
    assert shown["status"] == ("cancelled" if cancels else "completed")
    text = shown.pop("output_text")  # which the SDK adds
    assert shown == events[-1]["response"]
    assert text == "".join(event["delta"] for event in events if "delta" in event)
    assert said["added_up"] == (None if cancels else text)


async def test_a_worker_is_killed_in_mid_stream(system: System) -> None:
    """What was streamed cannot be taken back: the response has failed, with the text so far."""
    async with door(system).async_sdk() as client:
        async for events in long_stream(client):
            if len(events) == 10:
                system.workers[0].stop(at_once=True)
        response = check_whole(events)
        assert response.status == "failed"
        error: Any = response.error  # whose code is one of ours
        assert error.code == "worker_lost"
        assert response.output_text == text_of(events)
        assert await client.responses.retrieve(response.id) == response
