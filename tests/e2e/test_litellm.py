"""A gateway that nobody here wrote: LiteLLM's proxy, with a mocked response, streamed through deltawire."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from deltawire.redis_server import free_port
from tests.support.system import Service, System, check_whole, request, submit, text_of, watch

PROGRAM = Path(__file__).parents[2] / ".venv-litellm" / "bin" / "litellm"
START_TIMEOUT_S = 120  # it imports half of PyPI
SAYS = "Whisper of tokens, word by word the river fills, and no one waits for all of it."
KEY = "sk-of-the-litellm-test"
CONFIGURATION = f"""
model_list:
  - model_name: gpt-5.4
    litellm_params: {{model: openai/gpt-5.4, api_key: unused, mock_response: "{SAYS}"}}
general_settings: {{master_key: {KEY}}}
litellm_settings: {{telemetry: false}}
"""


@pytest.fixture(scope="module")
def litellm_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The base URL of a LiteLLM proxy that wants a key; `make litellm` installs the program."""
    if not PROGRAM.exists():
        if os.environ.get("CI"):
            pytest.fail("LiteLLM is not installed: make litellm")
        pytest.skip("LiteLLM is not installed: make litellm")
    directory = tmp_path_factory.mktemp("litellm")
    (directory / "config.yaml").write_text(CONFIGURATION)
    port = free_port()
    proxy = Service(
        "litellm",
        [
            str(PROGRAM),
            "--config",
            str(directory / "config.yaml"),
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
        ],
        # Else it fetches a price list from the network at its start.
        {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_TELEMETRY": "False"},
        log=directory / "litellm.log",
        ready_url=f"http://127.0.0.1:{port}/health/liveliness",
    )
    try:
        proxy.wait_until_ready(START_TIMEOUT_S)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        proxy.stop()


@pytest.mark.timeout(180)
async def test_a_stream_of_litellm_comes_through(litellm_url: str) -> None:
    """Its deltas, its final text and its usage arrive; our key went out as `Authorization: Bearer`."""
    upstream = {"DELTAWIRE_UPSTREAM_BASE_URL": litellm_url, "DELTAWIRE_UPSTREAM_API_KEY": KEY}
    with System(worker_environment=upstream) as system:
        events = await watch(system, await submit(system, request("hi")))
    terminal = check_whole(events)
    assert terminal["type"] == "completed", terminal
    assert text_of(events) == SAYS
    assert terminal["completion"]["choices"][0]["message"]["content"] == SAYS
    assert terminal["usage_source"] == "provider"
    assert len([event for event in events if event["type"] == "delta"]) > 5


@pytest.mark.timeout(180)
async def test_a_wrong_key_fails_the_job_and_shows_nowhere(litellm_url: str) -> None:
    """LiteLLM refuses a wrong key (by 400 where it has no database); the job fails, the key stays here."""
    upstream = {"DELTAWIRE_UPSTREAM_BASE_URL": litellm_url, "DELTAWIRE_UPSTREAM_API_KEY": "sk-wrong"}
    with System(worker_environment=upstream) as system:
        terminal = check_whole(await watch(system, await submit(system, request("hi"))))
    assert terminal["type"] == "failed"
    assert terminal["error"]["code"] in {"upstream_authentication", "upstream_invalid_request"}
    assert "sk-wrong" not in str(terminal)
