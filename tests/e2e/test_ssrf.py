"""A job makes nobody call an address of its choice: the worker asks configured upstreams only."""

import asyncio
from typing import Any

import pytest

from tests.support.system import System, check_whole, request, submit, watch


async def test_addresses_in_a_job_are_called_by_nobody(system: System) -> None:
    """The upstream's name, pictures, tools, schemas and their references: not ours to look at."""
    called: list[Any] = []

    async def note(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        called.append(writer.get_extra_info("peername"))
        writer.close()

    async with await asyncio.start_server(note, "127.0.0.1", 0) as server:
        address = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/secret"
        schema = {"name": "s", "schema": {"$schema": address, "$id": address, "$ref": address}}
        for field in (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "image_url", "image_url": {"url": address}}]}
                ]
            },
            {"response_format": {"type": "json_schema", "json_schema": schema}},
            {"tools": [{"type": "mcp", "server_url": address}], "base_url": address, "webhook": address},
        ):
            job_id = await submit(system, {**request(deltas=2, rate=0), **field}, {"max_retries": 0})
            check_whole(await watch(system, job_id))
        named = await submit(system, request(deltas=2), {"upstream": address})
        assert check_whole(await watch(system, named))["error"]["code"] == "unknown_upstream"
        await asyncio.sleep(0)
    assert not called


@pytest.mark.parametrize("name", ["default/../x", "http://localhost", "DEFAULT", ""])
async def test_an_upstream_that_is_not_configured_is_none(system: System, name: str) -> None:
    job_id = await submit(system, request(deltas=2), {"upstream": name})
    assert check_whole(await watch(system, job_id))["error"]["code"] == "unknown_upstream"
