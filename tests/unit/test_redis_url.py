"""Redis URLs: one server, sentinels, a cluster; and what is wrong with one, without its secrets."""

import pytest
from redis.connection import parse_url

from deltawire.redis_url import parse


@pytest.mark.parametrize(
    "url", ["redis://h", "rediss://u:p@h:1/2", "unix:///run/redis.sock", "redis://[::1]:1"]
)
def test_a_server_is_its_own_address(url: str) -> None:
    """It stays as it is, for redis-py's parser."""
    where = parse(url)
    assert (where.kind, where.url, where.hosts) == ("server", url, ())


def test_sentinels_have_hosts_a_name_and_a_database() -> None:
    """The primary's URL has the credentials as they were written, the database and the options."""
    where = parse("redis+sentinel://app:p%40s%2Fs%20w@a:1,b,[::1]:3/my%20primary/4?ssl_cert_reqs=none")
    assert where.kind == "sentinel"
    assert where.hosts == (("a", 1), ("b", 26_379), ("::1", 3))
    assert (where.master_name, where.db) == ("my primary", 4)
    url = where.server_url("::2", 6_379)
    assert url == "redis://app:p%40s%2Fs%20w@[::2]:6379/4?ssl_cert_reqs=none"
    address = parse_url(url)  # type: ignore[no-untyped-call] # redis-py
    assert (address["username"], address["password"], address["host"]) == ("app", "p@s/s w", "::2")


def test_a_sentinel_gets_a_password_but_no_user() -> None:
    """Users are the data servers'; a sentinel without a password takes any for its default user."""
    assert parse("redis+sentinel://app:pw@a:1/m").sentinel_url("a", 1) == "redis://a:1"
    assert parse("redis+sentinel://:pw@a:1/m").sentinel_url("a", 1) == "redis://:pw@a:1"


def test_a_cluster_has_hosts() -> None:
    """TLS holds for each of its nodes."""
    where = parse("rediss+cluster://:p%25@a:1,b")
    assert (where.kind, where.hosts, where.db) == ("cluster", (("a", 1), ("b", 6_379)), 0)
    assert where.server_url("c", 3) == "rediss://:p%25@c:3/0"


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("", "must be a URL"),
        ("redis//:hunter2@h", "must be a URL"),
        ("amqp://u:hunter2@h", "must be a URL"),
        ("redis://:hunter2@h:port", "must be a URL"),
        ("redis://:hunter2@h:0", "must be a URL"),
        ("redis+sentinel://:hunter2@a:1", "master_name"),
        ("redis+sentinel://:hunter2@a:1/", "master_name"),
        ("redis+sentinel://:hunter2@a:1/m/zero", "master_name"),
        ("redis+sentinel://:hunter2@a:1/m/0/more", "master_name"),
        ("redis+sentinel://:hunter2@/m", "host:port"),
        ("redis+sentinel://:hunter2@a:1,/m", "host:port"),
        ("redis+sentinel://:hunter2@a:1,b:x/m", "host:port"),
        ("redis+sentinel://:hunter2@a:70000/m", "host:port"),
        ("redis+cluster://:hunter2@a:1/1", "one database"),
        ("redis+cluster://:hunter2@:1", "host:port"),
        ("redis+cluster://:hunt/er2@a:1", "one database"),
        ("redis+cluster://[::1", "must be a URL"),
    ],
)
def test_what_is_wrong_is_said_without_the_password(url: str, says: str) -> None:
    """Each error says what is wanted, and nothing of the URL stands in it or in what it was raised from."""
    with pytest.raises(ValueError, match=says) as caught:
        parse(url)
    assert "hunt" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_its_representation_hides_the_password() -> None:
    """It may come into a log or a traceback."""
    assert "hunter2" not in repr(parse("redis+cluster://:hunter2@a:1"))
