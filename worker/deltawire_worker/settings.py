"""The worker's settings, read once from the environment (.env.example lists them all)."""

from typing import Literal

import msgspec

from deltawire.environment import ConfigurationError, Environment

from .upstream import Upstream


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: str
    broker_url: str
    upstream: Upstream
    key_prefix: str = "dw"
    host: str = "127.0.0.1"
    worker_port: int = 8081
    concurrency: int = 1000
    shutdown_grace_s: float = 30.0
    log_format: Literal["json", "text"] = "text"
    log_level: str = "info"

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return f"Settings(upstream={self.upstream!r}, concurrency={self.concurrency})"

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        redis_url = environment.secret("DELTAWIRE_REDIS_URL") or "redis://127.0.0.1:6379/0"
        base_url = environment.text("DELTAWIRE_UPSTREAM_BASE_URL").rstrip("/")
        if not base_url.startswith(("http://", "https://")):
            raise ConfigurationError(
                "DELTAWIRE_UPSTREAM_BASE_URL must be the address of an OpenAI-compatible gateway, such as "
                f"https://api.example.com/v1; it is {base_url or 'not set'}"
            )
        log_format = environment.text("DELTAWIRE_LOG_FORMAT", "text")
        if log_format not in {"json", "text"}:
            raise ConfigurationError(f"DELTAWIRE_LOG_FORMAT must be json or text, not {log_format!r}")
        return cls(
            redis_url=redis_url,
            broker_url=environment.secret("DELTAWIRE_BROKER_URL") or redis_url,
            upstream=Upstream("default", base_url, environment.secret("DELTAWIRE_UPSTREAM_API_KEY")),
            key_prefix=environment.text("DELTAWIRE_KEY_PREFIX", "dw"),
            host=environment.text("DELTAWIRE_HOST", "127.0.0.1"),
            worker_port=environment.integer("DELTAWIRE_WORKER_PORT", 8081),
            concurrency=environment.integer("DELTAWIRE_CONCURRENCY", 1000, minimum=1, maximum=100_000),
            shutdown_grace_s=environment.number("DELTAWIRE_SHUTDOWN_GRACE_S", 30.0),
            log_format=log_format,  # type: ignore[arg-type] # checked above
            log_level=environment.text("DELTAWIRE_LOG_LEVEL", "info"),
        )
