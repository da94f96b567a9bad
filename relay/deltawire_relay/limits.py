"""How much of this process one client may have, and all of them together (PROTOCOL.md §5.7).

Pure: who comes and when is passed in, a verdict comes out. A connection is counted twice: as a *socket*, from
when it is accepted until it is lost, and, while events go out on it, as a *place*. There may be some more
sockets than places, so that a relay that is full still takes commands, answers probes, and says that it is.
"""

import ipaddress
import math
from collections.abc import Callable, Container, Hashable, Iterable, Sequence
from typing import Final, Literal

import msgspec
from prometheus_client import Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from deltawire.errors import WireError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
Transport = Literal["websocket", "sse"]

HANDSHAKE_BURST_S: Final = 2
HANDSHAKE_SHARES: Final = 10
MIN_SHAKERS: Final = 1_024
MESSAGE_BURST: Final = 1_000
MIN_HEADROOM: Final = 16
FULL_RETRY_AFTER_S: Final = 5.0
MAX_HOPS: Final = 16
MAX_HOP_CHARACTERS: Final = 64


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """What the operator allows; 0 is no limit (but for sizes)."""

    max_connections: int = 20_000
    max_connections_per_ip: int = 1_000
    max_connections_per_subject: int = 1_000
    handshakes_per_s: int = 2_000
    max_subscriptions: int = 1_000
    messages_per_s: int = 50
    max_message_bytes: int = 65_536
    max_body_bytes: int = 10_485_760
    trusted_proxies: tuple[IPNetwork, ...] = ()


LIMITS: Final = tuple(name for name in Bounds.__struct_fields__ if name != "trusted_proxies")
"""The values of the metric's label `limit`: the settings' names."""


class Rate(msgspec.Struct, frozen=True):
    """A token bucket: `burst` at once, `per_s` in the long run; 0 is no limit.

    What it knows of a peer is one number: when that one's bucket is full again, 0.0 at first (GCRA).
    """

    per_s: float
    burst: float

    def take(self, full_at: float, now: float) -> float | None:
        """One more: when the bucket will be full again; None: it is empty."""
        if not self.per_s:
            return 0.0
        full_at = max(full_at, now) + 1 / self.per_s
        return full_at if full_at - now <= self.burst / self.per_s else None

    def wait_s(self, full_at: float, now: float) -> float:
        """Until there is one more."""
        return max(0.0, full_at - now - (self.burst - 1) / self.per_s)


class Address:
    """Who connects from there, counted: one IPv4 address, or one /64 of IPv6, what a host gets.

    There is one of each while it has anything; connections share it.
    """

    __slots__ = ("is_exempt", "is_trusted", "key", "places", "sockets")

    def __init__(self, key: bytes, *, is_exempt: bool, is_trusted: bool) -> None:
        self.key = key
        self.is_exempt = is_exempt  # this machine, or a proxy: many clients behind one address
        self.is_trusted = is_trusted  # what it says of its clients counts
        self.sockets = 0
        self.places = 0


class Place:
    """Somebody reads events. To be released once; more often does no harm."""

    __slots__ = ("_address", "_limits", "_subject", "_transport")

    def __init__(self, limits: "Limits", transport: Transport, address: Address) -> None:
        self._limits = limits
        self._transport = transport
        self._address: Address | None = address
        self._subject: Hashable | None = None

    def belong_to(self, subject: Hashable | None) -> None:
        """To that one from now on; None is not counted. Raises WireError, and then nothing has changed."""
        if subject in self._limits._uncounted:
            subject = None
        if self._address is not None and subject != self._subject:
            self._limits._count_subject(subject)
            self._limits._forget_subject(self._subject)
            self._subject = subject

    def release(self) -> None:
        address, self._address = self._address, None
        if address is not None:
            self._limits._leave(self._transport, address)
            self._limits._forget_subject(self._subject)


class Limits:
    """Counts, and refuses with a WireError that says when to come again."""

    def __init__(
        self,
        bounds: Bounds | None = None,
        *,
        open_files: int | None = None,
        uncounted: Container[Hashable] = (),
    ) -> None:
        """`open_files`: how many sockets the system lets us have; None: as many as we want.

        `uncounted`: subjects that stand for many users.
        """
        self.bounds = bounds = bounds or Bounds()
        self.max_places: float = bounds.max_connections or math.inf
        self.max_sockets = _with_headroom(self.max_places)
        if open_files is not None and open_files < self.max_sockets:
            self.max_sockets = open_files
            self.max_places = min(self.max_places, open_files - max(MIN_HEADROOM, open_files // 8))
        self.messages = Rate(
            bounds.messages_per_s, max(MESSAGE_BURST, bounds.max_subscriptions) + bounds.messages_per_s
        )
        self.sockets = 0
        self.places: dict[Transport, int] = {"websocket": 0, "sse": 0}
        self.refusals = dict.fromkeys(LIMITS, 0)
        self._handshakes = _handshakes(bounds.handshakes_per_s)
        self._handshakes_of_one = _handshakes(bounds.handshakes_per_s / HANDSHAKE_SHARES)
        self._handshakes_full_at = 0.0
        self._shakers: dict[bytes, float] = {}  # see Rate; also of addresses that have nothing any more
        self._most_shakers = MIN_SHAKERS
        self._addresses: dict[bytes, Address] = {}
        self._subjects: dict[Hashable, int] = {}
        self._uncounted = uncounted

    # Sockets.

    def address(self, host: str | None) -> Address:
        """Whatever a transport calls its peer; a Unix socket's has no address. For use at once."""
        ip = parse_ip(host or "")
        if ip is None:
            return self._addresses.get(b"") or Address(b"", is_exempt=True, is_trusted=False)
        is_trusted = self._is_trusted(ip)
        is_exempt = is_trusted or ip.is_loopback
        key = ip.packed if is_exempt else ip.packed[:8]
        return self._addresses.get(key) or Address(key, is_exempt=is_exempt, is_trusted=is_trusted)

    def arrive(self, host: str | None) -> Address:
        """A connection is there; `depart` when it is lost. Raises WireError."""
        address = self.address(host)
        if self.sockets >= self.max_sockets:
            raise self._full()
        if not address.is_exempt and address.sockets >= _with_headroom(self._per_ip):
            raise self._full_of_this()
        self.sockets += 1
        address.sockets += 1
        self._addresses[address.key] = address
        return address

    def depart(self, address: Address) -> None:
        self.sockets -= 1
        address.sockets -= 1
        self._tidy(address)

    # Places.

    def shake_hands(self, peer: Address, forwarded_for: Sequence[str], now: float) -> None:
        """Somebody wants a WebSocket: what can be said before anything is made for it. Raises WireError."""
        if self._is_full:
            raise self._full()
        address = self._client(peer, forwarded_for)
        if not address.is_exempt:  # or one stranger, who comes and goes, would have them all
            of_one = self._shakers.get(address.key, 0.0)
            full_at = self._handshakes_of_one.take(of_one, now)
            if full_at is None:
                raise self._too_fast(self._handshakes_of_one.wait_s(of_one, now))
            self._note_shaker(address.key, full_at, now)
        full_at = self._handshakes.take(self._handshakes_full_at, now)
        if full_at is None:
            raise self._too_fast(self._handshakes.wait_s(self._handshakes_full_at, now))
        self._handshakes_full_at = full_at

    def enter(
        self,
        transport: Transport,
        peer: Address,
        forwarded_for: Sequence[str] = (),
        subject: Hashable | None = None,
    ) -> Place:
        """A place for `peer`, or for whom it names where it is a proxy of ours. Raises WireError."""
        address = self._client(peer, forwarded_for)
        if self._is_full:
            raise self._full()
        if not address.is_exempt and address.places >= self._per_ip:
            raise self._full_of_this()
        place = Place(self, transport, address)
        place.belong_to(subject)
        self.places[transport] += 1
        address.places += 1
        self._addresses[address.key] = address
        return place

    # What comes in.

    def check_subscriptions(self, count: int) -> None:
        """Whether there may be one more than `count`. Raises WireError."""
        if 0 < self.bounds.max_subscriptions <= count:
            raise self._refusal(
                "max_subscriptions",
                "subscription_limit",
                f"a connection has at most {self.bounds.max_subscriptions} subscriptions; unsubscribe first",
            )

    def check_body(self, size: int) -> None:
        """Raises WireError."""
        if size > self.bounds.max_body_bytes:
            raise self._refusal(
                "max_body_bytes",
                "request_too_large",
                f"a body has at most {self.bounds.max_body_bytes} bytes",
            )

    def too_many_messages(self, full_at: float, now: float) -> WireError:
        """Said to one whose bucket `messages` is empty."""
        return self._refusal(
            "messages_per_s",
            "rate_limited",
            f"a connection sends at most {self.bounds.messages_per_s} messages and pings a second",
            max(1.0, self.messages.wait_s(full_at, now)),
        )

    def message_too_large(self) -> None:
        """Somebody was closed for it."""
        self.refusals["max_message_bytes"] += 1

    # What it has counted.

    def collect(self) -> Iterable[Metric]:
        connections = GaugeMetricFamily(
            "deltawire_connections",
            "Open connections: WebSockets, event streams and completions, other HTTP.",
            labels=["transport"],
        )
        for transport, count in self.places.items():
            connections.add_metric([transport], count)
        connections.add_metric(["http"], max(0, self.sockets - sum(self.places.values())))
        yield connections
        yield GaugeMetricFamily(
            "deltawire_connections_limit",
            "How many WebSockets, event streams and completions there may be.",
            value=self.max_places,
        )
        refusals = CounterMetricFamily(
            "deltawire_refusals", "What was refused, by the setting that says so.", labels=["limit"]
        )
        for limit, count in self.refusals.items():
            refusals.add_metric([limit], count)
        yield refusals

    # Inside.

    @property
    def _is_full(self) -> bool:
        return sum(self.places.values()) >= self.max_places

    @property
    def _per_ip(self) -> float:
        return self.bounds.max_connections_per_ip or math.inf

    def _note_shaker(self, key: bytes, full_at: float, now: float) -> None:
        if len(self._shakers) >= self._most_shakers:  # nearly all of them have full buckets again
            self._shakers = {key: full_at for key, full_at in self._shakers.items() if full_at > now}
            self._most_shakers = max(MIN_SHAKERS, 2 * len(self._shakers))
        self._shakers[key] = full_at

    def _is_trusted(self, ip: IPAddress) -> bool:
        return any(ip in network for network in self.bounds.trusted_proxies)

    def _client(self, peer: Address, forwarded_for: Sequence[str]) -> Address:
        """Who it is, behind our proxies."""
        if not (peer.is_trusted and forwarded_for):
            return peer
        ip = client_of(forwarded_for, self._is_trusted)
        return self.address(str(ip)) if ip is not None else peer

    def _leave(self, transport: Transport, address: Address) -> None:
        self.places[transport] -= 1
        address.places -= 1
        self._tidy(address)

    def _tidy(self, address: Address) -> None:
        if not (address.sockets or address.places):
            del self._addresses[address.key]

    def _count_subject(self, subject: Hashable | None) -> None:
        if subject is None:
            return
        count = self._subjects.get(subject, 0)
        if 0 < self.bounds.max_connections_per_subject <= count:
            raise self._refusal(
                "max_connections_per_subject",
                "connection_limit",
                "this credential's subject has as many connections as it may have",
                FULL_RETRY_AFTER_S,
            )
        self._subjects[subject] = count + 1

    def _forget_subject(self, subject: Hashable | None) -> None:
        if subject is not None:
            self._subjects[subject] -= 1
            if not self._subjects[subject]:
                del self._subjects[subject]

    def _full(self) -> WireError:
        return self._refusal(
            "max_connections", "overloaded", "this relay is full; try again", FULL_RETRY_AFTER_S
        )

    def _too_fast(self, wait_s: float) -> WireError:
        return self._refusal(
            "handshakes_per_s", "overloaded", "too many connect to this relay at once", max(1.0, wait_s)
        )

    def _full_of_this(self) -> WireError:
        return self._refusal(
            "max_connections_per_ip",
            "connection_limit",
            "there are as many connections from this address as there may be",
            FULL_RETRY_AFTER_S,
        )

    def _refusal(self, limit: str, code: str, message: str, retry_after_s: float | None = None) -> WireError:
        self.refusals[limit] += 1
        return WireError(code, message, retry_after_s=retry_after_s)


def client_of(forwarded_for: Sequence[str], is_trusted: Callable[[IPAddress], bool]) -> IPAddress | None:
    """Whom our proxies name in X-Forwarded-For (there may be several): the last that is no proxy of ours.

    Each proxy appends whom it heard; what stands before the last stranger is that stranger's own word. Where
    all are ours it is the first (of the last MAX_HOPS). None: one of ours wrote what is no address.
    """
    found: IPAddress | None = None
    for hop in reversed(",".join(forwarded_for).rsplit(",", MAX_HOPS)[-MAX_HOPS:]):
        found = _parse_hop(hop.strip())
        if found is None or not is_trusted(found):
            break
    return found


def parse_ip(text: str) -> IPAddress | None:
    """None for what is no address; an IPv4 address that is written as IPv6 is an IPv4 address."""
    if not 0 < len(text) <= MAX_HOP_CHARACTERS:
        return None
    try:
        ip = ipaddress.ip_address(text)
    except ValueError:
        return None
    return getattr(ip, "ipv4_mapped", None) or ip


def _parse_hop(text: str) -> IPAddress | None:
    """Some proxies write the port as well: 192.0.2.1:443, [2001:db8::1]:443."""
    if text.startswith("["):
        host, closing, port = text[1:].partition("]")
        is_right = bool(closing) and (not port or (port[0] == ":" and port[1:].isdecimal()))
        return parse_ip(host) if is_right else None
    if text.count(":") == 1:
        host, _, port = text.partition(":")
        return parse_ip(host) if port.isdecimal() else None
    return parse_ip(text)


def _handshakes(per_s: float) -> Rate:
    return Rate(per_s, max(1.0, HANDSHAKE_BURST_S * per_s))


def _with_headroom(limit: float) -> float:
    return limit + max(MIN_HEADROOM, limit / 8)
