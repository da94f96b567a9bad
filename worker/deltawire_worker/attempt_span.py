"""What a trace tells of an attempt: OpenTelemetry's GenAI conventions, and nothing of what was said.

https://opentelemetry.io/docs/specs/semconv/gen-ai/gen-ai-spans/ (v1.37 and later: `gen_ai.provider.name`).
"""

from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from deltawire.ending import AsIncomplete
from deltawire.events import TERMINAL_STATUSES
from deltawire.queue import QUEUE
from deltawire.tracing import Span, Tracing, Value, read_traceparent

from .run import Outcome, Refused, Run

if TYPE_CHECKING:
    from .asking import Question

# What a request may say besides its words; `stop` and `user` are words.
_OF_REQUEST: Final = {
    "max_tokens": "gen_ai.request.max_tokens",
    "max_completion_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_p": "gen_ai.request.top_p",
    "frequency_penalty": "gen_ai.request.frequency_penalty",
    "presence_penalty": "gen_ai.request.presence_penalty",
    "seed": "gen_ai.request.seed",
    "n": "gen_ai.request.choice.count",
}
_OF_USAGE: Final = (
    (("prompt_tokens",), "gen_ai.usage.input_tokens"),
    (("completion_tokens",), "gen_ai.usage.output_tokens"),
    (("prompt_tokens_details", "cached_tokens"), "gen_ai.usage.cache_read.input_tokens"),
    (("completion_tokens_details", "reasoning_tokens"), "gen_ai.usage.reasoning.output_tokens"),
)
_REASONS: Final = frozenset({"stop", "length", "content_filter", "tool_calls", "function_call", "error"})


def begin_attempt(tracing: Tracing, run: Run, heard: object) -> None:
    """Opens the attempt's span; `heard` is what its message has for a `traceparent`.

    A job whose record names no trace gets one with the first append, so that further attempts, and the
    relays, are in the same.
    """
    if not tracing.is_on:
        return
    record = run.record
    parent = record.traceparent or read_traceparent(heard)
    job: dict[str, Value] = {"deltawire.job.id": run.job_id}
    if record.traceparent and run.attempt == 1 and record.attempt_began_at is None:
        # Without a record before the claim nobody knows how long a message has waited.
        waited = tracing.start(
            f"wait {QUEUE}", kind="consumer", parent=parent, at=record.created_at, attributes=job
        )
        waited.end()
    run.span = tracing.start(
        "chat", kind="client", parent=parent, attributes=job | {"deltawire.attempt": run.attempt}
    )
    if not record.traceparent:
        run.writer.note("traceparent", parent or run.span.traceparent)


def tell_question(span: Span, question: "Question") -> None:
    """Whom the attempt asks, and how."""
    if not span.is_recorded:
        return
    where = urlsplit(question.upstream.base_url)
    attributes: dict[str, Value] = {
        "gen_ai.operation.name": "chat",
        # As the conventions want it of everything that speaks OpenAI's API; the address says who it is.
        "gen_ai.provider.name": "openai",
        "gen_ai.request.model": question.model,
        "gen_ai.request.stream": True,
        "server.address": where.hostname or "",
        "server.port": where.port or (443 if where.scheme == "https" else 80),
        "deltawire.upstream": question.upstream.name,
    }
    for field, name in _OF_REQUEST.items():
        value = question.request.get(field)
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            attributes[name] = value
    span.rename(f"chat {question.model}")
    span.tell(attributes)


def end_attempt(run: Run, outcome: Outcome) -> None:
    """Closes the span, with what came: names and numbers."""
    span, fold = run.span, run.fold
    if span.is_recorded:
        attributes: dict[str, Value] = {"deltawire.status": outcome.status}
        for key, name in (("id", "gen_ai.response.id"), ("model", "gen_ai.response.model")):
            said = fold.said(key)
            if isinstance(said, str):
                attributes[name] = said
        # By the fixed words only: what else a gateway gives for a reason may be a sentence.
        reasons = [each if each in _REASONS else "other" for each in fold.finish_reasons() if each]
        if reasons:
            attributes["gen_ai.response.finish_reasons"] = reasons
        for path, name in _OF_USAGE:
            count = _at(fold.usage, path)
            if isinstance(count, int):
                attributes[name] = count
        if run.first_delta_at is not None:
            attributes["gen_ai.response.time_to_first_chunk"] = run.first_delta_at - run.began_at
            span.note("first_delta", at=run.first_delta_at)
        span.tell(attributes)
        if error := _error(run, outcome):
            span.fail(error)
    span.end()


def _error(run: Run, outcome: Outcome) -> str:
    """A code of the protocol; empty where nothing went wrong."""
    if outcome.code is not None:
        return outcome.code
    if isinstance(run.ending, AsIncomplete) and outcome.status == "incomplete":
        return "" if run.ending.reason in {"length", "content_filter"} else run.ending.reason
    if outcome.status in TERMINAL_STATUSES or outcome.again_in_s is not None:
        return ""
    return run.cause.code.lower() if isinstance(run.cause, Refused) else "worker_shutdown"


def _at(value: Any, path: tuple[str, ...]) -> Any:  # JSON
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value
