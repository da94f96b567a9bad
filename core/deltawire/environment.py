"""Reading the environment: each service's `Settings` is made from it once, in its `main`.

A secret `NAME` may also come as `NAME_FILE`, the path of a file that holds it (Docker and Kubernetes
secrets).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from . import redis_url
from .errors import DeltawireError

DEFAULT_REDIS_URL: Final = "redis://127.0.0.1:6379/0"


class ConfigurationError(DeltawireError):
    """A setting is missing or wrong; the message names the variable and what to set."""


class Environment:
    """Typed access to environment variables. An empty value counts as not set."""

    def __init__(self, variables: Mapping[str, str] | None = None) -> None:
        self._variables = os.environ if variables is None else variables

    def text(self, name: str, default: str = "") -> str:
        return self._variables.get(name) or default

    def is_set(self, name: str) -> bool:
        """Whether there is a value, or a file that holds it."""
        return bool(self._variables.get(name) or self._variables.get(f"{name}_FILE"))

    def source(self, name: str) -> str:
        """Where the value of a secret comes from, for messages: NAME, or NAME_FILE and its path."""
        path = self._variables.get(f"{name}_FILE")
        return name if self._variables.get(name) or not path else f"{name}_FILE {path}"

    def secret(self, name: str) -> str:
        """The value of NAME, else the content of the file that NAME_FILE names.

        Raises ConfigurationError, also for an empty file: who names one means to have a secret.
        """
        if value := self._variables.get(name):
            return value
        if path := self._variables.get(f"{name}_FILE"):
            try:
                value = Path(path).read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigurationError(f"{name}_FILE: cannot read {path}: {error}") from error
            if not value:
                raise ConfigurationError(f"{name}_FILE: {path} is empty")
            return value
        return ""

    def header_secret(self, name: str) -> str:
        """A secret that goes into an HTTP header. Raises ConfigurationError for what cannot."""
        value = self.secret(name)
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ConfigurationError(
                f"{name} holds what cannot stand in a header (blanks, or other than ASCII)"
            )
        return value

    def choice(self, name: str, default: str, choices: tuple[str, ...]) -> str:
        """Raises ConfigurationError for anything but one of the choices."""
        value = self.text(name, default)
        if value not in choices:
            raise ConfigurationError(f"{name} must be one of {', '.join(choices)}, not {value!r}")
        return value

    def url(self, name: str, default: str = "", *, schemes: tuple[str, ...]) -> str:
        """A secret, since URLs may hold passwords. Raises ConfigurationError, which does not repeat it."""
        value = self.secret(name) or default
        try:
            parts = urlsplit(value)
            is_right = parts.scheme in schemes and (parts.port or 1) > 0
        except ValueError:
            is_right = False
        if not is_right:
            wanted = ", ".join(f"{scheme}://…" for scheme in schemes)
            raise ConfigurationError(
                f"{name} must be a URL ({wanted}); it is {'wrong' if value else 'not set'}"
            )
        return value

    def redis_url(self, name: str) -> str:
        """Where Redis is, in a form of redis_url's. Raises ConfigurationError, which does not repeat it."""
        return _checked(name, self.secret(name) or DEFAULT_REDIS_URL)

    def broker_url(self, name: str, url_of_redis: str) -> str:
        """Where Celery's messages go: where Redis is, unless set.

        Raises ConfigurationError where that cannot be.
        """
        value = self.secret(name) or url_of_redis
        if value.startswith((*redis_url.CLUSTER_SCHEMES, "rediss+sentinel")):
            raise ConfigurationError(
                f"{name} must name a broker of its own (a single Redis, redis+sentinel or RabbitMQ), because "
                "Celery cannot use a Redis Cluster as one, nor sentinels with TLS"
            )
        if value.startswith(redis_url.SENTINEL_SCHEMES):
            return _checked(name, value)
        return value

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


def _checked(name: str, url: str) -> str:
    try:
        redis_url.parse(url)
    except ValueError as error:
        raise ConfigurationError(f"{name} {error}") from None
    return url
