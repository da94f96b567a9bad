"""The client: submit a job, read its events, cancel it.

async with AsyncClient("http://127.0.0.1:8080") as client:
    job = await client.submit({"model": "gpt-5.4", "messages": [...]})
    async for event in client.events(job.id):
        ...
"""

from .async_client import AsyncClient, Job, JobUnavailableError, text_of

__all__ = ["AsyncClient", "Job", "JobUnavailableError", "text_of"]
