"""Settings that are TOML, in a variable or its file: tables [KIND.NAME], each read into a struct."""

import re
import tomllib
from collections.abc import Iterator
from typing import Any, Final, TypeVar

import msgspec

from .environment import ConfigurationError, Environment

_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}")

T = TypeVar("T", bound=msgspec.Struct)


def read_tables(
    environment: Environment, variable: str, heading: str, kind: type[T]
) -> Iterator[tuple[str, T]]:
    """Each table's struct, its `name` included, and where it stands, for messages.

    Raises ConfigurationError that says what to change, and repeats no value.
    """
    where = environment.source(variable)
    try:
        found = tomllib.loads(environment.secret(variable))
    except tomllib.TOMLDecodeError as error:
        raise ConfigurationError(f"{where} is not TOML: {error}") from None
    tables = found.pop(heading, None)
    if not isinstance(tables, dict) or not tables or found:
        raise ConfigurationError(f"{where} must hold tables [{heading}.NAME], and nothing else")
    for name, table in tables.items():
        place = f"{where}: [{heading}.{name}]"
        yield place, _read(place, name, table, kind)


def _read(where: str, name: str, table: Any, kind: type[T]) -> T:  # whatever TOML there is
    if not _NAME.fullmatch(name):
        raise ConfigurationError(f"{where}: a name is 1 to 64 of A-Z a-z 0-9 . _ -")
    if not isinstance(table, dict):
        raise ConfigurationError(f"{where} must be a table")
    fields = {field.name: field for field in msgspec.structs.fields(kind) if field.name != "name"}
    if unknown := sorted(set(table) - set(fields)):
        raise ConfigurationError(
            f"{where}: there is no key {unknown[0]!r}; known are {', '.join(sorted(fields))}"
        )
    if missing := [field for field in fields if fields[field].required and field not in table]:
        raise ConfigurationError(f"{where}: {missing[0]} is missing")
    try:
        return msgspec.convert({**table, "name": name}, kind)
    except msgspec.ValidationError as error:
        raise ConfigurationError(f"{where}: {error}") from None  # which names types, never values
