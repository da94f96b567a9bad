"""Writes docs/configuration.md and .env.example from what the services declare: `make configuration`."""

import re
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import msgspec

from deltawire.cli.parameters import API_KEY
from deltawire.gateway.__main__ import API_KEY as GATEWAY_API_KEY
from deltawire.variables import Variable, declarations
from deltawire_relay.settings import Settings as Relay
from deltawire_worker.settings import Settings as Worker

ROOT: Final = Path(__file__).parents[1]
MARKDOWN: Final = ROOT / "docs" / "configuration.md"
ENV_EXAMPLE: Final = ROOT / ".env.example"

_READERS: Final = (("relay", Relay), ("worker", Worker))
_PROGRAMS: Final = ((API_KEY, "command line"), (GATEWAY_API_KEY, "scripted gateway"))
_SECTIONS: Final = {
    "relay, worker": ("Relay and worker", "The same values for both, unless it says otherwise."),
    "relay": ("Relay", ""),
    "worker": ("Worker", ""),
    "command line": ("The command line", "Besides, it reads what tells it where the relay is."),
    "scripted gateway": ("The scripted gateway", "For demos and tests."),
}

_MARKDOWN_HEAD: Final = """\
<!-- Written by `make configuration` from what the services declare. Change it there. -->

# Configuration

All of it comes from environment variables, read once at the start; a wrong value ends the start with a
message that says what to set. `python -m deltawire_relay --check` and `python -m deltawire_worker --check`
read the settings and say what is wrong with them, `deltawire doctor` looks at what they lead to as well. An
empty value counts as not set. [.env.example](../.env.example) has all variables as comments, for `docker
compose` and shells.

A **secret** `NAME` may instead be `NAME_FILE`, the path of a file that holds it (Docker and Kubernetes
secrets); `NAME` wins if both are set. Secrets show in no log and no message.
"""

_ENV_HEAD: Final = """\
# Every variable that deltawire reads, with its default; docs/configuration.md says the same at more
# leisure. All lines are commented out: copying this file to .env changes nothing until you uncomment one.
# docker-compose.yml takes .env by itself and sets what differs in containers (the Redis URL, the hosts,
# JSON logs); for processes without containers: set -a; . ./.env; set +a
#
# A secret NAME may instead be NAME_FILE, the path of a file that holds it; NAME wins if both are set. An
# empty value counts as not set. (Written by `make configuration`.)
"""

WIDTH: Final = 115


class Entry(msgspec.Struct, frozen=True):
    """A variable, its default as an operator would write it, and which programs read it."""

    variable: Variable
    default: str
    read_by: str


def entries() -> list[Entry]:
    """All variables, each once, in the order of their declarations."""
    found: dict[str, Entry] = {}
    for reader, kind in _READERS:
        for _, declared, default in declarations(kind):
            for variable in declared:
                said = _written(default) if variable.default is None else variable.default
                known = found.get(variable.name)
                by = f"{known.read_by}, {reader}" if known else reader
                found[variable.name] = Entry(variable, said, by)
    for variable, program in _PROGRAMS:
        found[variable.name] = Entry(variable, variable.default or "", program)
    return list(found.values())


def names() -> set[str]:
    """All names that may be set."""
    return {name for entry in entries() for name in _names(entry.variable)}


def markdown() -> str:
    """The text of docs/configuration.md."""
    parts = [_MARKDOWN_HEAD]
    for title, about, some in _sections():
        parts.append(f"## {title}\n" + (f"\n{about}\n" if about else ""))
        parts += map(_paragraph, some)
    return "\n".join(parts)


def env_example() -> str:
    """The text of .env.example."""
    parts = [_ENV_HEAD]
    for title, _, some in _sections():
        parts.append(f"# --- {title} ".ljust(WIDTH - 2, "-") + "\n")
        parts += map(_commented, some)
    return "\n".join(parts)


def _sections() -> Iterator[tuple[str, str, list[Entry]]]:
    everything = entries()
    for read_by, (title, about) in _SECTIONS.items():
        yield title, about, [entry for entry in everything if entry.read_by == read_by]


def _names(variable: Variable) -> tuple[str, ...]:
    return (variable.name, f"{variable.name}_FILE") if variable.is_secret else (variable.name,)


def _written(default: Any) -> str:
    """A field's default, as the variable would say it."""
    if default is None or default is msgspec.NODEFAULT:
        return ""
    if isinstance(default, tuple | list):
        return ",".join(map(str, default))
    if isinstance(default, bool):
        return str(default).lower()
    return f"{default:g}" if isinstance(default, float) else str(default)


def _facts(variable: Variable) -> list[str]:
    """Which values it takes, and their unit, where the text does not say so."""
    facts = [variable.values] if variable.values else []
    for ending, unit in (("_PER_S", "per second"), ("_S", "seconds"), ("_BYTES", "bytes")):
        if variable.name.endswith(ending):
            return [*facts, unit] if unit not in variable.about.lower() else facts
    return facts


def _paragraph(entry: Entry) -> str:
    variable = entry.variable
    facts = [f"default: `{entry.default}`" if entry.default else "default: not set"]
    facts += _facts(variable)
    if variable.is_secret:
        facts.append(f"secret, or `{variable.name}_FILE`")
    about = variable.about if variable.about.endswith((".", "`", ":")) else f"{variable.about}."
    text = f"### `{variable.name}`\n\n{'; '.join(facts)}\n\n{about}\n"
    return f"{text}\n```toml\n{variable.example}```\n" if variable.example else text


def _commented(entry: Entry) -> str:
    variable = entry.variable
    facts = "; ".join(_facts(variable))
    about = re.sub(r"`([^`]*)`", r"\1", f"{variable.about} ({facts})" if facts else variable.about)
    lines = textwrap.wrap(about, WIDTH, break_long_words=False, break_on_hyphens=False)
    lines += [f"    {line}" for line in variable.example.splitlines()]
    name, *others = _names(variable)
    lines += [f"{name}={entry.default}", *(f"{other}=" for other in others)]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)


def main() -> None:
    MARKDOWN.write_text(markdown())
    ENV_EXAMPLE.write_text(env_example())


if __name__ == "__main__":
    main()
