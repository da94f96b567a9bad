"""deploy/redis/users.acl and an append-only file: what was written is there again after a restart."""

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from deltawire.redis_server import find_server, free_port

ACL: Final = Path(__file__).parents[2] / "deploy" / "redis" / "users.acl"
START_TIMEOUT_S: Final = 60
STOP_TIMEOUT_S: Final = 60


@contextmanager
def serving(directory: Path) -> Iterator[Any]:
    """A server on this directory, and an administrator's client."""
    acl = directory / "users.acl"
    acl.write_text(ACL.read_text() + "user admin on >admin ~* &* +@all\n")
    port = free_port()
    program = [find_server(), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(directory)]
    program += ["--aclfile", str(acl), "--appendonly", "yes", "--save", ""]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, start_new_session=True)
    patience = Retry(ConstantBackoff(0.1), START_TIMEOUT_S * 10)
    try:
        with redis.Redis(port=port, username="admin", password="admin", retry=patience) as client:
            client.ping()
            yield client
    finally:
        process.terminate()
        process.wait(STOP_TIMEOUT_S)


def test_what_scripts_have_written_outlives_a_restart(tmp_path: Path) -> None:
    """A script that writes twice is a transaction in the file. While that is read, EXEC asks what the default
    user may: of Redis 7 without its rights nothing comes back, as only the server's log says.

    (valkey-io/valkey#3983)
    """
    with serving(tmp_path) as client:
        client.eval("redis.call('SET', 'dw:a', 1) redis.call('SET', 'dw:b', 2)", 0)
    with serving(tmp_path) as client:
        assert client.mget("dw:a", "dw:b") == [b"1", b"2"]
