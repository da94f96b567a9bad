"""The benchmarks' gateway: what its readers rely on."""

import asyncio
from unittest.mock import MagicMock

import msgspec
from benchmarks.load_gateway import Connection, LoadGateway, model_name

from deltawire.sse_decoder import SseDecoder


async def test_a_request_in_any_pieces_gets_all_its_chunks_and_an_end() -> None:
    """Numbered chunks, the last with a finish reason, then [DONE], in a chunked body."""
    model = model_name(0, 40).encode()
    body = b'{"model": "%b", "messages": [], "stream": true}' % model
    asked = b"POST /v1/chat/completions HTTP/1.1\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body)
    for cut in range(len(asked)):
        transport = MagicMock()
        connection = Connection(LoadGateway())
        connection.connection_made(transport)
        connection.data_received(asked[:cut])
        connection.data_received(asked[cut:])
        for _ in range(4):  # sixteen chunks in each turn of the loop
            await asyncio.sleep(0)
        writes = [call.args[0] for call in transport.write.call_args_list]
        payloads = []
        for write in writes[1:]:
            size, _, rest = write.partition(b"\r\n")
            piece = rest[: int(size, 16)]
            assert rest[len(piece) :] == b"\r\n" + (b"0\r\n\r\n" if write is writes[-1] else b"")
            payloads += SseDecoder().feed(piece)
        assert payloads.pop() == b"[DONE]"
        choices = [msgspec.json.decode(payload)["choices"][0] for payload in payloads]
        assert [int(choice["delta"]["content"][:8]) for choice in choices] == list(range(1, 41))
        assert [choice["finish_reason"] for choice in choices] == [None] * 39 + ["stop"]
