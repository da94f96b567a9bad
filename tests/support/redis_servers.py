"""Groups of real servers on loopback: a primary with replica and sentinels, and a cluster. Blocking.

They are `redis-server` (or Valkey) processes of their own, as `deltawire.redis_server` starts one, and end
with their context manager. Nodes are killed, paused and resumed by the methods here.
"""

import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self
from urllib.parse import quote

import redis

from deltawire.redis_nodes import SLOTS, slot_of
from deltawire.redis_server import RedisServer, find_server, free_port

MASTER: Final = "dw-primary"
DEADLINE_S: Final = 60.0
REPLICATION: Final = {"repl-diskless-sync-delay": "0", "repl-ping-replica-period": "1"}


def eventually(condition: Callable[[], bool], what: str) -> None:
    """Waits for what servers agree upon among themselves."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        time.sleep(0.02)


def execute(port: int, *args: str | int, password: str = "") -> Any:
    """One command's reply, nearly raw."""
    with redis.Redis(port=port, password=password or None) as client:
        return client.execute_command(*args)


class _Servers:
    """What both groups have: nodes, a password for all of them, and ways to hurt one."""

    def __init__(self, password: str = "") -> None:
        self.password = password
        self.nodes: list[RedisServer] = []
        self._stack = ExitStack()
        self._paused: set[int] = set()

    @property
    def _credentials(self) -> str:
        return f":{quote(self.password, safe='')}@" if self.password else ""

    def url_of(self, node: RedisServer) -> str:
        """One node's own URL."""
        return f"redis://{self._credentials}127.0.0.1:{node.port}/0"

    def __enter__(self) -> Self:
        try:
            self._start()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        for pid in tuple(self._paused):
            os.kill(pid, signal.SIGCONT)
        self._stack.close()

    def _start(self) -> None:
        raise NotImplementedError

    def _node(self, options: dict[str, str], *, program: str | None = None) -> RedisServer:
        program = program or os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM")
        return self._stack.enter_context(RedisServer(program=program, options=options))

    @contextmanager
    def client(self, node: RedisServer) -> Iterator[redis.Redis]:
        """A redis-py client of one node."""
        with redis.Redis(port=node.port, password=self.password or None) as client:
            yield client

    def execute(self, node: RedisServer, *args: str | int) -> Any:
        """One command's reply, nearly raw."""
        return execute(node.port, *args, password=self.password)

    def _set_password(self) -> None:
        for node in self.nodes if self.password else ():
            execute(node.port, "CONFIG", "SET", "masterauth", self.password, "requirepass", self.password)

    def _replicates(self, node: RedisServer) -> bool:
        with self.client(node) as client:
            return bool(client.info("replication").get("master_link_status") == "up")

    def pause(self, node: RedisServer) -> None:
        """The node answers nothing, as after the loss of a network or a host; its connections stay."""
        os.kill(node.pid, signal.SIGSTOP)
        self._paused.add(node.pid)

    def resume(self, node: RedisServer) -> None:
        os.kill(node.pid, signal.SIGCONT)
        self._paused.discard(node.pid)

    def kill(self, node: RedisServer) -> None:
        """The node is gone, as after a crash. `node.start()` brings it back."""
        if node.pid in self._paused:
            self.resume(node)
        node.kill()


class SentinelServers(_Servers):
    """A primary, its replica, and sentinels that promote the replica about a second after a loss."""

    def __init__(self, *, sentinels: int = 1, password: str = "") -> None:
        super().__init__(password)
        self._count = sentinels
        self.sentinels: list[RedisServer] = []

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{self._credentials}{hosts}/{MASTER}/0"

    @property
    def primary(self) -> RedisServer:
        """Whom the first sentinel takes for the primary."""
        return next(node for node in self.nodes if node.port == self._named_by(self.sentinels[0]))

    @staticmethod
    def _named_by(sentinel: RedisServer) -> int:
        return int(execute(sentinel.port, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", MASTER)[1])

    @property
    def primary_pid(self) -> int:
        return self.primary.pid

    def primary_urls(self, _: str) -> list[str]:
        """The primary's, whatever the key."""
        return [self.url_of(self.primary)]

    def flush(self) -> None:
        self.execute(self.primary, "FLUSHALL")

    @property
    def replica(self) -> RedisServer:
        primary = self.primary
        return next(node for node in self.nodes if node is not primary)

    def _start(self) -> None:
        primary, replica = self.nodes = [self._node(REPLICATION) for _ in range(2)]
        self._set_password()
        self.execute(replica, "REPLICAOF", "127.0.0.1", primary.port)
        eventually(lambda: self._replicates(replica), "the replica follows")
        for _ in range(self._count):
            sentinel = self._node({}, program=self._sentinel_program())
            self.sentinels.append(sentinel)
            quorum = self._count // 2 + 1
            settings: dict[str, str | int] = {"down-after-milliseconds": 1_000, "failover-timeout": 3_000}
            if self.password:
                settings["auth-pass"] = self.password
            execute(sentinel.port, "SENTINEL", "MONITOR", MASTER, "127.0.0.1", primary.port, quorum)
            for name, value in settings.items():
                execute(sentinel.port, "SENTINEL", "SET", MASTER, name, value)
        eventually(lambda: all(map(self._is_ready, self.sentinels)), "the sentinels know all")

    def _sentinel_program(self) -> str:
        """A sentinel is the server with a configuration that it can write, and a word behind the options."""
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="deltawire-sentinel-")))
        configuration = directory / "sentinel.conf"
        configuration.touch()
        script = directory / "sentinel"
        program = os.environ.get("DELTAWIRE_TEST_REDIS_PROGRAM") or find_server()
        script.write_text(f'#!/bin/sh\nexec "{program}" "{configuration}" "$@" --sentinel\n')
        script.chmod(0o755)
        return str(script)

    def _is_ready(self, sentinel: RedisServer) -> bool:
        with redis.Redis(port=sentinel.port) as client:
            state = client.sentinel_masters()[MASTER]
        return (state["num-slaves"], state["num-other-sentinels"]) == (1, self._count - 1)

    def fail_over(self) -> None:
        """Asks for it: the primary gives way, and lives on as a replica."""
        eventually(self._is_failing_over, "the sentinel knows enough of the replica to promote it")

    def _is_failing_over(self) -> bool:
        try:
            execute(self.sentinels[0].port, "SENTINEL", "FAILOVER", MASTER)
        except redis.ResponseError:  # NOGOODSLAVE
            return False
        return True

    def wait_for_failover(self, lost: RedisServer) -> None:
        """Until every sentinel names another primary than `lost`, which knows it, if it is there."""
        eventually(
            lambda: all(self._named_by(sentinel) != lost.port for sentinel in self.sentinels),
            "the sentinels name the replica",
        )
        if lost.is_running and lost.pid not in self._paused:
            eventually(lambda: self.execute(lost, "ROLE")[0] != b"master", "the primary gives way")


class ClusterServers(_Servers):
    """Three primaries with a third of the slots each, and, if wanted, a replica for each of them.

    A slot that no node serves does not stop the others (`cluster-require-full-coverage no`).
    """

    def __init__(self, *, replicas: bool = False, password: str = "") -> None:
        super().__init__(password)
        self._has_replicas = replicas

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)
        return f"redis+cluster://{self._credentials}{hosts}"

    def flush(self) -> None:
        for node in self.nodes[:3]:
            self.execute(node, "FLUSHALL")

    def node_of(self, key: str) -> RedisServer:
        """The primary that has the key's slot, as the nodes that answer see it."""
        slot = slot_of(key)
        for node in self.nodes:
            if node.is_running and node.pid not in self._paused:
                for first, last, (_, port, *_), *_ in self.execute(node, "CLUSTER", "SLOTS"):
                    if first <= slot <= last:
                        return next(node for node in self.nodes if node.port == port)
        raise LookupError(key)

    def primary_urls(self, key: str) -> list[str]:
        """All primaries', first that of the key's."""
        its = self.node_of(key)
        return [self.url_of(node) for node in sorted(self.nodes[:3], key=lambda node: node is not its)]

    @property
    def primary_pid(self) -> int:
        """That of the first primary."""
        return self.nodes[0].pid

    def _start(self) -> None:
        buses = [free_port() for _ in range(6 if self._has_replicas else 3)]
        for bus in buses:
            options = {
                "cluster-enabled": "yes",
                "cluster-node-timeout": "2000",
                "cluster-port": str(bus),  # else the port and 10,000, which may be too much
                "cluster-require-full-coverage": "no",
                "cluster-replica-validity-factor": "0",
            }
            self.nodes.append(self._node(REPLICATION | options))
        self._set_password()
        for number, node in enumerate(self.nodes[:3]):
            bounds = [SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1]
            self.execute(node, "CLUSTER", "ADDSLOTSRANGE", *bounds)
        for number, (node, bus) in enumerate(zip(self.nodes, buses, strict=True)):
            self.execute(node, "CLUSTER", "SET-CONFIG-EPOCH", number + 1)
            self.execute(self.nodes[0], "CLUSTER", "MEET", "127.0.0.1", node.port, bus)
        self.wait_until_whole()
        for primary, replica in zip(self.nodes, self.nodes[3:], strict=False):
            self.execute(replica, "CLUSTER", "REPLICATE", self._id(primary))
        eventually(lambda: all(map(self._replicates, self.nodes[3:])), "the replicas follow")
        if self._has_replicas:
            eventually(lambda: all(map(self._lists_replicas, self.nodes)), "all know the replicas")

    def _id(self, node: RedisServer) -> str:
        return str(self.execute(node, "CLUSTER", "MYID").decode())

    def _lists_replicas(self, node: RedisServer) -> bool:
        return all(len(entry) == 4 for entry in self.execute(node, "CLUSTER", "SLOTS"))

    def wait_until_whole(self, nodes: Sequence[RedisServer] = ()) -> None:
        """Until all nodes (or those) see each other, and a primary for every slot."""

        def is_whole(node: RedisServer) -> bool:
            info = self.execute(node, "CLUSTER", "INFO")
            text = info.decode() if isinstance(info, bytes) else str(info)
            return (
                "cluster_state:ok" in text
                and f"cluster_slots_ok:{SLOTS}" in text
                and f"cluster_known_nodes:{len(self.nodes)}" in text
            )

        eventually(lambda: all(map(is_whole, nodes or self.nodes)), "the cluster is whole")

    def wait_for_takeover(self, lost: RedisServer) -> None:
        """Until the replica of `lost` has its slots, for all who answer."""

        def is_over(node: RedisServer) -> bool:
            return all(entry[2][1] != lost.port for entry in self.execute(node, "CLUSTER", "SLOTS"))

        rest = [node for node in self.nodes if node is not lost]
        eventually(lambda: all(map(is_over, rest)), "the replica takes over")

    def begin_move(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """The slot begins to move: keys that are not at `source` (any more) are asked of `target`."""
        self.execute(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self._id(source))
        self.execute(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self._id(target))

    def move_keys(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """All keys that the slot has now."""
        authentication = ("AUTH", self.password) if self.password else ()
        while keys := self.execute(source, "CLUSTER", "GETKEYSINSLOT", slot, 100):
            options = (*authentication, "KEYS", *keys)
            self.execute(source, "MIGRATE", "127.0.0.1", target.port, "", 0, 5_000, *options)

    def end_move(self, slot: int, target: RedisServer) -> None:
        """The slot is the target's; every primary is told."""
        for node in [target, *(node for node in self.nodes[:3] if node is not target)]:
            self.execute(node, "CLUSTER", "SETSLOT", slot, "NODE", self._id(target))

    def move(self, slot: int, source: RedisServer, target: RedisServer) -> None:
        """The slot and its keys move, as a resharding does it."""
        self.begin_move(slot, source, target)
        self.move_keys(slot, source, target)
        self.end_move(slot, target)
