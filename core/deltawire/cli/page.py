"""A job as it is printed: its text as it comes, or its events as lines of JSON."""

import sys
from collections.abc import Iterator
from typing import Any, Final, Literal, NamedTuple, Protocol

import msgspec
from rich.status import Status

from deltawire.codec import encode
from deltawire.errors import Error
from deltawire.events import (
    Cancelled,
    Completed,
    Delta,
    Event,
    Failed,
    Incomplete,
    InProgress,
    Queued,
    Restarted,
    Retrying,
    TerminalEvent,
)
from deltawire.messages import Snapshot

from .printing import err, is_lively, say, write, write_json

Kind = Literal["text", "reasoning", "call"]
STYLES: Final[dict[Kind, str]] = {"text": "", "reasoning": "dim", "call": "cyan"}


class Piece(NamedTuple):
    """What a delta adds. `starts_call`: the text is the name of a tool, arguments follow."""

    kind: Kind
    text: str
    starts_call: bool = False


class Page(Protocol):
    """Where a job's events go."""

    position: int
    """The last one that was shown."""

    def show(self, event: Event | Snapshot) -> None: ...

    def pause(self) -> None:
        """Leaves a clean line for something else; it goes on with the next event."""


class JsonPage:
    """Every event as it is on the wire."""

    def __init__(self, position: int) -> None:
        self.position = position

    def show(self, event: Event | Snapshot) -> None:
        write_json(event if isinstance(event, Snapshot) else encode(event))
        self.position = event.sequence_number

    def pause(self) -> None: ...


class TextPage:
    """The first choice's text. On a terminal what the model thinks and calls, too, and what is waited for."""

    def __init__(self, position: int) -> None:
        self.position = position
        self._kind: Kind = "text"
        self._is_mid_line = False
        self._waiting: Status | None = None
        self._wait("waiting for the job")

    def show(self, event: Event | Snapshot) -> None:
        match event:
            case Queued():
                self._wait("waiting for a worker")
            case InProgress(model=model):
                self._wait(f"waiting for {model or 'an answer'}")
            case Retrying(reason=reason, delay_s=delay_s):
                self._say(f"{reason}; the gateway is asked again in {delay_s:.1f} s")
                self._wait("waiting for the gateway")
            case Restarted():
                self._say("the job starts again: what stands above counts no more")
            case Snapshot():
                self._say("the log does not go back that far: this is the text so far")
                self._write(event)
            case Delta():
                self._write(event)
            case _:
                self.pause()
                say(*summary(event))
        self.position = event.sequence_number

    def pause(self) -> None:
        if self._waiting is not None:
            self._waiting.stop()
            self._waiting = None
        if self._is_mid_line:
            write("\n")
            self._is_mid_line = False

    def _say(self, text: str) -> None:
        self.pause()
        say((text, "dim"))

    def _wait(self, what: str) -> None:
        self.pause()
        if is_lively() and err.is_terminal:
            self._waiting = err.status(f"[dim]{what}[/]", spinner="dots")
            self._waiting.start()

    def _write(self, event: Delta | Snapshot) -> None:
        for kind, text, starts_call in pieces_of(event):
            if kind != "text" and not sys.stdout.isatty():
                continue  # a pipe gets the answer alone; --json has everything
            if starts_call or kind != self._kind or self._waiting is not None:
                self.pause()
            self._kind = kind
            write(f"{text} " if starts_call else text, STYLES[kind])
            self._is_mid_line = not text.endswith("\n")


def pieces_of(event: Delta | Snapshot) -> Iterator[Piece]:
    """What of the first choice there is to print. Pure; skips what has no shape that is known."""
    if isinstance(event, Delta):
        choices, key = msgspec.json.decode(event.chunk).get("choices"), "delta"
    else:
        choices, key = (event.completion or {}).get("choices"), "message"
    for choice in _dicts(choices):
        if choice.get("index") in (None, 0) and isinstance(message := choice.get(key), dict):
            yield from _pieces(message)


def _pieces(said: dict[str, Any]) -> Iterator[Piece]:
    # Gateways name it differently (docs/gateways.md); some say it by both names.
    if isinstance(thought := said.get("reasoning_content") or said.get("reasoning"), str):
        yield Piece("reasoning", thought)
    content = said.get("content")
    for part in _dicts(content):  # Mistral's reasoning models
        if isinstance(text := part.get("text"), str):
            yield Piece("text", text)
        for thought in _dicts(part.get("thinking")):
            yield Piece("reasoning", str(thought.get("text", "")))
    for text in (content, said.get("refusal")):
        if text and isinstance(text, str):
            yield Piece("text", text)
    for function in _functions(said):
        if name := function.get("name"):
            yield Piece("call", str(name), starts_call=True)
        if arguments := function.get("arguments"):
            yield Piece("call", str(arguments))


def summary(event: TerminalEvent) -> list[str | tuple[str, str]]:
    """How it ended, in a line."""
    match event:
        case Completed(usage=usage, timings=timings):
            tokens = f", {usage.get('completion_tokens')} tokens" if usage else ""
            return [("completed", "green"), f" in {timings.total_s:.1f} s{tokens}{_calls(event)}"]
        case Incomplete(incomplete_details=details):
            return [("incomplete", "yellow"), f": {details.reason}"]
        case Failed(error=error):
            return [("failed", "red"), f": {said(error)}"]
        case Cancelled(cancel=cancelled):
            return [("cancelled", "yellow"), f": {cancelled.reason}"]


def _calls(event: Completed) -> str:
    """Which tools are called: in a pipe nothing else says so."""
    choices = (event.completion or {}).get("choices", ())
    names = [str(function.get("name")) for choice in choices for function in _functions(choice["message"])]
    return f", calls {', '.join(names)}" if names else ""


def _functions(said: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What is called in a message, or in a piece of one."""
    return _dicts([call.get("function") for call in _dicts(said.get("tool_calls"))])


def _dicts(value: Any) -> Iterator[dict[str, Any]]:  # whatever JSON a gateway sent
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def said(error: Error) -> str:
    """An error, with its code to look up."""
    return f"{error.message} ({error.code})"
