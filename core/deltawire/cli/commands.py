"""The commands. Each is a door: it reads its arguments, calls what does the work, and says how it went."""

import asyncio
import os
import sys
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer
from rich.console import Console

from deltawire import __version__
from deltawire.api_keys import SCOPES, new_api_key
from deltawire.client import AsyncClient, JobUnavailableError, text_of
from deltawire.codec import encode
from deltawire.environment import ConfigurationError
from deltawire.errors import Error, RedisUnavailableError
from deltawire.events import TERMINAL_STATUSES, Cancelled, Completed, Event, Failed, Incomplete, TerminalEvent
from deltawire.findings import as_text, encode_findings, exit_code
from deltawire.messages import Snapshot
from deltawire.options import TENANT_RULE, is_tenant
from deltawire.variables import Variable

from .jobs import listed
from .jobs import table as as_table
from .jobs import text as as_page
from .up import up as run_up

app = typer.Typer(
    help="A message-queue worker that fans out streamed tokens.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys_app = typer.Typer(help="API keys for backends.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

STATUSES: Final = ("queued", "in_progress", *sorted(TERMINAL_STATUSES))
_out: Final = Console(highlight=False, soft_wrap=True)
_err: Final = Console(stderr=True, highlight=False, soft_wrap=True)

API_KEY: Final = Variable(
    "DELTAWIRE_API_KEY",
    "The API key's text that `deltawire submit`, `tail`, `cancel` and the like send; by default none.",
    default="",
)

Url = Annotated[
    str,
    typer.Option(
        envvar="DELTAWIRE_PUBLIC_URL",
        help="The relay's address.",
        show_default="http://127.0.0.1:$DELTAWIRE_PORT",
    ),
]
Key = Annotated[str, typer.Option(envvar=API_KEY.name, help="An API key, if the relay wants one.")]
JobId = Annotated[str, typer.Argument(help="The job's id.")]
Json = Annotated[bool, typer.Option("--json", help="Print the events as lines of JSON.")]


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        _out.print(f"deltawire {__version__}")
        raise typer.Exit


@app.command()
def up() -> None:
    """Run everything in this terminal: relay, worker and, where none is configured, Redis and a gateway."""
    raise typer.Exit(run_up())


@app.command()
def worker() -> None:
    """Run a worker (settings come from the environment, see .env.example)."""
    _become("deltawire_worker")


@app.command()
def relay() -> None:
    """Run a relay (settings come from the environment, see .env.example)."""
    _become("deltawire_relay")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def gateway(context: typer.Context) -> None:
    """Run the scripted OpenAI-compatible gateway, for demos and tests (--host, --port, --rate, --api-key)."""
    _become("deltawire.gateway", *context.args)


@app.command()
def submit(
    prompt: Annotated[str, typer.Argument(help="What to ask; - reads it from standard input.")],
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the tokens as they arrive.")] = False,
    model: Annotated[str, typer.Option(help="The model's name.")] = "gpt-5.4",
    request: Annotated[
        Path | None, typer.Option(help="A JSON file with further fields of the chat.completions body.")
    ] = None,
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Enqueue a chat job. With --follow the exit code is 0 only if it completes."""
    text = sys.stdin.read() if prompt == "-" else prompt
    body: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": text}]}
    if request is not None:
        try:
            body |= msgspec.json.decode(request.read_bytes(), type=dict[str, Any])
        except (OSError, msgspec.DecodeError) as error:
            raise typer.BadParameter(f"{request}: {error}", param_hint="--request") from error

    async def run() -> int:
        async with _client(url, api_key) as client:
            job = await client.submit(body)
            if not follow:
                _out.print(job.id)
                return 0
            if not json:
                _err.print(f"[dim]job {job.id}[/]")
            return await _follow(client, job.id, 0, as_json=json)

    _run(run())


@app.command()
def tail(
    job_id: JobId,
    starting_after: Annotated[int, typer.Option(min=0, help="The last sequence number that you have.")] = 0,
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Follow a job, from its beginning or from where you left off. Exit code 0 only if it completes."""

    async def run() -> int:
        async with _client(url, api_key) as client:
            return await _follow(client, job_id, starting_after, as_json=json)

    _run(run())


@app.command()
def cancel(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Goes into the job's last event.")] = "cli",
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Cancel a job, queued or running."""

    async def run() -> int:
        async with _client(url, api_key) as client:
            result = await client.cancel(job_id, reason=reason)
        if result.status == "unknown":
            _out.print(
                f"{job_id} is unknown; if a job of this id comes within a day, it is cancelled at once"
            )
            return 0
        came_from = f" (was {result.cancelled_from})" if result.cancelled_from else ""
        told = (
            "" if result.delivered or result.cancelled_from is None else "; its worker has not answered yet"
        )
        _out.print(f"{job_id} is {result.status}{came_from}{told}")
        return 0

    _run(run())


@app.command()
def jobs(
    job_id: Annotated[str, typer.Argument(help="Show this job, with what was said.")] = "",
    status: Annotated[
        str, typer.Option(help="Only those: queued, in_progress, completed, incomplete, failed, cancelled.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    delete: Annotated[bool, typer.Option("--delete", help="Erase the job; cancel it if it runs.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """List jobs, or show one. Lists want an API key with the scope `list`."""
    if delete and not job_id:
        raise typer.BadParameter("say which job", param_hint="--delete")
    if status and status not in STATUSES:
        raise typer.BadParameter(f"one of {', '.join(STATUSES)}", param_hint="--status")

    async def run() -> int:
        async with _client(url, api_key) as client:
            if delete:
                await client.delete(job_id)
                shown = [{"id": job_id, "deleted": True}]
            elif job_id:
                shown = [await client.retrieve(job_id)]
            else:
                shown = await listed(client, status=status, limit=limit)
        if json:
            for job in shown:
                print(msgspec.json.encode(job).decode())
        elif delete:
            _out.print(f"{job_id} is erased")
        elif job_id:
            print(as_page(shown[0]))
        else:
            Console(highlight=False, width=None if sys.stdout.isatty() else 200).print(
                as_table(shown, time.time())
            )
        return 0

    _run(run())


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Watch jobs, rates, workers and relays. Reads Redis and the broker, where the services' settings say."""
    from .top import watch

    try:
        _run(watch(once=once, as_json=json))
    except (ConfigurationError, RedisUnavailableError) as error:
        _err.print(f"[red]{error}[/]")
        raise typer.Exit(1) from error


@app.command()
def doctor(
    ask: Annotated[bool, typer.Option("--ask", help="Ask each upstream for one token.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
    url: Url = "",
) -> None:
    """Look at configuration, Redis, broker, upstreams and services, and say what to change.

    Settings come from the environment, as the services' do. The exit code is 1 if something is wrong.
    """
    from .doctor import examine

    findings = asyncio.run(examine(asks_upstream=ask, relay_url=url.rstrip("/") or _default_url()))
    sys.stdout.write(encode_findings(findings) if json else as_text(findings))
    raise typer.Exit(exit_code(findings))


@keys_app.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shows in logs.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "default",
    scope: Annotated[
        list[str] | None, typer.Option(help="read, cancel, submit, list, tokens, metrics; all if not given.")
    ] = None,
) -> None:
    """Make an API key. Its text is shown this once; the relay is given only its hash."""
    scopes = scope or sorted(SCOPES)
    if unknown := set(scopes) - SCOPES:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--scope")
    if bad := [word for word in (name, tenant) if not word or set(word) & set(":,")]:
        raise typer.BadParameter(f"{bad[0]!r}: a name holds neither ':' nor ','")
    if not is_tenant(tenant):
        raise typer.BadParameter(f"a tenant is {TENANT_RULE}", param_hint="--tenant")
    key, entry = new_api_key(name, tenant, scopes)
    _out.print(f"key (for the backend, keep it secret):  {key}")
    _out.print(f"entry for DELTAWIRE_API_KEYS:           {entry}")


def _become(module: str, *args: str) -> None:
    """Turns this process into a service, so that signals reach it."""
    os.execv(sys.executable, [sys.executable, "-m", module, *args])  # noqa: S606 - our own module


def _client(url: str, api_key: str) -> AsyncClient:
    return AsyncClient(url or _default_url(), api_key=api_key or None)


def _default_url() -> str:
    return f"http://127.0.0.1:{os.environ.get('DELTAWIRE_PORT') or 8080}"


def _run(coroutine: Coroutine[Any, Any, int]) -> None:
    try:
        code = asyncio.run(coroutine)
    except JobUnavailableError as error:
        _err.print(f"[red]{_said(error.error) or error}[/]")
        if error.error and error.error.code == "missing_credentials":
            _err.print(f"[dim]this command takes a key from {API_KEY.name}[/]")
        code = 1
    except KeyboardInterrupt:
        code = 130
    raise typer.Exit(code)


def _said(error: Error | None) -> str:
    return f"{error.message} ({error.code})" if error else ""


async def _follow(client: AsyncClient, job_id: str, starting_after: int, *, as_json: bool) -> int:
    """Prints a job to its end. Returns 0 if it has completed."""
    position = starting_after
    try:
        async for event in client.events(job_id, starting_after=starting_after):
            position = event.sequence_number
            if as_json:
                print(
                    (msgspec.json.encode(event) if isinstance(event, Snapshot) else encode(event)).decode(),
                    flush=True,
                )
            else:
                for text in text_of(event):
                    print(text, end="", flush=True)
            if isinstance(event, TerminalEvent):
                if not as_json:
                    print()
                    _err.print(_summary(event))
                return 0 if isinstance(event, Completed) else 1
    except asyncio.CancelledError:
        if not as_json:
            _err.print(
                f"\n[dim]the job goes on: deltawire tail {job_id} --starting-after {position}"
                f"   or stop it: deltawire cancel {job_id}[/]"
            )
        raise
    return 1


def _summary(event: Event) -> str:
    match event:
        case Completed(usage=usage, timings=timings):
            tokens = f", {usage.get('completion_tokens')} tokens" if usage else ""
            return f"[green]completed[/] in {timings.total_s:.1f} s{tokens}"
        case Incomplete(incomplete_details=details):
            return f"[yellow]incomplete[/]: {details.reason}"
        case Failed(error=error):
            return f"[red]failed[/]: {_said(error)}"
        case Cancelled(cancel=cancelled):
            return f"[yellow]cancelled[/]: {cancelled.reason}"
        case _:
            return ""
