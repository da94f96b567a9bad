"""The command line, as far as it needs no services."""

import json
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from deltawire import __version__
from deltawire.api_keys import parse_api_keys
from deltawire.cli import commands, completion, jobs, parameters
from deltawire.cli.exit_codes import ExitCode
from deltawire.client import AsyncClient, AsyncJob, JobUnavailableError
from deltawire.codec import decode
from deltawire.errors import Error
from deltawire.events import Event
from deltawire.messages import CancelResult
from tests.support.sample_events import cancelled, completed, delta, line, queued

runner = CliRunner()


class FakeJob(AsyncJob):
    """What became of it is what the test says."""

    async def events(self, starting_after: int = 0, **asked: Any) -> AsyncGenerator[Event]:
        FakeClient.asked |= {"job_id": self.id, "starting_after": starting_after, **asked}
        for event in FakeClient.events_of_job:
            yield event

    async def retrieve(self) -> dict[str, Any]:
        return JOB | {"id": self.id}


class FakeClient:
    """Stands in for the client; remembers what it was asked for."""

    asked: dict[str, Any]
    events_of_job: list[Event]
    error: JobUnavailableError | None
    pages: list[dict[str, Any]]

    def __init__(self, url: str | None, *, api_key: str | None) -> None:
        FakeClient.asked = {"url": url, "api_key": api_key}

    async def __aenter__(self) -> "FakeClient":
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def submit(self, body: dict[str, Any], options: dict[str, Any] | None) -> AsyncJob:
        FakeClient.asked |= {"body": body, "options": options}
        if FakeClient.error:
            raise FakeClient.error
        return FakeJob(AsyncClient(), "job-1", status="queued")

    def job(self, job_id: str) -> FakeJob:
        return FakeJob(AsyncClient(), job_id)

    async def cancel(self, job_id: str, *, reason: str) -> CancelResult:
        FakeClient.asked |= {"job_id": job_id, "reason": reason}
        return CancelResult(job_id=job_id, status="cancelled", cancelled_from="queued", delivered=True)

    async def retrieve(self, job_id: str) -> dict[str, Any]:
        return JOB | {"id": job_id}

    async def delete(self, job_id: str) -> None:
        FakeClient.asked["deleted"] = job_id

    async def list(self, **asked: Any) -> dict[str, Any]:
        FakeClient.asked.setdefault("list", []).append(asked)
        return FakeClient.pages.pop(0)


@pytest.fixture(autouse=True)
def client(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeClient.error = None
    FakeClient.events_of_job = [
        decode(line(event)) for event in (queued(1), delta(2), delta(3), completed(4))
    ]
    monkeypatch.setattr(parameters, "AsyncClient", FakeClient)
    for name in ("DELTAWIRE_PORT", "DELTAWIRE_PUBLIC_URL", "DELTAWIRE_API_KEY"):
        monkeypatch.delenv(name, raising=False)


def test_submit_prints_the_id() -> None:
    """So that `tail` and `cancel` can be given it in a shell."""
    result = runner.invoke(commands.app, ["submit", "Hello", "--model", "m"])
    assert (result.exit_code, result.stdout) == (0, "job-1\n")
    assert FakeClient.asked["body"] == {"model": "m", "messages": [{"role": "user", "content": "Hello"}]}
    assert FakeClient.asked["url"] is None  # the client knows where it is by default


def test_the_prompt_can_come_from_standard_input_and_a_file_adds_fields(tmp_path: Path) -> None:
    """`-` reads the prompt; --request overrides and adds what the file says."""
    (tmp_path / "more.json").write_text('{"temperature": 0}')
    result = runner.invoke(
        commands.app, ["submit", "-", "--request", str(tmp_path / "more.json")], input="Hi"
    )
    assert result.exit_code == 0
    assert FakeClient.asked["body"]["messages"][0]["content"] == "Hi"
    assert FakeClient.asked["body"]["temperature"] == 0


def test_a_system_message_stands_before_the_prompt() -> None:
    """In as many lines as there are, but for the line end that `echo` puts there."""
    result = runner.invoke(commands.app, ["submit", "--system", "Be brief."], input="two\nlines\n")
    assert result.exit_code == 0, result.output
    assert FakeClient.asked["body"]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two\nlines"},
    ]


def test_messages_of_a_file_are_the_prompt(tmp_path: Path) -> None:
    """And there is no second one."""
    (tmp_path / "more.json").write_text('{"messages": [{"role": "user", "content": "Hi"}]}')
    with_file = ["submit", "--request", str(tmp_path / "more.json")]
    assert runner.invoke(commands.app, with_file).exit_code == 0
    assert FakeClient.asked["body"]["messages"] == [{"role": "user", "content": "Hi"}]
    assert runner.invoke(commands.app, [*with_file, "Hello"]).exit_code == ExitCode.USAGE


def test_options_are_json_or_text() -> None:
    """By the names that the protocol has for them."""
    args = ["submit", "x", "-o", "timeout_s=1.5", "-o", "on_abandon=cancel", "--option", 'metadata={"a":"b"}']
    assert runner.invoke(commands.app, args).exit_code == 0
    assert FakeClient.asked["options"] == {
        "timeout_s": 1.5,
        "on_abandon": "cancel",
        "metadata": {"a": "b"},
    }
    assert runner.invoke(commands.app, ["submit", "x", "-o", "timeout_s"]).exit_code == ExitCode.USAGE


@pytest.mark.parametrize("standard_input", ["", "\n", b"\xff"])
def test_a_prompt_that_is_none_is_refused(standard_input: str | bytes) -> None:
    """Empty, or not UTF-8."""
    assert runner.invoke(commands.app, ["submit", "-"], input=standard_input).exit_code == ExitCode.USAGE


def test_a_request_file_that_is_no_object_is_refused(tmp_path: Path) -> None:
    """Usage errors exit with 2 and name the option."""
    (tmp_path / "bad.json").write_text("[]")
    result = runner.invoke(commands.app, ["submit", "x", "--request", str(tmp_path / "bad.json")])
    assert result.exit_code == 2
    assert "--request" in result.output


def test_following_prints_the_text_and_says_how_it_ended() -> None:
    """The text goes to standard output alone, so that it can be piped."""
    result = runner.invoke(commands.app, ["tail", "job-1", "--starting-after", "0"])
    assert result.exit_code == 0
    assert "completed" in result.stderr
    assert "completed" not in result.stdout


def test_json_prints_every_event_as_a_line() -> None:
    """One JSON object a line, nothing else."""
    result = runner.invoke(commands.app, ["tail", "job-1", "--json"])
    assert [json.loads(text)["sequence_number"] for text in result.stdout.splitlines()] == [1, 2, 3, 4]


def test_a_job_that_did_not_complete_has_an_exit_code_of_its_own() -> None:
    """For scripts."""
    FakeClient.events_of_job = [decode(line(queued(1))), decode(line(cancelled(2)))]
    result = runner.invoke(commands.app, ["tail", "job-1"])
    assert result.exit_code == ExitCode.CANCELLED
    assert "cancelled" in result.stderr


def test_a_refusal_is_said_with_its_code() -> None:
    """No traceback."""
    error = Error(
        message="send an API key", type="authentication_error", code="missing_credentials", retryable=False
    )
    FakeClient.error = JobUnavailableError("send an API key", error)
    result = runner.invoke(commands.app, ["submit", "x"])
    assert result.exit_code == ExitCode.REFUSED
    assert "send an API key (missing_credentials)" in result.stderr
    assert "DELTAWIRE_API_KEY" in result.stderr


def test_cancel_says_what_it_met() -> None:
    """Also where the address and key come from the environment."""
    environment = {"DELTAWIRE_PUBLIC_URL": "https://relay.example", "DELTAWIRE_API_KEY": "dw_x"}
    result = runner.invoke(commands.app, ["cancel", "job-1", "--reason", "enough"], env=environment)
    assert result.stdout == "job-1 is cancelled (was queued)\n"
    assert FakeClient.asked == {
        "url": "https://relay.example",
        "api_key": "dw_x",
        "job_id": "job-1",
        "reason": "enough",
    }


def test_a_new_key_is_an_entry_that_the_relay_reads() -> None:
    """The text is shown once; the entry has its hash."""
    result = runner.invoke(commands.app, ["keys", "new", "backend", "--tenant", "acme", "--scope", "read"])
    key_line, entry_line = result.stdout.splitlines()
    (key,) = parse_api_keys(entry_line.split()[-1])
    assert (key.name, key.tenant, key.scopes) == ("backend", "acme", frozenset({"read"}))
    assert key_line.split()[-1].startswith("dw_")


@pytest.mark.parametrize("args", [["a:b"], ["a", "--tenant", "x,y"], ["a", "--scope", "fly"]])
def test_a_key_that_could_not_be_read_back_is_not_made(args: list[str]) -> None:
    """Colons and commas are separators; scopes are known ones."""
    assert runner.invoke(commands.app, ["keys", "new", *args]).exit_code == 2


def test_the_version() -> None:
    """`deltawire --version`."""
    assert runner.invoke(commands.app, ["--version"]).stdout == f"deltawire {__version__}\n"


JOB: dict[str, Any] = {
    "id": "job-1",
    "object": "job",
    "status": "failed",
    "created_at": 1.0,
    "attempt": 2,
    "metadata": {"team": "a"},
    "completion": {"choices": [{"message": {"content": "half an ans"}}]},
    "usage": {"prompt_tokens": 3, "completion_tokens": 4},
    "usage_source": "provider",
    "error": {"message": "the gateway fell silent", "code": "idle_timeout"},
    "incomplete_details": None,
    "cancel": None,
    "timings": {"queued_s": 0.5, "first_delta_s": None, "total_s": 9.0},
    "latest_sequence_number": 7,
}


def test_jobs_are_listed_page_by_page() -> None:
    """As many as were asked for, by as many calls as the relay's pages take."""
    FakeClient.pages = [
        {"data": [JOB], "has_more": True, "last_id": "job-1"},
        {"data": [JOB | {"id": "job-2"}], "has_more": True, "last_id": "job-2"},
    ]
    result = runner.invoke(commands.app, ["jobs", "--status", "failed", "--limit", "2"])
    assert result.exit_code == 0
    assert "the gateway fell silent (idle_timeout)" in result.stdout
    assert [line.split()[0] for line in result.stdout.splitlines()] == ["job", "job-1", "job-2"]
    assert FakeClient.asked["list"] == [
        {"limit": 2, "after": "", "status": "failed"},
        {"limit": 1, "after": "job-1", "status": "failed"},
    ]


def test_nothing_of_a_list_commands_the_terminal() -> None:
    """Not even what the relay says of itself, and least of all what a gateway calls its usage."""
    evil = "\x1b]0;x\x07[red]y[/red]"
    job = JOB | {"id": evil, "attempt": evil, "usage": {"prompt_tokens": evil, "completion_tokens": 1}}
    console = Console(width=200, force_terminal=True, color_system=None)
    with console.capture() as shown:
        console.print(jobs.table([job], 1.0))
    assert "\x1b]" not in shown.get()
    assert "\x07" not in shown.get()
    assert shown.get().count("[red]y[/red]") == 3


def test_a_shell_is_offered_nothing_but_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """zsh evaluates what it is told."""
    evil = '\\") ; touch /tmp/x #'
    FakeClient.pages = [
        {"data": [JOB, JOB | {"id": evil}, JOB | {"id": "job-2", "status": evil}], "has_more": False}
    ]
    monkeypatch.setattr("logging.disable", lambda: None)
    context = typer.Context(typer.main.get_command(commands.app))
    assert list(completion.job_ids(context, "job")) == [("job-1", "failed"), ("job-2", "")]
    FakeClient.pages = [{"data": [JOB | {"id": evil}], "has_more": False}]
    assert list(completion.job_ids(context, "")) == []


@pytest.mark.parametrize(
    "args",
    [
        ["jobs", "--url", "relay"],
        ["doctor", "--url", "http://relay:port"],
        ["submit", "x", "--option", f"metadata={'[' * 20_000}"],
    ],
)
def test_what_is_wrong_on_the_command_line_is_said(args: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And is no bug of deltawire's."""
    monkeypatch.setattr(parameters, "AsyncClient", AsyncClient)
    assert runner.invoke(commands.app, args).exit_code == ExitCode.USAGE


def test_a_prompt_that_is_no_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python hands on the bytes of an argument that are not UTF-8 as halves of pairs."""
    monkeypatch.setattr(parameters, "AsyncClient", AsyncClient)
    assert runner.invoke(commands.app, ["submit", "\udcff"]).exit_code == ExitCode.USAGE


def test_a_job_is_shown_readably_or_as_json() -> None:
    """What became of it, then what was said."""
    shown = runner.invoke(commands.app, ["jobs", "job-1"]).stdout
    assert "status    failed: the gateway fell silent (idle_timeout)" in shown
    assert "tokens    3 + 4 (provider)" in shown
    assert shown.endswith("\n\nhalf an ans\n")
    assert json.loads(runner.invoke(commands.app, ["jobs", "job-1", "--json"]).stdout) == JOB


def test_a_job_is_erased() -> None:
    """By its id alone."""
    assert runner.invoke(commands.app, ["jobs", "job-1", "--delete"]).stdout == "job-1 is erased\n"
    assert FakeClient.asked["deleted"] == "job-1"
    assert runner.invoke(commands.app, ["jobs", "--delete"]).exit_code == 2
    assert runner.invoke(commands.app, ["jobs", "--status", "done"]).exit_code == 2
