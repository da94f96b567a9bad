"""What a service counts of its Redis."""

from collections.abc import Iterator, Mapping
from typing import Protocol

from prometheus_client.core import Metric

from .metrics import counter_family, gauge_family, histogram_family
from .redis_client import RedisClient


class Link(Protocol):
    """Connections for one purpose: a RedisLink, or RedisNodes."""

    @property
    def is_up(self) -> bool: ...
    @property
    def reconnects(self) -> int: ...


class RedisMetrics:
    """Of the client for commands, and of the other links by their names."""

    def __init__(self, client: RedisClient, links: Mapping[str, Link]) -> None:
        self._client = client
        self._links: dict[str, Link] = {"commands": client.nodes, **links}

    def collect(self) -> Iterator[Metric]:
        client, links = self._client, self._links
        yield gauge_family(
            "deltawire_redis_connected",
            "Whether all connections to Redis of a kind are up.",
            {name: link.is_up for name, link in links.items()},
            ["link"],
        )
        yield counter_family(
            "deltawire_redis_reconnects_total",
            "Connections to Redis that were made again after one was lost.",
            {name: link.reconnects for name, link in links.items()},
            ["link"],
        )
        yield histogram_family(
            "deltawire_redis_command_seconds",
            "How long a command took, a wait for a connection included.",
            {(): client.seconds},
        )
        yield counter_family(
            "deltawire_redis_command_errors_total",
            "Commands that Redis refused, or did not answer in time.",
            {"refused": client.refused, "unavailable": client.unavailable},
            ["kind"],
        )
