"""What events add up to for somebody who reads them: text, and the completion so far. No I/O."""

from collections.abc import Iterator
from typing import Any, Final

import msgspec

from deltawire.events import Delta, Restarted, TerminalEvent
from deltawire.fold import Fold
from deltawire.messages import Snapshot
from deltawire.outputs import text_of as text_of_message

from .following import Following, Message
from .result import Result, result_of_event

_decode: Final = msgspec.json.Decoder(dict[str, Any]).decode


def text_of(event: Message) -> Iterator[str]:
    """The text that a delta adds to the first choice (or a snapshot holds)."""
    if text := _text_of(event):
        yield text


def _text_of(event: Message) -> str:
    if isinstance(event, Delta):
        choices, key = _decode(event.chunk).get("choices"), "delta"
    elif isinstance(event, Snapshot):
        choices, key = (event.completion or {}).get("choices"), "message"
    else:
        return ""
    listed = choices if isinstance(choices, list) else ()  # chunks are passed on as they came, odd ones too
    first = (choice.get(key) for choice in listed if isinstance(choice, dict) and not choice.get("index"))
    return "".join(text_of_message(message) for message in first if isinstance(message, dict))


class TextReader:
    """The text of the first choice, piece by piece, each once."""

    def __init__(self) -> None:
        self._read: list[str] = []

    def add(self, event: Message) -> str:
        """What `event` adds to the text; "" where it adds nothing."""
        text = _text_of(event)
        if isinstance(event, Snapshot):  # stands for all that came, and for what is missing
            read, self._read = "".join(self._read), [text]
            return text.removeprefix(read)  # of another attempt nothing was read
        if isinstance(event, Restarted):
            self._read = []
        elif text:
            self._read.append(text)
        return text


class Folded:
    """The part of a stream that needs no I/O: where it stands, and what it adds up to."""

    def __init__(self, following: Following, metadata: dict[str, str] | None, response_model: Any) -> None:
        self._following = following
        self._metadata = metadata
        self._response_model = response_model
        self._fold = Fold()
        self._end: TerminalEvent | None = None

    @property
    def position(self) -> int:
        """The sequence number of the last event that came; `starting_after` for who goes on from here."""
        return self._following.position

    @property
    def completion(self) -> dict[str, Any] | None:
        """OpenAI's chat.completion so far (open choices have `finish_reason: null`); None before a delta.

        It adds up what this stream has read: from the beginning, or a snapshot, unless it began behind them.
        """
        return (self._end and self._end.completion) or self._fold.completion()

    @property
    def result(self) -> Result | None:
        """The job's result once its terminal event has come, without any request; None before.

        `metadata` is empty for a job that this process has not submitted.
        """
        if self._end is None:
            return None
        made = result_of_event(self._end, self._metadata or {}, self._fold.completion())
        return msgspec.structs.replace(made, response_model=self._response_model)

    def _add(self, event: Message) -> None:
        if isinstance(event, Delta):
            self._fold.add(_decode(event.chunk))
        elif isinstance(event, Snapshot):
            self._fold = fold_of(event.completion)
        elif isinstance(event, Restarted):
            self._fold = Fold()
        elif isinstance(event, TerminalEvent):
            self._end = event


def fold_of(completion: dict[str, Any] | None) -> Fold:
    """A fold that goes on from a completion, which a snapshot holds."""
    if completion is None:
        return Fold()
    state: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(completion))  # it is taken over
    choices, usage = state.pop("choices", []), state.pop("usage", None)
    state.pop("object", None)
    for choice in choices:
        calls = choice["message"].get("tool_calls")
        for index, call in enumerate(calls if isinstance(calls, list) else ()):
            if isinstance(call, dict):
                call.setdefault("index", index)  # as deltas number them; a completion does not
    return Fold.from_state({"top": state, "choices": choices, "usage": usage})
