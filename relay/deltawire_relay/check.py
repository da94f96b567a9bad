"""`python -m deltawire_relay --check`: what only the relay knows about its own settings."""

import math

from deltawire.environment import ConfigurationError, Environment
from deltawire.findings import Asked, Finding, of_configuration, of_open_files

from .limits import Limits
from .open_files import RESERVED, WANTED, hard_limit
from .settings import Settings

_CONFIGURATION = "relay configuration"


async def check(_: Asked) -> list[Finding]:
    """Looks at the settings and at the limit on open files; connects to nothing."""
    environment = Environment()
    if problems := of_configuration(_CONFIGURATION, Settings, environment):
        return problems
    try:
        settings = Settings.from_environment(environment)
    except ConfigurationError as error:
        return [Finding("error", _CONFIGURATION, str(error))]
    keys, sockets = len(settings.api_keys), Limits(settings.bounds).max_sockets
    wanted = WANTED if math.isinf(sockets) else int(sockets) + RESERVED
    return [
        Finding("ok", _CONFIGURATION, f"{settings.host}:{settings.port}, API keys: {keys}"),
        of_open_files("relay open files", hard_limit(), wanted, "DELTAWIRE_MAX_CONNECTIONS"),
    ]
