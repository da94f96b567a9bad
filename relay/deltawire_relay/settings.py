"""The relay's settings, read once from the environment (.env.example lists them all)."""

import msgspec

from deltawire.api_keys import ApiKey, parse_api_keys
from deltawire.environment import ConfigurationError, Environment
from deltawire.log_format import LOG_FORMATS, LOG_LEVELS
from deltawire.options import MAX_DURATION_S

from .auth import is_loopback


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: str
    broker_url: str
    key_prefix: str = "dw"
    host: str = "127.0.0.1"
    port: int = 8080
    public_url: str = ""
    allowed_origins: tuple[str, ...] = ()
    api_keys: tuple[ApiKey, ...] = ()
    chat_abandon_grace_s: float | None = 2.0  # None: never
    log_format: str = "text"
    log_level: str = "info"

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return (
            f"Settings(host={self.host!r}, port={self.port}, api_keys={[key.name for key in self.api_keys]})"
        )

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        redis_url = environment.redis_url("DELTAWIRE_REDIS_URL")
        settings = cls(
            redis_url=redis_url,
            broker_url=environment.broker_url("DELTAWIRE_BROKER_URL", redis_url),
            key_prefix=environment.text("DELTAWIRE_KEY_PREFIX", "dw"),
            host=environment.text("DELTAWIRE_HOST", "127.0.0.1"),
            port=environment.integer("DELTAWIRE_PORT", 8080),
            public_url=environment.text("DELTAWIRE_PUBLIC_URL").rstrip("/"),
            allowed_origins=_origins(environment, "DELTAWIRE_ALLOWED_ORIGINS"),
            api_keys=parse_api_keys(environment.secret("DELTAWIRE_API_KEYS")),
            chat_abandon_grace_s=_grace_s(environment, "DELTAWIRE_CHAT_ABANDON_GRACE_S", 2.0),
            log_format=environment.choice("DELTAWIRE_LOG_FORMAT", "text", LOG_FORMATS),
            log_level=environment.choice("DELTAWIRE_LOG_LEVEL", "info", LOG_LEVELS),
        )
        if not settings.api_keys and not is_loopback(settings.host):
            raise ConfigurationError(
                f"without an API key the relay serves loopback only, and DELTAWIRE_HOST is {settings.host}: "
                "make one (`deltawire keys new`) and set DELTAWIRE_API_KEYS, or set DELTAWIRE_HOST=127.0.0.1"
            )
        return settings


def _origins(environment: Environment, name: str) -> tuple[str, ...]:
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
