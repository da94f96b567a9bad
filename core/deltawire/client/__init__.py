"""The client SDK: submit a job, read its events, cancel it. `import deltawire` has the same names.

with Client("http://127.0.0.1:8080") as client:
    job = client.submit({"model": "gpt-5.4", "messages": [...]})
    for text in job.text():
        print(text, end="", flush=True)
    print(job.result().usage)
"""

from .async_client import AsyncClient, AsyncJob, AsyncStream
from .errors import (
    AuthenticationError,
    InvalidRequestError,
    JobCancelledError,
    JobEndedError,
    JobFailedError,
    JobIncompleteError,
    JobUnavailableError,
    NotFoundError,
    OutputError,
    PermissionDeniedError,
    RateLimitError,
    ServerError,
    UnreachableError,
    WaitTimeoutError,
)
from .reading import text_of
from .result import Result, ToolCall
from .sync_client import Client, Job, Stream

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncStream",
    "AuthenticationError",
    "Client",
    "InvalidRequestError",
    "Job",
    "JobCancelledError",
    "JobEndedError",
    "JobFailedError",
    "JobIncompleteError",
    "JobUnavailableError",
    "NotFoundError",
    "OutputError",
    "PermissionDeniedError",
    "RateLimitError",
    "Result",
    "ServerError",
    "Stream",
    "ToolCall",
    "UnreachableError",
    "WaitTimeoutError",
    "text_of",
]
