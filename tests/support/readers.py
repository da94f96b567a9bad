"""What a WebSocket or SSE client of the relay sees, as lists of dicts."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final

import httpx
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed

Message = dict[str, Any]

WAIT_S: Final = 30.0
TERMINAL: Final = frozenset({"completed", "incomplete", "failed", "cancelled"})


def is_event(message: Message) -> bool:
    """Whether it belongs to a job's log; the others are control messages."""
    return "created_at" in message


def numbers(messages: Iterable[Message]) -> list[int]:
    """The sequence numbers of the events among the messages."""
    return [message["sequence_number"] for message in messages if is_event(message)]


@asynccontextmanager
async def websocket(
    url: str, *, token: str | None = None, headers: dict[str, str] | None = None, **options: Any
) -> AsyncIterator["WebSocketReader"]:
    """A client on the relay's WebSocket door; its subprotocol is offered."""
    headers = dict(headers or {})
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    async with connect(
        url,
        additional_headers=headers,
        subprotocols=["deltawire.v1"],  # type: ignore[list-item] # a NewType of str
        proxy=None,
        max_size=None,
        compression=None,
        **options,
    ) as connection:
        yield WebSocketReader(connection)


class WebSocketReader:
    """Sends and collects JSON messages; every wait has a deadline."""

    def __init__(self, connection: ClientConnection) -> None:
        self.connection = connection

    async def send(self, type_: str, **fields: Any) -> None:
        await self.connection.send(json.dumps({"type": type_, **fields}))

    async def receive(self) -> Message:
        """The next message. Raises TimeoutError and ConnectionClosed."""
        async with asyncio.timeout(WAIT_S):
            message: Message = json.loads(await self.connection.recv())
        return message

    async def receive_type(self, *types: str) -> Message:
        """The next message of one of these types; those before it are dropped."""
        while (message := await self.receive())["type"] not in types:
            pass
        return message

    async def until(self, number: int) -> list[Message]:
        """All messages up to the event with this number."""
        messages = [await self.receive()]
        while not is_event(messages[-1]) or messages[-1]["sequence_number"] < number:
            messages.append(await self.receive())
        return messages

    async def until_terminal(self) -> list[Message]:
        """All messages up to a terminal event."""
        messages = [await self.receive()]
        while messages[-1]["type"] not in TERMINAL:
            messages.append(await self.receive())
        return messages

    async def until_closed(self) -> tuple[list[Message], int]:
        """All messages until the server closes, and its close code."""
        messages = []
        try:
            while True:
                messages.append(await self.receive())
        except ConnectionClosed:
            assert self.connection.close_code is not None
            return messages, self.connection.close_code


async def read_job(url: str, job_id: str, *, starting_after: int = 0, mode: str = "replay") -> list[Message]:
    """All that a one-job socket says, until the server closes it with 1000."""
    query = f"starting_after={starting_after}&mode={mode}"
    async with websocket(f"{url}/v1/jobs/{job_id}/ws?{query}") as reader:
        messages, code = await reader.until_closed()
    assert code == 1000, (code, messages)
    return messages


class StreamedMessage:
    """One server-sent event: its id (None: it carried none) and its data."""

    def __init__(self, id_: str | None, data: Message) -> None:
        self.id = id_
        self.data = data


class EventStreamReader:
    """Reads an event stream message by message (WHATWG HTML §9.2.6, as far as the relay uses it)."""

    def __init__(self, response: httpx.Response) -> None:
        self.response = response
        self.retries: list[int] = []
        self.comments: list[str] = []
        self._lines = response.aiter_lines()

    async def receive(self) -> StreamedMessage | None:
        """The next message; None at the end of the stream. Raises TimeoutError."""
        id_, data = None, []
        async with asyncio.timeout(WAIT_S):
            async for text in self._lines:
                field, _, value = text.partition(": ")
                if text.startswith(":"):
                    self.comments.append(text)
                elif field == "id":
                    id_ = value
                elif field == "data":
                    data.append(value)
                elif field == "retry":
                    self.retries.append(int(value))
                elif not text and data:
                    return StreamedMessage(id_, json.loads("\n".join(data)))
                else:
                    assert not text, f"a field that the protocol does not have: {text!r}"
        return None

    async def until(self, number: int) -> list[StreamedMessage]:
        """All messages up to the one with this id."""
        messages = []
        while message := await self.receive():
            messages.append(message)
            if message.id == str(number):
                break
        return messages

    async def rest(self) -> list[StreamedMessage]:
        """All messages to the end of the stream."""
        messages = []
        while message := await self.receive():
            messages.append(message)
        return messages


def http_client(**options: Any) -> httpx.AsyncClient:
    """A client without TLS: loading certificates takes longer than most of these tests."""
    return httpx.AsyncClient(timeout=WAIT_S, trust_env=False, verify=False, **options)


@asynccontextmanager
async def event_stream(
    url: str, job_id: str, *, headers: dict[str, str] | None = None, **query: Any
) -> AsyncIterator[EventStreamReader]:
    """GET /v1/jobs/{job_id}/events, read as it comes."""
    async with (
        http_client() as client,
        client.stream("GET", f"{url}/v1/jobs/{job_id}/events", params=query, headers=headers) as response,
    ):
        yield EventStreamReader(response)


async def read_stream(
    url: str, job_id: str, *, headers: dict[str, str] | None = None, **query: Any
) -> list[StreamedMessage]:
    """All messages of a stream, to its end."""
    async with event_stream(url, job_id, headers=headers, **query) as reader:
        assert reader.response.status_code == 200
        return await reader.rest()


def streamed_numbers(messages: Sequence[StreamedMessage]) -> list[int]:
    """The ids of the events among the messages, which must be their sequence numbers."""
    found = []
    for message in messages:
        if is_event(message.data):
            assert message.id == str(message.data["sequence_number"])
            found.append(int(message.id))
    return found
