"""What a relay counts of its hubs and its answers, and who may see it (PROTOCOL §5.5)."""

import asyncio
import time

import httpx
import pytest
from prometheus_client import CollectorRegistry
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire.api_keys import DEMO_KEY, digest, parse_api_keys
from deltawire.errors import WireError
from deltawire.metrics import new_registry
from deltawire_relay.auth import Gate
from deltawire_relay.http_app import http_app
from deltawire_relay.hubs import Hubs
from deltawire_relay.looks import TAIL_CHECK_AFTER_S
from deltawire_relay.metrics import HttpMetrics, HubMetrics, metrics_route
from tests.support.fake_log import FakeRedis, FakeSink
from tests.support.hub_readers import SETTLE_S, Reader, attach, deltas, hubs_of, started
from tests.support.sample_events import completed, line
from tests.support.virtual_time import virtual_time

# Not made anew each time: tests that run in several processes must have the same names.
SCRAPER, READER = "dw_scraper", "dw_reader"
SCRAPER_ENTRY = f"prometheus:ops:metrics:{digest(SCRAPER).hex()}"
READER_ENTRY = f"reader:ops:read+submit+cancel:{digest(READER).hex()}"
DEMO_ENTRY = f"demo:default:read+metrics:{digest(DEMO_KEY).hex()}"


class Scrape:
    """What hubs say just now."""

    def __init__(self, hubs: Hubs) -> None:
        self._registry: CollectorRegistry = new_registry()
        self._registry.register(hubs)

    def __call__(self, name: str, **labels: str) -> float | None:
        return self._registry.get_sample_value(f"deltawire_{name}", labels)


def leave(reader: Reader) -> None:
    reader.subscriber.close()


@virtual_time
async def test_each_event_counts_once_for_each_reader() -> None:
    """Live, late or merged; while they read and when they have left, so that nothing is counted back."""
    redis = FakeRedis()
    started(redis, 6)
    hubs = hubs_of(redis)
    scrape = Scrape(hubs)
    first, late = await attach(hubs), await attach(hubs, position=4)
    await attach(hubs, merge=True)
    await asyncio.sleep(SETTLE_S)
    assert scrape("deliveries_total") == 6 + 2 + 6
    leave(first)
    leave(first)
    redis.append(*deltas(7, 9))
    assert scrape("deliveries_total") == 6 + 5 + 9
    redis.append(line(completed(10)))
    leave(late)
    assert scrape("deliveries_total") == 6 + 6 + 10
    assert scrape("subscribers", transport="websocket") == 1


@virtual_time
async def test_what_a_snapshot_stands_for_is_not_delivered() -> None:
    """It was not written; what follows it is."""
    redis = FakeRedis()
    started(redis, 8)
    hubs = hubs_of(redis)
    scrape = Scrape(hubs)
    reader = await attach(hubs, mode="snapshot")
    await asyncio.sleep(SETTLE_S)
    assert (reader.subscriber.position, scrape("deliveries_total"), scrape("snapshots_total")) == (8, 0, 1)
    redis.append(*deltas(9, 10))
    assert scrape("deliveries_total") == 2


@virtual_time
async def test_a_reader_that_takes_nothing_lags() -> None:
    """Until it takes what has come meanwhile."""
    redis = FakeRedis()
    started(redis, 4)
    hubs = hubs_of(redis)
    scrape, sink = Scrape(hubs), FakeSink()
    reader = await attach(hubs, sink=sink)
    await asyncio.sleep(SETTLE_S)
    assert (scrape("lagging_subscribers"), scrape("hubs")) == (0, 1)
    sink.is_open_for_more = False
    redis.append(*deltas(5, 6))
    assert scrape("lagging_subscribers") == 1
    sink.is_open_for_more = True
    reader.subscriber.pump()
    assert scrape("lagging_subscribers") == 0


@virtual_time
async def test_repairs_count_by_what_was_lost() -> None:
    """A message with one after it, one without, and a connection."""
    redis = FakeRedis()
    started(redis, 4)
    hubs = hubs_of(redis)
    scrape = Scrape(hubs)
    reader = await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    redis.append(*deltas(5, 5), publish=0)
    redis.append(*deltas(6, 6))
    await asyncio.sleep(SETTLE_S)
    redis.append(*deltas(7, 7), publish=0)
    await asyncio.sleep(TAIL_CHECK_AFTER_S + 2)
    redis.feed.lose()
    redis.feed.reconnect()
    await asyncio.sleep(SETTLE_S)
    assert reader.sink.numbers == list(range(1, 8))
    kinds = ("gap", "tail", "reconnect", "standby", "overflow", "state_lost")
    assert [scrape("repairs_total", kind=kind) for kind in kinds] == [1, 1, 1, 0, 0, 0]


@virtual_time
async def test_one_event_of_a_job_in_a_second_is_timed() -> None:
    """However many come, and however many read them."""
    redis = FakeRedis()
    started(redis, 2)
    hubs = hubs_of(redis)
    scrape = Scrape(hubs)
    for _ in range(5):
        await attach(hubs)
    await asyncio.sleep(SETTLE_S)
    for number in range(3, 43):  # in two seconds
        redis.append(*deltas(number, number))
        await asyncio.sleep(0.05)
    assert scrape("publish_to_write_seconds_count") in {2, 3}


@pytest.mark.parametrize(("ago_s", "expected_s"), [(0.5, 0.5), (-100.0, 0.0)])
def test_a_delay_is_that_since_the_event_was_made(ago_s: float, expected_s: float) -> None:
    """Where the worker's clock is ahead of ours there is none."""
    metrics, registry = HubMetrics(), new_registry()
    registry.register(metrics)
    event = b'{"type":"delta","job_id":"j","sequence_number":3,"attempt":1,"created_at":%f,"chunk":{}}'
    metrics.written(event % (time.time() - ago_s))
    said = registry.get_sample_value("deltawire_publish_to_write_seconds_sum")
    assert said == pytest.approx(expected_s, abs=0.2)


async def show(request: Request) -> Response:
    if request.path_params["job_id"] == "gone":
        raise WireError("unknown_job", "gone")
    return Response("x")


async def test_answers_count_by_route_and_class() -> None:
    """A path that somebody makes up is no label, and neither is a method."""
    routes = [Route("/v1/jobs/{job_id}", show)]
    http, registry = HttpMetrics(http_app(routes, Gate([], [])), routes), new_registry()
    registry.register(http)
    transport = httpx.ASGITransport(http)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        for path in ("/v1/jobs/a", "/v1/jobs/b", "/v1/jobs/gone", "/wp-login.php", "/.env"):
            await client.get(path)
        await client.post("/v1/jobs/a")
        await client.get("/v1/jobs/a", headers={"Host": "evil.example"})
    said = {
        (sample.labels["route"], sample.labels["status"]): sample.value
        for family in registry.collect()
        for sample in family.samples
        if sample.name == "deltawire_http_requests_total"
    }
    assert said == {
        ("/v1/jobs/{job_id}", "2xx"): 2,
        ("/v1/jobs/{job_id}", "4xx"): 2,
        ("none", "4xx"): 3,
    }


@pytest.mark.parametrize(
    ("entries", "token", "host", "status"),
    [
        ("", None, "localhost:8080", 200),
        ("", None, "evil.example", 421),
        (f"{SCRAPER_ENTRY},{READER_ENTRY}", SCRAPER, "relay:8080", 200),
        (f"{SCRAPER_ENTRY},{READER_ENTRY}", READER, "relay:8080", 403),
        (f"{SCRAPER_ENTRY},{READER_ENTRY}", None, "relay:8080", 401),
        (f"{SCRAPER_ENTRY},{READER_ENTRY}", "dw_wrong", "localhost", 401),
        (DEMO_ENTRY, DEMO_KEY, "relay:8080", 200),  # of docker-compose.yml, where Prometheus says that name
        (DEMO_ENTRY, None, "localhost:8080", 401),
    ],
    ids=[
        "no keys",
        "no keys, foreign host",
        "scope",
        "no scope",
        "no key",
        "unknown key",
        "demo",
        "demo, no key",
    ],
)
async def test_metrics_are_shown_to_who_may_see_them(
    entries: str, token: str | None, host: str, status: int
) -> None:
    """With keys by the scope `metrics`, without to this machine."""
    gate = Gate(parse_api_keys(entries) if entries else (), [])
    app = http_app([metrics_route(new_registry(), gate)], gate)
    headers = {"Host": host} | ({"Authorization": f"Bearer {token}"} if token else {})
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://relay") as client:
        answer = await client.get("/metrics", headers=headers)
    assert answer.status_code == status
    assert ("process_resident_memory_bytes" in answer.text) is (status == 200)
