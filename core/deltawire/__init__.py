"""deltawire: a message-queue worker that fans out streamed tokens.

The bare install is the client SDK; `deltawire[worker]` and `deltawire[relay]` add the services.

    import deltawire

    with deltawire.Client("http://127.0.0.1:8080") as client:
        for text in client.submit({"model": "gpt-5.4", "messages": [...]}).text():
            print(text, end="", flush=True)

Names of the client are loaded when they are first used (PEP 562): worker and relay import this package, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import (
        AsyncClient,
        AsyncJob,
        AsyncStream,
        AuthenticationError,
        Client,
        InvalidRequestError,
        Job,
        JobCancelledError,
        JobEndedError,
        JobFailedError,
        JobIncompleteError,
        JobUnavailableError,
        NotFoundError,
        OutputError,
        PermissionDeniedError,
        RateLimitError,
        Result,
        ServerError,
        Stream,
        ToolCall,
        UnreachableError,
        WaitTimeoutError,
        text_of,
    )
    from .errors import DeltawireError

__version__ = "0.1.0"
__all__ = [
    "AsyncClient",
    "AsyncJob",
    "AsyncStream",
    "AuthenticationError",
    "Client",
    "DeltawireError",
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
    "__version__",
    "text_of",
]


def __getattr__(name: str) -> Any:  # one of __all__
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(".errors" if name == "DeltawireError" else ".client", __name__)
    globals()[name] = value = getattr(module, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
