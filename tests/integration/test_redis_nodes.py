"""Redis behind sentinels and as a cluster: commands, scripts and pub/sub, and what failovers do to them."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import redis

from deltawire import redis_client, redis_connection
from deltawire.cli.doctor import look_at_redis
from deltawire.errors import RedisUnavailableError
from deltawire.keys import Keys
from deltawire.redis_client import RedisClient
from deltawire.redis_connection import RedisConnection, RedisLink, connect
from deltawire.redis_nodes import RedisNodes, slot_of
from deltawire.redis_server import RedisServer, free_port
from tests.support.redis_servers import ClusterServers, SentinelServers

DEADLINE_S = 40.0
PASSWORD = "p w/@:%#ü"
KEYS = [f"k{{{number}}}" for number in range(60)]


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    """Every test ends, and leaves no task of its own."""
    before = asyncio.all_tasks()
    yield
    async with asyncio.timeout(DEADLINE_S):
        while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
            await asyncio.wait(left)


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelServers]:
    with SentinelServers(password=PASSWORD) as servers:
        yield servers


@pytest.fixture(scope="module")
def cluster() -> Iterator[ClusterServers]:
    with ClusterServers(password=PASSWORD) as servers:
        yield servers


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(url, name="client")
    try:
        yield client
    finally:
        await asyncio.wait_for(client.aclose(), DEADLINE_S)


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - other processes
            await asyncio.sleep(0.01)


class Writers:
    """Commands that go on all the time, one after another for each key, and what was acknowledged."""

    def __init__(self, client: RedisClient, keys: list[str]) -> None:
        self._client = client
        self.acknowledged = dict.fromkeys(keys, 0)
        self.failed: list[RedisUnavailableError] = []

    async def _write(self, key: str) -> None:
        while True:
            number = self.acknowledged[key] + 1
            await self._client.execute("SET", key, number)
            self.acknowledged[key] = number
            await asyncio.sleep(0.005)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._write(key)) for key in self.acknowledged]
        try:
            await self.have_gone_on()
            yield
            await self.have_gone_on()
            assert not [task for task in tasks if task.done()]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def have_gone_on(self) -> None:
        """Each has had three more acknowledgements."""
        before = dict(self.acknowledged)
        await eventually(lambda: all(self.acknowledged[key] >= before[key] + 3 for key in before))

    async def check(self) -> None:
        """Nothing that was acknowledged is lost."""
        for key, number in self.acknowledged.items():
            assert int(await self._client.execute("GET", key)) >= number


def stop_writing(servers: SentinelServers | ClusterServers, node: RedisServer) -> None:
    """Holds the node's writes back until its replica has all that was acknowledged: then it may be lost.

    (Redis replicates after it has answered, and what it answered last may get lost with it.)
    """
    servers.execute(node, "CLIENT", "PAUSE", 60_000, "WRITE")
    with servers.client(node) as client:
        while True:
            state = client.info("replication")
            if state["slave0"]["offset"] == state["master_repl_offset"]:
                return


# Sentinel.


async def test_sentinels_lead_to_the_primary(sentinels: SentinelServers) -> None:
    """Commands and scripts run on the primary, with a password of many kinds of characters."""
    async with client_of(sentinels.url) as client:
        assert await client.execute("SET", "a", "b") == b"OK"
        assert await client.execute("EVAL", "return redis.call('GET', KEYS[1])", 1, "a") == b"b"
        role = await client.execute("ROLE")
        assert role[0] == b"master"
    assert sentinels.execute(sentinels.primary, "GET", "a") == b"b"


async def test_the_database_is_selected(sentinels: SentinelServers) -> None:
    """/master_name/3 is database 3."""
    async with client_of(sentinels.url.removesuffix("/0") + "/3") as client:
        await client.execute("SET", "where", "three")
    with redis.Redis(port=sentinels.primary.port, password=PASSWORD, db=3) as direct:
        assert direct.get("where") == b"three"


async def test_a_name_that_no_sentinel_knows_is_unavailable(sentinels: SentinelServers) -> None:
    """The error says nothing of the password."""
    with pytest.raises(RedisUnavailableError) as caught:
        await connect(sentinels.url.replace("/dw-primary", "/nobody"), name="test")
    assert "p w" not in str(caught.value)
    assert "p%20w" not in str(caught.value)


async def test_a_sentinel_that_is_away_does_no_harm(sentinels: SentinelServers) -> None:
    """Any that answers will do."""
    url = sentinels.url.replace("@", f"@127.0.0.1:{free_port()},")
    connection = await connect(url, name="test")
    connection.abort()


async def test_all_sentinels_away_is_unavailable() -> None:
    """At once where nobody listens."""
    with pytest.raises(RedisUnavailableError):
        await connect(f"redis+sentinel://127.0.0.1:{free_port()},127.0.0.1:{free_port()}/m", name="test")


async def test_a_demoted_server_is_not_connected_to(sentinels: SentinelServers) -> None:
    """A sentinel that has not heard of a failover names a server that says itself what it is."""
    replica = sentinels.replica

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1_000)
        writer.write(b"+OK\r\n")
        await reader.read(1_000)
        port = str(replica.port).encode()
        writer.write(b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%s\r\n" % (len(port), port))
        await reader.read(1_000)
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        credentials = sentinels.url.partition("//")[2].partition("@")[0]
        with pytest.raises(RedisUnavailableError, match="no primary"):
            await connect(f"redis+sentinel://{credentials}@127.0.0.1:{port}/m", name="test")


@pytest.mark.parametrize("how", ["killed", "paused", "asked to"])
async def test_commands_go_on_after_a_failover(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whether the primary is gone, silent or gives way: no command fails.

    Nothing acknowledged is lost either, as far as Redis itself does not lose it: a primary that is asked to
    give way takes writes to the last.
    """
    monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 2.0)
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)
    with SentinelServers(sentinels=1) as servers:
        async with client_of(servers.url) as client:
            writers = Writers(client, KEYS[:20])
            async with writers.running():
                lost = servers.primary
                if how != "asked to":
                    await asyncio.to_thread(stop_writing, servers, lost)
                if how == "killed":
                    servers.kill(lost)
                elif how == "paused":
                    servers.pause(lost)
                else:
                    servers.fail_over()
                await asyncio.to_thread(servers.wait_for_failover, lost)
                await writers.have_gone_on()
                if how == "paused":
                    servers.resume(lost)
                    await writers.have_gone_on()
            if how != "asked to":
                await writers.check()
            assert servers.execute(servers.primary, "DBSIZE") == 20


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_a_subscriber_hears_again_after_a_failover(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link's on_connected runs on the new primary, even if the old one just falls silent."""
    monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 2.0)
    heard: list[bytes] = []

    async def subscribe(connection: RedisConnection) -> None:
        connection.push("SUBSCRIBE", "c")
        await connection.execute("PING")

    with SentinelServers(sentinels=3) as servers:
        link = RedisLink(
            servers.url,
            name="subscriber",
            on_connected=subscribe,
            on_push=lambda push: heard.append(push[2]) if push[0] == b"message" else None,
        )
        await link.start()
        try:
            async with client_of(servers.url) as client:
                await client.execute("PUBLISH", "c", "before")
                await eventually(lambda: heard == [b"before"])
                lost = servers.primary
                (servers.kill if how == "killed" else servers.pause)(lost)
                await asyncio.to_thread(servers.wait_for_failover, lost)
                async with asyncio.timeout(DEADLINE_S):
                    while not await client.execute("PUBLISH", "c", "after"):  # noqa: ASYNC110 - to whom it goes
                        await asyncio.sleep(0.05)
                await eventually(lambda: b"after" in heard)
        finally:
            await link.close()


# Cluster.


async def test_every_key_goes_to_its_primary(cluster: ClusterServers) -> None:
    """Commands and scripts over many slots are answered, and each node has its share."""
    async with client_of(cluster.url) as client:
        await asyncio.gather(*(client.execute("SET", key, "x") for key in KEYS))
        script = "return redis.call('GET', KEYS[1])"
        assert await asyncio.gather(*(client.execute("EVAL", script, 1, key) for key in KEYS)) == [b"x"] * 60
        assert await client.execute("PING") == b"PONG"
        await asyncio.gather(*(client.execute("DEL", key) for key in KEYS))
        await asyncio.gather(*(client.execute("XADD", key, "*", "e", key) for key in KEYS))
        reads = await asyncio.gather(*(client.execute("XREAD", "STREAMS", key, "0") for key in KEYS))
        assert [list(read) for read in reads] == [[key.encode()] for key in KEYS]
        await asyncio.gather(*(client.execute("DEL", key) for key in KEYS))


async def test_slots_are_redis_own(cluster: ClusterServers) -> None:
    """Hash tags included, also empty, open and repeated ones."""
    keys = ["", "a", "{a}b", "a{b}c{d}", "{}a", "a{}{b}", "{{a}}", "{a", "a}{", "é{ü}", "dw:{job}:log"]
    for key in keys:
        assert slot_of(key) == cluster.execute(cluster.nodes[0], "CLUSTER", "KEYSLOT", key)


async def test_one_node_of_those_named_is_enough(cluster: ClusterServers) -> None:
    """The others are found by it, whichever it is."""
    credentials = cluster.url.partition("//")[2].partition("@")[0]
    for node in cluster.nodes:
        hosts = f"127.0.0.1:{free_port()},127.0.0.1:{node.port}"
        async with client_of(f"redis+cluster://{credentials}@{hosts}") as client:
            for key in KEYS[:10]:
                await client.execute("GET", key)


async def test_a_cluster_that_is_away_does_not_start() -> None:
    """start raises, and leaves nothing behind; nor does a server that is no cluster."""
    with RedisServer() as server:
        for port in (free_port(), server.port):
            nodes = RedisNodes(f"redis+cluster://127.0.0.1:{port}", name="test")
            with pytest.raises(RedisUnavailableError):
                await nodes.start()
            assert nodes.links() == ()


async def test_a_refusal_is_the_callers(cluster: ClusterServers) -> None:
    """What will not pass by itself is not tried again: keys of two slots, for one."""
    async with client_of(cluster.url) as client:
        with pytest.raises(hiredis.ReplyError, match="CROSSSLOT"):
            await client.execute("MGET", "a", "b")


async def test_commands_follow_a_slot_that_moves(cluster: ClusterServers) -> None:
    """MOVED is no caller's business; however many are told it, the topology is asked for a few times."""
    key = "moves"
    slot = slot_of(key)
    source = cluster.node_of(key)
    target = next(node for node in cluster.nodes if node is not source)
    async with client_of(cluster.url) as client:
        await client.execute("SET", key, "x")
        for node in cluster.nodes:
            cluster.execute(node, "CONFIG", "RESETSTAT")
        try:
            cluster.move(slot, source, target)
            assert set(await asyncio.gather(*(client.execute("GET", key) for _ in range(500)))) == {b"x"}
            assert cluster.execute(target, "GET", key) == b"x"
            asked = 0
            for node in cluster.nodes:
                with cluster.client(node) as direct:
                    stats = direct.info("commandstats")
                asked += stats.get("cmdstat_cluster|slots", {}).get("calls", 0)
            assert 0 < asked <= 15
        finally:
            cluster.move(slot, target, source)


async def test_commands_are_answered_while_a_slot_moves(cluster: ClusterServers) -> None:
    """ASK: what has left its old node already is read at the new one."""
    key = "asks"
    slot = slot_of(key)
    source = cluster.node_of(key)
    target = next(node for node in cluster.nodes if node is not source)
    async with client_of(cluster.url) as client:
        await client.execute("SET", key, "x")
        cluster.begin_move(slot, source, target)
        cluster.move_keys(slot, source, target)
        try:
            assert await client.execute("GET", key) == b"x"
            # A script with keys of which only some are there already waits for the end of the move.
            script = "return redis.call('GET', KEYS[1])"
            waiting = asyncio.create_task(client.execute("EVAL", script, 2, key, f"{{{key}}}:none"))
            assert await client.execute("GET", key) == b"x"
            assert not waiting.done()
        finally:
            cluster.end_move(slot, target)
        assert await asyncio.wait_for(waiting, DEADLINE_S) == b"x"
    cluster.move(slot, target, source)


@pytest.mark.parametrize("how", ["killed", "paused"])
async def test_commands_go_on_after_a_takeover(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """When a node is gone or silent, its replica serves its slots: no command fails, nothing is lost."""
    monkeypatch.setattr(redis_connection, "REPLY_TIMEOUT_S", 2.0)
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)
    with ClusterServers(replicas=True) as servers:
        async with client_of(servers.url) as client:
            writers = Writers(client, KEYS)
            async with writers.running():
                lost = servers.nodes[0]
                await asyncio.to_thread(stop_writing, servers, lost)
                if how == "killed":
                    servers.kill(lost)
                else:
                    servers.pause(lost)
                await asyncio.to_thread(servers.wait_for_takeover, lost)
                await writers.have_gone_on()
                if how == "paused":
                    servers.resume(lost)
                    await writers.have_gone_on()
            await writers.check()


async def test_a_node_without_a_replica_takes_only_its_slots_along(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands for them are unavailable in bounded time, all others are answered; it may come back."""
    with ClusterServers() as servers:
        lost = servers.nodes[1]
        theirs = [key for key in KEYS if servers.node_of(key) is lost]
        others = [key for key in KEYS if key not in theirs]
        async with client_of(servers.url) as client:
            await asyncio.gather(*(client.execute("SET", key, "x") for key in KEYS))
            servers.kill(lost)
            for _ in range(3):
                monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", 1.0)
                commands = [client.execute("GET", key) for key in theirs]
                replies = await asyncio.gather(*commands, return_exceptions=True)
                assert {type(reply) for reply in replies} == {RedisUnavailableError}
                monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)
                assert set(await asyncio.gather(*(client.execute("GET", key) for key in others))) == {b"x"}
                await asyncio.gather(*(client.execute("PUBLISH", key, "x") for key in theirs))
            async with client_of(servers.url) as late:
                assert await late.execute("GET", others[0]) == b"x"
            lost.start()
            assert await asyncio.gather(*(client.execute("SET", key, "y") for key in KEYS)) == [b"OK"] * 60


async def test_closing_leaves_nothing(cluster: ClusterServers) -> None:
    """Neither connections nor tasks (the fixture looks), at whichever step it is closed."""
    for steps in range(12):
        nodes = RedisNodes(cluster.url, name="leak")
        nodes.keep_up()
        await asyncio.sleep(0.001 * steps)
        await asyncio.wait_for(nodes.close(), DEADLINE_S)
    for node in cluster.nodes:
        with cluster.client(node) as client:
            await eventually(lambda c=client: not [x for x in c.client_list() if x["name"] == "leak"])  # type: ignore[misc]


# Sharded channels.


class Subscriber:
    """The least that hears sharded channels wherever their slots go."""

    def __init__(self, url: str, channels: list[str]) -> None:
        self.heard: dict[str, list[bytes]] = {channel: [] for channel in channels}
        self.nodes = RedisNodes(
            url, name="subscriber", on_connected=self._connected, on_moved=self._moved, on_push=self._on_push
        )

    async def _connected(self, link: RedisLink, connection: RedisConnection) -> None:
        for channel in self.heard:
            if self.nodes.link(channel) is link:
                self._subscribe(connection, channel)

    def _moved(self) -> None:
        for channel in self.heard:
            link = self.nodes.link(channel)
            if link is not None and (connection := link.connection) is not None:
                self._subscribe(connection, channel)  # that it may have done so before is harmless

    def _subscribe(self, connection: RedisConnection, channel: str) -> None:
        def done(error: Exception | None) -> None:
            if error is not None:
                self.nodes.saw(error)

        connection.push("SSUBSCRIBE", channel, on_done=done)

    def _on_push(self, push: list[Any]) -> None:
        if push[0] == b"smessage":
            self.heard[push[1].decode()].append(push[2])
        elif push[0] == b"sunsubscribe":
            self.nodes.look_again()


@asynccontextmanager
async def subscriber_of(url: str, channels: list[str]) -> AsyncIterator[Subscriber]:
    subscriber = Subscriber(url, channels)
    await subscriber.nodes.start()
    try:
        yield subscriber
    finally:
        await subscriber.nodes.close()


async def all_hear(client: RedisClient, subscriber: Subscriber, text: bytes) -> None:
    """Publishes until each channel has the text."""

    async def until_heard(channel: str) -> None:
        while text not in subscriber.heard[channel]:
            await client.execute("SPUBLISH", channel, text)
            await asyncio.sleep(0.01)

    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*map(until_heard, subscriber.heard))


async def test_sharded_channels_follow_their_slots(cluster: ClusterServers) -> None:
    """A slot that moves takes its subscriptions back, unasked; replies of other commands do not shift."""
    channel = "dw:{moves}:events"
    slot = slot_of(channel)
    source = cluster.node_of(channel)
    target = next(node for node in cluster.nodes if node is not source)
    async with client_of(cluster.url) as client, subscriber_of(cluster.url, [channel, *KEYS]) as subscriber:
        await all_hear(client, subscriber, b"before")
        link = subscriber.nodes.link(channel)
        assert link is not None
        assert link.connection is not None
        left = link.connection
        cluster.move(slot, source, target)
        try:
            await all_hear(client, subscriber, b"after")
            replies = await asyncio.gather(*(left.execute("ECHO", str(number)) for number in range(100)))
            assert replies == [str(number).encode() for number in range(100)]
        finally:
            cluster.move(slot, target, source)
        await all_hear(client, subscriber, b"back")


async def test_sharded_channels_are_heard_after_a_takeover(monkeypatch: pytest.MonkeyPatch) -> None:
    """The replica that takes over is subscribed to."""
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", DEADLINE_S)
    with ClusterServers(replicas=True) as servers:
        async with client_of(servers.url) as client, subscriber_of(servers.url, KEYS) as subscriber:
            await all_hear(client, subscriber, b"before")
            servers.kill(servers.nodes[0])
            await all_hear(client, subscriber, b"after")


async def test_a_refused_subscription_is_its_senders_to_know(cluster: ClusterServers) -> None:
    """on_done gets the refusal of a slot that is elsewhere, or None, in order; the connection stays."""
    connection = await connect(cluster.url_of(cluster.nodes[0]), name="test")
    done: list[str] = []
    try:
        for channel in KEYS:
            connection.push("SSUBSCRIBE", channel, on_done=lambda e: done.append(str(e).partition(" ")[0]))
            connection.push("SUNSUBSCRIBE", channel, on_done=lambda e: done.append(str(e).partition(" ")[0]))
        assert await connection.execute("ECHO", "mine") == b"mine"
    finally:
        connection.abort()
    is_here = [cluster.node_of(channel) is cluster.nodes[0] for channel in KEYS for _ in range(2)]
    assert done == ["None" if here else "MOVED" for here in is_here]


async def test_the_doctor_looks_at_every_primary(sentinels: SentinelServers, cluster: ClusterServers) -> None:
    """Of a cluster, and at the one that sentinels name; a password shows nowhere."""
    found = await look_at_redis(sentinels.url, Keys())
    assert [each.level for each in found if each.subject == "redis version"] == ["ok"]
    found = await look_at_redis(cluster.url, Keys.at(cluster.url))
    assert {each.subject for each in found if "version" in each.subject} == {
        f"redis {number} of 3 version" for number in (1, 2, 3)
    }
    assert not any(PASSWORD in each.message for each in found)
