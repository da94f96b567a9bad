"""Settings, declared: each field of a service's Settings names its variable, its meaning and how it is read.

Read once in `main`; docs/configuration.md and .env.example are written from the same declarations (by
`make configuration`).
"""

from collections.abc import Callable, Iterator
from typing import Annotated, Any, Final, TypeVar, get_args, get_origin, get_type_hints

import msgspec

from .environment import ConfigurationError, Environment

Reader = Callable[[Environment, str, Any], Any]
"""Takes the environment, the variable's name and the field's default. Raises ConfigurationError."""


class _Among:
    """A reader that can say which values it takes."""

    def __init__(self, values: str, read: Reader) -> None:
        self.values = values
        self._read = read

    def __call__(self, environment: Environment, name: str, default: Any) -> Any:
        return self._read(environment, name, default)


S = TypeVar("S", bound=msgspec.Struct)


def text(environment: Environment, name: str, default: str) -> str:
    return environment.text(name, default)


def secret(environment: Environment, name: str, default: str) -> str:
    return environment.secret(name) or default


def words(environment: Environment, name: str, default: tuple[str, ...]) -> tuple[str, ...]:
    return environment.words(name) or default


def _number(environment: Environment, name: str, default: float) -> float:
    return environment.number(name, default)


number: Final[Reader] = _Among("a number, 0 or more", _number)


def integer(minimum: int, maximum: int) -> Reader:
    return _Among(
        f"{minimum} to {maximum}",
        lambda environment, name, default: environment.integer(
            name, default, minimum=minimum, maximum=maximum
        ),
    )


def choice(*choices: str) -> Reader:
    return _Among(
        ", ".join(f"`{each}`" for each in choices),
        lambda environment, name, default: environment.choice(name, default, choices),
    )


class Variable(msgspec.Struct, frozen=True):
    """One environment variable: `about` is a paragraph for operators, in Markdown.

    A secret may also come as NAME_FILE. `default` is said where the field's own does not say it. `example` is
    a value that needs several lines, as TOML.
    """

    name: str
    about: str
    read: Reader = text
    is_secret: bool = False
    default: str | None = None
    example: str = ""

    @property
    def values(self) -> str:
        """Which values it takes, in Markdown; empty where `about` has to say it."""
        return self.read.values if isinstance(self.read, _Among) else ""


PORT: Final = integer(0, 65_535)


def problems_of(kind: type[msgspec.Struct], environment: Environment) -> list[str]:
    """What is wrong with the environment, variable by variable; `read_settings` stops at the first."""
    problems: list[str] = []
    for _, declared, default in declarations(kind):
        try:
            declared[0].read(environment, declared[0].name, default)
        except ConfigurationError as error:
            if str(error) not in problems:  # one variable may be needed to read another
                problems.append(str(error))
    return problems


def read_settings(kind: type[S], environment: Environment) -> S:
    """The settings that the environment holds. Raises ConfigurationError that says what to set."""
    values: dict[str, Any] = {}
    for field, declared, default in declarations(kind):
        variable = declared[0]  # further ones are read along with it
        values[field] = variable.read(environment, variable.name, default)
    return kind(**values)


def declarations(kind: type[msgspec.Struct]) -> Iterator[tuple[str, tuple[Variable, ...], Any]]:
    """Each declared field: its name, its variables, its default (msgspec.NODEFAULT where it has none)."""
    hints = get_type_hints(kind, include_extras=True)
    for field in msgspec.structs.fields(kind):
        hint = hints[field.name]
        if get_origin(hint) is Annotated:
            found = tuple(each for each in get_args(hint)[1:] if isinstance(each, Variable))
            if found:
                yield field.name, found, field.default
