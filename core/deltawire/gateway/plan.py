"""From a request to the whole of its answer: which bytes, when, and how it ends.

Pure: no clock, no socket; time is in seconds since the request.
"""

from collections.abc import Iterator
from hashlib import blake2b
from itertools import chain, cycle, islice
from typing import Any, Literal, NamedTuple

import msgspec
from msgspec import Struct

from deltawire.gateway.answer import (
    JSON_TYPE,
    Envelope,
    FinishReason,
    Reply,
    Usage,
    encode_error_page,
    encode_status_error,
)
from deltawire.gateway.prose import Speech, compose, find_topic, say_at_length, say_whole
from deltawire.gateway.sample import sample
from deltawire.gateway.script import INTERRUPTING_FAULTS, BadRequestError, ChatRequest, Script, Split, Tool
from deltawire.gateway.wire import DONE, cut_event, encode_comment, encode_event

MAX_SILENCE_S = 3600.0
MAX_WHOLE_BYTES = 16 * 1024 * 1024
_COALESCED = 8
_MAX_WRITES = 512  # of one step: a reader that splits 1 MiB by bytes must not block the others
_FASTEST_COMMENT_S = 0.05

# finish: end of the body, the connection lives on; close: end of the body, then of the connection;
# abort: half a chunk (`Plan.torn`), then a reset; hold: silence.
Ending = Literal["finish", "close", "abort", "hold"]


class Step(NamedTuple):
    """Body bytes that are due at `at_s`; each of `writes` is a write and a chunk of its own."""

    at_s: float
    writes: list[bytes]
    deltas: int


class Choice(Struct, frozen=True):
    """One choice: the tool that it calls, if it does, and what it says, or what arguments it gives."""

    index: int
    speech: Speech
    finish_reason: FinishReason
    tool: Tool | None = None
    call_id: str = ""

    def opening(self) -> bytes:
        """The first `delta` object."""
        if self.tool is None:
            return b'{"role":"assistant","content":"","refusal":null}'
        return msgspec.json.encode(
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"index": 0, **self._call("")}],
                "refusal": None,
            }
        )

    def around_piece(self) -> tuple[bytes, bytes]:
        """The bytes of a `delta` object before and after a piece of the speech."""
        if self.tool is None:
            return b'{"content":', b"}"
        return b'{"tool_calls":[{"index":0,"function":{"arguments":', b"}}]}"

    def encode(self) -> dict[str, Any]:
        """The choice as it stands in a `chat.completion`."""
        message: dict[str, Any] = {"role": "assistant", "content": None, "refusal": None}
        if self.tool is None:
            message["content"] = self.speech.text
        else:
            message["tool_calls"] = [self._call(self.speech.text)]
        return {
            "index": self.index,
            "message": message,
            "logprobs": None,
            "finish_reason": self.finish_reason,
        }

    def _call(self, arguments: str) -> dict[str, Any]:
        name = self.tool.function.name if self.tool else ""
        return {"id": self.call_id, "type": "function", "function": {"name": name, "arguments": arguments}}


class Plan(Struct, frozen=True):
    """A streamed answer. `steps` may be walked once for each time it is performed.

    With `payloads` it says these, and nothing that the envelope and the choices would say.
    """

    envelope: Envelope
    choices: tuple[Choice, ...]
    usage: Usage
    script: Script
    rate: float
    payloads: tuple[bytes, ...] | None = None

    @property
    def total_deltas(self) -> int:
        return self.usage.completion_tokens

    @property
    def ending(self) -> Ending:
        match self.script.fault:
            case "stall":
                return "hold"
            case "reset":
                return "abort"
            case "cut" | "comments":
                return "close"
            case _:
                return "finish"

    @property
    def torn(self) -> bytes:
        """The event of which only a half arrives, when the ending is "abort"."""
        rest = (self.payloads or ())[self._last :]
        return encode_event(rest[0] if rest else self._closing()[0], self.script.split)

    @property
    def joins_due_steps(self) -> bool:
        """Whether steps that are due together may go in one write (several chunks of HTTP all the same)."""
        return self.script.split not in ("byte", "utf8")

    def steps(self) -> Iterator[Step]:
        """All writes in order, with the times at which they are due, which never go back."""
        steps = self._answer_steps()
        if self.script.split == "coalesce":
            steps = _coalesce(steps)
        elif self.script.split is not None:
            steps = _cut(steps, self.script.split)
        return chain(steps, self._comment_steps()) if self.script.fault == "comments" else steps

    @property
    def _interval_s(self) -> float:
        return 1 / self.rate if self.rate else 0.0

    @property
    def _last(self) -> int:
        """How many deltas are sent."""
        is_interrupted = self.script.fault in INTERRUPTING_FAULTS
        return min(self.script.after, self.total_deltas) if is_interrupted else self.total_deltas

    def _time_of(self, delta: int) -> float:
        return self.script.first_delta_s + delta * self._interval_s

    def _answer_steps(self) -> Iterator[Step]:
        """One step for each event."""
        split, fault = self.script.split, self.script.fault
        is_interrupted = fault in INTERRUPTING_FAULTS
        start_s, interval_s = self.script.first_delta_s, self._interval_s
        if not (is_interrupted and self.script.after == 0):
            for choice in self.choices:
                head, tail = self.envelope.around_choice(choice.index)
                yield Step(start_s, [encode_event(head + choice.opening() + tail, split)], 0)
        for i, payload in enumerate(islice(self._deltas(), self._last)):
            yield Step(start_s + i * interval_s, [encode_event(payload, split)], 1)
        end_s = self._time_of(self._last)
        if fault == "error":
            yield Step(end_s, [encode_event(encode_status_error(self.script.status or 500), split)], 0)
        elif not is_interrupted:
            for payload in self._closing():
                yield Step(end_s, [encode_event(payload, split)], 0)

    def _comment_steps(self) -> Iterator[Step]:
        comment = encode_comment(self.script.split)
        start_s, interval_s = self._time_of(self._last), max(self._interval_s, _FASTEST_COMMENT_S)
        for i in range(int(MAX_SILENCE_S / interval_s)):
            yield Step(start_s + i * interval_s, [comment], 0)

    def _deltas(self) -> Iterator[bytes]:
        """The chunks with content, the choices' in turn."""
        if self.payloads is not None:
            return iter(self.payloads)
        tracks = [self._track(choice) for choice in self.choices]
        return tracks[0] if len(tracks) == 1 else _take_turns(tracks)

    def _track(self, choice: Choice) -> Iterator[bytes]:
        head, tail = self.envelope.around_choice(choice.index)
        inner_head, inner_tail = choice.around_piece()
        head, tail = head + inner_head, inner_tail + tail
        pieces = [msgspec.json.encode(piece) for piece in choice.speech.pieces]
        for piece in islice(cycle(pieces), choice.speech.count):
            yield head + piece + tail

    def _closing(self) -> list[bytes]:
        payloads = []
        for choice in self.choices:
            reason = None if self.script.fault == "no_finish_reason" else choice.finish_reason
            head, tail = self.envelope.around_choice(choice.index, finish_reason=reason)
            payloads.append(head + b"{}" + tail)
        if self.envelope.has_usage:
            payloads.append(self.envelope.usage_chunk(self.usage))
        if self.script.fault != "no_done":
            payloads.append(DONE)
        return payloads


def make_plan(request: ChatRequest, *, completion_id: str, created: int, rate: float) -> Plan | Reply:
    """How to answer: the same for equal arguments. `rate` is for scripts without one.

    Raises `BadRequestError` where an answer that is not streamed would exceed 16 MiB.
    """
    script = request.script
    if script.fault in ("status", "html"):
        return _fail(script)
    if script.body is not None and (script.chunks is None or not request.is_streamed):
        return _reply(script, script.status or 200)
    rate = rate if script.rate is None else script.rate
    if script.chunks is not None:
        payloads = tuple(
            chunk.encode() if isinstance(chunk, str) else msgspec.json.encode(chunk)
            for chunk in script.chunks
        )
        envelope = Envelope(completion_id, created, request.model)
        return Plan(envelope, (), Usage(0, len(payloads)), script, rate, payloads)
    choices = tuple(_make_choice(request, i, completion_id) for i in range(request.n or 1))
    usage = Usage(
        prompt_tokens=1 + sum(len(message.text) for message in request.messages) // 4,
        completion_tokens=sum(choice.speech.count for choice in choices),
    )
    is_streamed = request.is_streamed
    has_usage = request.stream_options is not None and request.stream_options.include_usage
    envelope = Envelope(completion_id, created, request.model, has_usage and is_streamed)
    if is_streamed:
        return Plan(envelope, choices, usage, script, rate)
    longest = max((len(piece) for choice in choices for piece in choice.speech.pieces), default=0)
    if longest * usage.completion_tokens > MAX_WHOLE_BYTES:
        raise BadRequestError(
            "An answer of this length needs 'stream': true.", param="script", code="invalid_value"
        )
    return Reply(
        status=200,
        body=envelope.completion([choice.encode() for choice in choices], usage),
        headers=tuple(script.headers.items()),
        at_s=script.first_delta_s,
        deltas=usage.completion_tokens,
    )


def _fail(script: Script) -> Reply:
    if script.fault == "html":
        status = script.status or 502
        return _reply(script, status, encode_error_page(status), "text/html")
    status = script.status or 500
    return _reply(script, status, encode_status_error(status))


def _reply(script: Script, status: int, body: bytes = b"", content_type: str = JSON_TYPE) -> Reply:
    """An answer that is sent whole: what is given, unless the script says something else."""
    if script.body is not None:
        body, content_type = script.body.encode(), JSON_TYPE
    retry_after = () if script.retry_after is None else (("Retry-After", str(script.retry_after)),)
    return Reply(
        status=status,
        body=body,
        content_type=script.content_type or content_type,
        headers=(*retry_after, *script.headers.items()),
        at_s=script.first_delta_s,
    )


def _make_choice(request: ChatRequest, index: int, completion_id: str) -> Choice:
    tool = request.called_tool
    speech = _speak(request, tool, index)
    finish_reason: FinishReason = "stop" if tool is None else "tool_calls"
    if request.limit is not None and request.limit < speech.count:
        speech, finish_reason = speech.cut_to(request.limit), "length"
    call_id = ""
    if tool is not None:
        call_id = "call_" + blake2b(f"{completion_id}/{index}".encode(), digest_size=12).hexdigest()
    return Choice(index, speech, finish_reason, tool, call_id)


def _speak(request: ChatRequest, tool: Tool | None, index: int) -> Speech:
    script, prompt, form = request.script, request.prompt, request.response_format
    deltas, delta_bytes = script.deltas, script.delta_bytes
    if script.text is not None:
        return say_whole(script.text, deltas=deltas, delta_bytes=delta_bytes)
    schema: dict[str, Any] | None
    if tool is not None:
        schema = tool.function.parameters or {"type": "object", "properties": {}}
    elif form is not None and form.type != "text":
        schema = form.json_schema.schema if form.json_schema else None
    else:
        text = compose(prompt, variant=index, unicode=script.unicode)
        return say_at_length(text, deltas=deltas, delta_bytes=delta_bytes)
    value = msgspec.json.encode(sample(schema, find_topic(prompt))).decode()
    return say_whole(value, deltas=deltas, delta_bytes=None if deltas is not None else delta_bytes)


def _take_turns(tracks: list[Iterator[bytes]]) -> Iterator[bytes]:
    while tracks:
        for track in tuple(tracks):
            payload = next(track, None)
            if payload is None:
                tracks.remove(track)
            else:
                yield payload


def _cut(steps: Iterator[Step], split: Split) -> Iterator[Step]:
    for step in steps:
        writes = [piece for event in step.writes for piece in cut_event(event, split)]
        while len(writes) > _MAX_WRITES:
            yield Step(step.at_s, writes[:_MAX_WRITES], 0)
            writes = writes[_MAX_WRITES:]
        yield Step(step.at_s, writes, step.deltas)


def _coalesce(steps: Iterator[Step]) -> Iterator[Step]:
    while group := list(islice(steps, _COALESCED)):
        joined = b"".join(event for step in group for event in step.writes)
        yield Step(group[-1].at_s, [joined], sum(step.deltas for step in group))
