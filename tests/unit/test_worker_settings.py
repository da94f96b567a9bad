"""The worker's settings: what must be set, what is refused, and what never shows."""

import pytest

from deltawire.environment import ConfigurationError, Environment
from deltawire_worker.settings import Settings
from deltawire_worker.upstreams import Upstream

BASE_URL = "https://gateway.example/v1"
SECRET = "hunter2-hunter2"


def settings(**variables: str) -> Settings:
    return Settings.from_environment(Environment({"DELTAWIRE_UPSTREAM_BASE_URL": BASE_URL, **variables}))


def upstream_of(made: Settings) -> Upstream:
    """The only one."""
    [upstream] = made.upstreams
    return upstream


def test_a_gateway_is_all_that_must_be_set() -> None:
    """Everything else has a default, and the broker's is the data's Redis."""
    made = settings()
    assert made.redis_url == made.broker_url == "redis://127.0.0.1:6379/0"
    assert (upstream_of(made).name, upstream_of(made).base_url) == ("default", BASE_URL)
    assert (made.concurrency, made.worker_port, made.key_prefix, made.host) == (1000, 8081, "dw", "127.0.0.1")


def test_a_cluster_needs_a_broker_beside_it() -> None:
    """Celery cannot use one; sentinels it can."""
    sentinel = "redis+sentinel://a:1,b:2/m"
    assert settings(DELTAWIRE_REDIS_URL=sentinel).broker_url == sentinel
    with pytest.raises(ConfigurationError, match="DELTAWIRE_BROKER_URL"):
        settings(DELTAWIRE_REDIS_URL="redis+cluster://a:1")


def test_every_variable_arrives() -> None:
    """Each under its documented name."""
    made = settings(
        DELTAWIRE_REDIS_URL="redis://data/1",
        DELTAWIRE_BROKER_URL="amqp://broker",
        DELTAWIRE_UPSTREAM_BASE_URL="http://gateway:4000/v1/",
        DELTAWIRE_UPSTREAM_API_KEY=SECRET,
        DELTAWIRE_KEY_PREFIX="mine",
        DELTAWIRE_HOST="0.0.0.0",
        DELTAWIRE_WORKER_PORT="9000",
        DELTAWIRE_CONCURRENCY="7",
        DELTAWIRE_SHUTDOWN_GRACE_S="2.5",
        DELTAWIRE_LOG_FORMAT="json",
        DELTAWIRE_LOG_LEVEL="warning",
    )
    assert (made.redis_url, made.broker_url) == ("redis://data/1", "amqp://broker")
    assert (upstream_of(made).base_url, upstream_of(made).api_key) == ("http://gateway:4000/v1", SECRET)
    assert (made.key_prefix, made.host, made.worker_port, made.concurrency) == ("mine", "0.0.0.0", 9000, 7)
    assert (made.shutdown_grace_s, made.log_format, made.log_level) == (2.5, "json", "warning")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DELTAWIRE_UPSTREAM_API_KEY", "sk-…"),
        ("DELTAWIRE_UPSTREAM_API_KEY", "two words"),
        ("DELTAWIRE_UPSTREAM_BASE_URL", ""),
        ("DELTAWIRE_UPSTREAM_BASE_URL", "gateway.example/v1"),
        ("DELTAWIRE_UPSTREAM_BASE_URL", "ftp://gateway.example/v1"),
        ("DELTAWIRE_WORKER_PORT", "70000"),
        ("DELTAWIRE_WORKER_PORT", "http"),
        ("DELTAWIRE_CONCURRENCY", "0"),
        ("DELTAWIRE_SHUTDOWN_GRACE_S", "-1"),
        ("DELTAWIRE_SHUTDOWN_GRACE_S", "nan"),
        ("DELTAWIRE_LOG_FORMAT", "yaml"),
        ("DELTAWIRE_LOG_LEVEL", "loud"),
        ("DELTAWIRE_UPSTREAM_BASE_URL", "http://gateway.example:port/v1"),
    ],
)
def test_what_is_wrong_is_refused_at_the_start_by_name(name: str, value: str) -> None:
    """And not at the first job, or by a traceback."""
    with pytest.raises(ConfigurationError, match=name):
        settings(**{name: value})


def test_no_secret_shows() -> None:
    """Neither keys nor the passwords in URLs, wherever somebody prints the settings."""
    made = settings(
        DELTAWIRE_REDIS_URL=f"redis://:{SECRET}@data/1",
        DELTAWIRE_BROKER_URL=f"amqp://user:{SECRET}@broker",
        DELTAWIRE_UPSTREAM_API_KEY=SECRET,
    )
    assert SECRET not in f"{made!r} {made} {upstream_of(made)!r} {made.upstreams} {made.upstreams!r}"


def test_a_secret_may_come_from_a_file(tmp_path_factory: pytest.TempPathFactory) -> None:
    """As Docker and Kubernetes hand them out."""
    path = tmp_path_factory.mktemp("secrets") / "key"
    path.write_text(f"{SECRET}\n")
    assert upstream_of(settings(DELTAWIRE_UPSTREAM_API_KEY_FILE=str(path))).api_key == SECRET
