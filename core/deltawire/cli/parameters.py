"""What several commands take, the relay that they ask, and how its refusals are told."""

import asyncio
from collections.abc import Coroutine
from typing import Annotated, Any, Final

import msgspec
import typer

from deltawire.client import AsyncClient, JobUnavailableError, UnreachableError
from deltawire.environment import ConfigurationError
from deltawire.keys import JOB_ID
from deltawire.messages import ErrorMessage
from deltawire.variables import Variable

from .completion import job_ids
from .exit_codes import ExitCode
from .page import said
from .printing import say, write_json

API_KEY: Final = Variable(
    "DELTAWIRE_API_KEY",
    "What `deltawire submit`, `tail` and others, and the Python client, send: an API key or a token.",
    default="",
    is_secret=True,
)

Url = Annotated[
    str,
    typer.Option(
        envvar="DELTAWIRE_PUBLIC_URL",
        help="The relay's address.",
        show_default="http://127.0.0.1:$DELTAWIRE_PORT",
    ),
]
Key = Annotated[str, typer.Option(envvar=API_KEY.name, help="An API key or a token, if the relay wants one.")]


def checked_job_id(given: str) -> str:
    """What else it is would be another path of the relay's. Raises typer.BadParameter."""
    if given and not JOB_ID.fullmatch(given):
        raise typer.BadParameter("a job's id is 1 to 128 of A-Z a-z 0-9 _ -")
    return given


JobId = Annotated[str, typer.Argument(help="The job's id.", callback=checked_job_id, autocompletion=job_ids)]
Json = Annotated[bool, typer.Option("--json", help="Print lines of JSON, refusals included.")]

#: What to do about a refusal, by its code.
_NEXT: Final = {
    "missing_credentials": f"set {API_KEY.name}, or use --api-key",
    "invalid_credentials": f"look at {API_KEY.name}: the relay does not know this key",
    "token_expired": f"get another token, and put it into {API_KEY.name}",
    "forbidden": "this key may not do that; `deltawire keys new NAME --scope …` makes one that may",
    "unknown_job": "`deltawire jobs` lists those that there are; a job goes an hour after its end",
    "unknown_option": "docs: PROTOCOL.md §1.2 lists the options of a job",
    "host_not_allowed": "without keys the relay answers on this machine only",
    "tenant_queue_full": "too many jobs of this tenant wait",
}


def client_of(url: str, api_key: str) -> AsyncClient:
    """The relay's client. Use it as a context manager. Raises typer.BadParameter."""
    try:
        return AsyncClient(url or None, api_key=api_key or None)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--url") from error


def run(coroutine: Coroutine[Any, Any, ExitCode], *, as_json: bool = False) -> None:
    """Runs a command to its end, and exits with its code; a refusal is told, with what to do about it."""
    try:
        code = asyncio.run(coroutine)
    except JobUnavailableError as error:
        code = _refused(error, as_json=as_json)
    except ConfigurationError as error:
        say((str(error), "red"))
        code = ExitCode.USAGE
    except UnicodeEncodeError:
        say(("what was given is not UTF-8", "red"))
        code = ExitCode.USAGE
    except KeyboardInterrupt:
        code = ExitCode.INTERRUPTED
    raise typer.Exit(code)


def _refused(error: JobUnavailableError, *, as_json: bool) -> ExitCode:
    """Errors go to standard error; with --json the `error` message of the wire to standard output as well."""
    told = error.error
    if as_json and told is not None:
        write_json(msgspec.json.encode(ErrorMessage(error=told)))
    say((said(told) if told else str(error), "red"))
    if isinstance(error, UnreachableError):
        say(
            (
                "is it running? `make up` starts one; --url or DELTAWIRE_PUBLIC_URL says where it is",
                "dim",
            )
        )
        return ExitCode.UNREACHABLE
    if told is not None and told.code in _NEXT:
        say((_NEXT[told.code], "dim"))
    if error.retry_after_s is not None:
        say((f"try again in {error.retry_after_s:.0f} s", "dim"))
    return ExitCode.REFUSED
