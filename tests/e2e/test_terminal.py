"""`deltawire` as people type it, on a terminal and in pipes, against a whole system."""

import asyncio
import json
import os
import re
import select
import signal
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from deltawire.cli.exit_codes import ExitCode
from deltawire.redis_server import free_port
from tests.support.system import WAIT_S, System, check_whole, request, show, submit, watch
from tests.support.terminal import CTRL_C, CTRL_D, Terminal, environment_of

PIPED = "import sys; sys.argv[0] = 'deltawire'; from deltawire.cli import main; main()"
SGR = re.compile(r"\x1b\[[0-9;]*m")


async def piped(
    system: System | None, *args: str, environment: dict[str, str] | None = None
) -> tuple[int, str, str]:
    """The exit code, standard output and standard error of `deltawire ARGS` without a terminal."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", PIPED, *args),
        env=environment_of(system, **(environment or {})),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    assert process.returncode is not None
    return process.returncode, output.decode(), errors.decode()


def script(tmp_path: Path, **fields: Any) -> list[str]:
    """`--request` of what the scripted gateway is to do."""
    path = tmp_path / "request.json"
    path.write_text(json.dumps({"script": fields}))
    return ["--request", str(path)]


def chunks(*deltas: dict[str, Any], finish_reason: str = "stop") -> list[dict[str, Any]]:
    """What a gateway says: the deltas, then the end."""
    said: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
    said.append({"delta": {}, "finish_reason": finish_reason})
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return [{**head, "choices": [{"index": 0, **choice}]} for choice in said]


async def job_of(terminal: Terminal) -> str:
    """The id that `submit --follow` says first."""
    shown = await terminal.until(lambda shown: re.search(r"job ([0-9a-f-]{32,36})\b", SGR.sub("", shown)))
    found = re.search(r"job ([0-9a-f-]{32,36})", SGR.sub("", shown))
    assert found
    return found[1]


# Streaming.


async def test_tokens_come_one_by_one_on_a_terminal(system: System, tmp_path: Path) -> None:
    """The text grows while the job runs; at the end it says how that went."""
    with Terminal(
        *("submit", "-f", "Rivers", *script(tmp_path, text="one two three four five", rate=20)),
        environment=environment_of(system),
    ) as terminal:
        job_id = await job_of(terminal)
        await terminal.until("one")
        assert "five" not in terminal.shown
        assert await terminal.ended() == ExitCode.DONE
    assert "one two three four five\n" in terminal.shown
    assert re.search(r"completed.* in \d+\.\d s, \d+ tokens", terminal.shown)
    assert "\x1b[?25h" in terminal.shown.rpartition("\x1b[?25l")[2]  # the cursor is there again
    assert check_whole(await watch(system, job_id))["type"] == "completed"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
async def test_terminals_that_want_it_plain_get_it_plain(
    system: System, tmp_path: Path, environment: dict[str, str]
) -> None:
    """No colour by NO_COLOR; not one escape sequence on a dumb terminal."""
    with Terminal(
        *("submit", "-f", "Rivers", *script(tmp_path, text="plain text")),
        environment=environment_of(system, **environment),
    ) as terminal:
        assert await terminal.ended() == ExitCode.DONE
    assert "plain text\n" in terminal.shown
    assert not SGR.findall(terminal.shown)
    assert "TERM" not in environment or "\x1b" not in terminal.shown


async def test_a_pipe_gets_the_answer_alone(system: System, tmp_path: Path) -> None:
    """To the byte: neither colour nor thoughts, and what is said about it goes to standard error."""
    said = chunks({"reasoning_content": "hm "}, {"content": "\x1b[31mred\x07"}, {"content": " end"})
    code, output, errors = await piped(system, "submit", "-f", "Rivers", *script(tmp_path, chunks=said))
    assert (code, output) == (ExitCode.DONE, "\x1b[31mred\x07 end\n")
    assert "\x1b" not in errors
    assert "completed" in errors


async def test_what_a_model_says_cannot_command_the_terminal(system: System, tmp_path: Path) -> None:
    """Control characters are shown as signs: in text, thoughts, names of tools, and refusals of gateways."""
    evil = "\x1b]0;owned\x07\x1b[2J\x9b2J\u202e\x08"
    said = chunks(
        {"reasoning": f"hm{evil}"},
        {"content": f"a\tb\r\n{evil}c"},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": f"f{evil}", "arguments": evil}}]},
    )
    with Terminal(
        *("submit", "-f", f"Rivers{evil}", *script(tmp_path, chunks=said)), environment=environment_of(system)
    ) as terminal:
        await terminal.ended()
    shown = re.sub(r"\x1b\[(?:[0-9;]*m|\?25[lh]|2K|1A)", "", terminal.shown)  # ours
    assert "a\tb\n␛]0;owned␇␛[2J�2J�␈c" in shown
    assert not set(shown) & {"\x1b", "\x07", "\x08", "\x9b", "\u202e"}

    refusal = json.dumps({"error": {"message": f"no {evil}[/red][link=file:///]", "type": "x"}})
    with Terminal(
        *("submit", "-f", "x", *script(tmp_path, fault="status", status=400, body=refusal)),
        environment=environment_of(system),
    ) as terminal:
        assert await terminal.ended() == ExitCode.FAILED
    assert "[/red][link=file:///]" in terminal.shown
    assert "\x1b]" not in terminal.shown


async def test_thoughts_are_dim_and_calls_are_shown(system: System, tmp_path: Path) -> None:
    """What the model thinks, then what it says, then which tools it calls, each on lines of its own."""
    said = chunks(
        {"reasoning_content": "let me "},
        {"reasoning_content": "see"},
        {"content": "I look it up."},
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": "weather", "arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Oslo"}'}}]},
        {"tool_calls": [{"index": 1, "id": "2", "function": {"name": "time", "arguments": "{}"}}]},
        finish_reason="tool_calls",
    )
    file = script(tmp_path, chunks=said)
    with Terminal("submit", "-f", "Weather?", *file, environment=environment_of(system)) as terminal:
        assert await terminal.ended() == ExitCode.DONE
    assert "\x1b[2mlet me \x1b[0m\x1b[2msee\x1b[0m\nI look it up.\n" in terminal.shown
    assert 'weather {"city":"Oslo"}\ntime {}\n' in SGR.sub("", terminal.shown)
    code, output, errors = await piped(system, "submit", "-f", "Weather?", *file)
    assert (code, output) == (ExitCode.DONE, "I look it up.\n")
    assert "calls weather, time" in errors


async def test_several_readers_see_the_same_text(system: System) -> None:
    """Two terminals and a pipe, one of them late."""
    job_id = await submit(system, request("Tell me of rivers", deltas=40, rate=40))
    environment = environment_of(system)
    with (
        Terminal("tail", job_id, environment=environment) as first,
        Terminal("tail", job_id, environment=environment) as second,
    ):
        await watch(system, job_id, until=lambda event: event["sequence_number"] >= 20)
        code, output, _ = await piped(system, "tail", job_id)
        assert (code, await first.ended(), await second.ended()) == (0, 0, 0)
    for terminal in (first, second):
        assert output.strip() in terminal.shown
    completion = (await show(system, job_id))["completion"]
    assert output.rstrip("\n") == completion["choices"][0]["message"]["content"].rstrip("\n")


# Ctrl-C.


@pytest.fixture
def slow(system: System, tmp_path: Path) -> Iterator[Terminal]:
    """A job that takes its time, followed on a terminal."""
    with Terminal(
        *("submit", "-f", "Rivers", *script(tmp_path, deltas=3_000, rate=20)),
        environment=environment_of(system),
    ) as terminal:
        yield terminal


async def in_mid_stream(terminal: Terminal) -> str:
    """The job's id, once some of its text stands there."""
    job_id = await job_of(terminal)
    await terminal.until(lambda shown: len(shown.partition(job_id)[2].split()) > 20)
    return job_id


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
    await slow.until("c: cancel the job")
    before = slow.shown
    await asyncio.sleep(0.3)  # a few tokens more, that must not come between question and answer
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
    seen = [event for event in await watch(system, job_id) if event["type"] == "delta"]
    texts = [(e["sequence_number"], e["chunk"]["choices"][0]["delta"].get("content") or "") for e in seen]
    left = "".join(text for number, text in texts if number <= int(found[2]))
    rest = "".join(text for number, text in texts if number > int(found[2]))
    assert left.strip() in slow.shown  # each of them its part, and nothing twice
    assert rest[:20].strip() in terminal.shown
    assert left.strip()[:40] not in terminal.shown


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


async def test_a_pipe_that_nobody_reads_does_not_keep_it_alive(system: System) -> None:
    """The first SIGTERM cannot be answered in a write that blocks; the second one ends it."""
    job_id = await submit(system, request("Tell me of rivers", deltas=2_000, delta_bytes=1_000, rate=0))
    check_whole(await watch(system, job_id))
    ours, its = os.pipe()
    command = (sys.executable, "-c", PIPED, "tail", job_id)
    process = await asyncio.create_subprocess_exec(*command, env=environment_of(system), stdout=its)
    os.close(its)
    try:
        await asyncio.to_thread(select.select, [ours], [], [], WAIT_S)  # it writes
        while process.returncode is None:
            process.send_signal(signal.SIGTERM)
            with suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), 0.2)
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


# Exit codes, JSON.


@pytest.mark.parametrize(
    ("fields", "code", "word"),
    [
        ({"text": "fine"}, ExitCode.DONE, "completed"),
        ({"fault": "status", "status": 400}, ExitCode.FAILED, "failed"),
        ({"fault": "cut", "after": 2}, ExitCode.INCOMPLETE, "incomplete"),
    ],
)
async def test_the_exit_code_says_how_the_job_ended(
    system: System, tmp_path: Path, fields: dict[str, Any], code: int, word: str
) -> None:
    """The same for `submit --follow`, for `tail`, and with --json."""
    got, output, _ = await piped(system, "submit", "-f", "x", "--json", *script(tmp_path, **fields))
    first, *events = map(json.loads, output.splitlines())
    assert got == code
    assert first["id"] == events[0]["job_id"]
    assert check_whole(events)["type"] == word
    got, _, errors = await piped(system, "tail", first["id"])
    assert got == code
    assert word in errors


async def test_where_a_job_had_ended_the_exit_code_says_how(system: System) -> None:
    """Although there is nothing left to print."""
    job_id = await submit(system, request("hello", fault="cut", after=1))
    top = check_whole(await watch(system, job_id))["sequence_number"]
    code, output, _ = await piped(system, "tail", job_id, "--starting-after", str(top))
    assert (code, output) == (ExitCode.INCOMPLETE, "")


async def test_top_is_quiet_about_ctrl_c(system: System) -> None:
    """On a terminal it rewrites its lines; on a dumb one it prints them one below the other."""
    for terminal_type in ("xterm", "dumb"):
        environment = environment_of(system, DELTAWIRE_REDIS_URL=system.redis_url, TERM=terminal_type)
        with Terminal("top", environment=environment, columns=150) as terminal:
            await terminal.until(lambda shown: shown.count("relay") >= 2)
            assert ("\x1b" in terminal.shown) == (terminal_type == "xterm")
            terminal.press(CTRL_C)
            assert await terminal.ended() == ExitCode.INTERRUPTED
        assert "Traceback" not in terminal.shown


async def test_refusals_have_a_code_and_say_what_to_do(system: System) -> None:
    """6 where the relay says no, 7 where there is none, 2 where the command line is wrong."""
    for args in (["jobs", "nobody"], ["submit", "x", "-o", "fly=1"]):
        code, output, errors = await piped(system, *args, "--json")
        assert code == ExitCode.REFUSED, errors
        message = json.loads(output)
        assert message["type"] == "error"
        assert f"({message['error']['code']})" in errors
    nowhere = {"DELTAWIRE_PUBLIC_URL": "", "DELTAWIRE_PORT": str(free_port())}
    for args in (["submit", "x"], ["tail", "j"], ["cancel", "j"], ["jobs"]):
        code, output, errors = await piped(None, *args, environment=nowhere)
        assert (code, output) == (ExitCode.UNREACHABLE, "")
        assert "is it running? `make up`" in errors
        assert "Traceback" not in errors
    for args in (
        ["submit"],
        ["submit", "x", "-o", "fly"],
        ["tail"],
        ["tail", "a/b"],
        ["jobs", "--status", "done"],
    ):
        assert (await piped(system, *args))[0] == ExitCode.USAGE


async def test_json_is_everywhere(system: System) -> None:
    """Each line that comes on standard output is JSON, and nothing else comes."""
    code, output, _ = await piped(system, "submit", "Rivers", "--json", "-o", 'metadata={"a":"b"}')
    job = json.loads(output)
    assert (code, job["status"]) == (0, "queued")
    assert job["urls"]["self"].endswith(job["id"])
    _, output, _ = await piped(system, "tail", job["id"], "--json")
    assert check_whole([json.loads(line) for line in output.splitlines()])
    _, output, _ = await piped(system, "jobs", job["id"], "--json")
    assert json.loads(output)["metadata"] == {"a": "b"}
    _, output, _ = await piped(system, "cancel", job["id"], "--json")
    assert json.loads(output)["status"] == "completed"
    _, output, _ = await piped(system, "jobs", "--json")
    assert job["id"] in {json.loads(line)["id"] for line in output.splitlines()}
    _, output, _ = await piped(None, "keys", "new", "backend", "--scope", "read", "--json")
    assert json.loads(output)["scopes"] == ["read"]
    redis = {"DELTAWIRE_REDIS_URL": system.redis_url}
    _, output, _ = await piped(system, "top", "--once", "--json", environment=redis)
    assert json.loads(output)["processes"]
    _, output, _ = await piped(system, "jobs", job["id"], "--delete", "--json")
    assert json.loads(output) == {"id": job["id"], "deleted": True}


# The prompt.


async def test_no_prompt_on_a_terminal_says_what_to_do(system: System) -> None:
    """Instead of waiting for something that nobody knows of; - waits, and says for what."""
    with Terminal("submit", environment=environment_of(system)) as terminal:
        assert await terminal.ended() == ExitCode.USAGE
    assert "what is to be asked?" in terminal.shown
    with Terminal("submit", "-", environment=environment_of(system)) as terminal:
        await terminal.until("Ctrl-D ends it")
        terminal.press(b"Rivers\nand lakes\n" + CTRL_D)
        assert await terminal.ended() == ExitCode.DONE
    with Terminal("submit", "-", environment=environment_of(system)) as terminal:
        await terminal.until("Ctrl-D ends it")
        terminal.press(CTRL_C)
        assert await terminal.ended() == ExitCode.INTERRUPTED
    assert "Traceback" not in terminal.shown
