"""The relay's settings are read once, checked, and hide their secrets (.env.example)."""

from pathlib import Path

import pytest

from deltawire.api_keys import new_api_key
from deltawire.environment import ConfigurationError, Environment
from deltawire_relay.limits import LIMITS, Bounds
from deltawire_relay.settings import Settings

KEY, ENTRY = new_api_key("backend", "acme", ["read"])


def settings(**variables: str) -> Settings:
    return Settings.from_environment(
        Environment({f"DELTAWIRE_{name}": value for name, value in variables.items()})
    )


def test_defaults_serve_this_machine_only() -> None:
    """With nothing set: loopback, port 8080, the local Redis as data and broker, no keys, no origins."""
    made = settings()
    assert (made.host, made.port, made.key_prefix) == ("127.0.0.1", 8080, "dw")
    assert made.redis_url == made.broker_url == "redis://127.0.0.1:6379/0"
    assert made.api_keys == ()
    assert made.allowed_origins == ()
    assert made.public_url == ""


def test_every_variable_is_read() -> None:
    """What is set is taken; lists are separated by commas; the public URL loses its last slash."""
    made = settings(
        REDIS_URL="redis://data/1",
        BROKER_URL="amqp://broker",
        KEY_PREFIX="x",
        HOST="localhost",
        PORT="9000",
        PUBLIC_URL="https://relay.example/",
        ALLOWED_ORIGINS="https://a.example, https://b.example",
        API_KEYS=ENTRY,
        CHAT_ABANDON_GRACE_S="0.5",
        LOG_FORMAT="json",
        LOG_LEVEL="debug",
    )
    assert (made.redis_url, made.broker_url, made.key_prefix) == ("redis://data/1", "amqp://broker", "x")
    assert (made.host, made.port, made.public_url) == ("localhost", 9000, "https://relay.example")
    assert made.allowed_origins == ("https://a.example", "https://b.example")
    assert [key.name for key in made.api_keys] == ["backend"]
    assert made.chat_abandon_grace_s == 0.5
    assert (made.log_format, made.log_level) == ("json", "debug")


def test_how_long_a_job_of_the_openai_api_outlives_its_readers() -> None:
    """Two seconds unless the operator says otherwise: at once, later, never."""
    assert settings().chat_abandon_grace_s == 2
    assert settings(CHAT_ABANDON_GRACE_S="0").chat_abandon_grace_s == 0
    assert settings(CHAT_ABANDON_GRACE_S="never").chat_abandon_grace_s is None
    for text in ("-1", "86401", "soon", "nan"):
        with pytest.raises(ConfigurationError) as caught:
            settings(CHAT_ABANDON_GRACE_S=text)
        assert "DELTAWIRE_CHAT_ABANDON_GRACE_S" in str(caught.value)


def test_limits_are_settings() -> None:
    """Each by its name; the proxies are addresses and networks (PROTOCOL §5.7)."""
    assert settings().bounds == Bounds()
    for number, name in enumerate(LIMITS, start=2_000):
        assert getattr(settings(**{name.upper(): str(number)}).bounds, name) == number
    proxies = settings(TRUSTED_PROXIES="10.0.0.7, 172.16.0.0/12,fd00::/8").bounds.trusted_proxies
    assert [str(network) for network in proxies] == ["10.0.0.7/32", "172.16.0.0/12", "fd00::/8"]


def test_the_protocol_says_the_default_of_each_limit() -> None:
    """PROTOCOL §5.7 has a row for each, with its setting and its default."""
    section = (Path(__file__).parents[2] / "PROTOCOL.md").read_text().partition("### 5.7")[2]
    rows = [
        line.split(" | ") for line in section.partition("\n### 5.8")[0].splitlines() if line.startswith("| ")
    ]
    said = {cells[1].strip("`").lower(): cells[2] for cells in rows}
    for name in LIMITS:
        assert said[name].startswith(f"{getattr(Bounds(), name):,}"), name


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "relay.example", "localhost.evil.com"])
def test_without_a_key_only_loopback_is_served(host: str) -> None:
    """The refusal names the variable and both ways out; with a key any host will do."""
    with pytest.raises(ConfigurationError) as caught:
        settings(HOST=host)
    for word in (host, "DELTAWIRE_API_KEYS", "deltawire keys new", "DELTAWIRE_HOST=127.0.0.1"):
        assert word in str(caught.value)
    assert settings(HOST=host, API_KEYS=ENTRY).host == host


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_loopback_needs_no_key(host: str) -> None:
    """Every address of this machine's own is loopback."""
    assert settings(HOST=host).api_keys == ()


@pytest.mark.parametrize(
    ("name", "value"), [("REDIS_URL", "redis://:secret@data"), ("BROKER_URL", "amqp://u:secret@broker")]
)
def test_a_secret_may_come_in_a_file(name: str, value: str, tmp_path: Path) -> None:
    """NAME_FILE is read, without white space around it; NAME itself wins over it."""
    path = tmp_path / "secret"
    path.write_text(f"{value}\n")
    assert getattr(settings(**{f"{name}_FILE": str(path)}), name.lower()) == value
    both = settings(**{f"{name}_FILE": str(path), name: "redis://other"})
    assert getattr(both, name.lower()) == "redis://other"


def test_api_keys_may_come_in_a_file(tmp_path: Path) -> None:
    """DELTAWIRE_API_KEYS_FILE holds what DELTAWIRE_API_KEYS would."""
    path = tmp_path / "keys"
    path.write_text(f"{ENTRY}\n")
    assert [key.name for key in settings(API_KEYS_FILE=str(path)).api_keys] == ["backend"]


def test_a_secret_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    """A mistyped path never means "no keys"."""
    path = tmp_path / "missing"
    with pytest.raises(ConfigurationError, match="DELTAWIRE_API_KEYS_FILE") as caught:
        settings(API_KEYS_FILE=str(path))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("content", ["", " \n", ","])
def test_a_key_file_without_a_key_is_an_error(content: str, tmp_path: Path) -> None:
    """A secret that was not mounted yet never means "no keys": who names a file wants keys."""
    path = tmp_path / "keys"
    path.write_text(content)
    with pytest.raises(ConfigurationError):
        settings(API_KEYS_FILE=str(path))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("PORT", "http"),
        ("PORT", "70000"),
        ("PORT", "-1"),
        ("LOG_FORMAT", "xml"),
        ("API_KEYS", "nonsense"),
        ("LOG_LEVEL", "loud"),
        ("REDIS_URL", "localhost:6379"),
        ("MAX_CONNECTIONS", "-1"),
        ("MAX_BODY_BYTES", "0"),
        ("MAX_MESSAGE_BYTES", "100"),
        ("TRUSTED_PROXIES", "nginx"),
        ("TRUSTED_PROXIES", "10.0.0.7/8"),
        ("ALLOWED_ORIGINS", "https://app.example.com/"),
        ("ALLOWED_ORIGINS", "https://app.example.com,app.example.com"),
    ],
)
def test_a_wrong_value_names_its_variable(name: str, value: str) -> None:
    """Each refusal names the variable to mend."""
    with pytest.raises(ConfigurationError, match=f"DELTAWIRE_{name}"):
        settings(**{name: value})


def test_repr_hides_every_secret() -> None:
    """Neither a URL's password nor a key's hash shows in `repr` or `str`."""
    made = settings(REDIS_URL="redis://:hunter2@data", BROKER_URL="amqp://u:hunter3@broker", API_KEYS=ENTRY)
    for text in (repr(made), str(made), f"{made}"):
        assert "hunter" not in text
        assert ENTRY.rpartition(":")[2] not in text
    assert "backend" in repr(made)


SECRET = "0123456789abcdef0123456789abcdef"


def test_tokens_alone_open_other_addresses() -> None:
    """A relay for clients only needs no API key."""
    assert settings(HOST="0.0.0.0", JWT_SECRET=SECRET).takes_tokens
    assert settings(HOST="0.0.0.0", JWT_JWKS_URL="https://issuer.example/jwks").takes_tokens
    assert not settings(JWT_AUDIENCE="other", JWT_ISSUER="x").takes_tokens


def test_secrets_for_tokens(tmp_path: Path) -> None:
    """Several, in the environment or in a file, one to a line; none is shown."""
    path = tmp_path / "secret"
    path.write_text(f"{SECRET}\n{SECRET[::-1]}\n")
    made = settings(JWT_SECRET_FILE=str(path))
    assert made.jwt_secrets == (SECRET, SECRET[::-1])
    assert SECRET not in repr(made)
    assert (made.jwt_audience, made.jwt_issuer) == ("deltawire", "")
    with pytest.raises(ConfigurationError, match=r"DELTAWIRE_JWT_SECRET: a secret .* 32 bytes") as caught:
        settings(JWT_SECRET=f"{SECRET} too-short")
    assert "too-short" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["http://issuer.example/jwks", "ftp://issuer.example", "https://", "issuer.example", "file:///etc/x"],
)
def test_key_sets_come_by_https(url: str) -> None:
    """Whoever changes the keys on their way is let in."""
    with pytest.raises(ConfigurationError, match="DELTAWIRE_JWT_JWKS_URL"):
        settings(JWT_JWKS_URL=url)
    assert settings(JWT_JWKS_URL="http://127.0.0.1:9/jwks").jwt_jwks_url


def test_a_public_key_that_is_none() -> None:
    """The message names the variable."""
    with pytest.raises(ConfigurationError, match="DELTAWIRE_JWT_PUBLIC_KEY: "):
        settings(JWT_PUBLIC_KEY="what")
