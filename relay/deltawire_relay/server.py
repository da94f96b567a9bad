"""The relay's composition root: everything is made, connected, served and closed here."""

import asyncio
import logging
import secrets
import signal
import socket
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, contextmanager, suppress
from functools import partial
from typing import Final, Protocol

import uvicorn
from starlette.types import ASGIApp

from deltawire.background import in_background
from deltawire.errors import RedisUnavailableError
from deltawire.job_counts import JobCounts, PlaceCounts
from deltawire.keys import Keys
from deltawire.log import JobLog
from deltawire.metrics import BuildInfo, LoopLag, new_registry
from deltawire.queue import TaskSender, make_app
from deltawire.redis_client import RedisClient
from deltawire.redis_metrics import RedisMetrics
from deltawire.sweeper import Sweeper
from deltawire.tokens import secret_key
from deltawire.tracing import open_tracing
from deltawire.vitals import tell

from . import open_files
from .admissions import Admissions
from .auth import Gate
from .commands import Commands
from .console import console_routes
from .feed import Feed
from .flow import Stalls
from .health import UNREADY_AFTER_S, Health
from .http_app import http_app
from .http_protocol import HttpProtocol
from .hubs import Hubs
from .jobs import CeleryQueue, Jobs, RedisQueue
from .jobs_api import JobsApi
from .limits import Limits
from .metrics import HttpMetrics, metrics_route
from .openai_api import Models, OpenAIApi
from .processes import Processes
from .responses_api import ResponsesApi
from .revocations import Revocations
from .revoked import Revoked
from .settings import Settings
from .standby import Standby
from .tokens_api import Mint, TokensApi
from .verifier import Jwks, TokenVerifier
from .websocket import WebSocketDoor

DRAIN_WINDOW_S: Final = 5.0
MARK_TIMEOUT_S: Final = 1.0
LEAVE_S: Final = 1.0
LOOK_S: Final = 0.05

_log = logging.getLogger(__name__)


class _Door(Protocol):
    async def drain(self, window_s: float) -> None:
        """Lets those that it serves go, within the window."""


class _Server(uvicorn.Server):
    """uvicorn, with our own drain before its shutdown: it knows neither WebSockets nor endless streams."""

    def __init__(
        self, config: uvicorn.Config, health: Health, standby: Standby, doors: Sequence[_Door]
    ) -> None:
        super().__init__(config)
        self._health = health
        self._standby = standby
        self._doors = doors

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, but the signal is not raised again afterwards: a drained stop is exit code 0."""
        loop = asyncio.get_running_loop()
        signals = (signal.SIGINT, signal.SIGTERM)
        for number in signals:
            loop.add_signal_handler(number, self.handle_exit, number, None)
        try:
            yield
        finally:
            for number in signals:
                loop.remove_signal_handler(number)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            _log.info("the relay serves http://%s:%d", self.config.host, port)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._health.is_draining = True
        for server in self.servers:
            server.close()
        # A proxy that keeps connections for later hears with each answer that there is none.
        self.server_state.default_headers.append((b"connection", b"close"))
        with suppress(RedisUnavailableError, TimeoutError):
            async with asyncio.timeout(MARK_TIMEOUT_S):
                await self._standby.mark_watched()
        await asyncio.gather(*(door.drain(DRAIN_WINDOW_S) for door in self._doors), self._let_go())
        await super().shutdown(sockets)

    async def _let_go(self) -> None:
        """Waits for those who ask often: a request that meets a closing connection is lost."""
        for _ in range(round(LEAVE_S / LOOK_S)):
            if not self.server_state.connections:
                break
            await asyncio.sleep(LOOK_S)


def _verifier(settings: Settings, jwks: Jwks | None) -> TokenVerifier:
    keys = [*map(secret_key, settings.jwt_secrets), *settings.jwt_public_keys]
    return TokenVerifier(keys, audience=settings.jwt_audience, issuer=settings.jwt_issuer or None, jwks=jwks)


def _mint(settings: Settings) -> Mint:
    secret = settings.jwt_secrets[0]
    return Mint(secret, audience=settings.jwt_audience, issuer=settings.jwt_issuer or None)


def _counts(hubs: Hubs, feed: Feed) -> dict[str, float]:
    """What `deltawire top` and the console show of this process."""
    delays = hubs.metrics.delays
    return {
        "jobs": len(hubs),
        "readers": sum(len(hub.subscribers) for hub in hubs),
        "silent_s": round(feed.silent_s, 3),
        # From publishing to writing, as sampled for the metrics: how often, and the sum.
        "delays_total": sum(delays.counts),
        "delays_s_total": round(delays.total, 6),
    }


def _config(settings: Settings, app: ASGIApp, websockets: WebSocketDoor, limits: Limits) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        ws=websockets,  # type: ignore[arg-type] # any factory of an asyncio protocol will do
        http=partial(HttpProtocol, limits=limits),  # type: ignore[arg-type] # likewise
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=65_535,  # the system's limit (net.core.somaxconn) is the one that counts
        timeout_keep_alive=75,
        timeout_graceful_shutdown=round(DRAIN_WINDOW_S),
    )


async def serve(settings: Settings, *, sockets: Sequence[socket.socket] = ()) -> None:
    """Serves until SIGTERM or SIGINT. Raises RedisUnavailableError if Redis is not there at the start."""
    async with open_tracing("deltawire-relay") as tracing, AsyncExitStack() as stack:
        redis = RedisClient(settings.redis_url, name="deltawire-relay")
        stack.push_async_callback(redis.aclose)
        keys = Keys.at(settings.redis_url, settings.key_prefix)
        feed = Feed(settings.redis_url, redis, keys.probe(secrets.token_hex(8)))
        await feed.start()
        stack.push_async_callback(feed.close)
        celery = make_app(settings.broker_url, key_prefix=settings.key_prefix)
        stack.push_async_callback(asyncio.to_thread, celery.close)

        commands = Commands(redis, feed)
        log = JobLog(commands, keys, settings.tenant_limits, tells_ends=settings.has_webhooks)
        sender = TaskSender(celery)
        sweeper = Sweeper(log, sender, owner=f"relay-{secrets.token_hex(8)}")
        hubs = Hubs(log, feed, sweeper.report, tracing)
        standby = Standby(hubs, log, feed)
        revoked = Revoked()
        admissions = Admissions(revoked)
        jwks = Jwks(settings.jwt_jwks_url) if settings.jwt_jwks_url else None
        verifier = _verifier(settings, jwks) if settings.takes_tokens else None
        revocations = None
        if verifier is not None:
            revocations = Revocations(log.scripts, feed, keys, revoked, admissions.put_out_revoked)
            await revocations.read()
        gate = Gate(settings.api_keys, settings.allowed_origins, verifier=verifier, revoked=revoked)
        mint = _mint(settings) if settings.jwt_secrets else None
        is_one_redis = settings.broker_url == settings.redis_url  # a cluster is no broker
        queue = RedisQueue(sender, log.scripts) if is_one_redis else CeleryQueue(sender)
        jobs = Jobs(log, hubs, queue, tracing)
        health = Health(feed, unready_after_s=UNREADY_AFTER_S)
        tokens = TokensApi(gate, mint, verifier, revocations)
        processes = Processes(settings.redis_url, keys, gate)
        models, grace_s = Models(log.scripts, keys), settings.chat_abandon_grace_s
        doors = (
            JobsApi(settings, gate, hubs, jobs, health, admissions=admissions, mint=mint),
            OpenAIApi(gate, hubs, jobs, models, admissions, abandon_grace_s=grace_s),
            ResponsesApi(gate, hubs, jobs, admissions),
        )
        limits = Limits(
            settings.bounds,
            open_files=open_files.room(),
            # Many users may be behind one, also by tokens that are issued in its name.
            uncounted={(key.tenant, key.name) for key in settings.api_keys},
        )
        websockets = WebSocketDoor(gate, hubs, jobs, admissions, limits)
        registry, lag, counts = new_registry(), LoopLag(), JobCounts(log.index)
        routes = [
            *(route for door in (*doors, tokens, processes) for route in door.routes()),
            *(metrics_route(registry, gate), *console_routes(is_on=settings.has_console)),
        ]
        http = HttpMetrics(http_app(routes, gate, limits), routes)
        links = RedisMetrics(redis, {"feed": feed.nodes})
        registry.register(
            *(BuildInfo("relay"), lag, links, feed, sweeper, hubs, jobs, http, Stalls()),
            *(gate, admissions, limits, counts, PlaceCounts(log.places)),
        )
        vitals = tell(redis, keys, "relay", secrets.token_hex(8), lambda: _counts(hubs, feed))
        kept = [
            vitals,
            *(each.keep() for each in (sweeper, standby, websockets, admissions, counts, lag, processes)),
        ]
        for each in (jwks, revocations):
            if each is not None:
                registry.register(each)
                kept.append(each.keep())
        await stack.enter_async_context(in_background(*kept))
        config = _config(settings, http, websockets, limits)
        await _Server(config, health, standby, [*doors, websockets]).serve(list(sockets) or None)
