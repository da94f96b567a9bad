"""What the terminal event says of tool calls and of the JSON that was asked for (`outputs`).

The marks are `deltawire.outputs`'s; here the JSON is compared with the schema, in a process of its own,
which starts with the first schema. One question at a time: an honest one takes less than a millisecond, none
more than two seconds of CPU.
"""

import asyncio
import logging
import select
import subprocess
import sys
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec

from deltawire.ending import AsCancelled, AsFailed, Ending
from deltawire.events import Output, ParseError
from deltawire.fold import Fold
from deltawire.outputs import asks_for_json, judge, schema_of, text_of

WAIT_S: Final = 20.0
MAX_QUESTION_BYTES: Final = 4 << 20
COMMAND: Final = (sys.executable, "-P", str(Path(__file__).with_name("schema_process.py")))

_log = logging.getLogger(__name__)
_TOO_LONG: Final = ParseError("too_large", "it could not be compared with the schema in time")


class StructuredOutput:
    """One for a worker process. Its own process ends with it."""

    def __init__(self, command: Sequence[str] = COMMAND) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="schemas")
        self._process = _Process(command)
        weakref.finalize(self, self._process.kill)

    async def outputs(self, ending: Ending, fold: Fold, request: dict[str, Any] | None) -> list[Output]:
        """The `outputs` of a terminal event. Cancelling is safe. It takes WAIT_S at the most."""
        is_over = not isinstance(ending, AsFailed | AsCancelled)
        completion = fold.completion()
        outputs = judge(completion, request, is_over=is_over)
        if completion is None or request is None or not asks_for_json(request):
            return outputs
        schema = schema_of(request["response_format"])
        if schema is None:
            return outputs
        texts = {choice["index"]: text_of(choice["message"]) for choice in completion["choices"]}
        deadline = asyncio.get_running_loop().time() + WAIT_S
        compared: list[Output] = []
        for output in outputs:
            # What was too much for one choice is too much for the others: they have the same schema.
            is_given_up = any(before.parse_error == _TOO_LONG for before in compared)
            compared.append(
                await self._compared(output, schema, texts[output.index], -1 if is_given_up else deadline)
            )
        return compared

    async def _compared(self, output: Output, schema: Any, text: str, deadline: float) -> Output:
        if output.parse_error is not None or not text:
            return output
        loop = asyncio.get_running_loop()
        question = msgspec.json.encode({"schema": schema, "text": text}) + b"\n"
        if len(question) > MAX_QUESTION_BYTES:
            problem: ParseError | None = ParseError("too_large", "the schema is too large")
        elif loop.time() >= deadline:
            problem = _TOO_LONG
        else:
            try:
                async with asyncio.timeout_at(deadline):
                    problem = await loop.run_in_executor(self._thread, self._process.ask, question)
            except TimeoutError:
                problem = _TOO_LONG
        if problem is None:
            return output
        return msgspec.structs.replace(output, parsed=None, parse_error=problem)


class _Process:
    """The process that compares. All but `kill` is for one thread only, and blocks."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, question: bytes) -> ParseError | None:
        """What is wrong, or None. A process that does not answer is done away with."""
        line = b""
        with suppress(OSError):
            line = self._answer(question)
        if not line:
            _log.warning("no answer from the process that compares outputs with schemas")
            self.kill()
            return _TOO_LONG
        answer = msgspec.json.decode(line)
        return msgspec.convert(answer, ParseError) if answer else None

    def _answer(self, question: bytes) -> bytes:
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._process = subprocess.Popen(  # noqa: S603 - our own program
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        questions, answers = self._process.stdin, self._process.stdout
        assert questions is not None and answers is not None  # noqa: S101, PT018 - both are pipes
        questions.write(question)
        questions.flush()
        poll = select.poll()  # not select(): a worker has more than 1,024 files open
        poll.register(answers, select.POLLIN)
        return answers.readline() if poll.poll(WAIT_S * 1_000) else b""

    def kill(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            with suppress(OSError):
                process.communicate()  # closes the pipes and waits
