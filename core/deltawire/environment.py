"""Reading the environment: each service's `Settings` is made from it once, in its `main`.

A secret `NAME` may also come as `NAME_FILE`, the path of a file that holds it (Docker and Kubernetes
secrets).
"""

import os
from collections.abc import Mapping
from pathlib import Path

from .errors import DeltawireError


class ConfigurationError(DeltawireError):
    """A setting is missing or wrong; the message names the variable and what to set."""


class Environment:
    """Typed access to environment variables. An empty value counts as not set."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = os.environ if variables is None else variables

    def text(self, name: str, default: str = "") -> str:
        return self._variables.get(name) or default

    def secret(self, name: str) -> str:
        """The value of NAME, else the content of the file that NAME_FILE names. Raises ConfigurationError."""
        if value := self._variables.get(name):
            return value
        if path := self._variables.get(f"{name}_FILE"):
            try:
                return Path(path).read_text().strip()
            except OSError as error:
                raise ConfigurationError(f"{name}_FILE: cannot read {path}: {error.strerror}") from error
        return ""

    def integer(self, name: str, default: int, *, minimum: int = 0, maximum: int = 65_535) -> int:
        """Raises ConfigurationError for anything but an integer within the bounds."""
        text = self.text(name, str(default))
        try:
            value = int(text)
        except ValueError as error:
            raise ConfigurationError(f"{name} must be an integer, not {text!r}") from error
        if not minimum <= value <= maximum:
            raise ConfigurationError(f"{name} must be {minimum} to {maximum}, not {value}")
        return value

    def number(self, name: str, default: float) -> float:
        """A duration or the like. Raises ConfigurationError for anything but a number of 0 or more."""
        text = self.text(name, str(default))
        try:
            value = float(text)
        except ValueError as error:
            raise ConfigurationError(f"{name} must be a number, not {text!r}") from error
        if not 0 <= value < float("inf"):
            raise ConfigurationError(f"{name} must be a number of 0 or more, not {text!r}")
        return value

    def words(self, name: str) -> tuple[str, ...]:
        """Comma-separated values."""
        return tuple(word.strip() for word in self.text(name).split(",") if word.strip())
