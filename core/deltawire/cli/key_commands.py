"""`deltawire keys`."""

from typing import Annotated

import typer

from deltawire.api_keys import SCOPES, new_api_key
from deltawire.options import TENANT_RULE, is_tenant

from . import completion
from .parameters import Json
from .printing import write, write_json

app = typer.Typer(help="API keys for backends.", no_args_is_help=True)


@app.callback()
def _keys() -> None:
    """So that `new` keeps its name while it is the only one."""


@app.command("new")
def new_key(
    name: Annotated[str, typer.Argument(help="Whose key it is; shows in logs.")],
    tenant: Annotated[str, typer.Option(help="Whose jobs it sees.")] = "default",
    scope: Annotated[
        list[str] | None,
        typer.Option(
            help="read, cancel, submit, list, tokens, metrics; all if not given.",
            autocompletion=completion.scopes,
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Make an API key. Its text is shown this once; the relay is given only its hash."""
    wanted = scope or sorted(SCOPES)
    if unknown := set(wanted) - SCOPES:
        raise typer.BadParameter(f"unknown: {', '.join(sorted(unknown))}", param_hint="--scope")
    if bad := [word for word in (name, tenant) if not word or set(word) & set(":,")]:
        raise typer.BadParameter(f"{bad[0]!r}: a name holds neither ':' nor ','")
    if not is_tenant(tenant):
        raise typer.BadParameter(f"a tenant is {TENANT_RULE}", param_hint="--tenant")
    key, entry = new_api_key(name, tenant, wanted)
    if json:
        write_json({"name": name, "tenant": tenant, "scopes": wanted, "key": key, "entry": entry})
    else:
        write(f"key (for the backend, keep it secret):  {key}\n")
        write(f"entry for DELTAWIRE_API_KEYS:           {entry}\n")
