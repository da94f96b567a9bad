"""How much one client may have, and all together: decided without a socket (PROTOCOL §5.7)."""

import ipaddress
import random
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from deltawire.errors import WireError
from deltawire_relay.limits import (
    LIMITS,
    MAX_HOPS,
    MIN_HEADROOM,
    MIN_SHAKERS,
    Address,
    Bounds,
    Limits,
    Place,
    Rate,
    client_of,
    parse_ip,
)

STRANGER, OTHER = "192.0.2.1", "192.0.2.2"
PROXY = "10.0.0.7"
TRUSTED = (ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00::/8"))


def limits(**bounds: Any) -> Limits:
    return Limits(Bounds(**bounds))


def refused(call: Callable[[], Any]) -> WireError:
    with pytest.raises(WireError) as caught:
        call()
    assert caught.value.error.retry_after_s
    return caught.value


def is_empty(of: Limits) -> bool:
    """Whether nobody is counted any more, and nothing is known of who was."""
    return not (of.sockets or any(of.places.values()) or of._addresses or of._subjects)


def metrics(of: Limits) -> dict[tuple[str, ...], float]:
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in of.collect()
        for sample in family.samples
    }


# Places.


def test_a_process_has_so_many_places() -> None:
    """Whoever comes; then it is 503, until one is given back. Bare connections may be some more."""
    made = limits(max_connections=2)
    peers = [made.arrive(f"192.0.2.{number}") for number in range(2 + MIN_HEADROOM)]
    places = [made.enter("websocket", peers[0]), made.enter("sse", peers[1])]
    for call in (
        lambda: made.enter("sse", peers[2]),
        lambda: made.shake_hands(peers[2], (), 0.0),
        lambda: made.arrive(None),
    ):
        error = refused(call)
        assert (error.code, error.status, error.kind.close_code) == ("overloaded", 503, 4013)
    places.pop().release()
    made.shake_hands(peers[2], (), 0.0)
    made.enter("websocket", peers[2])
    assert made.refusals["max_connections"] == 3


def test_the_limit_on_open_files_is_one_on_connections() -> None:
    """Fewer descriptors than we want: fewer places, with room for those who are told so."""
    made = Limits(Bounds(), open_files=1_000)
    assert (made.max_sockets, made.max_places) == (1_000, 875)
    unlimited = Limits(Bounds(max_connections=0), open_files=1_000)
    assert (unlimited.max_sockets, unlimited.max_places) == (1_000, 875)
    assert Limits(Bounds(), open_files=1_000_000).max_places == 20_000
    assert Limits(Bounds(max_connections=0)).max_places == float("inf")


@pytest.mark.parametrize("transport", ["websocket", "sse"])
def test_an_address_has_so_many_places(transport: Any) -> None:
    """Then it is 429, for that one; a bare connection of its own gets to hear it, up to some more."""
    made = limits(max_connections_per_ip=2)
    peer, other = made.arrive(STRANGER), made.arrive(OTHER)
    for _ in range(2):
        made.enter(transport, peer)
    error = refused(lambda: made.enter(transport, peer))
    assert (error.code, error.status, error.kind.close_code) == ("connection_limit", 429, 4504)
    made.enter(transport, other)
    for _ in range(1 + MIN_HEADROOM):
        assert made.arrive(STRANGER) is peer
    assert refused(lambda: made.arrive(STRANGER)).code == "connection_limit"
    made.arrive(OTHER)
    assert made.refusals["max_connections_per_ip"] == 2


SAME = [
    ("2001:db8:1:2::1", "2001:db8:1:2:ffff::9", True),
    ("2001:db8:1:2::1", "2001:db8:1:3::1", False),
    ("::ffff:192.0.2.1", "192.0.2.1", True),
    ("::ffff:192.0.2.1", "::ffff:192.0.2.2", False),
    ("192.0.2.1", "192.0.2.2", False),
    ("fe80::1%eth0", "fe80::2", True),
]


@pytest.mark.parametrize(("one", "another", "is_same"), SAME)
def test_who_counts_as_one(one: str, another: str, is_same: bool) -> None:
    """An IPv4 address however it is written, a /64 of IPv6."""
    made = limits(max_connections_per_ip=1)
    made.enter("sse", made.arrive(one))
    if is_same:
        refused(lambda: made.enter("sse", made.arrive(another)))
    else:
        made.enter("sse", made.arrive(another))


@pytest.mark.parametrize(
    "host", ["127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1", PROXY, "fd00::1", None, ""]
)
def test_this_machine_and_proxies_are_not_counted_by_address(host: str | None) -> None:
    """There may be many clients behind one; a Unix socket's peer has no address."""
    made = limits(max_connections_per_ip=1, trusted_proxies=TRUSTED)
    for _ in range(100):
        made.enter("sse", made.arrive(host))


def test_a_trusted_proxy_does_not_make_its_neighbours_exempt() -> None:
    """It may share a /64 with clients."""
    proxy = ipaddress.ip_network("2001:db8::7")
    made = limits(max_connections_per_ip=1, trusted_proxies=(proxy,))
    made.enter("sse", made.arrive("2001:db8::7"))
    made.enter("sse", made.arrive("2001:db8::8"))
    made.enter("sse", made.arrive("2001:db8::7"))
    refused(lambda: made.enter("sse", made.arrive("2001:db8::8")))


def test_a_subject_has_so_many_places() -> None:
    """Of one tenant; who becomes another frees the first; a refusal changes nothing."""
    made = limits(max_connections_per_subject=1)
    peer = made.arrive(None)
    place = made.enter("sse", peer, subject=("acme", "ann"))
    assert refused(lambda: made.enter("sse", peer, subject=("acme", "ann"))).status == 429
    second = made.enter("websocket", peer, subject=("other", "ann"))
    assert refused(lambda: second.belong_to(("acme", "ann"))).kind.close_code == 4504
    assert refused(lambda: made.enter("sse", peer, subject=("other", "ann"))).code == "connection_limit"
    second.belong_to(("other", "ann"))
    place.belong_to(("acme", "bob"))
    second.belong_to(("acme", "ann"))
    for _ in range(10):
        made.enter("sse", peer)
    for each in (place, second):
        each.release()
        each.belong_to(("acme", "ann"))
    assert not made._subjects
    assert made.places == {"websocket": 0, "sse": 10}


def test_an_api_key_is_no_subject() -> None:
    """Nor is a token in its name: a backend has many users."""
    made = Limits(Bounds(max_connections_per_subject=1), uncounted={("acme", "backend")})
    peer = made.arrive(None)
    for _ in range(10):
        place = made.enter("sse", peer, subject=("acme", "backend"))
    place.belong_to(("acme", "ann"))
    refused(lambda: made.enter("sse", peer, subject=("acme", "ann")))
    place.belong_to(("acme", "backend"))
    made.enter("sse", peer, subject=("acme", "ann"))


class Crowd(RuleBasedStateMachine):
    """Connections that come, take places, become somebody and go, at random, also twice."""

    peers = Bundle("peers")
    places = Bundle("places")

    def __init__(self) -> None:
        super().__init__()
        self.limits = limits(
            max_connections=6,
            max_connections_per_ip=2,
            max_connections_per_subject=2,
            trusted_proxies=TRUSTED,
        )
        self.here: list[Address] = []
        self.taken: list[Place] = []

    @rule(target=peers, host=st.sampled_from([STRANGER, OTHER, "2001:db8::1", "2001:db8::2", PROXY, None]))
    def arrive(self, host: str | None) -> Address | None:
        try:
            self.here.append(self.limits.arrive(host))
        except WireError:
            return None
        return self.here[-1]

    @rule(
        target=places,
        peer=peers,
        forwarded=st.sampled_from([[], [STRANGER], ["2001:db8::9"], ["nonsense"], [PROXY]]),
        subject=st.sampled_from([None, "ann", "bob"]),
    )
    def enter(self, peer: Address | None, forwarded: list[str], subject: str | None) -> Place | None:
        if peer is None or not any(peer is each for each in self.here):
            return None
        try:
            self.taken.append(self.limits.enter("websocket", peer, forwarded, subject))
        except WireError:
            return None
        return self.taken[-1]

    @rule(place=places, subject=st.sampled_from([None, "ann", "bob"]))
    def belong_to(self, place: Place | None, subject: str | None) -> None:
        if place is not None:
            with suppress(WireError):
                place.belong_to(subject)

    @rule(place=places)
    def release(self, place: Place | None) -> None:
        if place is not None:
            place.release()
            self.taken = [each for each in self.taken if each is not place]

    @rule(peer=consumes(peers))
    def depart(self, peer: Address | None) -> None:
        if peer is not None:
            self.here.remove(peer)
            self.limits.depart(peer)

    @invariant()
    def it_counts_what_there_is(self) -> None:
        assert self.limits.sockets == len(self.here)
        assert self.limits.places["websocket"] == len(self.taken) <= 6
        strangers = [each for each in self.limits._addresses.values() if not each.is_exempt]
        assert all(each.places <= 2 for each in strangers)
        assert all(0 < count <= 2 for count in self.limits._subjects.values())

    def teardown(self) -> None:
        """When all have gone nothing is left, not even their names."""
        for place in self.taken:
            place.release()
        for peer in self.here:
            self.limits.depart(peer)
        assert is_empty(self.limits)


TestCrowd = Crowd.TestCase
TestCrowd.settings = settings(max_examples=40)


# Rates.


def test_handshakes_come_at_a_rate() -> None:
    """Twice as many at once as per second; then 503 says when."""
    made = limits(handshakes_per_s=10)
    peer = made.arrive(None)
    for _ in range(20):
        made.shake_hands(peer, (), 100.0)
    error = refused(lambda: made.shake_hands(peer, (), 100.0))
    assert (error.code, error.status, error.error.retry_after_s) == ("overloaded", 503, 1.0)
    made.shake_hands(peer, (), 100.11)
    refused(lambda: made.shake_hands(peer, (), 100.11))
    for _ in range(20):
        made.shake_hands(peer, (), 102.2)


@pytest.mark.parametrize("through", ["itself", "a proxy"])
def test_one_address_has_a_tenth_of_the_handshakes(through: str) -> None:
    """Or it could keep all others out, by coming and going."""
    made = limits(handshakes_per_s=100, trusted_proxies=TRUSTED)
    flood, other = made.arrive(STRANGER), made.arrive(OTHER)
    peer, word = (flood, []) if through == "itself" else (made.arrive(PROXY), [STRANGER])
    for _ in range(20):
        made.shake_hands(peer, word, 100.0)
    error = refused(lambda: made.shake_hands(peer, word, 100.0))
    assert (error.code, error.status) == ("overloaded", 503)
    made.shake_hands(other, (), 100.0)
    for _ in range(1_000):
        refused(lambda: made.shake_hands(peer, word, 100.0))
    for _ in range(19):
        made.shake_hands(other, [STRANGER], 100.0)
    made.shake_hands(peer, word, 100.11)


@pytest.mark.parametrize("through", ["itself", "a proxy"])
def test_one_that_leaves_each_time_has_no_more_handshakes(through: str) -> None:
    """It has nothing while it is away, or never has, as its handshakes are no WebSockets' of ours."""
    made = limits(handshakes_per_s=100, trusted_proxies=TRUSTED)
    proxy = made.arrive(PROXY)
    for number in range(30):
        peer, word = (made.arrive(STRANGER), []) if through == "itself" else (proxy, [STRANGER])
        if number < 20:
            made.shake_hands(peer, word, 100.0)
        else:
            refused(partial(made.shake_hands, peer, word, 100.0))
        if peer is not proxy:
            made.depart(peer)
    made.shake_hands(proxy, [OTHER], 100.0)
    made.depart(proxy)
    for number in range(20_000):
        peer = made.arrive(f"2001:db8:{number:x}::1")
        made.shake_hands(peer, (), 1_000.0 + number)
        made.depart(peer)
    assert not made._addresses
    assert len(made._shakers) <= MIN_SHAKERS


@given(
    per_s=st.integers(1, 1_000),
    burst=st.integers(1, 1_000),
    pauses=st.lists(st.floats(0, 3), max_size=100),
)
def test_a_rate_is_that_of_a_token_bucket(per_s: int, burst: int, pauses: list[float]) -> None:
    """One number per peer says the same as tokens that are counted."""
    rate = Rate(per_s, burst)
    tokens, now, full_at = float(burst), 50.0, 0.0
    for pause in pauses:
        now += pause
        tokens = min(burst, tokens + pause * per_s)
        if abs(tokens - 1) < 1e-6:  # a rounding apart
            return
        after = rate.take(full_at, now)
        assert (after is not None) is (tokens >= 1)
        if after is None:
            assert rate.wait_s(full_at, now) == pytest.approx((1 - tokens) / per_s, abs=1e-6)
        else:
            full_at, tokens = after, tokens - 1


def test_no_rate_is_no_limit() -> None:
    """And nothing is remembered."""
    rate = Rate(0, 0)
    assert all(rate.take(0.0, 1.0) == 0.0 for _ in range(10_000))


def test_all_subscriptions_that_are_allowed_may_come_at_once() -> None:
    """More of them than the usual burst, too."""
    assert limits().messages.burst == 1_050
    assert limits(max_subscriptions=5_000).messages.burst == 5_050


# What is too large.


def test_what_comes_in_is_bounded() -> None:
    """Each with its code; 0 is no limit for counts."""
    made = limits(max_subscriptions=2, max_body_bytes=10)
    made.check_subscriptions(1)
    made.check_body(10)
    with pytest.raises(WireError, match="subscription_limit"):
        made.check_subscriptions(2)
    with pytest.raises(WireError, match="request_too_large"):
        made.check_body(11)
    limits(max_subscriptions=0).check_subscriptions(1_000_000)


# Who it is.


def is_trusted(ip: Any) -> bool:
    return any(ip in network for network in TRUSTED)


FORWARDED: list[tuple[list[str], str | None]] = [
    (["192.0.2.1"], "192.0.2.1"),
    (["192.0.2.1:4711"], "192.0.2.1"),
    (["2001:db8::1"], "2001:db8::1"),
    (["[2001:db8::1]"], "2001:db8::1"),
    (["[2001:db8::1]:443"], "2001:db8::1"),
    (["::ffff:192.0.2.1"], "192.0.2.1"),
    (["6.6.6.6, 192.0.2.1"], "192.0.2.1"),
    (["6.6.6.6,192.0.2.1 , 10.0.0.8"], "192.0.2.1"),
    (["192.0.2.1, fd00::3, 10.0.0.8"], "192.0.2.1"),
    (["6.6.6.6", "192.0.2.1"], "192.0.2.1"),
    (["192.0.2.1", "10.0.0.8"], "192.0.2.1"),
    (["nonsense, 192.0.2.1"], "192.0.2.1"),
    (["127.0.0.1, 192.0.2.1"], "192.0.2.1"),
    (["10.0.0.9, 10.0.0.8"], "10.0.0.9"),
    (["10.0.0.9, nonsense"], None),
    (["192.0.2.1, "], None),
    ([""], None),
    (["unknown"], None),
    (["_hidden"], None),
    (["192.0.2.1:http"], None),
    (["[2001:db8::1"], None),
    (["[2001:db8::1]443"], None),
    (["1" * 60_000], None),
    (["192.0.2.1\x00"], None),
    ([", ".join(["10.0.0.9"] * 10_000)], "10.0.0.9"),
]


@pytest.mark.parametrize(("header", "client"), FORWARDED)
def test_the_client_is_the_last_that_is_no_proxy_of_ours(header: list[str], client: str | None) -> None:
    """Whatever stands before that is its own word; what is no address says nothing."""
    found = client_of(header, is_trusted)
    assert found == (client and ipaddress.ip_address(client))


@given(st.lists(st.text(max_size=30), max_size=5), st.booleans())
def test_no_header_is_too_strange(header: list[str], trusts: bool) -> None:
    """It is an address or nothing, never an exception."""
    found = client_of(header, lambda _: trusts)
    assert found is None or parse_ip(str(found)) == found


def test_only_so_many_hops_are_read() -> None:
    """A header as long as one may be costs as much as a short one."""
    asked: list[Any] = []

    def trust(ip: Any) -> bool:
        asked.append(ip)
        return True

    client_of([", ".join(["10.0.0.9"] * 6_000)], trust)
    assert len(asked) == MAX_HOPS


def test_behind_a_proxy_clients_are_told_apart() -> None:
    """Each has its own count, whether it comes through the proxy or by itself."""
    made = limits(max_connections_per_ip=1, trusted_proxies=TRUSTED)
    proxy = made.arrive(PROXY)
    made.enter("sse", proxy, [STRANGER])
    refused(lambda: made.enter("sse", proxy, [STRANGER]))
    refused(lambda: made.enter("sse", made.arrive(STRANGER)))
    refused(lambda: made.enter("sse", proxy, [f"{OTHER}, {STRANGER}"]))
    made.enter("sse", proxy, [OTHER])


def test_a_strangers_word_about_itself_changes_nothing() -> None:
    """Not another address for each connection, not ours, not a proxy's."""
    made = limits(max_connections_per_ip=1, trusted_proxies=TRUSTED)
    peer = made.arrive(STRANGER)
    made.enter("sse", peer, [OTHER])
    for word in (OTHER, "127.0.0.1", PROXY, "::1", "nonsense"):
        refused(lambda word=word: made.enter("sse", peer, [word]))  # type: ignore[misc] # mypy: no lambdas with defaults
    proxy = made.arrive(PROXY)
    for word in (OTHER, "127.0.0.1", PROXY, "::1", "nonsense"):
        refused(lambda word=word: made.enter("sse", proxy, [f"{word}, {STRANGER}"]))  # type: ignore[misc] # as above
    made.enter("sse", made.arrive(OTHER))


# What it says of itself.


def test_what_is_counted_is_told() -> None:
    """Connections by what they are, and each refusal by the setting that made it."""
    made = limits(max_connections=4, max_connections_per_ip=1)
    before = metrics(made)
    assert {name[1] for name in before if name[0] == "deltawire_refusals_total"} == set(LIMITS)
    assert not any(value for name, value in before.items() if name[0] != "deltawire_connections_limit")
    peers = [made.arrive(STRANGER) for _ in range(3)]
    place = made.enter("websocket", peers[0])
    refused(lambda: made.enter("sse", peers[1]))
    made.message_too_large()
    now = metrics(made)
    assert now["deltawire_connections", "websocket"] == 1
    assert now["deltawire_connections", "sse"] == 0
    assert now["deltawire_connections", "http"] == 2
    assert now["deltawire_connections_limit",] == 4
    assert now["deltawire_refusals_total", "max_connections_per_ip"] == 1
    assert now["deltawire_refusals_total", "max_message_bytes"] == 1
    place.release()
    for peer in peers:
        made.depart(peer)
    assert not any(value for name, value in metrics(made).items() if name[0] == "deltawire_connections")


def test_many_who_come_and_go_leave_nothing() -> None:
    """Thousands of addresses, in any order."""
    made, here = limits(), []
    randomness = random.Random(3)
    for number in range(5_000):
        peer = made.arrive(f"2001:db8:{number:x}::1")
        here.append((peer, made.enter("websocket", peer, subject=str(number % 700))))
        if randomness.random() < 0.6:
            peer, place = here.pop(randomness.randrange(len(here)))
            made.depart(peer)
            place.release()
    assert len(made._addresses) == len(here)
    for peer, place in here:
        place.release()
        made.depart(peer)
    assert is_empty(made)
