"""What every service of ours is told: where Redis and the broker are, who may ask, how to log."""

from collections.abc import Mapping
from typing import Annotated, Any

import msgspec

from .api_keys import ApiKey, parse_api_keys
from .environment import Environment
from .log_format import LOG_FORMATS, LOG_LEVELS
from .tenants import MAX_QUEUED, MAX_RUNNING, Quota, TenantLimits, read_quotas
from .variables import Variable, choice, integer


def _redis_url(environment: Environment, name: str, _: Any) -> str:
    return environment.redis_url(name)


def _broker_url(environment: Environment, name: str, _: Any) -> str:
    return environment.broker_url(name, environment.redis_url("DELTAWIRE_REDIS_URL"))


def _api_keys(environment: Environment, name: str, _: Any) -> tuple[ApiKey, ...]:
    return parse_api_keys(environment.secret(name))


class ServiceSettings(msgspec.Struct, frozen=True, kw_only=True):
    redis_url: Annotated[
        str,
        Variable(
            "DELTAWIRE_REDIS_URL",
            "Where records, logs and channels live; `rediss://` for TLS, `redis://:password@host` for a "
            "password. Or behind sentinels: "
            "`redis+sentinel://:password@host:26379,host:26379/master_name/0`, or on a Redis Cluster, by "
            "some of its nodes: `redis+cluster://:password@host:6379,host:6379` (which needs a "
            "`DELTAWIRE_BROKER_URL`).",
            _redis_url,
            is_secret=True,
            default="redis://127.0.0.1:6379/0",
        ),
    ]
    broker_url: Annotated[
        str,
        Variable(
            "DELTAWIRE_BROKER_URL",
            "Celery's broker, if it is another one; by default the Redis URL, which works for sentinels, "
            "but not for a cluster. `amqp://` or `amqps://` for RabbitMQ, see docs/rabbitmq.md.",
            _broker_url,
            is_secret=True,
            default="",
        ),
    ]
    key_prefix: Annotated[
        str,
        Variable(
            "DELTAWIRE_KEY_PREFIX",
            "What all keys and channels start with, so that installations can share a Redis.",
        ),
    ] = "dw"
    host: Annotated[
        str,
        Variable(
            "DELTAWIRE_HOST",
            "The address to listen on (the relay's port, the worker's probes). Beyond loopback the relay "
            "wants API keys.",
        ),
    ] = "127.0.0.1"
    api_keys: Annotated[
        tuple[ApiKey, ...],
        Variable(
            "DELTAWIRE_API_KEYS",
            "Who may do what: `name:tenant:scope+scope:sha256`, separated by commas; `deltawire keys new`"
            " makes one. Scopes are read, cancel, submit, list, tokens and metrics."
            ' sha256 is of the key\'s text: `printf %s "$key" | sha256sum`. Without any, the '
            "relay serves loopback only. docker-compose.yml has a demo key (`dw_demo`); to use the "
            "`_FILE` form there, also set this one to nothing.",
            _api_keys,
            is_secret=True,
        ),
    ] = ()
    tenant_max_running: Annotated[
        int,
        Variable(
            "DELTAWIRE_TENANT_MAX_RUNNING",
            "How many jobs a tenant may have in the broker's queue and running; further ones wait for their "
            "turn. 0 is no limit. The same in all services.",
            integer(0, 100_000_000),
        ),
    ] = MAX_RUNNING
    tenant_max_queued: Annotated[
        int,
        Variable(
            "DELTAWIRE_TENANT_MAX_QUEUED",
            "How many jobs of a tenant may wait for their turn; further ones are refused (429). 0 is no "
            "limit.",
            integer(0, 100_000_000),
        ),
    ] = MAX_QUEUED
    tenants: Annotated[
        Mapping[str, Quota],
        Variable(
            "DELTAWIRE_TENANTS",
            "Limits of single tenants in place of those two, as TOML: `[tenants.NAME]` with `max_running`, "
            "`max_queued`. Here (in single quotes), or in the file that `DELTAWIRE_TENANTS_FILE` names.",
            read_quotas,
            is_secret=True,
            default="",
        ),
    ] = msgspec.field(default_factory=dict)
    log_format: Annotated[
        str, Variable("DELTAWIRE_LOG_FORMAT", "What log lines look like.", choice(*LOG_FORMATS))
    ] = "text"
    log_level: Annotated[
        str,
        Variable("DELTAWIRE_LOG_LEVEL", "From which level on they are written.", choice(*LOG_LEVELS)),
    ] = "info"

    @property
    def tenant_limits(self) -> TenantLimits:
        return TenantLimits(
            max_running=self.tenant_max_running, max_queued=self.tenant_max_queued, of_tenants=self.tenants
        )
