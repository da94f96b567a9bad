"""Who came by a token goes with it (PROTOCOL §5.1)."""

from collections.abc import Iterator

import pytest

from deltawire.errors import WireError
from deltawire_relay.admissions import Admissions, Stay
from deltawire_relay.auth import LOCAL, Principal
from deltawire_relay.revoked import Revocation, Revoked

NOW = 1_800_000_000.0


class Guest(Stay):
    """Remembers why it was put out, and leaves then, as connections do."""

    def __init__(self, admissions: Admissions, principal: Principal) -> None:
        super().__init__(principal, self._out)
        self.out: str | None = None
        self._admissions = admissions

    def _out(self, error: WireError) -> None:
        self.out = error.code
        self._admissions.leave(self)


def principal(name: str = "u", *, life_s: float = 60) -> Principal:
    return Principal(
        name,
        "acme",
        frozenset({"read"}),
        is_key=False,
        token_id=f"id-{name}",
        issued_at=NOW,
        expires_at=NOW + life_s,
    )


@pytest.fixture
def revoked() -> Revoked:
    return Revoked()


@pytest.fixture
def admissions(revoked: Revoked) -> Iterator[Admissions]:
    made = Admissions(revoked)
    yield made
    assert made._by_second == {}  # nothing is left behind


def test_each_leaves_when_its_token_has_expired(admissions: Admissions) -> None:
    """After the leeway, not before; one that has left is not put out."""
    short, long, left = (Guest(admissions, principal(life_s=life_s)) for life_s in (60, 120, 60))
    for guest in (short, long, left):
        admissions.enter(guest)
    admissions.leave(left)
    admissions.leave(left)
    admissions.expire(NOW + 70)
    assert short.out is None
    admissions.expire(NOW + 71)
    assert [guest.out for guest in (short, long, left)] == ["token_expired", None, None]
    admissions.expire(NOW + 1_000)
    assert long.out == "token_expired"
    assert (admissions.expired, len(admissions)) == (2, 0)


def test_an_answer_under_way_may_outlive_its_token(admissions: Admissions, revoked: Revoked) -> None:
    """But no revocation."""
    guest = Guest(admissions, principal())
    admissions.enter(guest, may_outlive=True)
    admissions.expire(NOW + 100_000)
    assert guest.out is None
    revoked.add([Revocation("acme", "id", "id-u", NOW, NOW + 60)])
    admissions.put_out_revoked()
    assert guest.out == "token_revoked"


def test_only_those_who_are_revoked_go(admissions: Admissions, revoked: Revoked) -> None:
    """By id, or by subject; of this tenant."""
    guests = {name: Guest(admissions, principal(name)) for name in ("a", "b", "c")}
    for guest in guests.values():
        admissions.enter(guest)
    revoked.add(
        [
            Revocation("acme", "id", "id-a", NOW, NOW + 60),
            Revocation("acme", "sub", "b", NOW + 1, NOW + 60),
            Revocation("umbrella", "sub", "c", NOW + 1, NOW + 60),
            Revocation("acme", "sub", "c", NOW - 1, NOW + 60),
        ]
    )
    admissions.put_out_revoked()
    assert [guest.out for guest in guests.values()] == ["token_revoked", "token_revoked", None]
    admissions.leave(guests["c"])


def test_keys_and_local_users_stay(admissions: Admissions) -> None:
    """They have no end, and cost nothing here."""
    for each in (LOCAL, Principal("key", "acme", frozenset({"read"}))):
        admissions.enter(Guest(admissions, each))
    assert len(admissions) == 0
    admissions.expire(NOW + 1e9)
    admissions.put_out_revoked()


def test_one_that_cannot_be_put_out_keeps_nobody_else(admissions: Admissions) -> None:
    """A fault with one is logged, and the others go."""

    def fail(_: WireError) -> None:
        raise RuntimeError("cannot")

    guests = [Guest(admissions, principal()) for _ in range(3)]
    guests[0].put_out = fail
    for guest in guests:
        admissions.enter(guest)
    admissions.expire(NOW + 1_000)
    assert sorted(str(guest.out) for guest in guests) == ["None", "token_expired", "token_expired"]


def test_what_is_counted(admissions: Admissions) -> None:
    """How many there are, and how many have ended for which reason."""
    guest = Guest(admissions, principal())
    admissions.enter(guest)
    values = {
        (sample.name, *sample.labels.values()): sample.value
        for family in admissions.collect()
        for sample in family.samples
    }
    assert values["deltawire_token_connections",] == 1
    assert values["deltawire_token_ends_total", "expired"] == 0
    admissions.leave(guest)
