"""The fold: chunks added up into the `chat.completion` that the non-streaming call would have returned.

Field names and meanings are OpenAI's (API reference, "The chat completion chunk object"). Pure, and
linear in the size of the stream: text is kept in pieces and joined when somebody looks.
"""

from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec

from .codec import decode, decode_snapshot, is_snapshot, sequence_number_of
from .events import Delta, Event, Restarted

Chunk = dict[str, Any]

# Said again by some gateways in every chunk: never joined, the first that says something stays.
_SET_ONCE: Final = frozenset({"id", "type", "role", "index"})
_MAX_PIECES: Final = 512


class _Text:
    """A growing string. Joining it on every delta would copy it every time."""

    __slots__ = ("pieces",)

    def __init__(self, first: str) -> None:
        self.pieces = [first]

    def append(self, piece: str) -> None:
        self.pieces.append(piece)
        if len(self.pieces) > _MAX_PIECES:
            self.pieces = ["".join(self.pieces)]

    def join(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0]


class Fold:
    """Adds up the chunks of one attempt."""

    def __init__(self) -> None:
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self.usage: dict[str, Any] | None = None

    @property
    def is_empty(self) -> bool:
        """Whether no chunk was added."""
        return not self._top and not self._choices and self.usage is None

    def add(self, chunk: Chunk) -> None:
        """Adds one chunk. Odd shapes are skipped, never raised: an upstream's slip must not end a stream."""
        for key, value in chunk.items():
            if key == "choices":
                if isinstance(value, list):
                    for choice in value:
                        if isinstance(choice, dict):
                            self._add_choice(choice)
            elif key == "usage":
                if isinstance(value, dict):
                    self.usage = value
            elif key in {"id", "created", "model"}:
                # Azure's first chunk carries content filters and leaves these empty.
                if value and not self._top.get(key):
                    self._top[key] = value
            elif value is not None or key not in self._top:
                self._top[key] = value

    def _add_choice(self, choice: dict[str, Any]) -> None:
        index = choice.get("index")
        if not isinstance(index, int):
            index = 0
        known = self._choices.get(index)
        if known is None:
            known = self._choices[index] = {
                "index": index,
                "message": {},
                "logprobs": None,
                "finish_reason": None,
            }
        for key, value in choice.items():
            if key == "delta":
                if isinstance(value, dict):
                    _merge(known["message"], value)
            elif key == "logprobs":
                if isinstance(value, dict):
                    if known["logprobs"] is None:
                        known["logprobs"] = {}
                    _merge(known["logprobs"], value)
            elif key not in {"index", "message"} and (value is not None or key not in known):
                known[key] = value

    def state(self) -> dict[str, Any]:
        """All of it as JSON values, for `from_state`; to be encoded before anything else is added."""
        choices = [_plain(self._choices[index]) for index in sorted(self._choices)]
        return {"top": self._top, "choices": choices, "usage": self.usage}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Fold":
        """A fold that goes on from where the other stood. The state is taken over, not copied."""
        fold = cls()
        fold._top = state["top"]
        for choice in state["choices"]:
            choice["message"] = _growing(choice["message"])
            choice["logprobs"] = _growing(choice["logprobs"])
            fold._choices[choice["index"]] = choice
        fold.usage = state["usage"]
        return fold

    def finish_reasons(self) -> list[str | None]:
        """The `finish_reason` of each choice, by index; what is no text is none."""
        reasons = [self._choices[index]["finish_reason"] for index in sorted(self._choices)]
        return [reason if isinstance(reason, str) else None for reason in reasons]

    def completion(self) -> dict[str, Any] | None:
        """The `chat.completion` so far (open choices: `finish_reason: null`). None if no chunk was added."""
        if self.is_empty:
            return None
        top = {
            key: value for key, value in self._top.items() if key not in {"id", "object", "created", "model"}
        }
        return {
            "id": self._top.get("id", ""),
            "object": "chat.completion",
            "created": self._top.get("created", 0),
            "model": self._top.get("model", ""),
            **top,
            "choices": [_finished(self._choices[index]) for index in sorted(self._choices)],
            "usage": self.usage,
        }


def _merge(known: dict[str, Any], delta: dict[str, Any]) -> None:
    for key, value in delta.items():
        if isinstance(value, str):
            old = known.get(key)
            if isinstance(old, _Text):
                # A gateway that repeats a tool's whole name in each chunk means it once.
                if key not in _SET_ONCE and not (key == "name" and old.join() == value):
                    old.append(value)
                elif not old.join():
                    known[key] = _Text(value)
            else:
                known[key] = _Text(value)
        elif value is None:
            known.setdefault(key, None)
        elif isinstance(value, dict):
            old = known.get(key)
            if not isinstance(old, dict):
                old = known[key] = {}
            _merge(old, value)
        elif isinstance(value, list):
            old = known.get(key)
            if not isinstance(old, list):
                old = known[key] = []
            _merge_list(old, value)
        else:
            known[key] = value


def _merge_list(known: list[Any], items: list[Any]) -> None:
    """Entries with an `index` are pieces of the entry with that index; others are new entries."""
    for item in items:
        if isinstance(item, dict) and isinstance(item.get("index"), int):
            for entry in known:
                if isinstance(entry, dict) and entry.get("index") == item["index"]:
                    break
            else:
                entry = {}
                known.append(entry)
            _merge(entry, item)
        else:
            known.append(item)


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    finished: dict[str, Any] = _plain(choice)
    message = finished["message"]
    message.setdefault("role", "assistant")
    message.setdefault("content", None)
    tool_calls = message.get("tool_calls")
    if isinstance(tool_calls, list) and all(isinstance(call, dict) for call in tool_calls):
        tool_calls.sort(key=lambda call: index if isinstance(index := call.get("index"), int) else 0)
        for call in tool_calls:
            call.pop("index", None)  # a streaming field only
    return finished


def _plain(value: Any) -> Any:  # JSON in, JSON out
    if isinstance(value, _Text):
        return value.join()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _growing(value: Any) -> Any:  # JSON in
    """The inverse of `_plain`: every text can be appended to, whether it ever is or not."""
    if isinstance(value, str):
        return _Text(value)
    if isinstance(value, dict):
        return {key: _growing(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_growing(item) for item in value]
    return value


class LogFold:
    """Folds a job's log, line by line, in order; `restarted` discards what came before it."""

    def __init__(self) -> None:
        self.fold = Fold()
        self.sequence_number = 0

    def add(self, line: bytes) -> Event | None:
        """Adds the next event and returns it, decoded; None for a snapshot, from which it goes on."""
        if is_snapshot(line):
            self.fold = Fold.from_state(decode_snapshot(line))
            self.sequence_number = sequence_number_of(line)
            return None
        event = decode(line)
        if isinstance(event, Delta):
            self.fold.add(_read(event))
        elif isinstance(event, Restarted):
            self.fold = Fold()
        self.sequence_number = event.sequence_number
        return event

    def completion(self) -> dict[str, Any] | None:
        return self.fold.completion()


async def fold_pages(fold: LogFold, pages: AsyncIterator[list[bytes]]) -> LogFold:
    """Adds pages of a log that follow `fold`; cancelling leaves it at the end of a page."""
    async for page in pages:
        for line in page:
            fold.add(line)
    return fold


def _read(event: Delta) -> Chunk:
    chunk: Chunk = msgspec.json.decode(event.chunk)
    return chunk
