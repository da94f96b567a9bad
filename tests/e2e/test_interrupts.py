"""Ctrl-C, signals and pipes that close, while a job is followed."""

import asyncio
import json
import os
import re
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest

from deltawire.cli.exit_codes import ExitCode
from deltawire.cli.follow import QUESTION
from tests.support.system import WAIT_S, System, check_whole, request, show, submit, text_of, watch
from tests.support.terminal import CTRL_C, PIPED, SGR, Terminal, environment_of, job_of, piped, script


@pytest.fixture
def slow(system: System, tmp_path: Path) -> Iterator[Terminal]:
    """A job that takes its time, followed on a terminal. All line ends are the page's: its text has none."""
    with Terminal(
        *("submit", "-f", "Rivers", *script(tmp_path, deltas=3_000, delta_bytes=8, rate=20)),
        environment=environment_of(system),
    ) as terminal:
        yield terminal


async def in_mid_stream(terminal: Terminal) -> str:
    """The job's id, once some of its text stands there."""
    job_id = await job_of(terminal)
    await terminal.until(lambda shown: len(shown.partition(job_id)[2].split()) > 20)
    return job_id


def text_before_the_question(terminal: Terminal) -> str:
    """What stands on the terminal, without what was said while nothing had come."""
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.shown).replace("^C", "")
    return re.sub(r"[\u2800-\u28ff] waiting .*\n\r", "", shown).partition("\nc: cancel the job")[0]


async def test_ctrl_c_then_c_cancels(system: System, slow: Terminal) -> None:
    """The job ends as cancelled, which is seen here as well."""
    job_id = await in_mid_stream(slow)
    slow.press(CTRL_C)
    await slow.until("c: cancel the job")
    slow.press(b"c")
    assert await slow.ended() == ExitCode.CANCELLED
    assert "cancelled" in slow.shown
    assert check_whole(await watch(system, job_id))["cancel"]["reason"] == "cli"


async def test_ctrl_c_then_d_detaches(system: System, slow: Terminal) -> None:
    """The job goes on, and the line that is shown comes back to it where it was left."""
    job_id = await in_mid_stream(slow)
    slow.press(CTRL_C)
    before = await slow.until(QUESTION)
    there_are = (await show(system, job_id))["latest_sequence_number"]
    # A few tokens more, that must not come between question and answer.
    await watch(system, job_id, until=lambda event: event["sequence_number"] >= there_are + 10)
    slow.read()
    assert slow.shown == before
    slow.press(b"d")
    assert await slow.ended() == ExitCode.INTERRUPTED
    found = re.search(r"deltawire tail (\S+) --starting-after (\d+)", slow.shown)
    assert found
    assert found[1] == job_id
    assert (await show(system, job_id))["status"] == "in_progress"
    with Terminal("tail", *found[0].split()[2:], environment=environment_of(system)) as terminal:
        await terminal.until(lambda shown: len(shown.split()) > 5)
        terminal.press(CTRL_C)
        await terminal.until("c: cancel the job")
        terminal.press(b"c")
        assert await terminal.ended() == ExitCode.CANCELLED
    deltas = [event for event in await watch(system, job_id) if event["type"] == "delta"]
    place = sum(event["sequence_number"] <= int(found[2]) for event in deltas)
    # Each of them its part: nothing is missing, nothing comes twice.
    assert text_before_the_question(slow).removeprefix(f"job {job_id}\n") == text_of(deltas[:place])
    assert text_of(deltas[place:]).startswith(text_before_the_question(terminal))


async def test_a_second_ctrl_c_detaches_at_once(system: System, slow: Terminal) -> None:
    job_id = await in_mid_stream(slow)
    slow.press(CTRL_C)
    await slow.until("c: cancel the job")
    slow.press(CTRL_C)
    assert await slow.ended() == ExitCode.INTERRUPTED
    assert f"deltawire tail {job_id}" in slow.shown
    assert (await show(system, job_id))["status"] == "in_progress"
    await piped(system, "cancel", job_id)


async def test_ctrl_c_then_another_key_goes_on(system: System, slow: Terminal) -> None:
    """And the next Ctrl-C asks again."""
    job_id = await in_mid_stream(slow)
    slow.press(CTRL_C)
    await slow.until("c: cancel the job")
    length = len(slow.shown)
    slow.press(b"\n")
    await slow.until(lambda shown: len(shown) > length + 40)
    slow.press(CTRL_C)
    await slow.until(lambda shown: shown.count("c: cancel the job") == 2)
    slow.press(b"c")
    assert await slow.ended() == ExitCode.CANCELLED
    text = "".join(
        event["chunk"]["choices"][0]["delta"].get("content") or ""
        for event in await watch(system, job_id)
        if event["type"] == "delta"
    )
    shown = re.sub(r"\nc: cancel the job.*watching \n", "", SGR.sub("", slow.shown).replace("^C", ""))
    assert text.strip()[:300] in shown  # without a hole where the question stood


async def test_the_prompt_may_come_by_a_pipe_and_the_answer_from_the_keys(
    system: System, tmp_path: Path
) -> None:
    """`echo … | deltawire submit -f`: standard input is the prompt, the terminal is asked all the same."""
    with Terminal(
        *("submit", "-f", *script(tmp_path, deltas=3_000, rate=20)),
        environment=environment_of(system),
        stdin=b"Rivers\nand lakes\n",
    ) as terminal:
        await in_mid_stream(terminal)
        terminal.press(CTRL_C)
        await terminal.until("c: cancel the job")
        terminal.press(b"C")
        assert await terminal.ended() == ExitCode.CANCELLED


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, ExitCode.INTERRUPTED), (signal.SIGTERM, ExitCode.TERMINATED)]
)
async def test_without_a_terminal_signals_detach(system: System, number: int, code: int) -> None:
    """Nobody can be asked: the job goes on, and standard error says how to come back."""
    job_id = await submit(system, request("Tell me of rivers", deltas=3_000, rate=20))
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PIPED, "tail", job_id),
        env=environment_of(system),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    await process.stdout.read(20)
    process.send_signal(number)
    _, errors = await process.communicate()
    assert process.returncode == code
    assert re.search(rf"deltawire tail {job_id} --starting-after \d+", errors.decode())
    assert "Traceback" not in errors.decode()
    await piped(system, "cancel", job_id)


async def test_an_interrupt_before_the_answer_says_that_there_may_be_a_job() -> None:
    """The relay may have taken it, and then somebody pays for it."""
    asked = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with closing(writer):
            await reader.readuntil(b"\r\n\r\n")
            asked.set()
            await reader.read()

    async with await asyncio.start_server(say_nothing, "127.0.0.1", 0) as server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-c", PIPED, "submit", "Hello"),
            env=environment_of(None, DELTAWIRE_PUBLIC_URL=url),
            stderr=asyncio.subprocess.PIPE,
        )
        await asked.wait()
        process.send_signal(signal.SIGINT)
        _, errors = await process.communicate()
    assert process.returncode == ExitCode.INTERRUPTED
    assert "deltawire jobs" in errors.decode()


async def test_a_pipe_that_nobody_reads_does_not_keep_it_alive(system: System) -> None:
    """The first SIGTERM cannot be answered in a write that blocks; the second one ends it."""
    job_id = await submit(system, request("Tell me of rivers", deltas=2_000, delta_bytes=1_000, rate=0))
    check_whole(await watch(system, job_id))
    ours, its = os.pipe()
    command = (sys.executable, "-c", PIPED, "tail", job_id)
    # Not asyncio's: where a signal meets the end of its process, that knows of no exit code (Python 3.11).
    process = subprocess.Popen(command, env=environment_of(system), stdout=its)
    os.close(its)
    try:
        await asyncio.to_thread(select.select, [ours], [], [], WAIT_S)  # it writes
        while process.poll() is None:
            process.send_signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                await asyncio.to_thread(process.wait, 0.2)
        assert process.returncode in {-signal.SIGTERM, ExitCode.TERMINATED}
    finally:
        os.close(ours)


async def test_a_pipe_that_closes_is_no_traceback(system: System) -> None:
    """`deltawire tail … | head`: quiet, and as if SIGPIPE had ended it."""
    job_id = await submit(system, request("Tell me of rivers", deltas=3_000, rate=50))
    command = f'"$@" tail {job_id} --json | head -n 3; echo "${{PIPESTATUS[0]}}"'
    process = await asyncio.create_subprocess_exec(
        *("bash", "-c", command, "bash", sys.executable, "-c", PIPED),
        env=environment_of(system),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    lines = output.decode().splitlines()
    assert [json.loads(line)["sequence_number"] for line in lines[:3]] == [1, 2, 3]
    assert lines[3:] == [str(int(ExitCode.PIPE_CLOSED))]
    assert errors.decode() == ""
    await piped(system, "cancel", job_id)
