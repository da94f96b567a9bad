"""docs/asyncapi.yaml is what a relay sends: all events and messages, on WebSockets and event streams."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from typing import Any, Final

import jsonschema_rs
import pytest
import yaml

from deltawire.codec import encode
from deltawire_relay import websocket as websocket_module
from docs.asyncapi import DOCUMENT, EVENTS, FROM_CLIENT, FROM_SERVER, OF_STREAM
from tests.support.producer import Producer, producer
from tests.support.readers import TERMINAL, WAIT_S, Message, WebSocketReader, event_stream, websocket
from tests.support.relay_process import relay_in_process
from tests.support.sample_events import restarted
from tests.support.system import System, request, submit

Json = dict[str, Any]
OURS: Final = {kind.__struct_config__.tag for kind in (*EVENTS, *FROM_SERVER)}
#: What gateways and users fill as they like.
OPEN: Final = {"chunk", "completion", "usage", "parsed", "positions"}


def closed(schema: Any) -> Any:  # JSON
    """The same, but a field that it does not name is an error: readers ignore those, we have none."""
    if isinstance(schema, list):
        return [closed(each) for each in schema]
    if not isinstance(schema, dict):
        return schema
    made = {key: value if key in OPEN else closed(value) for key, value in schema.items()}
    return made | {"additionalProperties": False} if isinstance(schema.get("properties"), dict) else made


@pytest.fixture(scope="module")
def validators() -> dict[str, Any]:
    """One for each type of message."""
    components = closed(yaml.safe_load(DOCUMENT.read_text())["components"])
    return {
        tag: jsonschema_rs.Draft202012Validator({**message["payload"], "components": components})
        for tag, message in components["messages"].items()
    }


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """A worker and a gateway, for events as they are."""
    with System(relays=0, gateway_rate=0) as system:
        yield system


@pytest.fixture
async def jobs(system: System) -> AsyncIterator[Producer]:
    """For events that would take long to come about."""
    async with producer(system.redis_url) as made:
        yield made


TOOLS: Final = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
BODIES: Final[list[tuple[Json, Json]]] = [
    (request("hello"), {"metadata": {"a": "b"}}),
    (request("hello", text='{"a": 1}') | {"response_format": {"type": "json_object"}}, {}),
    (request("hello", text="no JSON") | {"response_format": {"type": "json_object"}}, {}),
    (request("weather?") | {"tools": TOOLS, "tool_choice": "required"}, {}),
    (request("hello", fault="status", status=503, fail_first=1), {}),
    (request("hello", fault="status", status=400), {}),
    (request("hello", fault="cut", after=2), {}),
    (request("hello"), {"upstream": "nowhere"}),
]


async def on_a_socket(reader: WebSocketReader, job_ids: list[str]) -> AsyncIterator[Message]:
    """All of several jobs, to their ends."""
    open_ids = set(job_ids)
    for job_id in job_ids:
        await reader.send("subscribe", job_id=job_id, request_id=job_id)
    while open_ids:
        message = await reader.receive()
        yield message
        if message["type"] in TERMINAL:
            open_ids.remove(message["job_id"])


async def test_every_message_is_as_the_document_says(
    system: System, jobs: Producer, validators: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No type is missing in what was seen here, but for what an event stream does not have."""
    monkeypatch.setattr(websocket_module, "HEARTBEAT_S", 0.2)
    on_socket: list[Message] = []
    on_stream: list[Message] = []
    async with AsyncExitStack() as clients:
        async with relay_in_process(system.redis_url, monkeypatch) as address:
            http = type("Door", (), {"relay_url": f"http://{address}"})
            ids = [await submit(http, *each) for each in BODIES]  # type: ignore[arg-type] # has what it needs
            reader = await clients.enter_async_context(websocket(f"ws://{address}/v1/ws"))
            on_socket += [message async for message in on_a_socket(reader, ids)]

            # Written here: a job that starts again, in mid-stream, and one whose reader lags and merges.
            job = await jobs.running("a", "b")
            await job.append([encode(restarted(job.top + 1, job_id=job.job_id))])
            await job.deltas(*"cdefgh")
            await reader.send("subscribe", job_id=job.job_id, mode="snapshot")
            on_socket.append(await reader.receive_type("snapshot"))
            await reader.send("unsubscribe", job_id=job.job_id)
            await reader.send("unsubscribe", job_id=job.job_id)
            await reader.send("authenticate", token="none is needed")
            await reader.send("sing")
            await reader.send("subscribe", job_id=job.job_id, merge=True)
            on_socket += await reader.until(job.top)
            await reader.send("cancel", job_id=job.job_id)
            await reader.send("cancel", job_id="nobody")
            await job.end("cancelled")
            seen = {"heartbeat", "unsubscribed", "authenticated", "cancelled"}
            while not seen <= {message["type"] for message in on_socket} or len(answers(on_socket)) < 2:
                on_socket.append(await reader.receive())

            for job_id in (*ids, job.job_id):
                async with event_stream(f"http://{address}", job_id) as stream:
                    on_stream += [message.data for message in await stream.rest()]
            running = await jobs.running("a")
            stream = await clients.enter_async_context(
                event_stream(f"http://{address}", running.job_id, mode="snapshot")
            )
            on_stream += [message.data for message in await stream.until(3)]
        # The relay has stopped: both were told.
        async with asyncio.timeout(WAIT_S):
            messages, code = await reader.until_closed()
            on_socket += messages
            on_stream += [message.data for message in await stream.rest()]
        assert code == 4001
    for message in (*on_socket, *on_stream):
        validators[message["type"]].validate(message)
    assert {message["type"] for message in on_socket} == OURS
    of_stream = {kind.__struct_config__.tag for kind in EVENTS} | set(OF_STREAM) - {"error"}
    assert {message["type"] for message in on_stream} == of_stream
    assert any("first_sequence_number" in message for message in on_socket)


def answers(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["type"] == "cancel_result"]


@pytest.mark.parametrize("kind", FROM_CLIENT)
def test_what_clients_send_is_in_it(kind: Any, validators: dict[str, Any]) -> None:
    """What the tests' own readers send; a field of the wrong kind is refused there as here."""
    fields = {"authenticate": {"token": "t"}}.get(kind.__struct_config__.tag, {"job_id": "j"})
    message = {"type": kind.__struct_config__.tag, "request_id": "r", **fields}
    validators[message["type"]].validate(message)
    assert not validators[message["type"]].is_valid(dict.fromkeys(message, 1))
