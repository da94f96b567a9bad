"""deploy/redis/users.acl on a real server: each user can do what it must, and nothing else."""

import asyncio
import base64
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.acl_redis import AclRedis
from tests.support.readers import http_client
from tests.support.system import (
    WAIT_S,
    System,
    backend_app,
    cancel,
    check_whole,
    eventually,
    request,
    send_task,
    submit,
    watch,
)

ROOT: Final = Path(__file__).parents[2]
COMMAND: Final = re.compile(r"""(?:redis\.p?call|execute|push)\(\s*['"]([A-Z]+)['"]""")
USERS = {
    words[1]: {word[1:] for word in words if word.startswith("+")}
    for words in map(str.split, (ROOT / "deploy" / "redis" / "users.acl").read_text().splitlines())
}


#: Nobody listens there; what is to be told is kept, and told again.
WEBHOOKS: Final = f"""
[webhooks.ledger]
url = "http://127.0.0.1:9/"
secret = "whsec_{base64.b64encode(bytes(32)).decode()}"
allow_http = true
"""


@pytest.mark.parametrize(("user", "package"), [("worker", "worker"), ("relay", "relay")])
def test_the_services_may_run_the_commands_that_they_name(user: str, package: str) -> None:
    """Those of the scripts, and those of the code that is not the command line's."""
    named: set[str] = set()
    for path in [
        *(ROOT / "core").rglob("*.lua"),
        *(ROOT / "core").rglob("*.py"),
        *(ROOT / package).rglob("*.py"),
    ]:
        if not {"cli", "gateway"} & {*path.parts} and (user, path.name) != ("relay", "take.lua"):
            named.update(COMMAND.findall(path.read_text()))
    allowed = {command.partition("|")[0] for command in USERS[user]}
    assert named >= {"XADD", "EVALSHA", "SUBSCRIBE"}  # the pattern still finds them
    assert {name.lower() for name in named} - {"hello", "sentinel"} <= allowed


@pytest.fixture(scope="module")
def server() -> Iterator[AclRedis]:
    with AclRedis() as server:
        yield server


@pytest.fixture(scope="module")
def system(server: AclRedis) -> Iterator[System]:
    """Relay and worker, each as its own user."""
    with System(
        redis=server,
        worker_environment={"DELTAWIRE_REDIS_URL": server.url_of("worker"), "DELTAWIRE_WEBHOOKS": WEBHOOKS},
        relay_environment={"DELTAWIRE_REDIS_URL": server.url_of("relay"), "DELTAWIRE_WEBHOOKS": "yes"},
    ) as system:
        yield system


async def test_a_whole_journey_meets_no_refusal(system: System, server: AclRedis) -> None:
    """Jobs by HTTP and by Celery, streamed, cancelled, taken over from a lost worker; and who is there."""
    server.denied()
    async with http_client(base_url=system.relay_url) as client, asyncio.timeout(WAIT_S):
        kinds: list[str] = []
        while kinds != ["relay", "worker"]:  # each of them speaks once a second
            processes = (await client.get("/v1/processes")).json()["data"]
            kinds = [each["kind"] for each in processes]
    long = request("rivers", deltas=5_000, rate=20)

    async def lost() -> None:
        """Its worker is killed; another one takes it over."""
        job = await submit(system, request("lakes", deltas=30, rate=20), {"restart": "always"})
        await watch(system, job, until=lambda event: event["type"] == "delta")
        worker = system.workers.pop()
        worker.signal(signal.SIGKILL)
        worker.wait()
        # Nobody takes it now.
        queued = await submit(system, request())
        await cancel(system, queued)
        assert check_whole(await watch(system, queued))["type"] == "cancelled"
        await asyncio.to_thread(system.start_worker)
        assert check_whole(await watch(system, job))["type"] == "completed"

    check_whole(await watch(system, await submit(system, request())))
    with backend_app(server.url_of("backend")) as app:
        check_whole(await watch(system, send_task(app, request())))
        unwanted = send_task(app, request("ponds", deltas=5_000, rate=20))
        await watch(system, unwanted, until=lambda event: event["type"] == "delta")
        with server.client("backend") as client:
            client.set(f"dw:{{{unwanted}}}:cancel", 1, ex=86_400)
        assert check_whole(await watch(system, unwanted))["type"] == "cancelled"
    running = await submit(system, long)
    await watch(system, running, until=lambda event: event["type"] == "delta")
    await cancel(system, running)
    assert check_whole(await watch(system, running))["type"] == "cancelled"
    await lost()
    assert server.denied() == []


@pytest.mark.parametrize(
    ("user", "command"),
    [
        *[
            (user, command)
            for user in ("health", "worker", "relay", "operator", "backend")
            for command in (
                "FLUSHALL",
                "FLUSHDB",
                "CONFIG SET maxmemory 1",
                "KEYS *",
                "SCAN 0",
                "ACL LIST",
                "SHUTDOWN",
                "REPLICAOF NO ONE",
                "MODULE LIST",
                "FUNCTION LIST",
                "MONITOR",
                "SAVE",
                "CLIENT LIST",
                "GET somebody:elses",
                "SET somebody:elses 1",
                "PUBLISH somebody:elses 1",
            )
        ],
        ("worker", "CONFIG GET *"),
        ("relay", "CONFIG GET *"),
        ("relay", "HGET dw:unacked tag"),
        ("relay", "SET dw:models 1"),
        ("relay", "LRANGE deltawire 0 -1"),
        ("relay", "RPOP deltawire"),
        ("relay", "EVAL return{redis.call('GET',KEYS[1])} 1 dw:unacked"),
        ("worker", "EVAL return{redis.call('GET',KEYS[1])} 1 somebody:elses"),
        ("worker", "EVAL return{redis.call('FLUSHALL')} 0"),
        ("operator", "GET dw:{job}:meta"),
        ("operator", "HGETALL dw:{job}:meta"),
        ("operator", "XRANGE dw:{job}:log - +"),
        ("operator", "SET dw:models 1"),
        ("operator", "ZADD dw:queued 1 job"),
        ("operator", "LPUSH deltawire 1"),
        ("operator", "EVAL return{} 0"),
        ("operator", "SUBSCRIBE dw:{job}:events"),
        ("backend", "GET dw:{job}:cancel"),
        ("backend", "SET dw:{job}:meta 1"),
        ("backend", "LRANGE deltawire 0 -1"),
        ("backend", "EVAL return{} 0"),
        ("health", "INFO"),
        ("health", "GET dw:models"),
    ],
)
def test_nobody_may_do_what_it_need_not(server: AclRedis, user: str, command: str) -> None:
    """Not even through a script."""
    with (
        redis.Redis(port=server.port, username="health") if user == "health" else server.client(user)
    ) as client:
        server.denied()
        with pytest.raises(redis.ResponseError):
            client.execute_command(*command.split())
    assert [entry for entry in server.denied() if entry.startswith(f"{user}: ")]


def test_nobody_comes_in_without_a_password(server: AclRedis) -> None:
    """The default user is off, and as it is shipped no other one has a password either."""
    once = Retry(NoBackoff(), 0)
    for user in ("default", "worker", "relay", "operator", "backend"):
        client = redis.Redis(port=server.port, username=user, password="", retry=once)
        with client, pytest.raises(redis.AuthenticationError):
            client.ping()


async def test_the_operator_sees_how_things_are(server: AclRedis, system: System) -> None:
    """What `deltawire doctor` and `deltawire top` ask."""
    server.denied()
    with server.client("operator") as client:
        await eventually(lambda: client.zcard("dw:owners"), what="a worker to be known")
        assert client.info("server")["redis_version"]
        assert "maxmemory-policy" in client.config_get("maxmemory-policy")
        assert client.llen("deltawire") is not None
        client.time()
    assert server.denied() == []
