"""A pytest plugin: a scripted gateway and a whole deltawire for the tests of those who use it.

Two fixtures for the whole session, `deltawire_gateway` and `deltawire_server`, which start when the first
test wants them; `deltawire_environment` is there to be overridden. After each test all jobs are erased, and
the gateway's answers with them. docs/how-to/test-your-application.md shows the use of it.

This module is loaded by every pytest where deltawire is installed: it imports nothing but pytest.
"""

from collections.abc import Generator, Iterator, Mapping
from typing import TYPE_CHECKING, Final

import pytest

if TYPE_CHECKING:
    from .scripted_gateway import ScriptedGateway
    from .server import DeltawireServer

_gateway: Final = pytest.StashKey["ScriptedGateway"]()
_server: Final = pytest.StashKey["DeltawireServer"]()


@pytest.fixture(scope="session")
def deltawire_environment() -> Mapping[str, str]:
    """Settings of deltawire's services, besides those that they have. To be overridden, in a conftest.py."""
    return {}


@pytest.fixture(scope="session")
def deltawire_gateway(pytestconfig: pytest.Config) -> "Iterator[ScriptedGateway]":
    """An OpenAI-compatible gateway that answers what a test says; it works without a server, too."""
    try:
        from .scripted_gateway import ScriptedGateway
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: pip install 'deltawire[testing]'", pytrace=False)
    with ScriptedGateway() as gateway:
        pytestconfig.stash[_gateway] = gateway
        yield gateway
        del pytestconfig.stash[_gateway]


@pytest.fixture(scope="session")
def deltawire_server(
    pytestconfig: pytest.Config,
    deltawire_gateway: "ScriptedGateway",
    deltawire_environment: Mapping[str, str],
) -> "Iterator[DeltawireServer]":
    """A whole deltawire: a Redis of its own, a worker, a relay, and `deltawire_gateway` behind them."""
    try:
        from .server import DeltawireServer
    except ModuleNotFoundError as error:
        pytest.fail(f"{error}: pip install 'deltawire[testing]'", pytrace=False)
    with DeltawireServer(deltawire_gateway, deltawire_environment) as server:
        pytestconfig.stash[_server] = server
        yield server
        del pytestconfig.stash[_server]


# Of the old kind, which every pytest knows. Not a fixture: that would stand in everybody's `--setup-plan`.
@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_teardown(item: pytest.Item) -> Generator[None]:
    """When all that the test had is torn down, an application for example: no test meets another's jobs."""
    yield
    if server := item.config.stash.get(_server, None):
        server.clear()
    if gateway := item.config.stash.get(_gateway, None):
        gateway.clear()
