"""The command line as a whole, and the commands that run or look at services."""

import asyncio
import os
import sys
from typing import Annotated, Final

import typer

from deltawire import __version__
from deltawire.client.calls import address
from deltawire.errors import RedisUnavailableError
from deltawire.extras import needs
from deltawire.findings import as_text, encode_findings, exit_code

from . import job_commands, key_commands
from .exit_codes import ExitCode
from .parameters import Json, Url, run
from .printing import say, write
from .up import up as run_up

_STYLES: Final = {"ok": "green", "warning": "yellow", "error": "red"}

app = typer.Typer(
    help="A message-queue worker that fans out streamed tokens.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        write(f"deltawire {__version__}\n")
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


app.add_typer(job_commands.app)


@app.command()
def top(
    once: Annotated[bool, typer.Option("--once", help="Print it once, and end.")] = False,
    json: Json = False,
) -> None:
    """Watch jobs, rates, workers and relays. Reads Redis and the broker, where the services' settings say."""
    with needs("all", "`deltawire top`"):
        from .top import watch

    try:
        run(watch(once=once, as_json=json))
    except RedisUnavailableError as error:
        say((str(error), "red"))
        say(("is it running? DELTAWIRE_REDIS_URL says where it is; `deltawire up` prints its own", "dim"))
        raise typer.Exit(ExitCode.UNREACHABLE) from error


@app.command()
def doctor(
    ask: Annotated[bool, typer.Option("--ask", help="Ask each upstream for one token.")] = False,
    json: Json = False,
    url: Url = "",
) -> None:
    """Look at configuration, Redis, broker, upstreams and services, and say what to change.

    Settings come from the environment, as the services' do. The exit code is 1 if something is wrong.
    """
    with needs("all", "`deltawire doctor`"):
        from .doctor import examine

    try:
        relay_url = address(url)
    except ValueError as error:
        if url:
            raise typer.BadParameter(str(error), param_hint="--url") from error
        relay_url = ""  # the environment is wrong: that is one of the findings
    findings = asyncio.run(examine(asks_upstream=ask, relay_url=relay_url))
    if json:
        write(encode_findings(findings))
    else:
        for line in as_text(findings).splitlines(keepends=True):
            level, space, rest = line.partition(" ")
            write(level, _STYLES.get(level, ""))
            write(f"{space}{rest}")
    raise typer.Exit(exit_code(findings))


app.add_typer(key_commands.app, name="keys")


def _become(module: str, *args: str) -> None:
    """Turns this process into a service, so that signals reach it."""
    os.execv(sys.executable, [sys.executable, "-m", module, *args])  # noqa: S606 - our own module
