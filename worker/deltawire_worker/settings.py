"""The worker's settings, read once from the environment (docs/configuration.md lists them all)."""

from typing import Annotated, Any

from deltawire.environment import Environment
from deltawire.settings import ServiceSettings
from deltawire.variables import PORT, Variable, integer, number, read_settings

from .flusher import MAX_LOG_BYTES
from .upstreams import EXAMPLE, Upstreams, read_upstreams
from .webhook_endpoints import EXAMPLE as WEBHOOKS_EXAMPLE
from .webhook_endpoints import Webhook, read_webhooks


def _webhooks(environment: Environment, _: str, __: Any) -> tuple[Webhook, ...]:
    return read_webhooks(environment)


def _upstreams(environment: Environment, name: str, _: Any) -> Upstreams:
    return read_upstreams(environment)


class Settings(ServiceSettings, frozen=True, kw_only=True):
    upstreams: Annotated[
        Upstreams,
        Variable(
            "DELTAWIRE_UPSTREAM_BASE_URL",
            "The OpenAI-compatible gateway, up to and with `/v1`. The worker has no default; docker-"
            "compose.yml has the scripted gateway.",
            _upstreams,
            is_secret=True,
            default="",
        ),
        Variable(
            "DELTAWIRE_UPSTREAM_API_KEY",
            "Sent to it as a bearer token; by default none.",
            is_secret=True,
            default="",
        ),
        Variable(
            "DELTAWIRE_UPSTREAMS",
            "In place of those two: several gateways, or one with other headers, a query, a limit of "
            "streams, or one that differs. TOML, here (in single quotes) or in a file, with a table for "
            "each; a job goes to the one that its option `upstream` names, else to the first that has its"
            " model. All keys but base_url may be left out. docs/gateways.md says what each gateway needs.",
            is_secret=True,
            default="",
            example=EXAMPLE,
        ),
    ]
    worker_port: Annotated[
        int,
        Variable("DELTAWIRE_WORKER_PORT", "The worker's port: `/healthz`, `/readyz`, `/metrics`.", PORT),
    ] = 8081
    concurrency: Annotated[
        int,
        Variable(
            "DELTAWIRE_CONCURRENCY",
            "How many jobs one worker process takes at a time.",
            integer(1, 100_000),
        ),
    ] = 1000
    shutdown_grace_s: Annotated[
        float,
        Variable(
            "DELTAWIRE_SHUTDOWN_GRACE_S",
            "Seconds that running streams get to finish after SIGTERM; the rest ends then. docker-"
            "compose.yml fixes it, next to the `stop_grace_period` that has to be longer.",
            number,
        ),
    ] = 30.0
    max_log_bytes: Annotated[
        int,
        Variable(
            "DELTAWIRE_MAX_LOG_BYTES",
            "A job's log that has grown past so many bytes is compacted: its oldest events become one "
            "snapshot.",
            integer(1_048_576, 1_073_741_824),
        ),
    ] = MAX_LOG_BYTES

    webhooks: Annotated[
        tuple[Webhook, ...],
        Variable(
            "DELTAWIRE_WEBHOOKS",
            "Addresses that hear of the ends of jobs (docs/webhooks.md). TOML, here (in single quotes) or "
            "in a file, with a table for each. Workers tell them; the relay only has to know that there are "
            "some, so there any value will do.",
            _webhooks,
            is_secret=True,
            default="",
            example=WEBHOOKS_EXAMPLE,
        ),
    ] = ()

    def __repr__(self) -> str:
        # URLs may carry passwords.
        return f"Settings(upstreams={self.upstreams!r}, concurrency={self.concurrency})"

    @classmethod
    def from_environment(cls, environment: Environment) -> "Settings":
        """Raises ConfigurationError that says what to set."""
        return read_settings(cls, environment)
