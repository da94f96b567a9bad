"""Which tokens were revoked, as this process knows it. Pure."""

from collections.abc import Iterable
from typing import Final, Literal

import msgspec

from deltawire.tokens import LEEWAY_S

from .auth import Principal

MAX_REVOKED: Final = 100_000


class Revocation(msgspec.Struct, frozen=True, array_like=True):
    """One token of a tenant, by its id, or all of a subject's that were issued until `at`. Unix seconds."""

    tenant: str
    kind: Literal["id", "sub"]
    value: str
    at: float
    expires_at: float


class Revoked:
    """A set that forgets what has expired."""

    def __init__(self) -> None:
        self._entries: dict[tuple[str, str, str], Revocation] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, principal: object) -> bool:
        if not self._entries or not isinstance(principal, Principal) or principal.is_key:
            return False
        tenant = principal.tenant or ""
        if (tenant, "id", principal.token_id or "") in self._entries:
            return True
        of_subject = self._entries.get((tenant, "sub", principal.subject))
        return of_subject is not None and principal.issued_at <= of_subject.at

    def add(self, revocations: Iterable[Revocation]) -> bool:
        """Whether one was new. Of a subject's the latest counts."""
        is_new = False
        for each in revocations:
            name = (each.tenant, each.kind, each.value)
            known = self._entries.get(name)
            if known is None or known.at < each.at:
                self._entries[name] = each
                is_new = True
        return is_new

    def forget(self, now: float) -> None:
        for name in [name for name, each in self._entries.items() if each.expires_at + LEEWAY_S < now]:
            del self._entries[name]
