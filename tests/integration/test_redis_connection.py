"""The connection of the hot paths: order, pushes, loss, reconnecting, and nothing left behind."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import hiredis
import pytest

from deltawire import redis_client, redis_connection
from deltawire.errors import RedisUnavailableError
from deltawire.metrics import new_registry
from deltawire.redis_client import RedisClient
from deltawire.redis_connection import RedisConnection, RedisLink, connect, pack
from deltawire.redis_metrics import RedisMetrics
from deltawire.redis_server import RedisServer, free_port

DEADLINE_S = 60.0


@pytest.fixture(autouse=True)
async def deadline() -> AsyncIterator[None]:
    """Every test ends, and leaves no task of its own."""
    before = asyncio.all_tasks()
    yield
    async with asyncio.timeout(DEADLINE_S):
        while left := asyncio.all_tasks() - before - {asyncio.current_task()}:
            await asyncio.wait(left)


async def close(connection: RedisConnection) -> None:
    connection.abort()
    await asyncio.wait_for(connection.lost, DEADLINE_S)


@asynccontextmanager
async def opened(url: str, **kwargs: Any) -> AsyncIterator[RedisConnection]:
    connection = await connect(url, **{"name": "test", **kwargs})
    try:
        yield connection
    finally:
        await close(connection)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    """Waits for what another process has to notice first."""
    async with asyncio.timeout(DEADLINE_S):
        while not await condition():  # noqa: ASYNC110 - another process, or a callback
            await asyncio.sleep(0.005)


async def clients(connection: RedisConnection, name: str) -> int:
    """How many connections of that name the server has."""
    listed: bytes = await connection.execute("CLIENT", "LIST")
    return listed.count(b" name=%s " % name.encode())


async def kill(connection: RedisConnection, name: str) -> None:
    """Ends every connection of that name, as a failing server or an operator would."""
    listed = await connection.execute("CLIENT", "LIST")
    for client in bytes(listed).splitlines():
        fields = dict(field.partition(b"=")[::2] for field in client.split())
        if fields[b"name"] == name.encode():
            await connection.execute("CLIENT", "KILL", "ID", int(fields[b"id"]))


# Replies.


async def test_pipelined_replies_come_in_order(redis_url: str) -> None:
    """However many commands are packed into one write, the nth callback gets the nth reply."""
    got: list[tuple[int, Any]] = []
    done = asyncio.get_running_loop().create_future()

    def callback(number: int) -> Callable[[Any], None]:
        def answer(reply: Any) -> None:
            got.append((number, reply))
            if len(got) == 2_000:
                done.set_result(None)

        return answer

    async with opened(redis_url) as connection:
        for batch in range(20):
            numbers = range(batch * 100, batch * 100 + 100)
            packed = b"".join(pack(("ECHO", str(number))) for number in numbers)
            connection.write(packed, [callback(number) for number in numbers])
        await asyncio.wait_for(done, DEADLINE_S)
    assert got == [(number, str(number).encode()) for number in range(2_000)]


async def test_an_error_reply_is_one_commands_own(redis_url: str) -> None:
    """A command that Redis refuses raises ReplyError; those around it are answered."""
    async with opened(redis_url) as connection:
        commands = (("ECHO", "a"), ("NO-SUCH-COMMAND",), ("ECHO", "b"))
        first, refused, last = await asyncio.gather(
            *(connection.execute(*command) for command in commands), return_exceptions=True
        )
    assert (first, last) == (b"a", b"b")
    assert isinstance(refused, hiredis.ReplyError)


async def test_a_cancelled_command_does_not_take_anothers_reply(redis_url: str) -> None:
    """The reply to a command whose caller has gone is dropped, and the next caller gets its own."""
    async with opened(redis_url) as connection:
        task = asyncio.create_task(connection.execute("ECHO", "gone"))
        await asyncio.sleep(0)
        task.cancel()
        assert await connection.execute("ECHO", "mine") == b"mine"
        with pytest.raises(asyncio.CancelledError):
            await task


async def test_large_replies_arrive_whole(redis_url: str) -> None:
    """Replies that come in many reads are one reply."""
    async with opened(redis_url) as connection:
        value = bytes(range(256)) * 20_000
        await connection.execute("SET", "big", value)
        assert await connection.execute("GET", "big") == value


async def test_pushes_come_beside_replies(redis_url: str) -> None:
    """Messages go to on_push, in order, replies to their callbacks, and on_read follows each read."""
    pushes: list[list[Any]] = []
    reads: list[int] = []
    async with opened(
        redis_url, on_push=pushes.append, on_read=lambda: reads.append(len(pushes))
    ) as subscriber:
        subscriber.push("SUBSCRIBE", "c")
        assert await subscriber.execute("ECHO", "a") == b"a"
        async with opened(redis_url) as publisher:
            for number in range(100):
                assert await publisher.execute("PUBLISH", "c", str(number)) == 1
            assert await subscriber.execute("ECHO", "b") == b"b"
    assert pushes[0] == [b"subscribe", b"c", 1]
    assert pushes[1:] == [[b"message", b"c", str(number).encode()] for number in range(100)]
    assert reads[-1] == 101


async def test_a_refused_subscribe_does_not_shift_the_replies(redis_url: str) -> None:
    """Where Redis refuses SUBSCRIBE (ACL, wrong slot), no other command gets that reply as its own."""
    async with opened(redis_url) as admin:
        await admin.execute("ACL", "SETUSER", "mute", "on", ">pw", "~*", "+@all", "resetchannels")
        try:
            async with opened(redis_url.replace("//", "//mute:pw@")) as connection:
                connection.push("SUBSCRIBE", "forbidden")
                with suppress(RedisUnavailableError):  # dropping the connection is an answer, too
                    assert await connection.execute("ECHO", "mine") == b"mine"
        finally:
            await admin.execute("ACL", "DELUSER", "mute")


# Loss.


async def test_a_lost_connection_fails_every_pending_callback_once(redis_url: str) -> None:
    """Each callback is called exactly once, answered or failed; `lost` is set; later writes are refused."""
    calls: list[list[Any]] = [[] for _ in range(50)]
    connection = await connect(redis_url, name="victim")
    async with opened(redis_url) as other:
        connection.write(pack(("ECHO", "x")), [calls[0].append])
        connection.write(pack(("BLPOP", "nothing", 0)), [calls[1].append])
        for call in calls[2:]:
            connection.write(pack(("ECHO", "x")), [call.append])
        await eventually(lambda: _is_true(bool(calls[0])))
        await kill(other, "victim")
        await asyncio.wait_for(connection.lost, DEADLINE_S)
    assert calls[0] == [b"x"]
    for call in calls[1:]:
        assert len(call) == 1
        assert isinstance(call[0], RedisUnavailableError)
    with pytest.raises(RedisUnavailableError):
        connection.write(pack(("PING",)), [calls[0].append])
    with pytest.raises(RedisUnavailableError):
        await connection.execute("PING")
    assert len(calls[0]) == 1


async def _is_true(value: bool) -> bool:
    return value


async def test_a_callback_that_raises_does_not_keep_others_waiting(redis_url: str) -> None:
    """All others are failed, too, whatever one does with its error (writing again raises, for one)."""
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda *_: None)
    connection = await connect(redis_url, name="test")
    failed: list[Any] = []
    connection.write(pack(("BLPOP", "nothing", 0)), [lambda _: connection.push("PING")])
    connection.write(pack(("PING",)), [failed.append])
    await close(connection)
    await asyncio.sleep(0)
    assert len(failed) == 1


async def test_what_is_not_resp_drops_the_connection(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A peer that speaks something else is left, with its pending commands failed."""

    async def speak(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(100)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        await reader.read()
        writer.close()

    server = await asyncio.start_server(speak, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        with pytest.raises(RedisUnavailableError):
            await connect(f"redis://127.0.0.1:{port}/0", name="test")
    assert "not RESP" in caplog.text


# Connecting.


async def test_no_server_is_refused() -> None:
    """Where nobody listens the error is RedisUnavailableError."""
    with pytest.raises(RedisUnavailableError, match="cannot connect"):
        await connect(f"redis://127.0.0.1:{free_port()}/0", name="test")


async def test_the_password_and_the_database_are_the_urls(redis_server: RedisServer, redis_url: str) -> None:
    """AUTH with user and password, SELECT with the path; wrong ones are refused and leave nothing."""
    address = f"127.0.0.1:{redis_server.port}"
    async with opened(redis_url) as admin:
        await admin.execute("ACL", "SETUSER", "app", "on", ">p@ss", "~*", "&*", "+@all")
        try:
            async with opened(f"redis://app:p%40ss@{address}/3") as connection:
                assert await connection.execute("ACL", "WHOAMI") == b"app"
                await connection.execute("SET", "where", "three")
            await admin.execute("SELECT", 3)
            assert await admin.execute("GET", "where") == b"three"
            for url in (f"redis://app:wrong@{address}/0", f"redis://app:p%40ss@{address}/9999"):
                with pytest.raises(RedisUnavailableError):
                    await connect(url, name="refused")
            await eventually(lambda: _nobody(admin, "refused"))
        finally:
            await admin.execute("ACL", "DELUSER", "app")


async def test_a_password_alone_is_the_default_users() -> None:
    """`redis://:password@…` is requirepass; without it the server refuses."""
    with RedisServer() as server:
        async with opened(server.url) as admin:
            await admin.execute("CONFIG", "SET", "requirepass", "pw")
            async with opened(f"redis://:pw@127.0.0.1:{server.port}") as connection:
                assert await connection.execute("ACL", "WHOAMI") == b"default"
            with pytest.raises(RedisUnavailableError):
                await connect(server.url, name="test")


async def _only(observer: RedisConnection, known: set[bytes]) -> bool:
    return await _connections(observer) <= known


async def _connections(observer: RedisConnection) -> set[bytes]:
    """The ids of all, also of those that have not come to say their name."""
    listed = bytes(await observer.execute("CLIENT", "LIST"))
    return {line.split()[0] for line in listed.splitlines()}


async def _nobody(connection: RedisConnection, name: str) -> bool:
    return await clients(connection, name) == 0


@asynccontextmanager
async def silent_server() -> AsyncIterator[tuple[str, asyncio.Event, asyncio.Event]]:
    """A server that accepts and never answers; events say that somebody came and that they left."""
    came, left = asyncio.Event(), asyncio.Event()

    async def listen(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        came.set()
        try:
            while await reader.read(1_000):
                pass
        except ConnectionError:
            pass
        left.set()
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0", came, left


async def test_a_silent_server_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that accepts and does not answer is unavailable after the time-out, and is let go."""
    monkeypatch.setattr(redis_connection, "CONNECT_TIMEOUT_S", 0.05)
    async with silent_server() as (url, _, left):
        with pytest.raises(RedisUnavailableError, match="timed out"):
            await connect(url, name="test")
        await asyncio.wait_for(left.wait(), DEADLINE_S)


async def test_cancelling_the_greeting_lets_the_server_go() -> None:
    """Cancelled while it waits for HELLO's answer, connect closes what it opened."""
    async with silent_server() as (url, came, left):
        task = asyncio.create_task(connect(url, name="test"))
        await asyncio.wait_for(came.wait(), DEADLINE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), DEADLINE_S)


async def test_cancelling_connect_anywhere_leaks_nothing(redis_url: str) -> None:
    """At whichever step of the loop connect is cancelled, no connection stays at the server."""
    completed = 0
    async with opened(f"{redis_url}", name="observer") as observer:
        before = await _connections(observer)  # a relay of other tests may have some
        for steps in range(60):
            task = asyncio.create_task(connect(redis_url.replace("/0", "/1"), name="leak"))
            for _ in range(steps):
                await asyncio.sleep(0 if steps % 2 else 0.0002)
            task.cancel()
            try:
                connection = await task
            except asyncio.CancelledError:
                pass
            else:
                completed += 1
                await close(connection)
        assert completed < 60
        await eventually(lambda: _only(observer, before))


# RedisLink.


class Watched:
    """A link, and what happened to it."""

    def __init__(
        self, url: str, *, name: str = "link", on_connected: Callable[[], Awaitable[None]] | None = None
    ):
        self.happened: list[str] = []
        self._on_connected = on_connected
        self.link = RedisLink(
            url, name="link", on_connected=self._connected, on_lost=lambda: self.happened.append("lost")
        )

    async def has_reconnected(self) -> bool:
        return self.happened[-1:] == ["connected"]

    async def _connected(self, connection: RedisConnection) -> None:
        assert self.link.connection is None
        assert await connection.execute("ECHO", "ready") == b"ready"
        if self._on_connected is not None:
            await self._on_connected()
        self.happened.append("connected")


async def connected(link: RedisLink) -> RedisConnection:
    """The link's connection, as soon as there is one."""
    await eventually(lambda: _is_true(link.connection is not None))
    assert link.connection is not None
    return link.connection


@asynccontextmanager
async def started(watched: Watched) -> AsyncIterator[RedisLink]:
    await asyncio.wait_for(watched.link.start(), DEADLINE_S)
    try:
        yield watched.link
    finally:
        await asyncio.wait_for(watched.link.close(), DEADLINE_S)


async def test_a_link_is_ready_when_started_and_gone_when_closed(redis_url: str) -> None:
    """start returns with a connection that on_connected has seen; close drops it, twice is fine."""
    watched = Watched(redis_url)
    async with opened(redis_url) as observer:
        async with started(watched) as link:
            assert link.connection is not None
            assert await connected(link) is link.connection
            assert watched.happened == ["connected"]
            assert await clients(observer, "link") == 1
        assert link.connection is None
        assert watched.happened == ["connected", "lost"]
        await link.close()
        await eventually(lambda: _nobody(observer, "link"))


async def test_a_link_reconnects_after_a_kill(redis_url: str) -> None:
    """Whenever the server drops it, on_lost is called, then on_connected on a new connection."""
    watched = Watched(redis_url)
    async with opened(redis_url) as other, started(watched) as link:
        for _ in range(3):
            watched.happened.clear()
            before = await asyncio.wait_for(connected(link), DEADLINE_S)
            pending = asyncio.create_task(before.execute("BLPOP", "nothing", 0))
            await asyncio.sleep(0)
            await kill(other, "link")
            with pytest.raises(RedisUnavailableError):
                await pending
            await asyncio.wait_for(before.lost, DEADLINE_S)
            await eventually(watched.has_reconnected)
            after = await asyncio.wait_for(connected(link), DEADLINE_S)
            assert await after.execute("ECHO", "again") == b"again"
            assert watched.happened == ["lost", "connected"]


async def test_a_link_outlives_a_restart_of_the_server() -> None:
    """While the server is away there is no connection; when it is back there is one."""
    with RedisServer() as server:
        watched = Watched(server.url)
        async with started(watched) as link:
            server.stop()
            await eventually(lambda: _is_true(link.connection is None))
            await asyncio.sleep(0.05)
            server.start()
            connection = await asyncio.wait_for(connected(link), DEADLINE_S)
            assert await connection.execute("ECHO", "back") == b"back"


async def test_an_outage_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """The first failure to reconnect is a warning, the others of the same outage are not."""
    caplog.set_level(logging.WARNING)
    with RedisServer() as server:
        async with started(Watched(server.url)) as link:
            server.stop()
            await eventually(lambda: _is_true("not to be reached" in caplog.text))
            await asyncio.sleep(0.5)  # a few tries: the first pauses are at most 0.1, 0.2 and 0.4 s
            server.start()
            await asyncio.wait_for(connected(link), DEADLINE_S)
    assert caplog.text.count("Redis is not to be reached") == 1
    assert caplog.text.count("Redis is back") == 1


async def test_a_link_that_cannot_start_says_so_and_runs_no_more() -> None:
    """If the first try fails, start raises, and nothing goes on trying."""
    watched = Watched(f"redis://127.0.0.1:{free_port()}/0")
    with pytest.raises(RedisUnavailableError):
        await asyncio.wait_for(watched.link.start(), DEADLINE_S)
    assert watched.happened == []
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("redis-link")]


async def test_a_failed_greeting_is_made_again(redis_url: str) -> None:
    """When on_connected fails on a reconnect, that connection is dropped and another one made."""
    failures = [False, True, True, False]

    async def fail() -> None:
        if failures.pop(0):
            raise RedisUnavailableError("not ready")

    watched = Watched(redis_url, on_connected=fail)
    async with opened(redis_url) as other, started(watched) as link:
        before = await connected(link)
        await kill(other, "link")
        await asyncio.wait_for(before.lost, DEADLINE_S)
        await eventually(lambda: _is_true(not failures and link.connection is not None))
        assert await clients(other, "link") == 1


async def test_cancelling_start_leaves_nothing() -> None:
    """A start that is cancelled while it waits ends its task and its connection."""
    async with silent_server() as (url, came, left):
        task = asyncio.create_task(Watched(url).link.start())
        await asyncio.wait_for(came.wait(), DEADLINE_S)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await asyncio.wait_for(left.wait(), DEADLINE_S)
        assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("redis-link")]


async def test_a_start_that_cannot_succeed_does_not_wait_for_ever() -> None:
    """A URL that nobody can parse, or a bug in on_connected, comes out of start."""
    link = Watched("nonsense://x").link
    try:
        with pytest.raises(ValueError):
            await asyncio.wait_for(link.start(), DEADLINE_S)
    finally:
        await link.close()


@pytest.mark.parametrize("error", [TimeoutError, OSError, KeyError])
async def test_a_link_survives_any_failure_of_its_greeting(redis_url: str, error: type[Exception]) -> None:
    """`when it fails, the connection is dropped and made again`: a time-out in on_connected, for one."""
    failures: list[type[Exception] | None] = [None, error, None]

    async def fail() -> None:
        if (failure := failures.pop(0)) is not None:
            raise failure

    asyncio.get_running_loop().set_exception_handler(lambda *_: None)
    watched = Watched(redis_url, on_connected=fail)
    async with opened(redis_url) as other, started(watched) as link:
        before = await connected(link)
        await kill(other, "link")
        await asyncio.wait_for(before.lost, DEADLINE_S)
        await eventually(lambda: _is_true(not failures and link.connection is not None))


# RedisClient.


@asynccontextmanager
async def client_of(url: str) -> AsyncIterator[RedisClient]:
    client = RedisClient(url, name="client")
    try:
        yield client
    finally:
        await asyncio.wait_for(client.aclose(), DEADLINE_S)


async def test_a_client_connects_once_for_all_callers(redis_url: str) -> None:
    """Any number of callers share one connection, made at first use, and each gets its own reply."""
    async with opened(redis_url) as observer, client_of(redis_url) as client:
        assert await clients(observer, "client") == 0
        replies = await asyncio.gather(*(client.execute("ECHO", str(number)) for number in range(500)))
        assert replies == [str(number).encode() for number in range(500)]
        assert await clients(observer, "client") == 1
    async with opened(redis_url) as observer:
        await eventually(lambda: _nobody(observer, "client"))


async def test_a_client_sends_again_what_a_lost_connection_took(redis_url: str) -> None:
    """A command that waits when the connection is lost is answered over the next one."""
    async with opened(redis_url) as other, client_of(redis_url) as client:
        waiting = asyncio.create_task(client.execute("BLPOP", "list", 0))
        await eventually(lambda: _is_blocked(other))
        await kill(other, "client")
        await eventually(lambda: _is_blocked(other))
        await other.execute("RPUSH", "list", "x")
        assert await asyncio.wait_for(waiting, DEADLINE_S) == [b"list", b"x"]


async def _is_blocked(connection: RedisConnection) -> bool:
    listed = bytes(await connection.execute("CLIENT", "LIST"))
    return any(b" name=client " in line and b" flags=b" in line for line in listed.splitlines())


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_client_gives_up_in_time(monkeypatch: pytest.MonkeyPatch, *, is_silent: bool) -> None:
    """Nobody listening and nobody answering are the same error, after COMMAND_TIMEOUT_S."""
    monkeypatch.setattr(redis_client, "COMMAND_TIMEOUT_S", 0.1)
    async with silent_server() as (silent, _, _):
        url = silent if is_silent else f"redis://127.0.0.1:{free_port()}/0"
        async with client_of(url) as client:
            with pytest.raises(RedisUnavailableError, match="in time"):
                await client.execute("PING")


async def test_a_cancelled_caller_takes_nobody_with_it(redis_url: str) -> None:
    """Cancelling the caller that made the client connect leaves the others their connection."""
    async with client_of(redis_url) as client:
        first, second = (asyncio.create_task(client.execute("ECHO", text)) for text in ("a", "b"))
        await asyncio.sleep(0)
        first.cancel()
        assert await asyncio.wait_for(second, DEADLINE_S) == b"b"
        with pytest.raises(asyncio.CancelledError):
            await first


@asynccontextmanager
async def answering(*replies: bytes) -> AsyncIterator[str]:
    """A server that answers HELLO with OK, then each command with the next of `replies` (the last stays)."""
    left = list(replies)

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"+OK\r\n")
        await reader.read(1_000)
        while await reader.read(1_000):
            writer.write(left.pop(0) if len(left) > 1 else left[0])
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}/0"


@pytest.mark.parametrize("code", ["LOADING", "MASTERDOWN", "READONLY"])
async def test_a_redis_that_is_not_ready_yet_is_waited_for(code: str) -> None:
    """After a restart or a failover Redis answers errors for a while: that is unavailable, not the reply."""
    async with (
        answering(f"-{code} not now\r\n".encode(), b"+PONG\r\n") as url,
        client_of(url) as client,
    ):
        assert await client.execute("PING") in {b"PONG", "PONG"}


async def test_a_clients_commands_and_connections_are_counted(redis_url: str) -> None:
    """How long they took, whatever came of them; what was refused; and a connection that came again."""
    async with opened(redis_url) as other, client_of(redis_url) as client:
        registry = new_registry()
        registry.register(RedisMetrics(client, {}))

        def said(name: str, **labels: str) -> float | None:
            return registry.get_sample_value(f"deltawire_redis_{name}", labels)

        assert said("connected", link="commands") == 0
        await client.execute("SET", "text", "x")
        for command in (("INCR", "text"), ("EVALSHA", "0" * 40, 0)):  # the latter is sent again, as a rule
            with pytest.raises(hiredis.ReplyError):
                await client.execute(*command)
        assert said("command_seconds_count") == 3
        assert said("command_errors_total", kind="refused") == 1
        assert (said("connected", link="commands"), said("reconnects_total", link="commands")) == (1, 0)
        await kill(other, "client")
        await client.execute("GET", "text")
        assert (said("connected", link="commands"), said("reconnects_total", link="commands")) == (1, 1)


async def test_a_closed_client_stays_closed(redis_url: str) -> None:
    """A late command after aclose is refused: it does not open a connection that nobody closes."""
    client = RedisClient(redis_url, name="client")
    assert await client.execute("ECHO", "x") == b"x"
    await client.aclose()
    try:
        with pytest.raises(RedisUnavailableError):
            await client.execute("ECHO", "x")
    finally:
        await client.aclose()


async def test_a_connection_that_owes_a_reply_for_long_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that drops packets closes nothing; TCP itself takes a quarter of an hour to notice."""
    monkeypatch.setattr("deltawire.redis_connection.REPLY_TIMEOUT_S", 0.3)
    async with answering(b"", b"+PONG\r\n") as url, client_of(url) as client:
        assert await client.execute("PING") in {b"PONG", "PONG"}
