"""Tracing is off unless it is wanted, and takes nothing from peers that it cannot pass on."""

import json
import sys

import pytest
from celery.app.task import Context

from deltawire.tracing import OFF, open_tracing, read_traceparent
from deltawire.tracing_otel import MAX_CHARACTERS, _sendable
from deltawire_worker.task import _stored

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


@pytest.mark.parametrize("text", [TRACEPARENT, "cc" + TRACEPARENT[2:], TRACEPARENT[:-2] + "00"])
def test_a_traceparent_is_taken(text: str) -> None:
    """Of this version of W3C's format or a later one, sampled or not."""
    assert read_traceparent(text) == text
    with OFF.start("span", parent=text) as span:
        assert (span.traceparent, span.is_recorded) == (text, False)


@pytest.mark.parametrize(
    "text",
    [
        *(
            None,
            "",
            5,
            "x",
            [TRACEPARENT],
            TRACEPARENT.upper(),
            TRACEPARENT + "\r\nX: y",
            "ff" + TRACEPARENT[2:],
        ),
        *(f"00-{'0' * 32}-00f067aa0ba902b7-01", f"00-4bf92f3577b34da6a3ce929d0e0e4736-{'0' * 16}-01"),
    ],
)
def test_what_is_none_is_nothing(text: object) -> None:
    """It begins a trace of its own, and goes nowhere: not into the record, not upstream."""
    assert read_traceparent(text) == ""


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://127.0.0.1:4318", "OTEL_SDK_DISABLED": "True"},
        {"OTEL_EXPORTER_OTLP_TRACES_ENDPOINT": "http://127.0.0.1:4318", "OTEL_TRACES_EXPORTER": "none"},
    ],
)
def test_it_is_off_unless_there_is_a_collector(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By OpenTelemetry's own variables."""
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert open_tracing("test") is OFF


def test_without_the_packages_it_is_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """They are an extra: a service without them starts all the same."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", "http://127.0.0.1:4318")
    monkeypatch.setitem(sys.modules, "deltawire.tracing_otel", None)
    assert open_tracing("test") is OFF
    assert "deltawire[otel]" in caplog.text


def test_what_peers_say_fits_the_wire() -> None:
    """One value that does not would lose the batch of everybody's spans."""
    said = _sendable({"long": "x" * 1_000, "lone": "\ud800", "huge": 2**63, "fits": -(2**63), "is": True})
    assert said == {"long": "x" * MAX_CHARACTERS, "lone": "?", "fits": -(2**63), "is": True}


def test_a_message_that_waits_for_its_turn_keeps_its_trace() -> None:
    """What is sent in its place carries the same header."""
    context = Context(id="job", traceparent=TRACEPARENT)
    assert json.loads(_stored(context))["headers"] == {"traceparent": TRACEPARENT}
    assert b"headers" not in _stored(Context(id="job", traceparent="x"))
