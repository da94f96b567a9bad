"""`python -m deltawire_worker --check`: what only the worker knows about its settings and its upstreams."""

import asyncio
import time
from typing import Any, Final

from deltawire.environment import ConfigurationError, Environment
from deltawire.findings import Asked, Finding, of_configuration, of_open_files

from .refusal import UpstreamError
from .settings import Settings
from .upstream import Chunk, UpstreamClient, request_body
from .upstreams import Upstream

ASK_TIMEOUT_S: Final = 30.0
OTHER_FILES: Final = 64  # what a worker has open besides a socket for each stream
_CONFIGURATION: Final = "worker configuration"
_AUTHENTICATION: Final = (401, 403)


async def check(asked: Asked) -> list[Finding]:
    """Looks at the settings and the limit on open files, and asks the upstreams for their models.

    Takes as long as the slowest of them, at the most about a minute.
    """
    environment = Environment()
    if problems := of_configuration(_CONFIGURATION, Settings, environment):
        return problems
    try:
        settings = Settings.from_environment(environment)
    except ConfigurationError as error:
        return [Finding("error", _CONFIGURATION, str(error))]
    names = ", ".join(upstream.name for upstream in settings.upstreams)
    said = f"{settings.concurrency} jobs at a time; upstreams: {names}; webhooks: {len(settings.webhooks)}"
    findings = [
        Finding("ok", _CONFIGURATION, said),
        of_open_files(
            "worker open files",
            _soft_limit(),
            settings.concurrency + OTHER_FILES,
            f"{settings.concurrency} streams",
        ),
    ]
    client = UpstreamClient()
    try:
        found = await asyncio.gather(
            *(_look(client, upstream, asks=asked.asks_upstream) for upstream in settings.upstreams)
        )
    finally:
        await client.aclose()
    return [*findings, *(finding for some in found for finding in some)]


def _soft_limit() -> int:
    try:
        import resource
    except ImportError:  # Windows
        return -1
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


async def _look(client: UpstreamClient, upstream: Upstream, *, asks: bool) -> list[Finding]:
    subject = f"upstream {upstream.name}"
    listed: list[Any] = []
    try:
        listed = await client.models(upstream)
        findings = [Finding("ok", subject, f"lists {len(listed)} models")]
    except TimeoutError:
        change = "is its address right, and may this machine reach it?"
        return [Finding("error", subject, f"{upstream.base_url} does not answer in time", change)]
    except UpstreamError as error:
        findings = [_refused(subject, upstream, error)]
    if asks and findings[0].level != "error":
        findings.append(await _ask(client, upstream, listed))
    return findings


def _refused(subject: str, upstream: Upstream, error: UpstreamError) -> Finding:
    status = error.status_code
    if status is None:
        why = f"{error.error.message}: {error.__cause__}" if error.__cause__ else error.error.message
        change = "look at its address, at DNS, at the firewall, and at the certificate where it is https"
        return Finding("error", subject, f"{upstream.base_url}: {why}", change)
    if status in _AUTHENTICATION:
        change = "look at DELTAWIRE_UPSTREAM_API_KEY, or at the key and auth_header in DELTAWIRE_UPSTREAMS"
        return Finding("error", subject, f"refuses our credentials ({status})", change)
    if status >= 500:
        return Finding("warning", subject, f"answers {status} when asked for its models", "try again later")
    change = "name its models in DELTAWIRE_UPSTREAMS if it has no such list; --ask says whether it streams"
    return Finding("warning", subject, f"is there, but does not list its models ({status})", change)


async def _ask(client: UpstreamClient, upstream: Upstream, listed: list[Any]) -> Finding:
    """One token, which costs as little as a call can."""
    subject = f"upstream {upstream.name} call"
    model = _model(upstream, listed)
    if model is None:
        change = "name one in its `models` in DELTAWIRE_UPSTREAMS"
        return Finding("warning", subject, "no model is known to ask for", change)
    try:
        async with asyncio.timeout(ASK_TIMEOUT_S):
            try:
                took_s = await _first_token(client, upstream, model, {"max_tokens": 1})
            except UpstreamError as error:
                if error.code != "upstream_invalid_request":
                    raise
                # Reasoning models know this one only, and want room to think.
                took_s = await _first_token(client, upstream, model, {"max_completion_tokens": 16})
    except TimeoutError:
        return Finding("error", subject, f"{model} did not begin to answer within {ASK_TIMEOUT_S:.0f} s")
    except UpstreamError as error:
        change = "DELTAWIRE_UPSTREAMS has a switch for most ways in which gateways differ: docs/gateways.md"
        return Finding("error", subject, f"{model}: {error.error.message} ({error.code})", change)
    if took_s is None:
        return Finding("warning", subject, f"{model} ended without a token")
    return Finding("ok", subject, f"{model} streams; the first chunk came after {took_s:.2f} s")


async def _first_token(
    client: UpstreamClient, upstream: Upstream, model: str, limit: dict[str, int]
) -> float | None:
    """How long the first chunk took; None: there was none. Raises UpstreamError."""
    request = {"model": model, "messages": [{"role": "user", "content": "Say ok."}], **limit}
    began_at = time.monotonic()
    chunks: list[Chunk] = []

    def take(batch: list[Chunk]) -> bool:
        chunks.extend(batch)
        return False

    async with client.open(upstream, request_body(request, upstream), job_id="doctor") as stream:
        await stream.read(take)
    return time.monotonic() - began_at if chunks else None


def _model(upstream: Upstream, listed: list[Any]) -> str | None:
    if upstream.models:
        return upstream.models[0]
    names = (entry.get("id") for entry in listed if isinstance(entry, dict))
    return next((name for name in names if isinstance(name, str)), None)
