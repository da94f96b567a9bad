"""`deltawire doctor`: looks at everything that an installation stands on, and says what to change.

Each service looks at its own settings (`--check`), as only it knows them; here is what they share. Every look
has its deadline, none changes anything but keys of its own that expire, and nothing printed is secret.
"""

import asyncio
import secrets
import sys
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from http.client import HTTPException
from threading import Thread
from typing import Any, Final, TypeVar
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import hiredis
import msgspec

from deltawire.environment import ConfigurationError, Environment
from deltawire.errors import RedisUnavailableError, WireError
from deltawire.findings import Finding, decode_findings
from deltawire.keys import Keys
from deltawire.queue import QUEUE, TaskSender, make_app
from deltawire.redis_connection import RedisConnection
from deltawire.redis_nodes import RedisNodes
from deltawire.settings import ServiceSettings
from deltawire.variables import read_settings
from deltawire.vitals import INTERVAL_S, Vitals, listening

from .redis_findings import (
    of_clock,
    of_refusals,
    of_round_trips,
    of_sample,
    of_server,
    read_info,
)

LOOK_TIMEOUT_S: Final = 20.0
CHECK_TIMEOUT_S: Final = 90.0  # upstreams are asked there
HTTP_TIMEOUT_S: Final = 5.0
ROUND_TRIPS: Final = 9
SCANS: Final = 20
SCAN_COUNT: Final = 500
OWN_KEYS_TTL_S: Final = 60
T = TypeVar("T")


async def examine(*, asks_upstream: bool, relay_url: str) -> list[Finding]:
    """All findings, in a fixed order. Takes as long as the slowest look."""
    environment = Environment()
    looks: list[Awaitable[list[Finding]]] = [
        _service("relay", asks_upstream=False),
        _worker(environment, asks_upstream=asks_upstream),
    ]
    try:
        settings = read_settings(ServiceSettings, environment)
    except ConfigurationError:
        pass  # both services say so
    else:
        keys = Keys.at(settings.redis_url, settings.key_prefix)
        looks += [
            _in_time("redis", look_at_redis(settings.redis_url, keys)),
            _in_time("broker", _broker(settings.broker_url, settings.key_prefix)),
            _in_time("services", _alive(settings.redis_url, keys)),
            _in_time("relay", _relay(relay_url)),
        ]
    return [finding for found in await asyncio.gather(*looks) for finding in found]


async def _in_time(subject: str, look: Awaitable[list[Finding]]) -> list[Finding]:
    try:
        async with asyncio.timeout(LOOK_TIMEOUT_S):
            return await look
    except TimeoutError:
        return [Finding("error", subject, f"no answer within {LOOK_TIMEOUT_S:.0f} s")]


async def _worker(environment: Environment, *, asks_upstream: bool) -> list[Finding]:
    """Where a relay runs no upstream is set, and nothing is wrong with that."""
    if environment.is_set("DELTAWIRE_UPSTREAM_BASE_URL") or environment.is_set("DELTAWIRE_UPSTREAMS"):
        return await _service("worker", asks_upstream=asks_upstream)
    message = "no upstream is set here, so a worker's settings were not looked at"
    change = "run the doctor with a worker's settings, too; what one needs is DELTAWIRE_UPSTREAM_BASE_URL"
    return [Finding("warning", "worker configuration", message, change)]


async def _service(name: str, *, asks_upstream: bool) -> list[Finding]:
    """What a service finds that looks at its own settings."""
    more = ["--ask"] if asks_upstream else []
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", f"deltawire_{name}", "--check", "--json", *more),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    subject = f"{name} configuration"
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_S):
            out, err = await process.communicate()
    except TimeoutError:
        return [Finding("error", subject, f"its check takes longer than {CHECK_TIMEOUT_S:.0f} s")]
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    try:
        findings = decode_findings(out)
    except msgspec.DecodeError:
        findings = []
    if findings:
        return findings
    if (install := f"pip install 'deltawire[{name}]'").encode() in err:
        change = f"{install}, if a {name} is to run here"
        return [Finding("warning", subject, f"there is no {name} in this environment", change)]
    return [Finding("error", subject, f"its check ended with {process.returncode}")]


# Redis.


async def look_at_redis(url: str, keys: Keys) -> list[Finding]:
    """Each primary behind the URL."""
    nodes = RedisNodes(url, name="deltawire-doctor")
    try:
        await nodes.start()
    except RedisUnavailableError as error:
        change = "look at DELTAWIRE_REDIS_URL, at the password, the firewall, and whether it runs"
        return [Finding("error", "redis", str(error), change)]
    findings: list[Finding] = []
    try:
        links = nodes.links()
        for number, link in enumerate(links):
            subject = f"redis {number + 1} of {len(links)}" if len(links) > 1 else "redis"
            if (connection := link.connection) is None:
                findings.append(Finding("error", subject, "not to be reached", "is that node down?"))
                continue
            findings += await _server(subject, connection, keys, is_cluster=nodes.is_cluster)
    except RedisUnavailableError as error:
        findings.append(Finding("error", "redis", str(error)))
    finally:
        await nodes.close()
    return findings


async def _server(
    subject: str, connection: RedisConnection, keys: Keys, *, is_cluster: bool
) -> list[Finding]:
    findings: list[Finding] = []
    info = await _asked(connection, "INFO")
    config: dict[str, str] | None = None
    names = ("appendfsync", "client-output-buffer-limit", "timeout")
    answers = [await _asked(connection, "CONFIG", "GET", name) for name in names]
    if all(isinstance(answer, dict) for answer in answers):
        config = {key.decode(): value.decode() for answer in answers for key, value in answer.items()}
    if isinstance(info, bytes | str):
        text = info.decode(errors="replace") if isinstance(info, bytes) else info
        findings += of_server(subject, read_info(text), config)
    else:
        message = "INFO is not to be read, so version, persistence and memory are not known"
        findings.append(Finding("warning", subject, message, "allow INFO to this user, or look yourself"))
    took_s = []
    for _ in range(ROUND_TRIPS):
        began_at = time.perf_counter()
        await _asked(connection, "PING")
        took_s.append(time.perf_counter() - began_at)
    findings.append(of_round_trips(subject, took_s))
    began_at = time.time()
    answer = await _asked(connection, "TIME")
    if isinstance(answer, list):
        now = (began_at + time.time()) / 2
        findings.append(of_clock(subject, now - int(answer[0]) - int(answer[1]) / 1e6))
    if not is_cluster:  # where most keys of a trial would be another node's
        findings.append(of_refusals(subject, await _refused(connection, keys)))
    findings.append(of_sample(subject, *await _sample(connection, keys)))
    return findings


async def _asked(connection: RedisConnection, *args: str | int) -> Any:
    """The reply; None where it is refused."""
    try:
        return await connection.execute(*args)
    except hiredis.ReplyError:
        return None


async def _refused(connection: RedisConnection, keys: Keys) -> list[str]:
    """What the services use and this user may not: tried out on keys that are gone within a minute."""
    own = f"{keys.prefix}:doctor:{secrets.token_hex(4)}"
    text, hashed, log, some, ordered, queue = (f"{own}:{kind}" for kind in "thlszq")
    script = "redis.call('SET', KEYS[1], '1', 'EX', ARGV[1]) return redis.call('GET', KEYS[1])"
    tries: list[tuple[str | int, ...]] = [
        ("SET", text, 1, "EX", OWN_KEYS_TTL_S),
        ("GET", text),
        ("EXISTS", text),
        ("MGET", text),
        ("TTL", text),
        ("EVAL", script, 1, text, OWN_KEYS_TTL_S),
        ("EVALSHA", "0" * 40, 1, text),
        ("SCRIPT", "LOAD", script),
        ("HSET", hashed, "a", 1),
        ("HSETNX", hashed, "a", 1),
        ("HINCRBY", hashed, "a", 1),
        ("HGET", hashed, "a"),
        ("HMGET", hashed, "a"),
        ("HGETALL", hashed),
        ("HDEL", hashed, "b"),
        ("XADD", log, "1-0", "e", 1),
        ("XLEN", log),
        ("XRANGE", log, "-", "+"),
        ("XREVRANGE", log, "+", "-"),
        ("XREAD", "COUNT", 1, "STREAMS", log, 0),
        ("XTRIM", log, "MAXLEN", 1),
        ("SADD", some, 1),
        ("SREM", some, 2),
        ("SMEMBERS", some),
        ("SCARD", some),
        ("SRANDMEMBER", some, 1),
        ("ZADD", ordered, 1, 1),
        ("ZREM", ordered, 2),
        ("ZRANGE", ordered, 0, 0),
        ("ZCARD", ordered),
        ("ZCOUNT", ordered, 0, 0),
        ("ZSCORE", ordered, 1),
        ("ZRANDMEMBER", ordered, 1),
        ("ZRANGEBYSCORE", ordered, 0, 0),
        ("ZREMRANGEBYRANK", ordered, 9, 9),
        ("ZREMRANGEBYSCORE", ordered, 9, 9),
        *(("EXPIRE", key, OWN_KEYS_TTL_S) for key in (hashed, log, some, ordered)),
        ("LPUSH", queue, 1),
        ("EXPIRE", queue, OWN_KEYS_TTL_S),
        ("LLEN", QUEUE),
        ("PUBSUB", "NUMSUB", f"{own}:events"),
        ("PUBLISH", f"{own}:events", 1),
        ("DEL", text, hashed, log, some, ordered, queue),
    ]
    refused: dict[str, None] = {}
    for command in tries:
        try:
            await connection.execute(*command)
        except hiredis.ReplyError as error:
            if str(error).startswith("NOPERM"):
                refused[str(command[0])] = None
    return list(refused)


async def _sample(connection: RedisConnection, keys: Keys) -> tuple[int | None, list[str]]:
    """How many of our keys were looked at, and which of them never expire: the broker's own left out.

    None where it is not allowed.
    """
    cursor, looked_at, without = 0, 0, list[str]()
    for _ in range(SCANS):
        page = await _asked(connection, "SCAN", cursor, "MATCH", f"{keys.prefix}:*", "COUNT", SCAN_COUNT)
        if not isinstance(page, list):
            return None, []
        names = [name for name in page[1] if not name.startswith(f"{keys.prefix}:unacked".encode())]
        left_s = await asyncio.gather(*(connection.execute("TTL", name) for name in names))
        looked_at += len(names)
        without += [
            name.decode(errors="replace") for name, left in zip(names, left_s, strict=True) if left == -1
        ]
        cursor = int(page[0])
        if cursor == 0:
            break
    return looked_at, without


# What runs.


async def _alive(url: str, keys: Keys) -> list[Finding]:
    """Which services say that they live."""
    heard: dict[str, Vitals] = {}
    try:
        async with listening(url, keys, lambda vitals: heard.update({vitals.name: vitals})):
            await asyncio.sleep(2 * INTERVAL_S)
    except RedisUnavailableError:
        return []  # said already
    findings: list[Finding] = []
    for kind, why in (("worker", "jobs wait in the queue"), ("relay", "nobody can submit or watch")):
        alive = [vitals for vitals in heard.values() if vitals.kind == kind]
        if not alive:
            findings.append(
                Finding("warning", f"{kind}s", f"none is alive: {why}", f"start one: `deltawire {kind}`")
            )
            continue
        late_s = max(vitals.counts.get("loop_late_s", 0.0) for vitals in alive)
        versions = ", ".join(sorted({vitals.version for vitals in alive}))
        said = f"{len(alive)} alive, version {versions}"
        if kind == "worker":
            running = sum(vitals.counts.get("running", 0) for vitals in alive)
            places = sum(vitals.counts.get("places", 0) for vitals in alive)
            said += f", {running:.0f} of {places:.0f} places taken"
        if late_s > 0.25:
            change = "it has too much to do for one core: run more of them"
            findings.append(Finding("warning", f"{kind}s", f"{said}; one was {late_s:.1f} s late", change))
        else:
            findings.append(Finding("ok", f"{kind}s", said))
    return findings


async def _broker(url: str, key_prefix: str) -> list[Finding]:
    app = make_app(url, key_prefix=key_prefix)
    try:
        depth = await in_thread(TaskSender(app).depth)
    except WireError as error:
        change = "look at DELTAWIRE_BROKER_URL (by default the Redis of the jobs)"
        why = type(error.__cause__).__name__ if error.__cause__ else ""
        return [Finding("error", "broker", f"{error.error.message} ({why})", change)]
    finally:
        with suppress(TimeoutError):
            async with asyncio.timeout(HTTP_TIMEOUT_S):
                await in_thread(app.close)
    return [Finding("ok", "broker", f"{depth} messages wait")]


async def _relay(url: str) -> list[Finding]:
    change = "is it up, and is DELTAWIRE_PUBLIC_URL (or DELTAWIRE_PORT) its address?"
    if not url:
        return [Finding("error", "relay", "this environment does not say where it is", change)]
    subject = f"relay at {url}"
    try:
        status, page = await in_thread(lambda: _get(f"{url}/readyz"))
        if status == 404:  # as every proxy should answer that stands before a relay (deploy/proxies)
            _, page = await in_thread(lambda: _get(f"{url}/v1"))
            if page.startswith('{"error":'):
                return [Finding("ok", subject, "answers, behind a proxy that keeps its probes inside")]
            return [Finding("error", subject, "what answers there is no relay", change)]
    except (OSError, HTTPException) as error:
        return [Finding("warning", subject, f"not to be reached: {error}", change)]
    if status != 200:
        return [Finding("error", subject, f"not ready: {page[:80]}", "look at its log")]
    if "degraded" in page:
        return [Finding("warning", subject, "degraded: it hears nothing of Redis just now")]
    return [Finding("ok", subject, "ready")]


def _get(url: str) -> tuple[int, str]:
    try:
        with build_opener(ProxyHandler({})).open(url, timeout=HTTP_TIMEOUT_S) as response:
            return response.status, response.read(1_000).decode(errors="replace")
    except HTTPError as error:
        return error.code, error.read(1_000).decode(errors="replace")


async def in_thread(call: Callable[[], T]) -> T:
    """As asyncio.to_thread; but a call that hangs does not keep this process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def settle(set_to: Callable[[Any], None], value: object) -> None:
        if not future.done():
            set_to(value)

    def run() -> None:
        try:
            answer = call()
        except BaseException as error:  # noqa: BLE001 - raised where it is waited for
            loop.call_soon_threadsafe(settle, future.set_exception, error)
        else:
            loop.call_soon_threadsafe(settle, future.set_result, answer)

    Thread(target=run, daemon=True).start()
    return await future
