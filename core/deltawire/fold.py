"""The fold: chunks added up into the `chat.completion` that the non-streaming call would have returned.

Field names and meanings are OpenAI's (API reference, "The chat completion chunk object"). Pure, and
linear in the size of the stream: text is kept in pieces and joined when somebody looks.

Where the OpenAI SDK's own accumulation (openai.lib.streaming) says something else than the non-streaming
call does, the latter counts. The SDK leaves `index` in tool calls and `obfuscation` at the top, joins an id,
role or name that is said twice, adds up numbers, forgets usage and fingerprint when a later chunk says null,
keeps a choice's vendor fields of the first chunk only, and raises where choices come out of order, and where
a list has no indexes (annotations, say).
"""

from collections.abc import Iterable
from typing import Any, ClassVar, Final

import msgspec

Chunk = dict[str, Any]

# Said again by some gateways in every chunk: never joined, the first that says something stays.
_SET_ONCE: Final = frozenset({"id", "type", "role", "index", "format"})
_SAID_WHOLE: Final = _SET_ONCE | {"name"}
# What fills a stream up, so that its packets' sizes tell nothing: OpenAI's, Mistral's.
_PADDING: Final = frozenset({"obfuscation", "p"})
_FIRST_STAYS: Final = frozenset({"id", "created", "model"})
# Parts of these types grow (Mistral's reasoning models send content as a list of them).
_GROWING_PARTS: Final = frozenset({"text", "thinking"})
_MIN_PIECES: Final = 64  # a piece of a few letters takes 60 bytes
_LETTERS_A_PIECE: Final = 256
_MAX_INDEX: Final = 4_095  # far beyond any `n`: each look at the fold looks at all choices


class _Text:
    """A growing string. Joined on every delta it would be copied each time; the longer, the more seldom."""

    __slots__ = ("max_pieces", "pieces")

    def __init__(self, first: str) -> None:
        self.pieces = [first]
        self.max_pieces = _MIN_PIECES

    def append(self, piece: str) -> None:
        self.pieces.append(piece)
        if len(self.pieces) > self.max_pieces:
            self.max_pieces = _MIN_PIECES + len(self.join()) // _LETTERS_A_PIECE

    def join(self) -> str:
        if len(self.pieces) > 1:
            self.pieces = ["".join(self.pieces)]
        return self.pieces[0]


class _Entries(list[Any]):  # of JSON
    """A list whose entries come in pieces, each found again by its index, and what marks it there."""

    __slots__ = ("places",)
    mark: ClassVar = "type"

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__(items)
        self.places: dict[object, int] = {}
        for place, entry in enumerate(self):
            if isinstance(entry, dict):
                self.note(place, entry)

    def note(self, place: int, entry: dict[str, Any]) -> None:
        """Makes an entry found by what it has by now; of several the last counts."""
        index, mark = entry.get("index"), _said(entry.get(self.mark))
        if isinstance(index, int):
            self.places[index] = max(place, self.places.get(index, 0))
            if mark:
                self.places[index, mark] = place
        if mark:
            self.places[mark] = max(place, self.places.get(mark, 0))

    def merge(self, items: list[Any]) -> None:
        """Entries with an `index` are pieces of the entry with that index and type; others are new."""
        for item in items:
            if isinstance(item, dict) and isinstance(index := item.get("index"), int):
                mark = item.get("type")
                has_mark = isinstance(mark, str) and mark != ""
                place = self.places.get((index, mark) if has_mark else index)
                if place is None:
                    place = self.places.get(index)
                    if place is not None and _said(self[place].get("type")):
                        place = None  # OpenRouter numbers reasoning_details by type
                self.merge_at(place, item)
            elif (
                isinstance(item, dict)
                and isinstance(kind := item.get("type"), str)
                and kind in _GROWING_PARTS
            ):
                last = self[-1] if self else None
                goes_on = isinstance(last, dict) and _said(last.get("type")) == kind
                self.merge_at(len(self) - 1 if goes_on else None, item)
            else:
                self.append(item)

    def merge_at(self, place: int | None, item: dict[str, Any]) -> None:
        if place is None:
            place = len(self)
            self.append({})
            _merge(self[place], item)
            self.note(place, self[place])
        else:
            _merge(self[place], item)
            if item.get(self.mark):
                self.note(place, self[place])


class _ToolCalls(_Entries):
    """As above; but gateways number tool calls in ways of their own, or not at all."""

    __slots__ = ("changed",)
    mark: ClassVar = "id"

    def __init__(self, items: Iterable[Any] = ()) -> None:
        super().__init__(items)
        self.changed = set(range(len(self)))
        """The places of those that are new, or have grown, since somebody looked."""

    def merge(self, items: list[Any]) -> None:
        for item in items:
            if not isinstance(item, dict):
                self.append(item)
                continue
            index, function = item.get("index"), item.get("function")
            has_index = isinstance(index, int)
            # {"index", "function"} without a name, as OpenAI goes on; the rest is for the others.
            if has_index and len(item) == 2 and isinstance(function, dict) and "name" not in function:
                place = self.places.get(index)
                known = None if place is None else self[place].get("function")
                if isinstance(known, dict):
                    _merge(known, function)
                    self.changed.add(place)  # type: ignore[arg-type] # where `known` is
                    continue
            mark = item.get("id")
            has_id = isinstance(mark, str) and mark != ""
            if has_id:
                place = self.places.get((index, mark) if has_index else mark)
                if place is not None:
                    _merge(self[place], item)
                    self.changed.add(place)
                    continue
            if has_index:
                place = self.places.get(index)
            else:
                place = len(self) - 1 if self and isinstance(self[-1], dict) else None
            if place is not None and _is_another(self[place], item, has_id, has_index):
                place = None
            self.changed.add(len(self) if place is None else place)
            self.merge_at(place, item)


def _is_another(call: dict[str, Any], item: dict[str, Any], has_id: bool, has_index: bool) -> bool:
    """Whether a piece that stands where `call` does, and has no id or another one, begins another call.

    Gemini gives whole calls the same index, or none. Poolside gives the later pieces of a call another id, so
    an id alone does not make one where there is an index: it takes a name.
    """
    function = item.get("function") or item.get("custom")
    name = function.get("name") if isinstance(function, dict) else None
    known_id = _said(call.get("id"))
    if not name or not isinstance(name, str):
        return has_id and not has_index and known_id != ""
    if has_id and known_id:
        return True
    # Neither says which call it is. Names may be repeated, arguments after whole arguments may not.
    known, arguments = call.get("function"), function.get("arguments")  # type: ignore[union-attr] # it has a name
    begins = isinstance(arguments, dict) or (isinstance(arguments, str) and arguments[:1] == "{")
    return begins and isinstance(known, dict) and _is_whole(known.get("arguments"))


def _is_whole(arguments: Any) -> bool:  # what is known, its texts growing
    text = _said(arguments)
    if not text.endswith("}"):
        return False
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True


class Fold:
    """Adds up the chunks of one attempt."""

    def __init__(self) -> None:
        self._top: dict[str, Any] = {}
        self._choices: dict[int, dict[str, Any]] = {}
        self._usage: dict[str, Any] | None = None

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the gateway says was used: at the top, or in `x_groq` (Groq) or a choice (Moonshot)."""
        if self._usage is None:
            for place in (self._top.get("x_groq"), *self._choices.values()):
                usage = place.get("usage") if isinstance(place, dict) else None
                if isinstance(usage, dict) and usage:
                    return usage
        return self._usage

    @property
    def is_empty(self) -> bool:
        """Whether no chunk was added."""
        return not self._top and not self._choices and self._usage is None

    def said(self, key: str) -> Any:  # JSON
        """What the top of the completion has under `key`, if anything."""
        return self._top.get(key)

    def add(self, chunk: Chunk) -> None:
        """Adds one chunk. Odd shapes are skipped, never raised: an upstream's slip must not end a stream."""
        for key, value in chunk.items():
            if key == "choices":
                for choice in value if isinstance(value, list) else ():
                    if isinstance(choice, dict):
                        self._add_choice(choice)
            elif key == "usage":
                # Those that come with every chunk are the total so far: the last counts.
                if isinstance(value, dict) and value:
                    self._usage = value
            elif key in _FIRST_STAYS:
                # Azure's first chunk carries content filters and leaves these empty.
                if value and not self._top.get(key):
                    self._top[key] = value
            elif key not in _PADDING and (value is not None or key not in self._top):
                self._top[key] = value

    def _add_choice(self, choice: dict[str, Any]) -> None:  # noqa: PLR0912 - calls would cost the hot path
        index = choice.get("index")
        if type(index) is not int or not 0 <= index <= _MAX_INDEX:  # true is an int, too
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
                    for name, entries in value.items():
                        _extend(known["logprobs"], name, entries)
            elif key == "finish_reason":
                if value is not None and value != "":
                    known[key] = value
            elif key == "index" or key == "message":  # noqa: PLR1714 - a set to look in costs more
                pass
            else:
                _extend(known, key, value)

    def changed_tool_calls(self) -> list[tuple[int, dict[str, Any]]]:
        """Those of the first choice that are new, or have grown, since the last look, and their places.

        In order; a call keeps its place, later ones follow.
        """
        calls = self._choices[0]["message"].get("tool_calls") if 0 in self._choices else None
        if not isinstance(calls, _ToolCalls):
            return []
        places = sorted(calls.changed)
        calls.changed.clear()
        return [(place, _plain(calls[place])) for place in places if isinstance(calls[place], dict)]

    def state(self) -> dict[str, Any]:
        """All of it as JSON values, for `from_state`; to be encoded before anything else is added."""
        choices = [_shown(self._choices[index]) for index in sorted(self._choices)]
        return {"top": self._top, "choices": choices, "usage": self._usage}

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "Fold":
        """A fold that goes on from where the other stood. The state is taken over, not copied."""
        fold = cls()
        fold._top = state["top"]
        for choice in state["choices"]:
            choice["message"] = _growing(choice["message"])
            fold._choices[choice["index"]] = choice
        fold._usage = state["usage"]
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


def _extend(known: dict[str, Any], key: str, value: Any) -> None:  # JSON
    """Lists go on where they ended (logprobs, vLLM's token_ids); of anything else the last counts."""
    if isinstance(value, list):
        old = known.get(key)
        if isinstance(old, list):
            old.extend(value)
        else:
            known[key] = list(value)
    elif value is not None or key not in known:
        known[key] = value


def _merge(known: dict[str, Any], delta: dict[str, Any]) -> None:  # noqa: PLR0912 - as above
    for key, value in delta.items():
        old = known.get(key)
        if isinstance(value, str):
            if isinstance(old, _Text) and key not in _SAID_WHOLE:
                old.append(value)
            else:
                _add_text(known, key, old, value)
        elif value is None:
            if old is None:
                known[key] = None
        elif isinstance(value, dict):
            if isinstance(old, dict):
                _merge(old, value)
            elif key == "arguments":  # a text, also where a gateway sends the object
                _merge(known, {key: msgspec.json.encode(value).decode()})
            elif key not in _SET_ONCE:
                known[key] = {}
                _merge(known[key], value)
        elif isinstance(value, list):
            if isinstance(old, _Entries):
                old.merge(value)
            elif key not in _SET_ONCE:
                known[key] = _entries(key, _as_parts(old) if key == "content" else ())
                known[key].merge(value)
        elif old is None or key not in _SET_ONCE or (isinstance(old, _Text) and not old.join()):
            known[key] = value


def _add_text(
    known: dict[str, Any], key: str, old: Any, value: str
) -> None:  # what is known, its texts growing
    if isinstance(old, _Text):
        if key not in _SET_ONCE:
            # A gateway that repeats a tool's whole name in each chunk means it once.
            if old.join() != value:
                old.append(value)
        elif not old.join():
            known[key] = _Text(value)
    elif key == "content" and isinstance(old, _Entries):
        old.merge([{"type": "text", "text": value}] if value else [])
    elif old is None or key not in _SET_ONCE:
        known[key] = _Text(value)


def _as_parts(text: Any) -> list[Any]:  # as above
    return [{"type": _Text("text"), "text": text}] if _said(text) else []


def _entries(key: str, items: Iterable[Any]) -> _Entries:
    return _ToolCalls(items) if key == "tool_calls" else _Entries(items)


def _said(value: Any) -> str:  # as above
    return value.join() if isinstance(value, _Text) else ""


def _finished(choice: dict[str, Any]) -> dict[str, Any]:
    finished = _shown(choice)
    finished.pop("usage", None)
    message = finished["message"]
    message["role"] = message.get("role") or "assistant"
    message.setdefault("content", None)
    if isinstance(message.get("function_call"), dict):
        _finish_arguments(message["function_call"])
    tool_calls = message.get("tool_calls")
    if isinstance(tool_calls, list) and all(isinstance(call, dict) for call in tool_calls):
        if all(isinstance(call.get("index"), int) for call in tool_calls):
            tool_calls.sort(key=lambda call: call["index"])  # else they stand as they came
        for call in tool_calls:
            call.pop("index", None)  # a streaming field only
            if isinstance(call.get("function"), dict):
                _finish_arguments(call["function"])
    return finished


def _shown(choice: dict[str, Any]) -> dict[str, Any]:
    """A choice as JSON, of which nothing grows. Only its message has texts in pieces; logprobs are large."""
    return {key: _plain(value) if key == "message" else _fixed(value) for key, value in choice.items()}


def _fixed(value: Any) -> Any:  # JSON, to which `_extend` adds at its top, or one below
    if isinstance(value, dict):
        return {key: list(item) if isinstance(item, list) else item for key, item in value.items()}
    return list(value) if isinstance(value, list) else value


def _finish_arguments(function: dict[str, Any]) -> None:
    if function.get("arguments") is None:
        function["arguments"] = ""  # a text, always


def _plain(value: Any) -> Any:  # JSON in, JSON out
    if isinstance(value, _Text):
        return value.join()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return value


def _growing(value: Any, key: str = "") -> Any:  # JSON in
    """The inverse of `_plain`: every text can be appended to, whether it ever is or not."""
    if isinstance(value, str):
        return _Text(value)
    if isinstance(value, dict):
        return {key: _growing(item, key) for key, item in value.items()}
    if isinstance(value, list):
        return _entries(key, [_growing(item) for item in value])
    return value
