"""Traces by OpenTelemetry's SDK, sent over OTLP/HTTP from a thread of their own. Needs the extra `otel`."""

import asyncio
import logging
import os
import threading
import time
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Final
from urllib.parse import urlsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    set_span_in_context,
)
from opentelemetry.trace import Span as SdkSpan

from .tracing import Kind, Span, Tracing, Value

FLUSH_TIMEOUT_S: Final = 1.5
LEAVE_TIMEOUT_S: Final = 0.5
QUIET_S: Final = 60.0
MAX_CHARACTERS: Final = 128
"""Of a text: some are what a peer has named."""

_log = logging.getLogger(__name__)


class OtelSpan(Span):
    """One of the SDK's."""

    __slots__ = ("_span", "is_recorded")

    def __init__(self, span: SdkSpan) -> None:
        context = span.get_span_context()
        super().__init__(f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}")
        self._span = span
        self.is_recorded = span.is_recording()

    def rename(self, name: str) -> None:
        self._span.update_name(_text(name))

    def tell(self, attributes: Mapping[str, Value]) -> None:
        self._span.set_attributes(_sendable(attributes))

    def note(
        self, event: str, attributes: Mapping[str, Value] | None = None, *, at: float | None = None
    ) -> None:
        self._span.add_event(event, attributes, timestamp=_ns(at))

    def fail(self, error_type: str) -> None:
        self._span.set_attribute("error.type", error_type)
        self._span.set_status(Status(StatusCode.ERROR))

    def end(self) -> None:
        self._span.end()


class OtelTracing(Tracing):
    """Spans wait in a bounded queue (OTEL_BSP_MAX_QUEUE_SIZE); what does not fit in is dropped."""

    is_on = True

    def __init__(self, service: str, endpoint: str) -> None:
        self._exporter = OTLPSpanExporter()
        # Not by itself at the interpreter's exit: it would wait for a collector that is away.
        self._provider = TracerProvider(resource=_resource(service), shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("deltawire", version("deltawire"))
        where = urlsplit(endpoint)
        collector = f"{where.hostname}:{where.port}" if where.port else str(where.hostname)
        theirs = logging.getLogger("opentelemetry")
        theirs.handlers[:] = [_Bounded(collector)]
        theirs.propagate = False
        logging.getLogger("urllib3").setLevel("WARNING")  # a line for each export
        _log.info("traces go to %s", collector)

    def start(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: str = "",
        at: float | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        span = self._tracer.start_span(
            name,
            context=_context(parent),
            kind=SpanKind[kind.upper()],
            attributes=_sendable(attributes),
            start_time=_ns(at),
        )
        return OtelSpan(span)

    async def close(self) -> None:
        # A thread that nobody has to wait for: the SDK gives a collector that is away half a minute.
        closing = threading.Thread(target=self._provider.shutdown, name="traces-flush", daemon=True)
        closing.start()
        await asyncio.to_thread(closing.join, FLUSH_TIMEOUT_S)
        if closing.is_alive():
            self._exporter.shutdown()  # type: ignore[no-untyped-call]  # it does not try again
            await asyncio.to_thread(closing.join, LEAVE_TIMEOUT_S)


class _Bounded(logging.Handler):
    """One line of the SDK's in QUIET_S: of a collector that is away it tells several times a batch.

    What it would fill in stays out, since the exporter's URL may hold a key.
    """

    def __init__(self, collector: str) -> None:
        super().__init__(logging.WARNING)
        self._collector = collector
        self._silent_until = 0.0

    def emit(self, record: logging.LogRecord) -> None:
        now = time.monotonic()
        if now >= self._silent_until:
            self._silent_until = now + QUIET_S
            said = str(record.msg).partition("%")[0].strip()
            _log.warning("traces for %s are late or lost: %s …", self._collector, said)


def _resource(service: str) -> Resource:
    """What the environment says of this process, and a name where it says none."""
    given = os.environ.get("OTEL_RESOURCE_ATTRIBUTES", "")
    attributes: dict[str, Any] = {"service.version": version("deltawire")}
    if not os.environ.get("OTEL_SERVICE_NAME") and "service.name=" not in given:
        attributes["service.name"] = service
    return Resource.create(attributes)


def _context(parent: str) -> Context:
    """Never the current one: nothing here relies on context variables."""
    if not parent:
        return Context()
    _, trace_id, span_id, flags = parent.split("-")
    their_flags = TraceFlags(int(flags, 16))
    context = SpanContext(int(trace_id, 16), int(span_id, 16), is_remote=True, trace_flags=their_flags)
    return set_span_in_context(NonRecordingSpan(context), Context())


def _sendable(attributes: Mapping[str, Value] | None) -> dict[str, Value]:
    """What the wire's format takes: one value beyond it would lose the whole batch."""
    return {
        name: _text(value) if isinstance(value, str) else value
        for name, value in (attributes or {}).items()
        if not isinstance(value, int) or -(2**63) <= value < 2**63
    }


def _text(text: str) -> str:
    """Cut, and without lone surrogates, which JSON can say."""
    return text[:MAX_CHARACTERS].encode(errors="replace").decode()


def _ns(at: float | None) -> int | None:
    return None if at is None else int(at * 1e9)
