"""Writes into docs/cli.md what the command line says of itself: `make configuration`."""

import re
from collections.abc import Iterator
from itertools import starmap
from pathlib import Path
from typing import Any, Final

import typer

from deltawire.cli.commands import app
from deltawire.cli.exit_codes import ExitCode

PAGE: Final = Path(__file__).with_suffix(".md")


Command = Any  # typer keeps its copy of click's classes to itself


def page() -> str:
    """The text of docs/cli.md: what is written by hand, and between its marks what the commands say."""
    root = typer.main.get_command(app)
    written = {
        "exit codes": _exit_codes(),
        "commands": "".join(starmap(_section, _commands(root, "deltawire"))),
    }
    text = PAGE.read_text()
    for name, part in written.items():
        begin, end = f"<!-- {name}: written by `make configuration` -->\n", "<!-- end -->"
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{part.strip()}\n\n{end}{rest.partition(end)[2]}"
    return text


def _exit_codes() -> str:
    rows = "".join(f"| {int(code)} | {code.meaning} |\n" for code in ExitCode)
    return f"| code | meaning |\n|---|---|\n{rows}"


def _commands(command: Command, name: str) -> Iterator[tuple[str, Command]]:
    """Those that do something, each by its whole name."""
    for each, child in sorted(getattr(command, "commands", {}).items()):
        if hasattr(child, "commands"):
            yield from _commands(child, f"{name} {each}")
        else:
            yield f"{name} {each}", child


def _section(name: str, command: Command) -> str:
    about = re.sub(r"(?<!\n)\n(?!\n)", " ", command.help)
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join([name, *(["[OPTIONS]"] if options else []), *map(_placeholder, arguments)])
    text = f"\n### `{name}`\n\n{about}\n\n```text\n{usage}\n```\n"
    rows = [_row(_placeholder(each), each) for each in arguments]
    rows += [_row(", ".join((*each.opts, *each.secondary_opts)), each) for each in options]
    return text + ("\n| | | default |\n|---|---|---|\n" + "".join(rows) if rows else "")


def _placeholder(argument: Any) -> str:
    name = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _row(name: str, parameter: Any) -> str:
    return f"| `{name}` | {parameter.help} | {_default(parameter)} |\n"


def _default(parameter: Any) -> str:
    told = parameter.show_default if isinstance(parameter.show_default, str) else parameter.default
    said = [f"`${parameter.envvar}`"] if getattr(parameter, "envvar", None) else []
    if told not in (None, "", False):
        said.append(f"`{told}`")
    return ", else ".join(said)


def main() -> None:
    PAGE.write_text(page())


if __name__ == "__main__":
    main()
