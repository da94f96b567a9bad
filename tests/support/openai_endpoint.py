"""Where OpenAI's API is spoken: by the scripted gateway, and by a deltawire in front of it."""

from pathlib import Path
from typing import Any, Final, NamedTuple

from openai import AsyncOpenAI, OpenAI

from tests.support.system import UPSTREAM_API_KEY, WAIT_S, System

EXAMPLES: Final = Path(__file__).parents[2] / "examples" / "openai"


class Endpoint(NamedTuple):
    """All that a client has to be told. A key for whoever wants none is any text."""

    base_url: str
    api_key: str = "any"

    def example(self, name: str) -> str:
        """A program of examples/openai with this address and key, and nothing else, changed."""
        code = (EXAMPLES / name).read_text()
        return code.replace("http://127.0.0.1:8080/v1", self.base_url).replace("YOUR_API_KEY", self.api_key)

    def sdk(self, **options: Any) -> OpenAI:
        """Its SDK, a context manager; it does not try again unless it is told to."""
        return OpenAI(**{**self._options, **options})

    def async_sdk(self, **options: Any) -> AsyncOpenAI:
        return AsyncOpenAI(**{**self._options, **options})

    @property
    def _options(self) -> dict[str, Any]:
        return {"base_url": self.base_url, "api_key": self.api_key, "max_retries": 0, "timeout": WAIT_S}


def gateway_of(system: System) -> Endpoint:
    """The system's gateway itself."""
    return Endpoint(f"{system.gateway_url}/v1", UPSTREAM_API_KEY)


def door_of(system: System, api_key: str = "any") -> Endpoint:
    """The system's first relay."""
    return Endpoint(f"{system.relay_url}/v1", api_key)
