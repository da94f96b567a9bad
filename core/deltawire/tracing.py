"""Traces: a thin port, since OpenTelemetry's packages are an extra (`otel`) and most systems run without.

A trace goes from one process to the next as the text of a `traceparent` (W3C Trace Context §3.2): in HTTP
headers, in a message's headers, in a job's record. Prompts, completions and keys are nobody's attributes.
"""

import logging
import os
import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Final, Literal, Self, TypeAlias

from .errors import WireError

Kind = Literal["internal", "server", "client", "producer", "consumer"]
Value: TypeAlias = str | bool | int | float | Sequence[str]

_TRACEPARENT: Final = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})[0-9a-f]{32}-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}")

_log = logging.getLogger(__name__)


def read_traceparent(text: object) -> str:
    """A header's value, if it is one; else nothing, and whoever reads on begins a trace of its own."""
    return text if isinstance(text, str) and _TRACEPARENT.fullmatch(text) else ""


class Span:
    """A span of time in a trace. This one is not recorded: it hands on the trace that it stands in."""

    __slots__ = ("traceparent",)
    is_recorded: bool = False
    """Whether it is worth the while to say something to it."""

    def __init__(self, traceparent: str = "") -> None:
        self.traceparent = traceparent
        """What makes others its children; empty where there is no trace."""

    def rename(self, name: str) -> None: ...
    def tell(self, attributes: Mapping[str, Value]) -> None: ...
    def note(
        self, event: str, attributes: Mapping[str, Value] | None = None, *, at: float | None = None
    ) -> None:
        """An event in it; `at`, here and below, is Unix time."""

    def fail(self, error_type: str) -> None:
        """`error_type`: a code, or a class' name."""

    def end(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if kind is not None:
            self.fail(error.code if isinstance(error, WireError) else kind.__name__)
        self.end()


class Tracing:
    """Begins spans. This one is off."""

    is_on: bool = False

    def start(
        self,
        name: str,
        *,
        kind: Kind = "internal",
        parent: str = "",
        at: float | None = None,
        attributes: Mapping[str, Value] | None = None,
    ) -> Span:
        """A span under `parent`, a `traceparent` that was read; without one it begins a trace."""
        return Span(parent)

    async def close(self) -> None:
        """Sends what is left, and waits for that a moment."""

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


OFF: Final = Tracing()
NO_SPAN: Final = Span()


def open_tracing(service: str) -> Tracing:
    """Tracing as the environment wants it, by OpenTelemetry's own variables, which its SDK reads as well."""
    said = os.environ.get
    wanted = said("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT") or said("OTEL_EXPORTER_OTLP_ENDPOINT")
    if not wanted or said("OTEL_SDK_DISABLED", "").strip().lower() == "true":
        return OFF
    if said("OTEL_TRACES_EXPORTER", "otlp").strip().lower() != "otlp":
        return OFF
    try:
        from .tracing_otel import OtelTracing
    except ImportError:
        _log.warning("there are no traces: OpenTelemetry is not installed (deltawire[otel])")
        return OFF
    return OtelTracing(service, wanted)
