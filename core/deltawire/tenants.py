"""How many jobs a tenant may have at a time (PROTOCOL.md §1.4), as the operator has set it."""

import tomllib
from collections.abc import Mapping
from typing import Final

import msgspec

from .environment import ConfigurationError, Environment
from .options import TENANT_RULE, is_tenant

MAX_RUNNING: Final = 10_000
MAX_QUEUED: Final = 50_000


class Quota(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Of one tenant; None stands for the setting for all. 0 is no limit."""

    max_running: int | None = None
    max_queued: int | None = None


class _File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    tenants: dict[str, Quota] = {}


class TenantLimits(msgspec.Struct, frozen=True, kw_only=True):
    """`max_running` jobs have a place (sent or running), `max_queued` more wait for one. 0 is no limit."""

    max_running: int = 0
    max_queued: int = 0
    of_tenants: Mapping[str, Quota] = {}

    def places(self, tenant: str) -> int:
        own = self.of_tenants.get(tenant)
        return self.max_running if own is None or own.max_running is None else own.max_running

    def may_wait(self, tenant: str) -> int:
        own = self.of_tenants.get(tenant)
        return self.max_queued if own is None or own.max_queued is None else own.max_queued


def read_quotas(environment: Environment, name: str, _: object) -> Mapping[str, Quota]:
    """Those of single tenants, from the TOML in NAME or NAME_FILE. Raises ConfigurationError."""
    text, where = environment.secret(name), environment.source(name)
    try:
        quotas = msgspec.convert(tomllib.loads(text), _File).tenants
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise ConfigurationError(f"{where}: {error}") from None
    for tenant, quota in quotas.items():
        if not is_tenant(tenant):
            raise ConfigurationError(f"{where}: a tenant is {TENANT_RULE}, not {tenant!r}")
        if min(quota.max_running or 0, quota.max_queued or 0) < 0:
            raise ConfigurationError(f"{where}: tenants.{tenant}: limits are 0 (none) or more")
    return quotas
