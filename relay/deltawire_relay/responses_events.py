"""A job's log as OpenAI's Responses API tells it (PROTOCOL.md §5.11). Pure: lines in, events out.

The events are a fold of the log, which is the same for all readers at all times: so are their numbers,
whoever reads, from wherever, however often, and on whichever relay.
"""

from collections.abc import Iterator
from io import StringIO
from typing import Any, Final

import msgspec

from deltawire.codec import chunk_of, decode, decode_snapshot, is_delta, is_snapshot
from deltawire.errors import WireError
from deltawire.events import Completed, Incomplete, InProgress, Queued, Restarted, TerminalEvent
from deltawire.fold import Fold
from deltawire.outputs import text_of
from deltawire.record import Record

from .openai_errors import failure_of

Json = dict[str, Any]

PREFIX: Final = "resp_"
REASONS: Final = {"length": "max_output_tokens"}
_DEFAULTS: Final[Json] = {
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
    "text": {"format": {"type": "text"}},
    **dict.fromkeys(("max_output_tokens", "reasoning", "service_tier", "temperature", "top_p")),
}
"""What a Response repeats of its request, and what it says where the request said nothing."""
ECHOED: Final = frozenset(_DEFAULTS)
# A text's part, its field in a part and in its last event, and what its events begin with.
_PARTS: Final = {"output_text": "text", "refusal": "refusal"}


def response_object(job_id: str, record: Record) -> Json:
    """The Response of a job as its record says, without what has come of it: that is in the log."""
    said = msgspec.json.decode(record.response or b"{}")
    return {
        "id": PREFIX + job_id,
        "object": "response",
        "created_at": int(record.created_at),
        "completed_at": None,
        "status": record.status,
        "background": True,
        "error": None,
        "incomplete_details": None,
        "instructions": None,  # part of the prompt, which is shown to nobody
        "model": None,
        "output": [],
        "previous_response_id": None,
        "store": True,
        "truncation": "disabled",
        "usage": None,
        "metadata": record.options.metadata,
        **_DEFAULTS,
        **said,
    }


class Translator:
    """Folds a job's log, line by line from the first one, into the events of its Response."""

    def __init__(self, job_id: str, record: Record) -> None:
        self.response = response_object(job_id, record)
        """As of the last event; `output` is there at the end only."""
        self.is_over = False
        self.number = 0
        """Of the next event."""
        self._job_id = job_id
        self._events: list[Json] = []
        self._items: list[_Message | _Call] = []
        self._message: _Message | None = None
        self._calls: dict[int, _Call] = {}  # by their places in the fold
        self._fold = Fold()  # of tool calls, which gateways number in ways of their own

    def add(self, line: bytes) -> list[Json]:
        """The events that the next line of the log makes. Raises WireError `state_lost` where it makes none.

        A log that begins with a snapshot, in which single deltas are no more, still tells the Response.
        """
        self._events = []
        if is_delta(line):
            self._add_chunk(msgspec.json.decode(chunk_of(line)))
        elif is_snapshot(line):
            self._fold = Fold.from_state(decode_snapshot(line))
            completion = self._fold.completion() or {"choices": []}
            for choice in completion["choices"][:1]:
                self._add_chunk({"choices": [{**choice, "delta": {**choice["message"], "tool_calls": None}}]})
            self._add_calls()
        else:
            event = decode(line)
            if isinstance(event, Queued):
                self._tell("created", "queued")
                self._tell("queued", "queued")
            elif isinstance(event, InProgress) and self.response["status"] != "in_progress":
                self._tell("in_progress", "in_progress")
            elif isinstance(event, Restarted):  # no job of this door does
                raise WireError("state_lost", "the job began anew after it had said something")
            elif isinstance(event, TerminalEvent):
                self._end(event)
        return self._events

    # Inside.

    def _emit(self, kind: str, **fields: Any) -> None:
        self._events.append({"type": f"response.{kind}", "sequence_number": self.number, **fields})
        self.number += 1

    def _tell(self, kind: str, status: str, **fields: Any) -> None:
        self.response = {**self.response, "status": status, **fields}
        self._emit(kind, response=self.response)

    def _add_chunk(self, chunk: Json) -> None:
        for choice in _dicts(chunk.get("choices")):
            if _is_another_choice(choice.get("index")) or not isinstance(choice.get("delta"), dict):
                continue
            delta = choice["delta"]
            for kind, name in ("output_text", "content"), ("refusal", "refusal"):
                said = delta.get(name)
                if said and (text := said if isinstance(said, str) else text_of({"content": said})):
                    self._add_text(kind, text)
            if delta.get("tool_calls"):
                self._fold.add({"choices": [{"delta": {"tool_calls": delta["tool_calls"]}}]})
                self._add_calls()

    def _add_text(self, kind: str, text: str) -> None:
        message = self._message
        if message is None:
            message = self._message = _Message(f"msg_{self._job_id}", len(self._items))
            self._add_item(message)
        known = message.parts.get(kind)
        if known is None:
            known = message.parts[kind] = StringIO()
            self._emit("content_part.added", **message.place(kind), part=_part(kind, ""))
        known.write(text)
        logprobs: Json = {"logprobs": []} if kind == "output_text" else {}
        self._emit(f"{kind}.delta", **message.place(kind), delta=text, **logprobs)

    def _add_calls(self) -> None:
        for key, call in self._fold.changed_tool_calls():
            function = call.get("function")
            if not isinstance(function, dict):
                continue
            name, arguments = function.get("name"), function.get("arguments")
            if not name or not isinstance(name, str):
                continue  # it is nobody's yet
            item = self._calls.get(key)
            if item is None:
                mark = f"{self._job_id}_{key}"
                call_id = str(call.get("id") or f"call_{mark}")
                item = self._calls[key] = _Call(f"fc_{mark}", len(self._items), call_id)
                item.name = name
                self._add_item(item)
            item.name, before = name, len(item.arguments)
            if isinstance(arguments, str) and len(arguments) > before:
                item.arguments = arguments
                self._emit("function_call_arguments.delta", **item.place(), delta=arguments[before:])

    def _add_item(self, item: "_Message | _Call") -> None:
        self._items.append(item)
        self._emit("output_item.added", output_index=item.index, item=item.shown("in_progress", is_new=True))

    def _end(self, event: TerminalEvent) -> None:
        failure = failure_of(event)
        kind = event.status if failure is None or event.status == "cancelled" else "failed"
        is_whole = isinstance(event, Completed)
        outputs = () if isinstance(event.outputs, msgspec.UnsetType) else event.outputs
        calls_are_whole = any(output.index == 0 and output.tool_calls == "complete" for output in outputs)
        items = []
        for item in self._items:
            item_is_whole = calls_are_whole if isinstance(item, _Call) else is_whole
            shown = item.shown("completed" if item_is_whole else "incomplete")
            items.append(shown)
            if failure is None:
                for name, said in item.last_events(is_whole=item_is_whole):
                    self._emit(name, **said)
                self._emit("output_item.done", output_index=item.index, item=shown)
        fields: Json = {"output": items}
        if event.usage_source == "provider":
            fields["usage"] = _usage(event.usage)
        if is_whole:
            fields["completed_at"] = int(event.created_at)
        elif isinstance(event, Incomplete) and failure is None:
            reason = event.incomplete_details.reason
            fields["incomplete_details"] = {"reason": REASONS.get(reason, reason)}
        elif failure is not None and kind == "failed":
            fields["error"] = msgspec.to_builtins(failure.error)
        self.is_over = True
        # The API has no event for it; this one says that there is no more than what came.
        self._tell("incomplete" if kind == "cancelled" else kind, kind, **fields)


class _Message:
    """The text of the answer: what is said, or why it is not."""

    def __init__(self, item_id: str, index: int) -> None:
        self.id = item_id
        self.index = index
        self.parts: dict[str, StringIO] = {}  # by kind, in order; pieces would be 60 bytes each

    def place(self, kind: str) -> Json:
        return {"item_id": self.id, "output_index": self.index, "content_index": [*self.parts].index(kind)}

    def shown(self, status: str, *, is_new: bool = False) -> Json:
        content = [] if is_new else [_part(kind, text.getvalue()) for kind, text in self.parts.items()]
        return {"id": self.id, "type": "message", "status": status, "role": "assistant", "content": content}

    def last_events(self, *, is_whole: bool) -> Iterator[tuple[str, Json]]:
        for kind, known in self.parts.items():
            text = known.getvalue()
            logprobs: Json = {"logprobs": []} if kind == "output_text" else {}
            yield f"{kind}.done", {**self.place(kind), _PARTS[kind]: text, **logprobs}
            yield "content_part.done", {**self.place(kind), "part": _part(kind, text)}


class _Call:
    """A function call."""

    def __init__(self, item_id: str, index: int, call_id: str) -> None:
        self.id = item_id
        self.index = index
        self.call_id = call_id
        self.name = ""
        self.arguments = ""

    def place(self) -> Json:
        return {"item_id": self.id, "output_index": self.index}

    def shown(self, status: str, *, is_new: bool = False) -> Json:
        item = {"id": self.id, "type": "function_call", "status": status, "call_id": self.call_id}
        return {**item, "name": self.name, "arguments": "" if is_new else self.arguments}

    def last_events(self, *, is_whole: bool) -> Iterator[tuple[str, Json]]:
        """None for half a call, which must not look like a whole one."""
        if is_whole:
            said = {"name": self.name, "arguments": self.arguments}
            yield "function_call_arguments.done", {**self.place(), **said}


def _part(kind: str, text: str) -> Json:
    extra: Json = {"annotations": [], "logprobs": []} if kind == "output_text" else {}
    return {"type": kind, _PARTS[kind]: text, **extra}


def _dicts(value: Any) -> Iterator[Json]:  # JSON
    return (item for item in value if isinstance(item, dict)) if isinstance(value, list) else iter(())


def _is_another_choice(index: Any) -> bool:  # JSON
    """Whether a choice is none of this API, which has one; what has no number is the first."""
    return type(index) is int and index > 0


def _usage(usage: Json | None) -> Json:
    """OpenAI's usage of a completion, in the words of the other API."""

    def count(name: str, details: str | None = None) -> int:
        among = (usage or {}).get(details) if details else usage
        value = among.get(name) if isinstance(among, dict) else None
        return value if isinstance(value, int) else 0

    asked, said = count("prompt_tokens"), count("completion_tokens")
    cached = count("cached_tokens", "prompt_tokens_details")
    return {
        "input_tokens": asked,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": said,
        "output_tokens_details": {"reasoning_tokens": count("reasoning_tokens", "completion_tokens_details")},
        "total_tokens": count("total_tokens") or asked + said,
    }
