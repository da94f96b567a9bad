"""The worker's composition root: the Celery app, and what lives on its pool's loop."""

import asyncio
import logging
import secrets
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Final

from celery import Celery

from deltawire.background import in_background
from deltawire.job_counts import PlaceCounts
from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.metrics import BuildInfo, LoopLag, exposition, new_registry
from deltawire.queue import TaskSender, make_app
from deltawire.redis_client import RedisClient
from deltawire.redis_metrics import RedisMetrics
from deltawire.sweeper import Sweeper
from deltawire.tracing import open_tracing
from deltawire.turns import Turns
from deltawire.vitals import tell

from .abandonment import Abandonment
from .asking import Asker
from .cancellation import ControlChannel
from .flusher import Flusher
from .generate import Generator
from .lease import Leases, Presence
from .metrics import JobMetrics
from .models import Catalogue
from .parking import Parking
from .probes import Probes
from .quotas import Quotas
from .run import Run
from .settings import Settings
from .task import register
from .upstream import UpstreamClient
from .visibility import VisibilityRenewal
from .webhooks import Webhooks

TRANSPORTS: Final = {
    **dict.fromkeys(("redis", "rediss", "redis+socket", "unix"), "Transport"),
    **dict.fromkeys(("redis+sentinel", "sentinel"), "SentinelTransport"),
}
"""Our own for brokers by their URLs' schemes, instead of kombu's (see broker_transport)."""

_log = logging.getLogger(__name__)


def create_app(settings: Settings) -> Celery:
    """The Celery app of a worker process."""
    app = make_app(settings.broker_url, key_prefix=settings.key_prefix)
    app.conf.update(
        worker_pool="deltawire_worker.pool:TaskPool",
        worker_consumer="deltawire_worker.consumer:Consumer",
        worker_concurrency=settings.concurrency,
        # A message is acknowledged when its job has ended, so a lost worker's jobs come back.
        task_acks_late=True,
        task_reject_on_worker_lost=True,
        # Else a worker holds back four times its concurrency from its neighbours.
        worker_prefetch_multiplier=1,
        # Both would end or throttle running streams when the broker's connection drops.
        worker_cancel_long_running_tasks_on_connection_loss=False,
        worker_enable_prefetch_count_reduction=False,
        worker_hijack_root_logger=False,
        worker_redirect_stdouts=False,
        worker_send_task_events=False,
        broker_connection_max_retries=None,
    )
    if transport := TRANSPORTS.get(settings.broker_url.partition(":")[0]):
        app.conf.broker_transport = f"deltawire_worker.broker_transport:{transport}"
    # SIGTERM lets running streams finish for this long; Celery's own warm shutdown would wait for ever.
    app.pool_drain_timeout_s = settings.shutdown_grace_s
    app.pool_lifespan = partial(_lifespan, app, settings)
    app.steps["consumer"].add(VisibilityRenewal)
    register(app)
    return app


def _counts(app: Celery, runs: Mapping[str, Run], settings: Settings) -> dict[str, float]:
    """What `deltawire top` shows of this process."""
    generator: Generator = app.generator
    return {
        "running": len(runs),
        "places": settings.concurrency,
        "parked": len(app.parking),
        "ended_total": generator.ended,
        "events_total": generator.events,
    }


@asynccontextmanager
async def _lifespan(app: Celery, settings: Settings) -> AsyncIterator[None]:
    """Connects before the worker takes its first message; closes after its last task."""
    keys = Keys.at(settings.redis_url, settings.key_prefix)
    owner = secrets.token_hex(8)  # a new one for each start: a restarted worker is somebody else
    runs: dict[str, Run] = {}
    async with open_tracing("deltawire-worker") as tracing, AsyncExitStack() as stack:
        redis = RedisClient(settings.redis_url, name="deltawire-worker")
        stack.push_async_callback(redis.aclose)
        log = JobLog(redis, keys, settings.tenant_limits, tells_ends=bool(settings.webhooks))
        flusher = Flusher(settings.redis_url, keys, max_log_bytes=settings.max_log_bytes)
        await flusher.start()
        stack.push_async_callback(flusher.close)
        control = ControlChannel(settings.redis_url, keys, owner, runs)
        await control.start()
        stack.push_async_callback(control.close)
        client = UpstreamClient()
        stack.push_async_callback(client.aclose)
        leases = Leases(flusher, owner, runs)
        presence = Presence(log.index, owner, runs)
        sender = app.sender = TaskSender(app)
        sweeper = Sweeper(log, sender, owner=f"{owner}-sweeper")
        abandonment = Abandonment(log, runs)
        parking = app.parking = Parking(sender)
        stack.push_async_callback(parking.drain)
        quotas = Quotas(log.places, Turns(log, sender), runs)
        models = Catalogue(redis, keys, settings.upstreams, client)
        metrics = JobMetrics(
            settings.upstreams, runs, capacity=settings.concurrency, knows_model=models.knows
        )
        lag = LoopLag()
        links = RedisMetrics(redis, {"flusher": flusher.nodes, "control": control.link})
        registry = new_registry()
        registry.register(BuildInfo("worker"), lag, links, sweeper, metrics, flusher, leases, parking)
        registry.register(PlaceCounts(log.places))
        webhooks = Webhooks(settings.webhooks, log, log.notices) if log.notices else None
        if webhooks is not None:
            registry.register(webhooks)
        kept = in_background(
            *([webhooks.keep()] if webhooks else []),
            *(leases.keep(), presence.keep(), sweeper.keep(), abandonment.keep()),
            *(parking.keep(), models.keep(), quotas.keep(), lag.keep()),
            tell(redis, keys, "worker", owner, lambda: _counts(app, runs, settings)),
        )
        await stack.enter_async_context(kept)
        app.generator_loop = asyncio.get_running_loop()
        app.generator = Generator(
            log=log,
            flusher=flusher,
            upstreams=settings.upstreams,
            asker=Asker(settings.upstreams, client, metrics),
            owner=owner,
            runs=runs,
            leases=leases,
            presence=presence,
            abandonment=abandonment,
            quotas=quotas,
            metrics=metrics,
            tracing=tracing,
        )
        probes = Probes(
            settings.host,
            settings.worker_port,
            is_ready=lambda: flusher.is_connected,
            metrics=partial(exposition, registry),
            api_keys=settings.api_keys,
        )
        await probes.start()
        stack.push_async_callback(probes.close)
        where = ", ".join(f"{upstream.name} ({upstream.base_url})" for upstream in settings.upstreams)
        _log.info("the worker takes %d jobs at a time for %s", settings.concurrency, where)
        yield
