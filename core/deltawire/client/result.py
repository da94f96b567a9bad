"""What became of a job: its answer, its tool calls, its JSON, what it cost. No I/O."""

from collections.abc import Mapping
from typing import Any, Protocol, Self, TypeVar

import msgspec

from deltawire.errors import Error
from deltawire.events import (
    LEFT_OUT,
    Cancel,
    Cancelled,
    Failed,
    Incomplete,
    IncompleteDetails,
    Output,
    Status,
    TerminalEvent,
    Timings,
    UsageSource,
)
from deltawire.outputs import text_of as text_of_message

from .errors import JobCancelledError, JobEndedError, JobFailedError, JobIncompleteError, OutputError


class PydanticModel(Protocol):
    """What is used of pydantic's models, so that pydantic is needed by nobody else."""

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]: ...
    @classmethod
    def model_validate_json(cls, json_data: str) -> Self: ...


M = TypeVar("M", bound=PydanticModel)


class ToolCall(msgspec.Struct, frozen=True, kw_only=True):
    """A whole call of a tool, which may be run.

    `arguments` is the JSON as the model wrote it, `parsed` the object in it ({} where it wrote nothing). Of a
    custom tool `arguments` is the input's free text, and `parsed` is None.
    """

    id: str
    name: str
    arguments: str
    parsed: dict[str, Any] | None


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """A job that has ended, as GET /v1/jobs/{id} shows it (PROTOCOL.md §5.3)."""

    id: str
    status: Status
    """`completed`, `incomplete`, `failed` or `cancelled`."""
    completion: dict[str, Any] | None
    """OpenAI's chat.completion; None where no delta came."""
    usage: dict[str, Any] | None
    """OpenAI's usage object; `usage_source` says whose figures they are."""
    usage_source: UsageSource
    timings: Timings
    """Seconds from the job's creation: `queued_s`, `first_delta_s`, `total_s`."""
    outputs: list[Output] = []
    error: Error | None = None
    cancel: Cancel | None = None
    incomplete_details: IncompleteDetails | None = None
    metadata: dict[str, str] = {}
    response_model: Any = None  # the class that `submit` was given

    @classmethod
    def from_job(cls, job: Mapping[str, Any]) -> Self:
        """Of a job that has ended, as `retrieve` gives it, or a webhook's `data`. Raises ValueError.

        A webhook may leave out what is large (docs/webhooks.md): `client.job(id).wait()` has all of it.
        """
        try:
            return msgspec.convert(job, cls)
        except msgspec.ValidationError as error:
            raise ValueError(f"this is no job that has ended: {error}") from error

    @property
    def message(self) -> dict[str, Any]:
        """The first choice's message, {} where there is none."""
        choices = (self.completion or {}).get("choices") or [{}]
        message: dict[str, Any] = choices[0].get("message") or {}
        return message

    @property
    def text(self) -> str:
        """The text of the first choice."""
        return text_of_message(self.message)

    @property
    def refusal(self) -> str | None:
        """The model's words where it refused to answer."""
        return self.message.get("refusal")

    @property
    def tool_calls(self) -> list[ToolCall]:
        """The calls of the first choice, if they are whole; half a call stands in `completion` only."""
        output = self._output
        if output is None or output.tool_calls != "complete":
            return []
        said, legacy = self.message.get("tool_calls") or [], self.message.get("function_call")
        calls = said if isinstance(said, list) else [said]
        return [_tool_call(call) for call in (*calls, *([{"function": legacy}] if legacy else []))]

    @property
    def parsed(self) -> Any:  # of the caller's model, or JSON
        """The answer as `response_format` asked for it: the pydantic model that `submit` got, else JSON.

        None where no JSON was asked for. Raises OutputError.
        """
        if self.response_model is not None:
            return self.parse(self.response_model)
        output = self._output
        if output is None:
            return None
        if output.parse_error is not None:
            raise OutputError(output.parse_error.message, output.parse_error.reason)
        return output.parsed

    def parse(self, model: type[M]) -> M:
        """The text as a pydantic model. Raises OutputError: `refused`, `incomplete`, or `not_valid`."""
        if self.refusal:
            raise OutputError(f"the model has refused: {self.refusal}", "refused")
        if self.status != "completed":
            raise OutputError(f"the job is {self.status}, so its answer is not whole", "incomplete")
        try:
            return model.model_validate_json(self.text)
        except ValueError as error:  # pydantic's ValidationError is one
            raise OutputError(f"the answer is no {model.__name__}: {error}", "not_valid") from error

    @property
    def _output(self) -> Output | None:
        return next((output for output in self.outputs if output.index == 0), None)

    def check(self) -> Self:
        """Itself, if it has completed. Raises JobEndedError otherwise."""
        if self.status == "completed":
            return self
        if self.status == "failed":
            said = self.error.message if self.error else "without a reason"
            raise JobFailedError(f"the job has failed: {said}", self)
        if self.status == "cancelled":
            raise JobCancelledError(f"the job was cancelled: {self.cancel and self.cancel.reason}", self)
        if self.status == "incomplete":
            reason = self.incomplete_details and self.incomplete_details.reason
            raise JobIncompleteError(f"the answer is incomplete: {reason}", self)
        raise JobEndedError(f"the job is {self.status}", self)


def result_of_event(
    event: TerminalEvent, metadata: dict[str, str], completion: dict[str, Any] | None = None
) -> Result:
    """`completion` stands in where the event had no room for its own."""
    return Result(
        id=event.job_id,
        status=event.status,
        completion=event.completion or completion,
        usage=event.usage,
        usage_source=event.usage_source,
        timings=event.timings,
        outputs=[] if isinstance(event.outputs, msgspec.UnsetType) else event.outputs,
        error=event.error if isinstance(event, Failed) else None,
        cancel=event.cancel if isinstance(event, Cancelled) else None,
        incomplete_details=event.incomplete_details if isinstance(event, Incomplete) else None,
        metadata=metadata,
    )


def _tool_call(call: dict[str, Any]) -> ToolCall:
    function = call.get("function")
    if function is None:
        custom = call["custom"]
        return ToolCall(id=call.get("id", ""), name=custom["name"], arguments=custom["input"], parsed=None)
    arguments = function["arguments"]
    parsed = msgspec.json.decode(arguments) if arguments.strip() else {}
    return ToolCall(id=call.get("id", ""), name=function["name"], arguments=arguments, parsed=parsed)


def is_whole(event: TerminalEvent) -> bool:
    """Whether there was room in it for all that the job's address shows (PROTOCOL.md §2.3)."""
    outputs = () if isinstance(event.outputs, msgspec.UnsetType) else event.outputs
    return event.completion_url is msgspec.UNSET and all(out.parse_error != LEFT_OUT for out in outputs)
