"""Gateways as they are: each stream of tests/support/gateway_streams.py through the worker's real code."""

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from deltawire.redis_server import RedisServer
from tests.integration.test_generate import Bench, open_bench, request
from tests.support.gateway_streams import QUIRKS, Quirk

# What the fold and the reading of errors have to learn first.
WAITING = frozenset(
    [
        "infinityblue-stream",
        "infinityblue-400",
        "infinityblue-413",
        "infinityblue-401",
        "infinityblue-403",
        "infinityblue-404",
        "infinityblue-429",
        "infinityblue-500",
        "infinityblue-502",
        "infinityblue-503",
        "infinityblue-504",
        "openai-obfuscation",
        "openai-named-tool-ends-in-stop",
        "openai-error-in-mid-stream",
        "openai-insufficient-quota",
        "azure-content-filter-400",
        "vllm-error-event",
        "vllm-old-error-object",
        "llamacpp-error-field",
        "ollama-same-index-for-all-calls",
        "ollama-calls-without-index",
        "ollama-empty-finish-reason",
        "litellm-ping",
        "litellm-code-in-digits",
        "openrouter-reasoning-details",
        "openrouter-error-in-mid-stream",
        "openrouter-error-beside-no-choices",
        "openrouter-error-as-answer",
        "deepseek-insufficient-system-resource",
        "groq-usage",
        "groq-error-event",
        "mistral-thinking-parts",
        "mistral-padding",
        "mistral-finish-reason-error",
        "mistral-model-length",
        "gemini-calls-without-index",
        "gemini-pieces-without-index",
        "gemini-error-in-array",
        "moonshot-usage-in-choice",
        "qwen-empty-ids",
        "sglang-refusal-as-event",
        "anthropic-ignores-response-format",
    ]
)
CASES = [
    pytest.param(
        quirk,
        id=quirk.name,
        marks=[pytest.mark.xfail(strict=True, reason="not read yet")] if quirk.name in WAITING else [],
    )
    for quirk in QUIRKS
]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bench(redis_server: RedisServer) -> AsyncIterator[Bench]:
    """One worker and one gateway for all; each quirk is a job of its own."""
    async with open_bench(redis_server.url) as bench:
        yield bench


def check(actual: Any, expected: Any, where: str = "event") -> None:
    """`actual` is `expected`; objects may have more fields than those expected."""
    if isinstance(expected, dict):
        assert isinstance(actual, dict), f"{where} is {actual!r}"
        for key, value in expected.items():
            assert key in actual or value is None, f"{where} has no {key}: {actual!r}"
            check(actual.get(key), value, f"{where}.{key}")
    elif isinstance(expected, list):
        assert isinstance(actual, list), f"{where} is {actual!r}"
        assert len(actual) == len(expected), f"{where} is {actual!r}"
        for i, value in enumerate(expected):
            check(actual[i], value, f"{where}[{i}]")
    else:
        assert actual == expected, f"{where} is {actual!r}"


@pytest.mark.parametrize("quirk", CASES)
async def test_a_gateway_is_understood(bench: Bench, quirk: Quirk) -> None:
    """Its chunks are published byte for byte, and the terminal event says how it ended and what it said."""
    options: dict[str, Any] = {}  # max_retries, as soon as there are retries
    fields = {name: value for name, value in quirk.asks.items() if name != "max_retries"}
    await bench.run(quirk.name, {**request(fields=fields), "script": quirk.script}, options)
    lines = await bench.lines(quirk.name)
    events = [json.loads(line) for line in lines]
    chunks = quirk.script.get("chunks", [])
    count = len(chunks) if quirk.deltas is None else quirk.deltas
    published = [line.partition(b'"chunk":')[2][:-1] for line in lines if b'"chunk":' in line]
    assert len(published) == count, events[-1]
    for sent, line in zip(chunks, published, strict=False):
        assert line == json.dumps(sent, ensure_ascii=False, separators=(",", ":")).encode()
    check(events[-1], quirk.ends)
    assert not set(quirk.lacks) & set(events[-1]["completion"] or ())
    assert not quirk.hides or quirk.hides.encode() not in b"".join(lines)
    assert bench.requests(quirk.name) == quirk.requests
