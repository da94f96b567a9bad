"""The commands about jobs: each reads its arguments, calls what does the work, and says how it went."""

import asyncio
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from deltawire.client import NotFoundError
from deltawire.events import STATUSES, Status

from . import completion
from .exit_codes import ExitCode
from .follow import follow as follow_job
from .jobs import listed
from .jobs import table as as_table
from .jobs import text as as_page
from .parameters import JobId, Json, Key, Url, checked_job_id, client_of, run
from .printing import PIPE_WIDTH, out, say, write, write_json

app = typer.Typer()


@app.command()
def submit(
    prompt: Annotated[
        str | None,
        typer.Argument(help="What to ask. - or nothing: standard input.", show_default=False),
    ] = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Print the tokens as they arrive.")] = False,
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name.")] = "gpt-5.4",
    system: Annotated[str, typer.Option(help="The system message, before the prompt.")] = "",
    request: Annotated[
        Path | None,
        typer.Option(
            help="A JSON file of more fields of the chat.completions body; `messages` in it are the prompt."
        ),
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option",
            "-o",
            help="NAME=VALUE, an option of the job (PROTOCOL.md §1.2), such as timeout_s=60.",
            autocompletion=completion.options,
        ),
    ] = None,
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Enqueue a chat job, and print its id; with --follow its text, and its end is the exit code.

    Ctrl-C on a job that is followed asks whether to cancel it, or to detach and leave it running.
    """
    fields = _fields_of(request)
    body: dict[str, Any] = {"model": model, **fields}
    if "messages" not in fields:
        asked = {"role": "user", "content": _prompt(prompt)}
        body["messages"] = [*([{"role": "system", "content": system}] if system else []), asked]
    elif prompt is not None or system:
        raise typer.BadParameter("its messages leave no place for a prompt", param_hint="--request")
    options = _options_of(option or ())

    async def enqueue() -> ExitCode:
        async with client_of(url, api_key) as client:
            try:
                job = await client.submit(body, options or None)
            except asyncio.CancelledError:  # Ctrl-C
                say(("the relay may have taken the job all the same: `deltawire jobs` lists it", "dim"))
                raise
            if json:
                write_json({"id": job.id, "status": job.status, "token": job.token, "urls": job.urls})
            elif not follow:
                write(f"{job.id}\n")
            else:
                say((f"job {job.id}", "dim"))
            return await follow_job(job, 0, as_json=json) if follow else ExitCode.DONE

    run(enqueue(), as_json=json)


@app.command()
def tail(
    job_id: JobId,
    starting_after: Annotated[int, typer.Option(min=0, help="The last sequence number that you have.")] = 0,
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Follow a job, from its beginning or from where you left off; its end is the exit code.

    Any number of readers may. Ctrl-C asks whether to cancel the job, or to detach and leave it running.
    """

    async def watch() -> ExitCode:
        async with client_of(url, api_key) as client:
            job = client.job(job_id)
            with suppress(NotFoundError):  # its message may be on its way
                await job.retrieve()  # events wait for a relay that is away; this says so at once
            return await follow_job(job, starting_after, as_json=json)

    run(watch(), as_json=json)


@app.command()
def cancel(
    job_id: JobId,
    reason: Annotated[str, typer.Option(help="Goes into the job's last event.")] = "cli",
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """Cancel a job, queued or running."""

    async def stop() -> ExitCode:
        async with client_of(url, api_key) as client:
            result = await client.cancel(job_id, reason=reason)
        if json:
            write_json(result)
        elif result.status == "unknown":
            write(f"{job_id} is unknown; if a job of this id comes within a day, it is cancelled at once\n")
        else:
            was = f" (was {result.cancelled_from})" if result.cancelled_from else ""
            is_silent = not result.delivered and result.cancelled_from is not None
            told = "; its worker has not answered yet" if is_silent else ""
            write(f"{job_id} is {result.status}{was}{told}\n")
        return ExitCode.DONE

    run(stop(), as_json=json)


@app.command()
def jobs(
    job_id: Annotated[
        str,
        typer.Argument(
            help="Show this job, with what was said.",
            callback=checked_job_id,
            autocompletion=completion.job_ids,
        ),
    ] = "",
    status: Annotated[Status | None, typer.Option(help=f"Only those: {', '.join(STATUSES)}.")] = None,
    limit: Annotated[int, typer.Option(min=1, help="How many, the latest first.")] = 20,
    delete: Annotated[bool, typer.Option("--delete", help="Erase the job; cancel it if it runs.")] = False,
    json: Json = False,
    url: Url = "",
    api_key: Key = "",
) -> None:
    """List jobs, or show one. Lists want an API key with the scope `list`."""
    if delete and not job_id:
        raise typer.BadParameter("say which job", param_hint="--delete")

    async def look() -> ExitCode:
        async with client_of(url, api_key) as client:
            if delete:
                await client.delete(job_id)
                shown = [{"id": job_id, "deleted": True}]
            elif job_id:
                shown = [await client.retrieve(job_id)]
            else:
                shown = await listed(client, status=status or "", limit=limit)
        if json:
            for job in shown:
                write_json(job)
        elif delete:
            write(f"{job_id} is erased\n")
        elif job_id:
            write(f"{as_page(shown[0])}\n")
        else:
            console = out if out.is_terminal else Console(highlight=False, width=PIPE_WIDTH)
            console.print(as_table(shown, time.time()), soft_wrap=False)
        return ExitCode.DONE

    run(look(), as_json=json)


def _prompt(given: str | None) -> str:
    """What was given, or all of standard input, without the line end that `echo` puts there."""
    if given not in {None, "-"}:
        return str(given)
    terminal = sys.stdin is not None and sys.stdin.isatty()
    if sys.stdin is None or (terminal and given is None):
        raise typer.BadParameter(
            'what is to be asked? deltawire submit "…", or echo … | deltawire submit, or - to type it here',
            param_hint="PROMPT",
        )
    if terminal:
        say(("the prompt, in as many lines as you like; Ctrl-D ends it", "dim"))
    try:
        text = sys.stdin.buffer.read().decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise typer.BadParameter(f"standard input is not UTF-8: {error}", param_hint="PROMPT") from error
    except KeyboardInterrupt as error:
        raise typer.Exit(ExitCode.INTERRUPTED) from error
    if not text:
        raise typer.BadParameter("standard input is empty", param_hint="PROMPT")
    return text


def _fields_of(request: Path | None) -> dict[str, Any]:
    if request is None:
        return {}
    try:
        return msgspec.json.decode(request.read_bytes(), type=dict[str, Any])
    except (OSError, msgspec.DecodeError, RecursionError) as error:
        raise typer.BadParameter(f"{request}: {error}", param_hint="--request") from error


def _options_of(given: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """A value is JSON, or else the text that it is."""
    options: dict[str, Any] = {}
    for each in given:
        name, sign, value = each.partition("=")
        if not sign or not name:
            raise typer.BadParameter(f"{each!r} is not NAME=VALUE", param_hint="--option")
        try:
            options[name] = msgspec.json.decode(value)
        except msgspec.DecodeError:
            options[name] = value
        except RecursionError as error:
            raise typer.BadParameter(f"{name}: {error}", param_hint="--option") from error
    return options
