"""Web origins that may use the relay: exact ones, and patterns for all below a name. Pure."""

import re
from collections.abc import Sequence
from typing import Final

from deltawire.environment import ConfigurationError

_NAME: Final = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_is_origin: Final = re.compile(
    rf"[a-z][a-z0-9+.-]*://(?:\*\.)?(?:{_NAME}|\[[0-9a-f:.]+\])(?::[0-9]{{1,5}})?"
).fullmatch
_LABELS: Final = r"(?:[a-z0-9_-]+\.)+"


class Origins:
    """Those listed, and for `https://*.example.com` all below: one label or more, same scheme, same port."""

    def __init__(self, origins: Sequence[str]) -> None:
        self.exact = tuple(origin for origin in origins if "*" not in origin)
        patterns = [re.escape(origin).replace(r"\*\.", _LABELS) for origin in origins if "*" in origin]
        self.pattern = "|".join(patterns) or None
        """A regular expression for those that are patterns."""
        self._matches = re.compile(self.pattern or r"(?!)").fullmatch

    def __contains__(self, origin: str) -> bool:
        return origin in self.exact or self._matches(origin) is not None


def check_origin(origin: str) -> str:
    """Raises ConfigurationError for what no browser's page can have, or what is open to too many."""
    if not _is_origin(origin):
        raise ConfigurationError(
            f"{origin!r} is no origin; that is scheme, host and port, without a slash at the end, as in "
            "https://app.example.com, or with * as its first label, as in https://*.example.com"
        )
    host = origin.partition("://")[2].partition(":")[0]
    if "*" in host and host.count(".") < 2 and host != "*.localhost":
        raise ConfigurationError(f"the origin {origin!r} would let the pages of very many sites in")
    return origin
