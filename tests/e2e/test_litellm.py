"""A gateway that nobody here wrote: LiteLLM's proxy, streamed through deltawire.

Its responses are mocked by itself, but for tools, which its mocks do not stream: those it has of our gateway.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
from openai.types.chat import ParsedChatCompletion
from pydantic import BaseModel

from deltawire.redis_server import free_port
from tests.support.absent import lack
from tests.support.openai_endpoint import Endpoint, door_of
from tests.support.system import (
    UPSTREAM_API_KEY,
    Service,
    System,
    check_whole,
    request,
    submit,
    text_of,
    watch,
)

PROGRAM = Path(__file__).parents[2] / ".venv-litellm" / "bin" / "litellm"
START_TIMEOUT_S = 120  # it imports half of PyPI
SAYS = "Whisper of tokens, word by word the river fills, and no one waits for all of it."
KEY = "sk-of-the-litellm-test"
HI: Any = [{"role": "user", "content": "hi"}]  # the SDK's types for it are many
CONFIGURATION = f"""
model_list:
  - model_name: gpt-5.4
    litellm_params: {{model: openai/gpt-5.4, api_key: unused, mock_response: "{SAYS}"}}
  - model_name: passed-on
    litellm_params: {{model: openai/gpt-5.4, api_key: {UPSTREAM_API_KEY}, api_base: "GATEWAY_URL"}}
general_settings: {{master_key: {KEY}}}
litellm_settings: {{telemetry: false}}
"""


@pytest.fixture(scope="module")
def litellm() -> Endpoint:
    """Where the proxy is, once there is a `system`, and its key."""
    return Endpoint(f"http://127.0.0.1:{free_port()}/v1", KEY)


def in_front_of(litellm: Endpoint, key: str) -> System:
    """A deltawire whose gateway is that one; not started."""
    upstream = {"DELTAWIRE_UPSTREAM_BASE_URL": litellm.base_url, "DELTAWIRE_UPSTREAM_API_KEY": key}
    return System(worker_environment=upstream)


@pytest.fixture(scope="module")
def system(litellm: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """A deltawire in front of a LiteLLM proxy; `make litellm` installs the program."""
    if not PROGRAM.exists():
        lack("LiteLLM is not installed: make litellm")
    system = in_front_of(litellm, KEY)
    directory = tmp_path_factory.mktemp("litellm")
    config = directory / "config.yaml"
    config.write_text(CONFIGURATION.replace("GATEWAY_URL", f"{system.gateway_url}/v1"))
    address = urlsplit(litellm.base_url)
    proxy = Service(
        "litellm",
        [str(PROGRAM), "--config", str(config), "--host", str(address.hostname), "--port", str(address.port)],
        # Else it fetches a price list from the network at its start.
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"},
        log=directory / "litellm.log",
        ready_url=f"http://{address.netloc}/health/liveliness",
    )
    try:
        with system:
            proxy.wait_until_ready(START_TIMEOUT_S)
            yield system
    finally:
        proxy.stop()


@pytest.mark.timeout(300)
async def test_a_stream_of_litellm_comes_through(system: System) -> None:
    """Its deltas, its final text and its usage arrive; our key went out as `Authorization: Bearer`."""
    events = await watch(system, await submit(system, request("hi")))
    terminal = check_whole(events)
    assert terminal["type"] == "completed", terminal
    assert text_of(events) == SAYS
    assert terminal["completion"]["choices"][0]["message"]["content"] == SAYS
    assert terminal["usage_source"] == "provider"
    assert len([event for event in events if event["type"] == "delta"]) > 5


class GetWeatherArgs(BaseModel):
    city: str
    country: str


@pytest.mark.timeout(300)
@pytest.mark.parametrize("tools", [None, [openai.pydantic_function_tool(GetWeatherArgs)]])
def test_the_openai_sdk_sees_no_difference(
    system: System, litellm: Endpoint, tools: list[dict[str, Any]] | None
) -> None:
    """Text and tool calls: the same final object as from LiteLLM, but for the ids that it rolls."""

    def final(at: Endpoint) -> dict[str, Any]:
        asked: dict[str, Any] = {"model": "passed-on", "tools": tools} if tools else {"model": "gpt-5.4"}
        with (
            at.sdk() as client,
            client.chat.completions.stream(
                messages=HI, stream_options={"include_usage": True}, **asked
            ) as stream,
        ):
            completion: ParsedChatCompletion[None] = stream.get_final_completion()
        for call in completion.choices[0].message.tool_calls or ():
            assert call.id
            call.id = "call"
        assert completion.id
        return {**completion.model_dump(warnings=False), "id": "chatcmpl", "created": 0}

    here = final(door_of(system))
    assert here == final(litellm)
    message = here["choices"][0]["message"]
    if tools:
        assert set(message["tool_calls"][0]["function"]["parsed_arguments"]) == {"city", "country"}
    else:
        assert message["content"] == SAYS


@pytest.mark.timeout(300)
def test_what_breaks_behind_litellm_breaks_here(system: System, litellm: Endpoint) -> None:
    """An error in mid-stream that LiteLLM passes on is one to the SDK behind deltawire, too."""
    script = {"fault": "error", "after": 5, "rate": 0}
    for at in litellm, door_of(system):
        said: list[str | None] = []
        with at.sdk() as client:
            stream = client.chat.completions.create(
                model="passed-on", messages=HI, stream=True, extra_body={"script": script}
            )
            with pytest.raises(openai.APIError):
                said.extend(chunk.choices[0].delta.content for chunk in stream)
        assert any(said)


@pytest.mark.timeout(300)
@pytest.mark.usefixtures("system")
async def test_a_wrong_key_fails_the_job_and_shows_nowhere(litellm: Endpoint) -> None:
    """LiteLLM refuses a wrong key (by 400 where it has no database); the job fails, the key stays here."""
    with in_front_of(litellm, "sk-wrong") as other:
        terminal = check_whole(await watch(other, await submit(other, request("hi"))))
    assert terminal["type"] == "failed"
    assert terminal["error"]["code"] in {"upstream_authentication", "upstream_invalid_request"}
    assert "sk-wrong" not in str(terminal)
