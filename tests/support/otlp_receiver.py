"""A collector for tests: takes spans over OTLP/HTTP, as protobuf, and keeps them."""

import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.support.system import eventually

KINDS = ("", "internal", "server", "client", "producer", "consumer")


class ReceivedSpan:
    """A span as it came, with hex ids; times are nanoseconds."""

    def __init__(self, service: str, span: Any) -> None:  # a protobuf message
        self.service = service
        self.name: str = span.name
        self.kind = KINDS[span.kind]
        self.trace_id: str = span.trace_id.hex()
        self.span_id: str = span.span_id.hex()
        self.parent_id: str = span.parent_span_id.hex()
        self.attributes = {each.key: _value(each.value) for each in span.attributes}
        self.events = [event.name for event in span.events]
        self.is_error = span.status.code == 2
        self.started: int = span.start_time_unix_nano
        self.ended: int = span.end_time_unix_nano

    def __repr__(self) -> str:
        return f"{self.service}/{self.name}({self.attributes}, {self.events})"


class OtlpReceiver:
    """Serves `url` from `__enter__` on; `bytes` is all that came, as it came."""

    def __init__(self) -> None:
        self.spans: list[ReceivedSpan] = []
        self.bytes = b""
        receiver = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                receiver.take(body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, *_: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What a service needs to send its spans here, soon."""
        return {"OTEL_EXPORTER_OTLP_ENDPOINT": self.url, "OTEL_BSP_SCHEDULE_DELAY": "200"}

    def take(self, body: bytes) -> None:
        self.bytes += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {each.key: _value(each.value) for each in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.spans += [ReceivedSpan(attributes["service.name"], span) for span in scope.spans]

    async def of_job(
        self, job_id: str, count: int, where: Callable[[ReceivedSpan], bool] = lambda _: True
    ) -> list[ReceivedSpan]:
        """The spans of a job when there are so many, by their beginnings. Raises AssertionError in time."""

        def found() -> list[ReceivedSpan]:
            mine = [span for span in self.spans if span.attributes.get("deltawire.job.id") == job_id]
            return sorted(filter(where, mine), key=lambda span: span.started)

        await eventually(lambda: len(found()) >= count, what=f"{count} spans of {job_id}")
        return found()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def _value(value: Any) -> Any:  # a protobuf AnyValue
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(each) for each in value.array_value.values]
    return getattr(value, kind) if kind else None
