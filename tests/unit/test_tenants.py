"""Limits of tenants, as operators set them (PROTOCOL.md §1.4)."""

import pytest

from deltawire.environment import ConfigurationError, Environment
from deltawire.settings import ServiceSettings
from deltawire.tenants import TenantLimits
from deltawire.variables import read_settings

TENANTS = """
[tenants.acme]
max_running = 5
[tenants."user@example.com"]
max_running = 0
max_queued = 7
"""


def limits(**variables: str) -> TenantLimits:
    return read_settings(ServiceSettings, Environment(variables)).tenant_limits


def test_a_tenants_own_limits_come_first() -> None:
    """What it does not name is as for all; 0 is no limit."""
    found = limits(DELTAWIRE_TENANTS=TENANTS, DELTAWIRE_TENANT_MAX_RUNNING="9")
    assert [found.places(name) for name in ("acme", "user@example.com", "other")] == [5, 0, 9]
    assert [found.may_wait(name) for name in ("acme", "user@example.com", "other")] == [50_000, 7, 50_000]


def test_there_are_limits_by_default() -> None:
    assert (limits().places("a"), limits().may_wait("a")) == (10_000, 50_000)


@pytest.mark.parametrize(
    "text",
    [
        "tenants = 3",
        "[tenants.acme]\nmax_runing = 3",
        "[tenants.acme]\nmax_running = -1",
        "[tenants.acme]\nmax_queued = 'many'",
        '[tenants."a b"]\nmax_queued = 1',
        "[tenant.acme]\nmax_queued = 1",
        "[tenants.acme",
    ],
)
def test_wrong_limits_are_refused(text: str) -> None:
    """The message names the variable."""
    with pytest.raises(ConfigurationError, match="DELTAWIRE_TENANTS"):
        limits(DELTAWIRE_TENANTS=text)
