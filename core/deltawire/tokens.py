"""Tokens: what a client may do, for a while, signed by whoever it trusts (PROTOCOL.md §5.1, RFC 7519).

Pure: texts, keys and a time in, claims or a WireError out. A backend makes tokens with `mint`, or with any
JWT library. What makes or reads keys needs PyJWT (`pip install "pyjwt[crypto]"`).
"""

import binascii
import hashlib
import json
import re
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, Literal, get_args

import msgspec

from .environment import ConfigurationError
from .errors import DeltawireError, WireError
from .keys import is_job_id
from .options import TENANT_RULE, is_tenant

Capability = Literal["read", "cancel", "submit"]
CAPABILITIES: Final[frozenset[Capability]] = frozenset(get_args(Capability))
AUDIENCE: Final = "deltawire"
LEEWAY_S: Final = 10.0
"""How far two clocks may be apart."""
MAX_LIFE_S: Final = 86_400
MAX_TICKET_LIFE_S: Final = 900
MAX_TOKEN_CHARACTERS: Final = 8_192
MAX_JOBS: Final = 100
MAX_NAME_CHARACTERS: Final = 255
MIN_SECRET_BYTES: Final = 32
MIN_RSA_BITS: Final = 2_048
MAX_JWKS_KEYS: Final = 100

_has_shape: Final = re.compile(r"[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+").fullmatch
_PEM: Final = re.compile(r"-----BEGIN ([A-Z0-9 ]+)-----.+?-----END \1-----", re.DOTALL)


class Key(msgspec.Struct, frozen=True):
    """What verifies signatures, by the one algorithm that is the key's own: no token chooses another."""

    algorithm: Literal["HS256", "RS256", "EdDSA"]
    check: Callable[[bytes, bytes], bool]
    """Takes what is signed, and the signature."""
    key_id: str | None = None
    """Only tokens that name it are for this key. None: it is tried for all of its algorithm."""


class Claims(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a token says, by its names on the wire. Times are Unix seconds; other claims are ignored."""

    aud: str | list[str]
    sub: str
    exp: float
    iat: float
    iss: str | None = None
    nbf: float | None = None
    jti: str | None = None
    tenant: str = "default"
    job: str | list[str] = []
    cap: list[Capability] = []

    @property
    def jobs(self) -> tuple[str, ...]:
        """Ids, or patterns that end in `*`."""
        return (self.job,) if isinstance(self.job, str) else tuple(self.job)


class Token(msgspec.Struct, frozen=True):
    """A token that was verified. `id` is its `jti`, or a hash of what is signed."""

    claims: Claims
    id: str

    def ticket_fault(self) -> str | None:
        """Why it may not stand in a URL, which is written down in many places; None where it may."""
        claims = self.claims
        if len(claims.jobs) != 1 or not is_job_id(claims.jobs[0]):
            return "a ticket is for one job, by its id"
        if claims.cap != ["read"]:
            return "a ticket has the capability read, and no other"
        if claims.exp - claims.iat > MAX_TICKET_LIFE_S:
            return f"a ticket lives {MAX_TICKET_LIFE_S} s at most"
        return None


class UnknownKeyError(WireError):
    """A token names a key that is not among ours, and may be among those of an issuer by now."""

    def __init__(self) -> None:
        super().__init__("invalid_credentials", "this token is signed with a key that is not known here")


class PyJWTMissingError(DeltawireError):
    """PyJWT is not installed."""


def covers(jobs: Sequence[str], job_id: str) -> bool:
    """Whether `job_id` is one of the ids, or begins as one of the patterns does."""
    return any(job_id.startswith(job[:-1]) if job.endswith("*") else job_id == job for job in jobs)


# Verifying.


def verify(
    token: str, keys: Iterable[Key], *, now: float, audience: str = AUDIENCE, issuer: str | None = None
) -> Token:
    """Raises WireError `invalid_credentials` (an UnknownKeyError where new keys may help), `token_expired`.

    Nothing of a token is repeated in an error, and before its signature is checked nothing is said about it.
    """
    if len(token) > MAX_TOKEN_CHARACTERS or not _has_shape(token):
        raise _refusal("this is no credential that is known here")
    signed, _, signature = token.rpartition(".")
    head, _, body = signed.partition(".")
    _check_signature(_json_object(head), signed.encode(), _bytes(signature), tuple(keys))
    try:
        claims = msgspec.convert(_json_object(body), Claims)
    except (msgspec.ValidationError, OverflowError) as error:
        raise _refusal("this token lacks a claim (aud, sub, exp, iat), or one is of another kind") from error
    if fault := _fault(claims):
        raise _refusal(fault)
    if audience not in ([claims.aud] if isinstance(claims.aud, str) else claims.aud):
        raise _refusal("this token is for another audience (aud)")
    if issuer is not None and claims.iss != issuer:
        raise _refusal("this token is of another issuer (iss)")
    if not max(claims.iat, claims.nbf or claims.iat) <= now + LEEWAY_S:
        raise _refusal("this token is not valid yet (nbf, iat)")
    if not now < claims.exp + LEEWAY_S:
        raise WireError("token_expired", "this token has expired; get another one")
    return Token(claims, claims.jti or _hash(signed))


def _check_signature(header: dict[str, Any], signed: bytes, signature: bytes, keys: Sequence[Key]) -> None:
    if "crit" in header or "b64" in header:  # RFC 7515 §4.1.11, RFC 7797
        raise _refusal("this token asks for an extension")
    algorithm, key_id = _text(header.get("alg")), _text(header.get("kid"))
    for key in keys:
        is_meant = key.algorithm == algorithm and key.key_id in {None, key_id}
        if is_meant and key.check(signed, signature):
            return
    is_known = any(key.key_id == key_id for key in keys)
    if algorithm in {"RS256", "EdDSA"} and key_id is not None and not is_known:
        raise UnknownKeyError
    raise _refusal("this is no credential that is known here")


def _fault(claims: Claims) -> str | None:
    """What is wrong with claims, whatever the time is and whomever they are for."""
    jobs = claims.jobs
    if not all(_is_name(name) for name in (claims.sub, claims.jti) if name is not None):
        return f"sub and jti have 1 to {MAX_NAME_CHARACTERS} printable characters"
    if not is_tenant(claims.tenant):
        return f"a tenant is {TENANT_RULE}"
    if len(jobs) > MAX_JOBS or not all(job == "*" or is_job_id(job.removesuffix("*")) for job in jobs):
        return f"job has at most {MAX_JOBS} job ids, or beginnings of some with a * at the end"
    if not 0 < claims.exp - claims.iat <= MAX_LIFE_S:
        return f"a token lives at most {MAX_LIFE_S} s, from iat to exp"
    return None


def _is_name(text: str) -> bool:
    """Whether it may stand in a log line: without line ends, and without what turns the rest around."""
    return 0 < len(text) <= MAX_NAME_CHARACTERS and text.isprintable()


def _text(value: Any) -> str | None:  # whatever a header says
    return value if isinstance(value, str) else None


def _json_object(segment: str) -> dict[str, Any]:
    """Claims that come twice are refused: two readers could disagree about them (RFC 7519 §4)."""
    try:
        value = json.loads(_bytes(segment), object_pairs_hook=_unique, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _refusal("this is no credential that is known here") from error
    if not isinstance(value, dict):
        raise _refusal("this is no credential that is known here")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name comes twice")
    return value


def _no_number(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _bytes(segment: str) -> bytes:
    text = segment.translate(_FROM_URL) + "=" * (-len(segment) % 4)
    try:
        return binascii.a2b_base64(text, strict_mode=True)
    except binascii.Error as error:
        raise _refusal("this is no credential that is known here") from error


_FROM_URL: Final = str.maketrans("-_", "+/")


def _hash(signed: str) -> str:
    """Names a token without a `jti`. The signature is left out: some can be written in more than one way."""
    return hashlib.sha256(signed.encode()).hexdigest()


def _refusal(message: str) -> WireError:
    return WireError("invalid_credentials", message)


# Keys.


def secret_key(secret: str) -> Key:
    """HS256. Raises ConfigurationError."""
    value = secret.encode()
    if len(value) < MIN_SECRET_BYTES:
        raise ConfigurationError(
            f"a secret for tokens has at least {MIN_SECRET_BYTES} bytes (`openssl rand -base64 32`)"
        )
    algorithm = _jwt().get_algorithm_by_name("HS256")
    try:
        algorithm.prepare_key(value)
    except _jwt().PyJWTError as error:
        raise ConfigurationError("a secret for tokens is a random text, no key of another kind") from error
    return Key("HS256", lambda signed, signature: algorithm.verify(signed, value, signature))


def public_keys(text: str) -> tuple[Key, ...]:
    """The keys in PEM blocks, RSA (RS256) or Ed25519 (EdDSA). Raises ConfigurationError."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    text = text.replace("\\n", "\n")  # as it comes in one line of an environment file
    keys = []
    for block in _PEM.finditer(text):
        if block[1] not in {"PUBLIC KEY", "RSA PUBLIC KEY"}:
            raise ConfigurationError(f"a public key is wanted (BEGIN PUBLIC KEY), not a {block[1].lower()}")
        try:
            keys.append(_public_key(load_pem_public_key(block[0].encode()), None))
        except (ValueError, UnsupportedAlgorithm) as error:
            raise ConfigurationError(
                f"a public key is RSA with at least {MIN_RSA_BITS} bits, or Ed25519, in PEM"
            ) from error
    if not keys or _PEM.sub("", text).strip():
        raise ConfigurationError("public keys are PEM blocks (BEGIN PUBLIC KEY), and nothing else")
    return tuple(keys)


def read_jwks(data: bytes) -> tuple[Key, ...]:
    """The keys of a JSON Web Key Set (RFC 7517) that have a `kid` and are for us; others are passed over.

    A symmetric key never is: whoever serves a set shows it to everybody. Raises ValueError for what is none.
    """
    algorithms = _jwt().algorithms
    kinds: dict[str, Any] = {"RSA": algorithms.RSAAlgorithm, "OKP": algorithms.OKPAlgorithm}
    value = json.loads(data)
    if not isinstance(value, dict) or not isinstance(value.get("keys"), list):
        raise ValueError("this is no JSON Web Key Set")  # noqa: TRY004 - of a peer, not of a caller
    keys = []
    for jwk in value["keys"][:MAX_JWKS_KEYS]:
        if not isinstance(jwk, dict) or jwk.get("use", "sig") != "sig" or not _text(jwk.get("kid")):
            continue
        try:
            public = {name: part for name, part in jwk.items() if name != "d"}
            key = _public_key(kinds[jwk["kty"]].from_jwk(public), jwk["kid"])
        except (_jwt().PyJWTError, ValueError, TypeError, KeyError, AttributeError):
            continue
        if jwk.get("alg", key.algorithm) == key.algorithm:
            keys.append(key)
    return tuple(keys)


def _public_key(key: Any, key_id: str | None) -> Key:  # of one of a dozen types
    """Raises ValueError."""
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    name: Literal["RS256", "EdDSA"]
    if isinstance(key, RSAPublicKey) and key.key_size >= MIN_RSA_BITS:
        name = "RS256"
    elif isinstance(key, Ed25519PublicKey):
        name = "EdDSA"
    else:
        raise ValueError("neither RSA with enough bits nor Ed25519")
    algorithm = _jwt().get_algorithm_by_name(name)
    return Key(name, lambda signed, signature: algorithm.verify(signed, key, signature), key_id)


def _jwt() -> Any:  # the module, where it is installed
    try:
        import jwt
    except ImportError as error:
        raise PyJWTMissingError('tokens need PyJWT: pip install "pyjwt[crypto]"') from error
    return jwt


# Minting.


def new_claims(
    *,
    subject: str,
    jobs: Sequence[str],
    capabilities: Sequence[Capability] = ("read",),
    tenant: str = "default",
    ttl_s: float = 3_600,
    audience: str = AUDIENCE,
    issuer: str | None = None,
    now: float | None = None,
) -> Claims:
    """Claims that will be accepted, with an id of their own. Raises ValueError."""
    issued_at = round(time.time() if now is None else now, 3)
    claims = Claims(
        aud=audience,
        sub=subject,
        exp=int(issued_at + ttl_s),
        iat=issued_at,
        iss=issuer,
        jti=secrets.token_urlsafe(12),
        tenant=tenant,
        job=list(jobs),
        cap=list(capabilities),
    )
    fault = _fault(claims)
    if unknown := set(capabilities) - CAPABILITIES:
        fault = f"there are no capabilities {', '.join(sorted(unknown))}"
    if fault:
        raise ValueError(fault)
    return claims


def sign(claims: Claims, key: str | bytes, *, algorithm: str = "HS256", key_id: str | None = None) -> str:
    """The token. `key` is the secret, or a private key in PEM for RS256 and EdDSA."""
    headers = {"kid": key_id} if key_id is not None else None
    text: str = _jwt().encode(msgspec.to_builtins(claims), key, algorithm, headers)
    return text


def mint(
    key: str | bytes,
    *,
    subject: str,
    jobs: Sequence[str],
    capabilities: Sequence[Capability] = ("read",),
    tenant: str = "default",
    ttl_s: float = 3_600,
    audience: str = AUDIENCE,
    issuer: str | None = None,
    algorithm: str = "HS256",
    key_id: str | None = None,
) -> str:
    """A token for `subject` about `jobs` (ids, or patterns with a `*` at the end). Raises ValueError."""
    claims = new_claims(
        subject=subject,
        jobs=jobs,
        capabilities=capabilities,
        tenant=tenant,
        ttl_s=ttl_s,
        audience=audience,
        issuer=issuer,
    )
    return sign(claims, key, algorithm=algorithm, key_id=key_id)
