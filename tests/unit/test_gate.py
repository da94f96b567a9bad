"""The gate decides by headers alone who gets in: Host, Origin, API keys (PROTOCOL §5)."""

from typing import Any

import pytest

from deltawire.api_keys import SCOPES, new_api_key, parse_api_keys
from deltawire.environment import ConfigurationError
from deltawire.errors import WireError
from deltawire.loopback import is_loopback
from deltawire.tokens import new_claims, secret_key, sign
from deltawire_relay.auth import LOCAL, RESULTS, Gate, Principal, bearer_token
from deltawire_relay.origins import check_origin
from deltawire_relay.revoked import Revocation, Revoked
from deltawire_relay.verifier import TokenVerifier

KEY, ENTRY = new_api_key("backend", "acme", ["read", "submit"])
OTHER_KEY, OTHER_ENTRY = new_api_key("other", "umbrella", ["read"])

OPEN = Gate((), ())
ORIGINS = ("https://app.example", "https://*.example.com", "http://*.localhost:3000")
KEYED = Gate(parse_api_keys(f"{ENTRY},{OTHER_ENTRY}"), ORIGINS)
SECRET = "0123456789abcdef0123456789abcdef"
NOW = 1_800_000_000.0


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
        ("https://a.example.com", "relay.example"),
        ("https://b.a-1.example.com", "relay.example"),
        ("http://a.localhost:3000", "relay.example"),
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
        "https://evil-example.com",
        "https://example.com",
        "https://.example.com",
        "https://a..example.com",
        "https://example.com.evil.com",
        "https://a.example.com.evil.com",
        "https://a.exampleXcom",
        "https://a.example.com:8443",
        "http://a.example.com",
        "https://a.example.com/",
        "https://a.example.com\n",
        "https://evil.com/.example.com",
        "https://evil.com#.example.com",
        "https://evil.com?.example.com",
        "https://user@a.example.com",
        "https://A.example.com",
        "https://*.example.com",
        "http://a.localhost:3001",
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


# Origins.


@pytest.mark.parametrize(
    "origin",
    ["https://app.example", "https://*.example.com", "http://*.localhost:3000", "http://[::1]:80", "app://-"],
)
def test_what_may_be_listed(origin: str) -> None:
    """Exact origins, and patterns whose first label is a star."""
    assert check_origin(origin) == origin


@pytest.mark.parametrize(
    "origin",
    [
        *(
            "*",
            "https://*",
            "https://*.com",
            "https://*:443",
            "https://a.*.example.com",
            "https://*a.example.com",
        ),
        *("https://*.*.example.com", "*://a.example.com", "https://app.example/", "app.example", "https://"),
        *("null", "https://a.example.com:port", "https://user@a.example.com", "https://a.example.com?x"),
    ],
)
def test_what_may_not_be_listed(origin: str) -> None:
    """A star elsewhere, or over a whole top-level domain, would let strangers in."""
    with pytest.raises(ConfigurationError, match="origin"):
        check_origin(origin)


def test_a_missing_origin_only_with_a_header_token() -> None:
    """Whoever sends neither may be a browser that hides where it is; without keys nothing is hidden."""
    KEYED.check_origin(None, "relay.example", has_header=True)
    OPEN.check_origin(None, "localhost", has_header=False)
    KEYED.check_origin("https://app.example", "relay.example", has_header=False)
    with pytest.raises(WireError) as caught:
        KEYED.check_origin(None, "relay.example", has_header=False)
    assert caught.value.code == "origin_not_allowed"


@pytest.mark.parametrize(
    ("origin", "site", "is_served"),
    [
        (None, None, True),
        (None, "same-origin", True),
        (None, "none", True),
        ("https://app.example", "cross-site", True),
        (None, "cross-site", False),
        (None, "same-site", False),
        (None, "SAME-ORIGIN", False),
    ],
)
def test_a_ticket_in_an_image_of_another_site(origin: str | None, site: str | None, is_served: bool) -> None:
    """An EventSource of our own page sends no Origin, a foreign page's image neither: browsers tell which."""
    if is_served:
        KEYED.check_site(origin, site)
    else:
        with pytest.raises(WireError):
            KEYED.check_site(origin, site)


# Tokens.


def token(**changes: Any) -> str:
    arguments: dict[str, Any] = {
        "subject": "user-1",
        "jobs": ["j1"],
        "tenant": "acme",
        "ttl_s": 600,
        "now": NOW,
    }
    return sign(new_claims(**{**arguments, **changes}), SECRET)


def gate(*, now: float = NOW, revoked: Revoked | None = None, keys: str = ENTRY) -> Gate:
    verifier = TokenVerifier([secret_key(SECRET)], audience="deltawire", issuer=None)
    return Gate(
        parse_api_keys(keys),
        (),
        verifier=verifier,
        revoked=() if revoked is None else revoked,
        now=lambda: now,
    )


def code_of(made: Gate, text: str, **options: Any) -> str:
    with pytest.raises(WireError) as caught:
        made.authenticate(text, **options)
    assert caught.value.status == 401
    return caught.value.code


def test_a_token_says_tenant_jobs_and_capabilities() -> None:
    """No scope of a key comes with it."""
    principal = gate().authenticate(token(jobs=["j1", "chat-*"], capabilities=["read", "cancel"]))
    assert (principal.tenant, principal.subject, principal.is_key) == ("acme", "user-1", False)
    assert principal.scopes == {"read", "cancel"}
    assert principal.expires_at == NOW + 600
    principal.may("chat-7", "cancel")
    with pytest.raises(WireError) as caught:
        principal.may("j2", "read")
    assert (caught.value.code, caught.value.status) == ("unknown_job", 404)
    with pytest.raises(WireError) as caught:
        principal.may("j1", "submit")
    assert caught.value.code == "forbidden"


def test_keys_and_tokens_stand_side_by_side() -> None:
    """A key is found first; without keys tokens alone open the relay, and nothing else does."""
    assert gate().authenticate(KEY).is_key
    alone = gate(keys="")
    assert alone.needs_credentials
    assert not alone.authenticate(token()).is_key
    assert code_of(alone, "") == "missing_credentials"
    assert code_of(alone, KEY) == "invalid_credentials"
    assert code_of(Gate(parse_api_keys(ENTRY), ()), token()) == "invalid_credentials"
    alone.check_host("relay.example")


def test_token_replay_after_its_end() -> None:
    """What was verified once is remembered, but not beyond its end; and a revocation beats the memory."""
    clock, revoked = [NOW], Revoked()
    verifier = TokenVerifier([secret_key(SECRET)], audience="deltawire", issuer=None)
    made = Gate((), (), verifier=verifier, revoked=revoked, now=lambda: clock[0])
    text, other = token(), token(subject="user-2")
    for _ in range(3):
        made.authenticate(text)
    claims = verifier.verify(text, NOW).claims
    revoked.add([Revocation("acme", "id", claims.jti or "", NOW, claims.exp)])
    assert code_of(made, text) == "token_revoked"
    made.authenticate(other)
    clock[0] = NOW + 610
    assert code_of(made, other) == "token_expired"
    assert code_of(made, text) == "token_expired"


def test_revoked_subjects_come_back_with_new_tokens() -> None:
    """All that a subject got until then is revoked, in its own tenant, and nothing that it gets later."""
    revoked = Revoked()
    made = gate(revoked=revoked)
    revoked.add([Revocation("acme", "sub", "user-1", NOW - 60, NOW + 86_400)])
    made.authenticate(token())
    assert code_of(made, token(now=NOW - 61)) == "token_revoked"
    made.authenticate(token(now=NOW - 61, tenant="umbrella"))
    made.authenticate(token(now=NOW - 61, subject="user-2"))
    revoked.add([Revocation("acme", "sub", "user-1", NOW - 90, NOW + 86_400)])  # comes late, says less
    assert code_of(made, token(now=NOW - 61)) == "token_revoked"
    revoked.forget(NOW + 86_500)
    assert len(revoked) == 0


def test_a_ticket_is_a_token_that_may_stand_in_a_url() -> None:
    """Nothing else may: no key, no token that is good for more."""
    made = gate()
    assert made.authenticate(token(), is_ticket=True).jobs == ("j1",)
    for text in (KEY, token(jobs=["*"]), token(capabilities=["read", "cancel"]), token(ttl_s=901)):
        assert code_of(made, text, is_ticket=True) == "invalid_credentials"


def test_authentications_are_counted_by_result() -> None:
    """All results are there from the beginning, and no peer makes up another."""
    made = gate()
    made.authenticate(KEY)
    made.authenticate(token())
    code_of(made, "a.b.c")
    (family,) = made.collect()
    counted = {each.labels["result"]: each.value for each in family.samples if each.name.endswith("_total")}
    assert list(counted) == list(RESULTS)
    assert {result for result, count in counted.items() if count} == {"key", "token", "invalid_credentials"}


def test_the_memory_of_tokens_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest goes, and is verified again when it comes back."""
    monkeypatch.setattr("deltawire_relay.verifier.MAX_VERIFIED", 3)
    made = gate()
    texts = [token(subject=f"user-{number}") for number in range(9)]
    for text in texts * 2:
        made.authenticate(text)
    assert len(made._verifier._verified) == 3  # type: ignore[union-attr] # of a TokenVerifier
