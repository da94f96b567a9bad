"""Which webhooks there are, what each hears of, and how that is signed."""

import base64
from pathlib import Path

import pytest

from deltawire.environment import ConfigurationError, Environment
from deltawire_worker.webhook_endpoints import EXAMPLE, Webhook, read_webhooks

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef0123456789abcdef").decode()


def read(text: str, **more: str) -> tuple[Webhook, ...]:
    return read_webhooks(Environment({"DELTAWIRE_WEBHOOKS": text, **more}))


def table(**keys: str) -> str:
    keys = {"url": '"https://a.example/hook"', "secret": f'"{SECRET}"', **keys}
    return "[webhooks.a]\n" + "\n".join(f"{key} = {value}" for key, value in keys.items() if value)


def test_none_is_the_default() -> None:
    """Nothing is told to anybody."""
    assert read_webhooks(Environment({})) == ()


def test_the_example() -> None:
    """It is read as it stands."""
    (webhook,) = read(EXAMPLE, BILLING_HOOK_SECRET=SECRET)
    assert (webhook.name, webhook.secret, webhook.tenants) == ("billing", SECRET, ["acme"])
    assert webhook.wants("job.failed", "acme")
    assert not webhook.wants("job.cancelled", "acme")
    assert not webhook.wants("job.failed", "globex")
    assert SECRET not in repr(webhook)
    assert webhook.url not in repr(webhook)


def test_a_secret_in_a_file(tmp_path: Path) -> None:
    """As Docker and Kubernetes give it."""
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    (webhook,) = read(table(secret="", secret_file=f'"{tmp_path}/secret"'))
    assert webhook.secret == SECRET


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x", "not TOML"),
        ("[other]\n", "tables"),
        ("[webhooks.'a/b']\nurl='x'", "name"),
        ("[webhooks.a]\n", "url is missing"),
        (table(color="1"), "no key 'color'"),
        (table(url="1"), "Expected `str`"),
        (table(secret=""), "one of secret"),
        (table(secret_env='"X"'), "one of secret"),
        (table(secret="", secret_env='"NOT_SET"'), "a secret is"),
        (table(secret='"short"'), "a secret is"),
        (table(secret='"whsec_MTIz"'), "a secret is"),
        (table(secret=f'"{SECRET}ä"'), "a secret is"),
        (table(secret="", secret_file='"/nowhere/at/all"'), "cannot be read"),
        (table(url='"http://a.example/hook"'), "must be https"),
        (table(url='"file:///etc/passwd"'), "must be a URL"),
        (table(url='"https://"'), "must be a URL"),
        (table(url='"https://ä..ö/hook"'), "must be a URL"),
        (table(url='"https://user:pass@a.example"'), "credentials"),
        (table(events='["done"]'), "no 'done'"),
        (table(tenants='["a b"]'), "tenants"),
    ],
)
def test_what_is_wrong_is_said(text: str, problem: str) -> None:
    """With the table's name, and no secret."""
    with pytest.raises(ConfigurationError, match=problem) as caught:
        read(text)
    assert SECRET not in str(caught.value)
    assert "pass" not in str(caught.value)


@pytest.mark.parametrize(
    "keys", [{"url": '"http://127.0.0.1:9/x"'}, {"url": '"http://hooks.internal/x"', "allow_http": "true"}]
)
def test_plain_http_has_to_be_meant(keys: dict[str, str]) -> None:
    """It is for this machine, and for networks that an operator says to trust."""
    assert read(table(**keys))[0].url.startswith("http:")


def test_the_signature_is_that_of_standard_webhooks() -> None:
    """The known answer of its own libraries' tests."""
    webhook = Webhook(name="a", url="https://a", secret="whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = webhook.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    assert headers["webhook-signature"] == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
    assert headers["webhook-timestamp"] == "1614265330"


def test_two_secrets_sign_both() -> None:
    """While one takes the other's place, receivers with either are content."""
    webhook = Webhook(name="a", url="https://a", secret=f"{SECRET} whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = webhook.headers("msg_p5jXN8AQM9LWM0D4loKWxJek", 1614265330, b'{"test": 2432232314}')
    first, second = headers["webhook-signature"].split()
    assert first != second == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="
