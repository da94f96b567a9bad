"""What a shell offers when Tab is pressed; nothing, silently, where the relay is slow or not there."""

import asyncio
import logging
import os
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import typer

from deltawire.api_keys import SCOPES
from deltawire.events import STATUSES
from deltawire.keys import JOB_ID
from deltawire.options import Options

TIMEOUT_S: Final = 1.0
LISTED: Final = 50


def job_ids(context: typer.Context, incomplete: str) -> Iterator[tuple[str, str]]:
    """The latest jobs, and how they are."""
    for job in _jobs(context):
        job_id, status = str(job["id"]), str(job["status"])
        # Shells evaluate some of it: nothing passes but what is an id, and a status.
        if job_id.startswith(incomplete) and JOB_ID.fullmatch(job_id):
            yield job_id, status if status in STATUSES else ""


def scopes(incomplete: str) -> list[str]:
    return [scope for scope in sorted(SCOPES) if scope.startswith(incomplete)]


def options(incomplete: str) -> list[str]:
    """Those of a job, up to the sign behind which the value comes."""
    return [f"{name}=" for name in msgspec.structs.asdict(Options()) if name.startswith(incomplete)]


def _jobs(context: typer.Context) -> list[dict[str, Any]]:
    from .parameters import client_of

    async def ask() -> list[dict[str, Any]]:
        async with asyncio.timeout(TIMEOUT_S), client_of(url, api_key) as client:
            jobs: list[dict[str, Any]] = (await client.list(limit=LISTED))["data"]
            return jobs

    url = context.params.get("url") or os.environ.get("DELTAWIRE_PUBLIC_URL", "")
    api_key = context.params.get("api_key") or os.environ.get("DELTAWIRE_API_KEY", "")
    logging.disable()
    try:
        return asyncio.run(ask())
    except Exception:  # noqa: BLE001 - whatever it is, the line that somebody types must stay as it is
        return []
