"""A scripted OpenAI-compatible gateway: stands in for a real one in demo, tests and benchmarks.

`Gateway` serves in a running loop, `run` in a process of its own. What a request may ask of it is in the
docstring of `Script`, which is the vendor field `script` of the request body.
"""

from typing import TYPE_CHECKING, Any

from deltawire.gateway.records import RequestRecord
from deltawire.gateway.script import Script

if TYPE_CHECKING:
    from deltawire.gateway.server import Gateway, run

__all__ = ["Gateway", "RequestRecord", "Script", "run"]


def __getattr__(name: str) -> Any:  # what serves; late, so that `python -m` can say which package is missing
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from deltawire.gateway import server

    return getattr(server, name)
