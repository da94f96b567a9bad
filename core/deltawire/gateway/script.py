"""A request to the scripted gateway, read and checked. Pure: bytes in, structs or `BadRequestError` out."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

MAX_DELTAS = 1_000_000
MAX_DELTA_BYTES = 1_048_576

Fault = Literal[
    "status", "html", "stall", "comments", "cut", "reset", "no_done", "error", "no_finish_reason", "json"
]
HeaderName = Annotated[str, Meta(pattern=r"\A[A-Za-z0-9_-]{1,64}\Z")]
HeaderValue = Annotated[str, Meta(pattern=r"\A[\x20-\x7e]{1,4096}\Z")]
Split = Literal["byte", "utf8", "crlf", "multiline", "coalesce"]

# These come in place of an answer, so they make sense without `stream` too.
WHOLE_ANSWER_FAULTS: frozenset[Fault] = frozenset({"status", "html", "json"})
# These interrupt a stream after `after` deltas.
INTERRUPTING_FAULTS: frozenset[Fault] = frozenset({"stall", "comments", "cut", "reset", "error"})
# The gateway says these itself: HTTP's framing depends on them.
_FRAMING_HEADERS = frozenset({"connection", "content-length", "transfer-encoding"})


class BadRequestError(Exception):
    """The client's fault, told as an OpenAI error object with status 400."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class Script(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The vendor field `script` of a request body: how the gateway behaves for this request.

    All fields are optional; a key that is not listed here is a 400 that names it.

    What is said:
      `text`           say exactly this, in token-sized pieces. Overrules tools and response_format.
      `deltas`         how many content deltas each choice has. Prose is repeated or shortened to fit;
                       what must stay whole (`text`, JSON, tool arguments) is cut into at most so many.
      `delta_bytes`    UTF-8 bytes of content in each delta: exactly, for prose; at most, for what must
                       stay whole (never inside a character). Not together with both `text` and `deltas`.
      `unicode`        prose with many multi-byte characters. (So is the answer to a prompt that holds
                       any, or that speaks of emoji or Unicode.)
      `chunks`         say exactly these payloads, one event each: strings verbatim, objects as compact JSON.
                       No role, finish or usage chunk is added, only [DONE]. Each counts as a delta. Where
                       no stream was asked for, `body` has to say what is answered instead.
      `body`           answer exactly this, whole, to any request (with `chunks`: to those that ask for no
                       stream), with `status` (default 200) and `content_type` (default application/json;
                       text/event-stream makes it a stream, to the byte). With the fault `status` or `html`
                       it is the body of that error, and what comes after `fail_first` is answered as if
                       there were neither.
      `headers`        HTTP headers besides the usual ones, or (Content-Type) in place of them. Not on
                       answers to requests that `fail_first` spares.

    When:
      `rate`           content deltas per second, all choices together; 0 is as fast as the client reads.
                       Default: the gateway's.
      `first_delta_s`  seconds between the headers and the first byte of the body. An answer that is not
                       streamed comes whole, headers and all, after it.

    What goes wrong, `fault`; all but the first three need `stream: true`:
      `status`            an OpenAI-shaped error with `status` (default 500) and, where given, a
                          `Retry-After` header with the value of `retry_after`, verbatim.
      `html`              an HTML error page with `status` (default 502) and `retry_after` likewise.
      `json`              a plain `chat.completion`, though a stream was asked for.
      `stall`             silence after `after` deltas; the connection stays open (for an hour).
      `comments`          only SSE comments after `after` deltas, one per delta that was due (for an hour).
      `cut`               after `after` deltas the body ends as HTTP wants it, without [DONE], and the
                          connection is closed.
      `reset`             after `after` deltas the connection is reset in the middle of a chunk.
      `error`             after `after` deltas an error object (of `status`, default 500) as a data event,
                          then the end of the body, without [DONE].
      `no_done`           everything but [DONE].
      `no_finish_reason`  `finish_reason` stays null to the end; [DONE] comes.
      `after`          default 0: the headers, and nothing of the body, not even the role. Counts content
                       deltas of all choices; more than there are means all of them.
      `fail_first`     only the first so many requests meet the fault, later ones of the same script are
                       answered well. The same: equal scripts with equal `X-Client-Request-Id`, or, where
                       that is missing, an equal prompt.

    How the bytes are laid out, `split`. Each piece is one HTTP chunk and one write of its own, so that
    the client's HTTP parser sees it apart even where TCP joins them:
      `byte`       one byte of body per write.
      `utf8`       writes end inside every multi-byte character.
      `crlf`       lines end in CR LF.
      `multiline`  the JSON of an event is spread over several `data:` lines.
      `coalesce`   up to eight events in one write (and chunk), when the last of them is due.
    """

    text: Annotated[str, Meta(max_length=262_144)] | None = None
    deltas: Annotated[int, Meta(ge=0, le=MAX_DELTAS)] | None = None
    delta_bytes: Annotated[int, Meta(ge=1, le=MAX_DELTA_BYTES)] | None = None
    unicode: bool = False
    chunks: list[str | dict[str, Any] | list[Any]] | None = None  # JSON of any shape, or none at all
    body: str | None = None
    content_type: HeaderValue | None = None
    headers: dict[HeaderName, HeaderValue] = {}
    rate: Annotated[float, Meta(ge=0, le=1_000_000)] | None = None
    first_delta_s: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    fault: Fault | None = None
    after: Annotated[int, Meta(ge=0)] = 0
    status: Annotated[int, Meta(ge=200, le=599)] | None = None
    retry_after: HeaderValue | int | float | None = None
    fail_first: Annotated[int, Meta(ge=1)] | None = None
    split: Split | None = None

    def without_fault(self) -> "Script":
        """What a request meets that `fail_first` spares."""
        spared = msgspec.structs.replace(self, fault=None, headers={})
        if self.fault in ("status", "html"):
            return msgspec.structs.replace(spared, body=None, content_type=None)
        return spared


class Part(Struct, frozen=True):
    """One part of a message's content; what is not text is of no interest here."""

    type: str = "text"
    text: str = ""


class Message(Struct, frozen=True):
    role: str
    content: str | list[Part] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content if part.text)
        return self.content or ""


class Function(Struct, frozen=True):
    name: Annotated[str, Meta(min_length=1)]
    parameters: dict[str, Any] | None = None  # a JSON Schema, of any shape


class Tool(Struct, frozen=True):
    function: Function
    type: Literal["function"] = "function"


class FunctionName(Struct, frozen=True):
    name: str


class NamedTool(Struct, frozen=True):
    function: FunctionName
    type: Literal["function"] = "function"


class StreamOptions(Struct, frozen=True):
    include_usage: bool = False


class JsonSchema(Struct, frozen=True):
    name: str = "answer"
    schema: dict[str, Any] | None = None  # a JSON Schema, of any shape


class ResponseFormat(Struct, frozen=True):
    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None


class ChatRequest(Struct, frozen=True, kw_only=True):
    """What the gateway looks at in a `chat.completions` body; every other field is accepted unseen."""

    model: Annotated[str, Meta(min_length=1, max_length=256)]
    messages: Annotated[list[Message], Meta(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    max_tokens: Annotated[int, Meta(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1)] | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    response_format: ResponseFormat | None = None
    script: Script = Script()

    @property
    def is_streamed(self) -> bool:
        """Whether the answer is a stream, if no fault comes in its place."""
        return bool(self.stream) and self.script.fault != "json"

    @property
    def prompt(self) -> str:
        """The text of the last message of the user; of the last message, if there is none."""
        users = [message for message in self.messages if message.role == "user"]
        return (users or self.messages)[-1].text

    @property
    def limit(self) -> int | None:
        """The most tokens (deltas) a choice may have."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def called_tool(self) -> Tool | None:
        """The tool that the answer calls, if any.

        Without a `tool_choice`, or with "auto", a tool is called once: after its result comes text.
        """
        if not self.tools or self.tool_choice == "none" or self.script.text is not None:
            return None
        if isinstance(self.tool_choice, NamedTool):
            name = self.tool_choice.function.name
            return next(tool for tool in self.tools if tool.function.name == name)
        if self.tool_choice != "required" and self.messages[-1].role == "tool":
            return None
        return self.tools[0]


_REQUEST_FIELDS = {
    field.name: field.type for field in msgspec.structs.fields(ChatRequest) if field.name != "script"
}
_SCRIPT_FIELDS = {field.name: field.type for field in msgspec.structs.fields(Script)}


def parse_request(body: bytes) -> ChatRequest:
    """Read a request body. Raises `BadRequestError`, whose `param` is the field at fault, if it is one."""
    try:
        fields = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadRequestError(f"The body of the request is not valid JSON: {error}.") from error
    if not isinstance(fields, dict):
        raise BadRequestError("The body of the request must be a JSON object.")
    for name in ("model", "messages"):
        if fields.get(name) is None:
            raise BadRequestError(
                f"Missing required parameter: '{name}'.", param=name, code="missing_required_parameter"
            )
    values = _convert_fields(fields, _REQUEST_FIELDS, prefix="")
    request = ChatRequest(**values, script=_parse_script(fields.get("script")))
    _check_together(request)
    return request


def _parse_script(value: object) -> Script:
    if value is None:
        return Script()
    if not isinstance(value, dict):
        raise BadRequestError("'script' must be an object.", param="script", code="invalid_type")
    for key in value:
        if key not in _SCRIPT_FIELDS:
            raise BadRequestError(
                f"Unknown key in script: '{key}'.", param=f"script.{key}", code="unknown_parameter"
            )
    script = Script(**_convert_fields(value, _SCRIPT_FIELDS, prefix="script."))
    _check_script(script, {name for name, given in value.items() if given is not None})
    return script


def _check_script(script: Script, given: set[str]) -> None:
    """Refuse what contradicts itself, or would do nothing."""
    if script.fault is None:
        for name in ("after", "retry_after", "fail_first"):
            if name in given:
                raise _conflict(f"'script.{name}' needs a 'script.fault'.", f"script.{name}")
    if script.status is not None:
        if script.fault is None and script.body is None:
            raise _conflict("'script.status' needs a 'script.fault' or a 'script.body'.", "script.status")
        if script.status in (204, 205, 304) or (script.fault is not None and script.status < 400):
            raise _conflict(f"'script.status' cannot be {script.status} here.", "script.status")
    if None not in (script.text, script.deltas, script.delta_bytes):
        raise _conflict("'script.text' takes one of 'deltas' and 'delta_bytes', not both.", "script.text")
    if script.chunks is not None:
        _check_chunks(script, given)
    elif script.body is not None and script.fault not in (None, *WHOLE_ANSWER_FAULTS):
        raise _conflict(f"'script.fault' = '{script.fault}' needs a stream, not a 'body'.", "script.fault")
    if script.body is None and script.content_type is not None:
        raise _conflict("'script.content_type' needs a 'script.body'.", "script.content_type")
    if not _FRAMING_HEADERS.isdisjoint(name.lower() for name in script.headers):
        raise _conflict("'script.headers' cannot set how the answer is framed.", "script.headers")


def _check_chunks(script: Script, given: set[str]) -> None:
    for name in ("text", "deltas", "delta_bytes", "unicode"):
        if name in given:
            raise _conflict(f"'script.{name}' does not go with 'script.chunks'.", f"script.{name}")
    if script.fault == "no_finish_reason":
        raise _conflict("'script.chunks' have the finish reason that they say.", "script.fault")


def _convert_fields(source: Mapping[str, Any], types: Mapping[str, Any], *, prefix: str) -> dict[str, Any]:
    """Convert field by field, so that the error can name the field without reading its own text.

    The `Any`s are JSON on its way to becoming typed, and the types themselves.
    """
    values = {}
    for name, type_ in types.items():
        if source.get(name) is None:
            continue  # OpenAI takes null for "not given"
        try:
            values[name] = msgspec.convert(source[name], type_)
        except msgspec.ValidationError as error:
            param = prefix + name
            raise BadRequestError(
                f"Invalid value for '{param}': {error}.", param=param, code="invalid_value"
            ) from error
    return values


def _check_together(request: ChatRequest) -> None:
    fault = request.script.fault
    if fault is not None and not request.stream and fault not in WHOLE_ANSWER_FAULTS:
        raise _conflict(f"'script.fault' = '{fault}' needs 'stream': true.", "script.fault")
    if not request.is_streamed and request.script.chunks is not None and request.script.body is None:
        raise _conflict("'script.chunks' need 'stream': true, or a 'script.body'.", "script.chunks")
    if isinstance(request.tool_choice, NamedTool):
        name = request.tool_choice.function.name
        if name not in [tool.function.name for tool in request.tools or ()]:
            raise _conflict(f"'tool_choice' names '{name}', which is not among 'tools'.", "tool_choice")
    if request.tool_choice == "required" and not request.tools:
        raise _conflict("'tool_choice' is only allowed when 'tools' are given.", "tool_choice")


def _conflict(message: str, param: str) -> BadRequestError:
    return BadRequestError(message, param=param, code="invalid_value")
