"""Settings are read from the environment with errors that name the variable."""

from pathlib import Path

import pytest

from deltawire.environment import ConfigurationError, Environment


def test_an_empty_value_counts_as_not_set() -> None:
    """As docker compose passes variables that are not set."""
    environment = Environment({"A": "", "N": ""})
    assert environment.text("A", "default") == "default"
    assert environment.integer("N", 3) == 3


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    """NAME beats NAME_FILE; a trailing line end is no part of it."""
    (tmp_path / "secret").write_text("from-file\n")
    variables = {"KEY_FILE": str(tmp_path / "secret")}
    assert Environment(variables).secret("KEY") == "from-file"
    assert Environment({**variables, "KEY": "direct"}).secret("KEY") == "direct"


@pytest.mark.parametrize(
    ("call", "variables"),
    [
        (lambda e: e.integer("X", 1), {"X": "one"}),
        (lambda e: e.integer("X", 1), {"X": "70000"}),
        (lambda e: e.number("X", 1), {"X": "-1"}),
        (lambda e: e.number("X", 1), {"X": "nan"}),
        (lambda e: e.choice("X", "a", ("a", "b")), {"X": "c"}),
        (lambda e: e.secret("X"), {"X_FILE": "/nowhere/at/all"}),
        (lambda e: e.url("X", schemes=("http",)), {}),
        (lambda e: e.url("X", schemes=("http",)), {"X": "ftp://x"}),
        (lambda e: e.url("X", schemes=("http",)), {"X": "http://x:port"}),
        (lambda e: e.redis_url("X"), {"X": "http://x"}),
        (lambda e: e.redis_url("X"), {"X": "redis+sentinel://x"}),
        (lambda e: e.redis_url("X"), {"X": "redis+cluster://x/1"}),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_variable(call: object, variables: dict[str, str]) -> None:
    """Whatever is wrong with it."""
    assert callable(call)
    with pytest.raises(ConfigurationError, match="X"):
        call(Environment(variables))


def test_the_broker_is_where_redis_is_unless_set() -> None:
    """Sentinels can be one; a cluster cannot, nor sentinels with TLS, and the error says what to set."""
    sentinel, cluster = "redis+sentinel://:hunter2@a:1/m", "redis+cluster://:hunter2@a:1"
    assert Environment({}).broker_url("X", sentinel) == sentinel
    assert Environment({"X": "amqp://b"}).broker_url("X", cluster) == "amqp://b"
    assert Environment({"X": sentinel}).broker_url("X", cluster) == sentinel
    for variables, url in (({}, cluster), ({}, "rediss+sentinel://a/m"), ({"X": cluster}, "redis://h")):
        with pytest.raises(ConfigurationError, match=r"^X must name a broker of its own") as caught:
            Environment(variables).broker_url("X", url)
        assert "hunter2" not in str(caught.value)
    with pytest.raises(ConfigurationError, match=r"^X must end in /master_name"):
        Environment({"X": "redis+sentinel://a:1"}).broker_url("X", cluster)


def test_words_are_separated_by_commas() -> None:
    """Blanks and empty words fall away."""
    assert Environment({"X": " a, b,,"}).words("X") == ("a", "b")


def test_a_url_is_not_repeated_in_its_error() -> None:
    """It may hold a password."""
    with pytest.raises(ConfigurationError) as caught:
        Environment({"X": "redis//:hunter2@host"}).url("X", schemes=("redis",))
    assert "hunter2" not in str(caught.value)
