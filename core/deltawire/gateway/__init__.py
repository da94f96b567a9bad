"""A scripted OpenAI-compatible gateway: stands in for a real one in demo, tests and benchmarks.

`Gateway` serves in a running loop, `run` in a process of its own. What a request may ask of it is in the
docstring of `Script`, which is the vendor field `script` of the request body.
"""

from deltawire.gateway.records import RequestRecord
from deltawire.gateway.script import Script
from deltawire.gateway.server import Gateway, run

__all__ = ["Gateway", "RequestRecord", "Script", "run"]
