"""The gate decides by headers alone who gets in: Host, Origin, API keys (PROTOCOL §5)."""

import pytest

from deltawire.api_keys import SCOPES, new_api_key, parse_api_keys
from deltawire.errors import WireError
from deltawire_relay.auth import LOCAL, Gate, Principal, bearer_token, is_loopback

KEY, ENTRY = new_api_key("backend", "acme", ["read", "submit"])
OTHER_KEY, OTHER_ENTRY = new_api_key("other", "umbrella", ["read"])

OPEN = Gate((), ())
KEYED = Gate(parse_api_keys(f"{ENTRY},{OTHER_ENTRY}"), ("https://app.example",))


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "localhost:8080",
        "LOCALHOST:8080",
        "127.0.0.1",
        "127.0.0.1:8080",
        "127.8.9.10",
        "[::1]",
        "[::1]:8080",
    ],
)
def test_without_keys_loopback_names_are_served(host: str) -> None:
    """Every way to write this machine's own address is good."""
    OPEN.check_host(host)


@pytest.mark.parametrize(
    "host",
    [
        None,
        "",
        "evil.com",
        "127.evil.com",
        "127.0.0.1.evil.com",
        "localhost.evil.com",
        "evil.com:127",
        "localhost@evil.com",
        "evil.com/localhost",
        "evil.com#@localhost",
        "0.0.0.0",
        "10.0.0.1:8080",
        "[::]:8080",
        "[::ffff:10.0.0.1]",
        "::1",
        "2130706433",
        "0x7f.1",
    ],
)
def test_without_keys_any_other_name_is_refused(host: str | None) -> None:
    """A page whose name was rebound to 127.0.0.1 still sends its own name, and gets nothing."""
    with pytest.raises(WireError) as caught:
        OPEN.check_host(host)
    assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize("host", ["[", "[::1", "[evil]", "localhost\u2100"])
def test_a_host_that_is_none_is_refused(host: str) -> None:
    """A Host header that is no host at all is refused like a foreign one."""
    with pytest.raises(WireError) as caught:
        OPEN.check_host(host)
    assert caught.value.code == "host_not_allowed"


@pytest.mark.parametrize("host", ["relay.example", "[::ffff:127.0.0.1]", None])
def test_with_keys_any_name_is_served(host: str | None) -> None:
    """With keys a rebinding page has nothing to show, so names do not matter."""
    KEYED.check_host(host)


def test_an_ipv4_mapped_loopback_address_opens_nothing_else() -> None:
    """Whether ::ffff:127.0.0.1 counts as loopback is Python's say; an address elsewhere never does."""
    assert not is_loopback("::ffff:10.0.0.1")
    assert is_loopback("::1")
    assert not is_loopback("")


@pytest.mark.parametrize(
    ("origin", "host"),
    [
        (None, "relay.example"),
        ("https://app.example", "relay.example"),
        ("http://localhost:8080", "localhost:8080"),
        ("https://relay.example", "relay.example"),
    ],
)
def test_no_origin_our_own_and_listed_ones_are_served(origin: str | None, host: str) -> None:
    """A client that is no browser sends none; a browser's page is ours or is listed by exact name."""
    KEYED.check_origin(origin, host)


@pytest.mark.parametrize(
    "origin",
    [
        "",
        "null",
        "https://evil.com",
        "http://app.example",
        "https://app.example:8443",
        "https://app.example.evil.com",
        "https://APP.example",
        "https://app.example/",
        "http://relay.example:1",
        "//relay.example",
    ],
)
def test_every_other_origin_is_refused(origin: str) -> None:
    """Scheme, name and port must all be those listed."""
    with pytest.raises(WireError) as caught:
        KEYED.check_origin(origin, "relay.example")
    assert caught.value.code == "origin_not_allowed"


def test_without_keys_everybody_is_local() -> None:
    """A relay without keys takes any token, or none, and sees all tenants."""
    assert OPEN.authenticate(None) is LOCAL
    assert OPEN.authenticate("whatever") is LOCAL
    assert LOCAL.tenant is None
    assert LOCAL.scopes == SCOPES
    assert not OPEN.needs_credentials


def test_a_key_says_name_tenant_and_scopes() -> None:
    """The principal is the key's own, whichever place it has in the list."""
    assert KEYED.authenticate(KEY) == Principal("backend", "acme", frozenset({"read", "submit"}))
    assert KEYED.authenticate(OTHER_KEY) == Principal("other", "umbrella", frozenset({"read"}))


@pytest.mark.parametrize(
    ("token", "code"),
    [
        (None, "missing_credentials"),
        ("", "missing_credentials"),
        ("dw_wrong", "invalid_credentials"),
        (KEY + "x", "invalid_credentials"),
        (KEY.upper(), "invalid_credentials"),
        (ENTRY, "invalid_credentials"),
        (ENTRY.rpartition(":")[2], "invalid_credentials"),
        ("\u00e9", "invalid_credentials"),
    ],
    ids=["none", "empty", "wrong", "longer", "upper", "entry", "hash", "not ASCII"],  # keys differ by run
)
def test_no_key_and_a_wrong_key_are_told_apart(token: str | None, code: str) -> None:
    """Missing and wrong have codes of their own; the stored hash is no key."""
    with pytest.raises(WireError) as caught:
        KEYED.authenticate(token)
    assert caught.value.code == code
    assert caught.value.status == 401
    assert not caught.value.kind.retryable


def test_a_scope_that_a_key_lacks_is_forbidden() -> None:
    """What a credential may not do is refused by name."""
    principal = KEYED.authenticate(KEY)
    principal.require("read")
    with pytest.raises(WireError, match="cancel") as caught:
        principal.require("cancel")
    assert (caught.value.code, caught.value.status) == ("forbidden", 403)


@pytest.mark.parametrize(
    ("header", "token"),
    [
        ("Bearer dw_1", "dw_1"),
        ("bearer dw_1", "dw_1"),
        ("BEARER   dw_1  ", "dw_1"),
        ("Basic dw_1", None),
        ("Bearer", None),
        ("Bearer ", None),
        ("dw_1", None),
        ("", None),
        (None, None),
    ],
)
def test_the_bearer_token_of_a_header(header: str | None, token: str | None) -> None:
    """The scheme's case does not matter; another scheme holds no token (RFC 6750 §2.1)."""
    assert bearer_token(header) == token
