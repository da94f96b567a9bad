"""What a token must be to be taken, attack by attack (PROTOCOL §5.1). Real keys; the time is given."""

import base64
import contextlib
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from jwt.algorithms import OKPAlgorithm, RSAAlgorithm

from deltawire.environment import ConfigurationError
from deltawire.errors import WireError
from deltawire.tokens import (
    MAX_TOKEN_CHARACTERS,
    Token,
    UnknownKeyError,
    covers,
    mint,
    new_claims,
    public_keys,
    read_jwks,
    secret_key,
    sign,
    verify,
)

NOW = 1_800_000_000.0
SECRET = "0123456789abcdef0123456789abcdef"
OTHER_SECRET = "fedcba9876543210fedcba9876543210"
RSA_KEY = rsa.generate_private_key(65537, 2048)
OTHER_RSA_KEY = rsa.generate_private_key(65537, 2048)
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def private_pem(key: Any) -> str:
    pem: bytes = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem.decode()


def public_pem(key: Any) -> str:
    pem: bytes = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    return pem.decode()


KEYS = (secret_key(SECRET), *public_keys(public_pem(RSA_KEY)), *public_keys(public_pem(ED_KEY)))


def claims(**changes: Any) -> dict[str, Any]:
    """Good claims, with changes; None takes one away."""
    made = {
        "aud": "deltawire",
        "sub": "user-1",
        "exp": NOW + 600,
        "iat": NOW,
        "jti": "t1",
        "tenant": "acme",
        "job": ["j1"],
        "cap": ["read"],
        **changes,
    }
    return {name: value for name, value in made.items() if value is not None}


def token(key: Any = SECRET, algorithm: str = "HS256", *, kid: str | None = None, **changes: Any) -> str:
    headers = {"kid": kid} if kid else None
    return jwt.encode(claims(**changes), key, algorithm, headers)


def segment(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def by_hand(header: Any, payload: bytes, secret: bytes = SECRET.encode()) -> str:
    """What no library would make, with a signature that is right for HS256."""
    head = header if isinstance(header, bytes) else json.dumps(header).encode()
    signed = f"{segment(head)}.{segment(payload)}"
    return f"{signed}.{segment(hmac.digest(secret, signed.encode(), 'sha256'))}"


def verified(text: str, *, now: float = NOW, issuer: str | None = None) -> Token:
    return verify(text, KEYS, now=now, audience="deltawire", issuer=issuer)


def refusal(text: str, *, now: float = NOW, issuer: str | None = None) -> WireError:
    with pytest.raises(WireError) as caught:
        verified(text, now=now, issuer=issuer)
    assert caught.value.status == 401
    for part in text.split("."):
        assert len(part) < 8 or part not in str(caught.value)
    return caught.value


# What is taken.


@pytest.mark.parametrize(
    ("key", "algorithm"), [(SECRET, "HS256"), (private_pem(RSA_KEY), "RS256"), (private_pem(ED_KEY), "EdDSA")]
)
def test_a_token_of_plain_pyjwt_is_taken(key: str, algorithm: str) -> None:
    """A backend needs nothing of ours; the three algorithms differ in nothing else."""
    made = verified(token(key, algorithm))
    assert (made.id, made.claims.sub, made.claims.tenant) == ("t1", "user-1", "acme")
    assert (made.claims.jobs, made.claims.cap, made.claims.exp) == (("j1",), ["read"], NOW + 600)


def test_what_is_missing_gives_nothing() -> None:
    """No tenant is the default one, no job is none at all, no cap is none."""
    made = verified(token(tenant=None, job=None, cap=None))
    assert (made.claims.tenant, made.claims.jobs, made.claims.cap) == ("default", (), [])
    assert not covers(made.claims.jobs, "j1")


def test_a_minted_token_is_taken() -> None:
    """Ours are like any other, also in that others can read them."""
    text = mint(
        SECRET, subject="user-1", jobs=["j1", "chat-*"], capabilities=["read", "cancel"], tenant="acme"
    )
    made = verify(text, KEYS, now=time.time())
    assert (made.claims.jobs, made.claims.cap) == (("j1", "chat-*"), ["read", "cancel"])
    assert jwt.decode(text, SECRET, ["HS256"], audience="deltawire")["sub"] == "user-1"
    for key, algorithm in ((private_pem(RSA_KEY), "RS256"), (private_pem(ED_KEY), "EdDSA")):
        verify(mint(key, subject="u", jobs=["j"], algorithm=algorithm), KEYS, now=time.time())


@pytest.mark.parametrize(
    "wrong",
    [
        {"subject": ""},
        {"subject": "a\r\nb"},
        {"tenant": "a b"},
        {"jobs": ["a*b"]},
        {"capabilities": ["reed"]},
        {"ttl_s": 86_402},
        {"ttl_s": 0},
    ],
)
def test_nothing_is_minted_that_would_be_refused(wrong: dict[str, Any]) -> None:
    """The backend's programmer hears of it, not its user."""
    with pytest.raises(ValueError):
        new_claims(**{"subject": "u", "jobs": ["j"], **wrong})


def test_ttls_are_kept_to_the_second() -> None:
    """Rounded down, so that what may live 900 s is a ticket."""
    made = new_claims(subject="u", jobs=["j1"], ttl_s=900, now=NOW + 0.9994)
    assert 898 < made.exp - made.iat <= 900
    assert Token(made, "x").ticket_fault() is None


# Attacks on the signature.


def test_alg_none() -> None:
    """A token without a signature is none, however its header spells that."""
    payload = segment(json.dumps(claims()).encode())
    for algorithm in ("none", "None", "NONE", "nOnE", "", None):
        head = segment(json.dumps({"alg": algorithm}).encode())
        for signature in ("", segment(b"x"), segment(b"\0" * 32)):
            refusal(f"{head}.{payload}.{signature}")
    refusal(by_hand({"alg": "none"}, json.dumps(claims()).encode()))


def test_hs_rs_confusion() -> None:
    """The public key, known to all, is no secret: only a key's own algorithm is ever tried with it."""
    public = public_pem(RSA_KEY)
    for secret in (public, public.strip(), public_pem(ED_KEY)):
        forged = by_hand({"alg": "HS256"}, json.dumps(claims()).encode(), secret.encode())
        refusal(forged)
        with pytest.raises(WireError):
            verify(forged, public_keys(public), now=NOW)
    for algorithm in ("HS384", "HS512", "RS384", "PS256", "ES256", ["HS256"], {"a": 1}):
        refusal(by_hand({"alg": algorithm}, json.dumps(claims()).encode()))
    with pytest.raises(ConfigurationError):
        secret_key(public)


def test_a_key_of_somebody_else() -> None:
    """Signed, but not by whom we trust."""
    refusal(token(OTHER_SECRET))
    refusal(token(private_pem(OTHER_RSA_KEY), "RS256"))


def test_a_key_that_the_token_brings_along() -> None:
    """jwk, jku, x5u and x5c are the attacker's own; nothing follows them."""
    jwk = json.loads(RSAAlgorithm.to_jwk(OTHER_RSA_KEY.public_key()))
    for extra in (
        {"jwk": jwk},
        {"jku": "http://127.0.0.1:1/"},
        {"x5u": "http://127.0.0.1:1/"},
        {"x5c": ["AA=="]},
    ):
        refusal(jwt.encode(claims(), private_pem(OTHER_RSA_KEY), "RS256", extra))


def test_an_altered_token() -> None:
    """One bit elsewhere, in any part, and it is none."""
    good = token()
    for at in range(0, len(good), 7):
        altered = good[:at] + ("A" if good[at] != "A" else "B") + good[at + 1 :]
        refusal(altered)


def test_signatures_of_other_tokens() -> None:
    """Header, claims and signature belong together."""
    one, other = token().split("."), token(sub="user-2").split(".")
    refusal(".".join([one[0], one[1], other[2]]))
    refusal(".".join([one[0], other[1], one[2]]))


@pytest.mark.parametrize(
    "extra", [{"crit": ["exp"]}, {"crit": []}, {"b64": False}, {"b64": False, "crit": ["b64"]}]
)
def test_extensions_that_must_be_understood(extra: dict[str, Any]) -> None:
    """What we do not understand is not ignored (RFC 7515 §4.1.11)."""
    refusal(by_hand({"alg": "HS256", **extra}, json.dumps(claims()).encode()))


# Attacks on the claims, by somebody who has an issuer's signature.


@pytest.mark.parametrize("aud", ["other", ["other"], [], "DELTAWIRE", "deltawire ", ["deltawire-staging"]])
def test_wrong_aud(aud: Any) -> None:
    """A token for another service of the same issuer opens nothing here."""
    assert refusal(token(aud=aud)).code == "invalid_credentials"


def test_aud_among_others() -> None:
    """`aud` may be a list (RFC 7519 §4.1.3)."""
    verified(token(aud=["other", "deltawire"]))


def test_wrong_iss() -> None:
    """Where an issuer is configured, no other will do, and none neither."""
    verified(token(iss="https://issuer.example"), issuer="https://issuer.example")
    verified(token(iss="https://issuer.example"))
    for iss in ("https://evil.example", "https://issuer.example/", "", None):
        refusal(token(iss=iss), issuer="https://issuer.example")


def test_expired() -> None:
    """`exp` counts, with the leeway that clocks need."""
    verified(token(exp=NOW - 5, iat=NOW - 60))
    assert refusal(token(exp=NOW - 10, iat=NOW - 60)).code == "token_expired"
    assert refusal(token(), now=NOW + 86_400).code == "token_expired"


def test_not_yet_valid() -> None:
    """Neither before `nbf` nor before it was issued."""
    verified(token(nbf=NOW + 5, iat=NOW + 5))
    assert refusal(token(nbf=NOW + 60)).code == "invalid_credentials"
    assert refusal(token(iat=NOW + 60)).code == "invalid_credentials"


@pytest.mark.parametrize("missing", ["exp", "iat", "sub", "aud"])
def test_claims_that_must_be_there(missing: str) -> None:
    """A token without an end, or of nobody, is none."""
    changes: dict[str, Any] = {missing: None}
    refusal(token(**changes))


@pytest.mark.parametrize(
    ("exp", "iat"),
    [
        (NOW + 86_401, NOW),
        (NOW + 600, NOW - 86_400),
        (NOW, NOW),
        (NOW + 5, NOW + 6),
        (1e300, NOW),
        (1e300, 1e300),
    ],
)
def test_a_life_longer_than_a_day(exp: float, iat: float) -> None:
    """A day at the most, whoever signs; otherwise a revocation would have to be kept for ever."""
    refusal(token(exp=exp, iat=iat))


@pytest.mark.parametrize(
    "changes",
    [
        {"exp": "tomorrow"},
        {"exp": True},
        {"exp": str(NOW + 600)},
        {"exp": 10**400},
        {"exp": [NOW + 600]},
        {"nbf": "now"},
        {"sub": 7},
        {"sub": ["a"]},
        {"aud": {"a": 1}},
        {"jti": 7},
        {"tenant": 7},
        {"job": 7},
        {"job": [7]},
        {"job": {"a": 1}},
        {"cap": "read"},
        {"cap": {"read": True}},
        {"iss": 7},
    ],
)
def test_claims_of_another_kind(changes: dict[str, Any]) -> None:
    """Nothing is guessed, and nothing is converted."""
    refusal(by_hand({"alg": "HS256"}, json.dumps(claims(**changes)).encode()))


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999", "9" * 5_000])
def test_times_that_are_no_numbers(number: str) -> None:
    """Comparisons with them would come out as an attacker likes."""
    for name in ("exp", "iat"):
        payload = json.dumps(claims(**{name: 4711})).replace("4711", number)
        refusal(by_hand({"alg": "HS256"}, payload.encode()))


def test_duplicate_claims() -> None:
    """Two readers could disagree about which of them counts (RFC 7519 §4)."""
    text = json.dumps(claims())
    verified(by_hand({"alg": "HS256"}, text.encode()))
    for more in ('"tenant":"umbrella"', '"cap":["cancel"]', '"exp":9999999999', '"tenant":"acme"'):
        refusal(by_hand({"alg": "HS256"}, f"{text[:-1]},{more}}}".encode()))
    refusal(by_hand(b'{"alg":"HS256","alg":"none"}', text.encode()))


def test_giant_tokens() -> None:
    """Above the bound nothing is parsed, let alone verified; so a parser's worst case stays small."""
    refusal(token(job=[f"job-{number}" for number in range(101)]))
    refusal(token(job=["j" * 128] * 100))
    refusal("a" * 8_000_000)
    refusal("a.b." + "c" * 8_000_000)
    assert len(token(pad="x" * MAX_TOKEN_CHARACTERS)) > MAX_TOKEN_CHARACTERS
    refusal(token(pad="x" * MAX_TOKEN_CHARACTERS))
    verified(token(pad="x" * (MAX_TOKEN_CHARACTERS // 2)))
    refusal(by_hand({"alg": "HS256"}, b"[" * 5_000))
    refusal(by_hand(b"[" * 5_000, b"{}"))
    refusal(by_hand({"alg": "HS256"}, b'{"a":' * 1_000))


@pytest.mark.parametrize("name", ["a\r\nb", "a\nb", "\u202euser", "a\0b", "\u2028", "", "x" * 256, "\ufeff"])
def test_unicode_and_crlf_in_claims(name: str) -> None:
    """A subject may stand in a log line: no line ends, nothing that turns the text around."""
    refusal(token(sub=name))
    refusal(token(jti=name))


def test_names_of_people_are_taken() -> None:
    """Other scripts are no attack."""
    assert verified(token(sub="Zoë Ünal <zoë@example.com> 李")).claims.sub == "Zoë Ünal <zoë@example.com> 李"


def test_lone_surrogates() -> None:
    """They cannot be written down in UTF-8, so nobody is called that."""
    refusal(by_hand({"alg": "HS256"}, json.dumps(claims(sub="\ud800")).encode()))


@pytest.mark.parametrize("tenant", ["", "a b", "a/b", "a:b", "{a}", "a\nb", "é", "x" * 65, "*"])
def test_tenants_with_odd_characters(tenant: str) -> None:
    """A tenant stands in keys of Redis."""
    refusal(token(tenant=tenant))


@pytest.mark.parametrize(
    "cap", [["reed"], ["READ"], ["read "], ["read", "admin"], ["list"], ["tokens"], ["*"], [""]]
)
def test_cap_typos(cap: list[str]) -> None:
    """A capability that does not exist is a mistake, and no less a one beside others."""
    refusal(token(cap=cap))


@pytest.mark.parametrize(
    "job",
    [
        "a*b",
        "*a",
        "a**",
        "**",
        "a.b",
        "a/b",
        "",
        "a b",
        "{a}",
        "a\n",
        "x" * 129,
        "x" * 129 + "*",
        "?",
        "[a-z]",
    ],
)
def test_job_pattern_abuse(job: str) -> None:
    """A pattern ends in its only `*`; all else is one of the characters of job ids."""
    refusal(token(job=[job]))
    refusal(token(job=job))


@pytest.mark.parametrize(
    ("jobs", "job_id", "is_covered"),
    [
        (("j1",), "j1", True),
        (("j1",), "j10", False),
        (("j1",), "J1", False),
        (("j10",), "j1", False),
        (("chat-*",), "chat-1", True),
        (("chat-*",), "chat-", True),
        (("chat-*",), "chat", False),
        (("chat-*",), "xchat-1", False),
        (("*",), "anything", True),
        ((), "anything", False),
        (("a", "b-*"), "b-1", True),
    ],
)
def test_another_jobs_token(jobs: tuple[str, ...], job_id: str, is_covered: bool) -> None:
    """A token is for the jobs that it names."""
    assert covers(jobs, job_id) is is_covered


@pytest.mark.parametrize(
    "changes",
    [
        {"job": ["j1", "j2"]},
        {"job": ["j*"]},
        {"job": ["*"]},
        {"job": []},
        {"cap": ["read", "cancel"]},
        {"cap": ["cancel"]},
        {"cap": []},
        {"cap": ["read", "read"]},
        {"exp": NOW + 901},
        {"iat": NOW - 400},
    ],
)
def test_a_ticket_with_other_caps_or_too_long(changes: dict[str, Any]) -> None:
    """What stands in a URL is good for one job, to read, and for a quarter of an hour."""
    assert verified(token()).ticket_fault() is None
    assert verified(token(exp=NOW + 900)).ticket_fault() is None
    assert verified(token(job="j1")).ticket_fault() is None
    assert verified(token(**changes)).ticket_fault() is not None


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "a.b",
        "a.b.c.d",
        "dw_key",
        "a.b.c\n",
        " a.b.c",
        "a.b.c=",
        "a+.b/.c",
        "é.b.c",
        "a.b.c" * 2_000,
    ],
)
def test_what_is_no_token(text: str) -> None:
    """One shape (RFC 7515 §3.1), and no forgiving of another."""
    refusal(text)


def test_a_token_without_an_id_is_named_by_what_is_signed() -> None:
    """Not by its signature: HS256's last character has bits that no decoder looks at."""
    text = token(jti=None)
    assert verified(text).id == hashlib.sha256(text.rpartition(".")[0].encode()).hexdigest()


# Keys.


def jwks(*keys: dict[str, Any]) -> bytes:
    return json.dumps({"keys": keys}).encode()


def jwk(key: Any, kid: str | None, **extra: Any) -> dict[str, Any]:
    algorithm: Any = RSAAlgorithm if hasattr(key, "key_size") else OKPAlgorithm
    value = json.loads(algorithm.to_jwk(key.public_key()))
    value.pop("key_ops", None)
    return {**value, **({"kid": kid} if kid else {}), **extra}


def test_a_key_set() -> None:
    """RSA and Ed25519, by their names."""
    keys = read_jwks(jwks(jwk(RSA_KEY, "r", use="sig", alg="RS256"), jwk(ED_KEY, "e")))
    assert [(key.algorithm, key.key_id) for key in keys] == [("RS256", "r"), ("EdDSA", "e")]
    verify(token(private_pem(RSA_KEY), "RS256", kid="r"), keys, now=NOW)
    verify(token(private_pem(ED_KEY), "EdDSA", kid="e"), keys, now=NOW)


def test_unknown_kid() -> None:
    """It may be among the issuer's keys by now; a key under another name is not tried."""
    keys = read_jwks(jwks(jwk(RSA_KEY, "r")))
    with pytest.raises(UnknownKeyError):
        verify(token(private_pem(RSA_KEY), "RS256", kid="s"), keys, now=NOW)
    for text in (
        token(private_pem(RSA_KEY), "RS256"),
        token(private_pem(OTHER_RSA_KEY), "RS256", kid="r"),
        token(SECRET, kid="s"),
        by_hand({"alg": "RS256", "kid": ["r"]}, b"{}"),
        by_hand({"alg": "none", "kid": "s"}, b"{}"),
    ):
        with pytest.raises(WireError) as caught:
            verify(text, keys, now=NOW)
        assert not isinstance(caught.value, UnknownKeyError)


def test_keys_of_a_set_that_are_not_for_us() -> None:
    """Among them symmetric ones, which everybody could read: a set never gives a secret."""
    small = rsa.generate_private_key(65537, 1024)
    curve = ec.generate_private_key(ec.SECP256R1())
    others = [
        {"kty": "oct", "k": segment(SECRET.encode()), "kid": "o", "alg": "HS256"},
        jwk(RSA_KEY, None),
        jwk(RSA_KEY, "enc", use="enc"),
        jwk(RSA_KEY, "alg", alg="HS256"),
        jwk(small, "small"),
        json.loads(jwt.algorithms.ECAlgorithm.to_jwk(curve.public_key())) | {"kid": "ec"},
        {"kty": "RSA", "kid": "broken", "n": "AQAB"},
        {"kty": "OKP", "kid": "broken", "crv": "Ed25519", "x": 7},
        {"kty": ["RSA"], "kid": "list"},
        "no object",
    ]
    assert read_jwks(json.dumps({"keys": [*others, jwk(ED_KEY, "e")]}).encode())[0].key_id == "e"
    assert len(read_jwks(json.dumps({"keys": [*others, jwk(ED_KEY, "e")]}).encode())) == 1
    for data in (b"", b"[]", b"{}", b'{"keys":{}}', b"<html>"):
        with pytest.raises(ValueError):
            read_jwks(data)


def test_rotation_of_public_keys() -> None:
    """Several PEM blocks, old and new; in one line with \\n as environment files have it."""
    both = public_keys(public_pem(RSA_KEY) + public_pem(OTHER_RSA_KEY))
    for key in (RSA_KEY, OTHER_RSA_KEY):
        verify(token(private_pem(key), "RS256"), both, now=NOW)
    assert len(public_keys(public_pem(ED_KEY).replace("\n", "\\n"))) == 1


@pytest.mark.parametrize(
    "text",
    [
        "secret",
        "",
        private_pem(ED_KEY),
        public_pem(ED_KEY) + "junk",
        "-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----",
        public_pem(ec.generate_private_key(ec.SECP256R1())),
        public_pem(rsa.generate_private_key(65537, 1024)),
    ],
)
def test_public_keys_that_are_none(text: str) -> None:
    """The operator hears of it at the start, and a private key is not repeated."""
    with pytest.raises(ConfigurationError) as caught:
        public_keys(text)
    assert "PRIVATE KEY-----" not in str(caught.value)


@pytest.mark.parametrize("secret", ["short", "x" * 31, '{"kty":"oct","k":"0123456789abcdef0123456789"}'])
def test_secrets_that_are_none(secret: str) -> None:
    """32 bytes at least (RFC 7518 §3.2), and never repeated."""
    with pytest.raises(ConfigurationError) as caught:
        secret_key(secret)
    assert secret not in str(caught.value)


def test_keys_show_nothing() -> None:
    """A key may come into a traceback, or a repr of settings."""
    assert SECRET not in repr(secret_key(SECRET))
    assert SECRET not in repr(KEYS)


def test_signing_names_the_key() -> None:
    """For issuers with a key set of their own."""
    text = sign(new_claims(subject="u", jobs=["j"]), private_pem(RSA_KEY), algorithm="RS256", key_id="r")
    assert jwt.get_unverified_header(text)["kid"] == "r"


# Whatever comes.

JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3),
)
CLAIM_NAMES = st.sampled_from(["aud", "sub", "exp", "iat", "nbf", "iss", "jti", "tenant", "job", "cap", "x"])
HEADER_NAMES = st.sampled_from(["alg", "kid", "typ", "crit", "jku", "jwk", "x"])


@settings(max_examples=30)
@given(st.dictionaries(HEADER_NAMES, JSON_VALUES), st.dictionaries(CLAIM_NAMES, JSON_VALUES))
def test_any_header_and_claims(head: dict[str, Any], changes: dict[str, Any]) -> None:
    """Signed or not, a token is taken or refused; nothing else ever happens."""
    payload = json.dumps({**claims(), **changes}).encode()
    for header in (head, {**head, "alg": "HS256"}, {"alg": "HS256"}):
        with contextlib.suppress(WireError):
            verified(by_hand(header, payload))


@settings(max_examples=30)
@given(st.text() | st.from_regex(r"[A-Za-z0-9_-]{0,9}\.[A-Za-z0-9_-]{0,9}\.[A-Za-z0-9_-]{0,9}"))
def test_any_text(text: str) -> None:
    """No text is a token by chance."""
    with pytest.raises(WireError):
        verified(text)


@settings(max_examples=30)
@given(JSON_VALUES | st.fixed_dictionaries({"keys": st.lists(st.dictionaries(st.text(), JSON_VALUES))}))
def test_any_key_set(value: Any) -> None:
    """A set has keys, or is refused."""
    with contextlib.suppress(ValueError):
        read_jwks(json.dumps(value).encode())
