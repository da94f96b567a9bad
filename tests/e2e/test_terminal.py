"""`deltawire` as people type it, on a terminal and in pipes, against a whole system."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from deltawire.cli.exit_codes import ExitCode
from deltawire.redis_server import free_port
from tests.support.system import System, check_whole, request, show, submit, watch
from tests.support.terminal import CTRL_C, CTRL_D, SGR, Terminal, environment_of, job_of, piped, script


def chunks(*deltas: dict[str, Any], finish_reason: str = "stop") -> list[dict[str, Any]]:
    """What a gateway says: the deltas, then the end."""
    said: list[dict[str, Any]] = [{"delta": delta, "finish_reason": None} for delta in deltas]
    said.append({"delta": {}, "finish_reason": finish_reason})
    head = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    return [{**head, "choices": [{"index": 0, **choice}]} for choice in said]


# Streaming.


async def test_tokens_come_one_by_one_on_a_terminal(system: System, tmp_path: Path) -> None:
    """The text grows while the job runs; at the end it says how that went."""
    with Terminal(
        *("submit", "-f", "Rivers", *script(tmp_path, text="one two three four five", rate=1)),
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
    shown = terminal.shown.replace("\x1b[0m\x1b[2m", "")  # what came together is shown together
    assert "\x1b[2mlet me see\x1b[0m\nI look it up.\n" in shown
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
