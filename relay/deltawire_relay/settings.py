"""The relay's settings, read once from the environment (docs/configuration.md lists them all)."""

from typing import Annotated, Any

from deltawire.environment import ConfigurationError, Environment
from deltawire.options import MAX_DURATION_S
from deltawire.settings import ServiceSettings
from deltawire.variables import PORT, Variable, read_settings

from .auth import is_loopback


def _public_url(environment: Environment, name: str, default: str) -> str:
    return environment.text(name, default).rstrip("/")


def _origins(environment: Environment, name: str, _: Any) -> tuple[str, ...]:
    origins = environment.words(name)
    for origin in origins:
        scheme, separator, host = origin.partition("://")
        if not (scheme and separator and host) or "/" in host:
            raise ConfigurationError(
                f"{name}: {origin!r} is no origin; that is scheme, host and port, without a slash at the end"
            )
    return origins


def _grace_s(environment: Environment, name: str, default: float) -> float | None:
    if environment.text(name) == "never":
        return None
    value = environment.number(name, default)
    if value > MAX_DURATION_S:
        raise ConfigurationError(f"{name} must be at most {MAX_DURATION_S:.0f}, or never")
    return value


class Settings(ServiceSettings, frozen=True, kw_only=True):
    port: Annotated[
        int,
        Variable(
            "DELTAWIRE_PORT",
            "The relay's port. With docker compose: the port on this machine's loopback.",
            PORT,
        ),
    ] = 8080
    public_url: Annotated[
        str,
        Variable(
            "DELTAWIRE_PUBLIC_URL",
            "The relay's address as clients see it, put before the paths in `urls`; without it they are "
            "relative. The command line looks for the relay there, by default on this machine at "
            "`DELTAWIRE_PORT`.",
            _public_url,
        ),
    ] = ""
    allowed_origins: Annotated[
        tuple[str, ...],
        Variable(
            "DELTAWIRE_ALLOWED_ORIGINS",
            "Web origins whose pages may use the relay, exact (no slash at the end) and separated by commas: "
            "`https://app.example.com`",
            _origins,
        ),
    ] = ()
    chat_abandon_grace_s: Annotated[
        float | None,  # None: never
        Variable(
            "DELTAWIRE_CHAT_ABANDON_GRACE_S",
            "Seconds that a job of the OpenAI API (`/v1/chat/completions`) outlives its last reader "
            "before it is cancelled; 0 is at once, `never` lets it run to its end. A request can say "
            "otherwise.",
            _grace_s,
        ),
    ] = 2.0

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return (
            f"Settings(host={self.host!r}, port={self.port}, api_keys={[key.name for key in self.api_keys]})"
        )

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        settings = read_settings(cls, environment)
        if not settings.api_keys and not is_loopback(settings.host):
            raise ConfigurationError(
                f"without an API key the relay serves loopback only, and DELTAWIRE_HOST is {settings.host}: "
                "make one (`deltawire keys new`) and set DELTAWIRE_API_KEYS, or set DELTAWIRE_HOST=127.0.0.1"
            )
        return settings
