"""The worker's settings, read once from the environment (.env.example lists them all)."""

import msgspec

from deltawire.environment import Environment
from deltawire.log_format import LOG_FORMATS, LOG_LEVELS

from .flusher import MAX_LOG_BYTES
from .upstreams import Upstreams, read_upstreams


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: str
    broker_url: str
    upstreams: Upstreams
    key_prefix: str = "dw"
    host: str = "127.0.0.1"
    worker_port: int = 8081
    concurrency: int = 1000
    shutdown_grace_s: float = 30.0
    max_log_bytes: int = MAX_LOG_BYTES
    log_format: str = "text"
    log_level: str = "info"

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return f"Settings(upstreams={self.upstreams!r}, concurrency={self.concurrency})"

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        redis_url = environment.redis_url("DELTAWIRE_REDIS_URL")
        return cls(
            redis_url=redis_url,
            broker_url=environment.broker_url("DELTAWIRE_BROKER_URL", redis_url),
            upstreams=read_upstreams(environment),
            key_prefix=environment.text("DELTAWIRE_KEY_PREFIX", "dw"),
            host=environment.text("DELTAWIRE_HOST", "127.0.0.1"),
            worker_port=environment.integer("DELTAWIRE_WORKER_PORT", 8081),
            concurrency=environment.integer("DELTAWIRE_CONCURRENCY", 1000, minimum=1, maximum=100_000),
            shutdown_grace_s=environment.number("DELTAWIRE_SHUTDOWN_GRACE_S", 30.0),
            max_log_bytes=environment.integer(
                "DELTAWIRE_MAX_LOG_BYTES", MAX_LOG_BYTES, minimum=1_048_576, maximum=1_073_741_824
            ),
            log_format=environment.choice("DELTAWIRE_LOG_FORMAT", "text", LOG_FORMATS),
            log_level=environment.choice("DELTAWIRE_LOG_LEVEL", "info", LOG_LEVELS),
        )
