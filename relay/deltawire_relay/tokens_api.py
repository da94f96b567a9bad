"""The HTTP door for tokens: made for a job, revoked before their time (PROTOCOL.md §5.10)."""

import time
from typing import Any, Final, TypeVar, cast

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire.errors import WireError
from deltawire.tokens import (
    MAX_LIFE_S,
    MAX_NAME_CHARACTERS,
    Capability,
    Claims,
    new_claims,
    sign,
)

from .auth import Gate, Principal, Verifier, bearer_token
from .http_app import json_answer
from .http_body import json_object
from .jobs import check_job_id
from .revocations import Revocations
from .revoked import Revocation

TTL_S: Final = 3_600

T = TypeVar("T")


class Mint:
    """Makes tokens that this installation takes."""

    def __init__(self, secret: str, *, audience: str, issuer: str | None) -> None:
        self._secret = secret
        self._audience = audience
        self._issuer = issuer

    def token(
        self,
        principal: Principal,
        job_id: str,
        capabilities: list[Capability],
        *,
        ttl_s: float,
        subject: str | None = None,
    ) -> tuple[str, Claims]:
        """Of the principal's tenant. Raises WireError."""
        try:
            claims = new_claims(
                subject=principal.subject if subject is None else subject,
                jobs=[job_id],
                capabilities=capabilities,
                tenant=principal.tenant or "default",
                ttl_s=ttl_s,
                audience=self._audience,
                issuer=self._issuer,
            )
        except ValueError as error:
            raise WireError("invalid_request", str(error)) from error
        return sign(claims, self._secret), claims

    def for_submitter(self, principal: Principal, job_id: str, ttl_s: float) -> str | None:
        """A token for the job that the principal has just made: it may do no more, and for no longer."""
        capabilities: list[Capability] = [each for each in _OF_A_JOB if each in principal.scopes]
        if not principal.is_key:
            ttl_s = min(ttl_s, principal.expires_at - time.time())
        if not capabilities or ttl_s < 2:  # whole seconds, rounded down
            return None
        return self.token(principal, job_id, capabilities, ttl_s=min(ttl_s, MAX_LIFE_S))[0]


_OF_A_JOB: Final[tuple[Capability, ...]] = ("read", "cancel")


class TokensApi:
    """`mint` and `revocations` are None where tokens are not made, or not taken."""

    def __init__(
        self,
        gate: Gate,
        mint: Mint | None,
        verifier: Verifier | None,
        revocations: Revocations | None,
    ) -> None:
        self._gate = gate
        self._mint = mint
        self._verifier = verifier
        self._revocations = revocations

    def routes(self) -> list[Route]:
        return [
            Route("/v1/jobs/{job_id}/tokens", self.create_token, methods=["POST"]),
            Route("/v1/tokens/revoke", self.revoke, methods=["POST"]),
        ]

    async def _principal(self, request: Request) -> Principal:
        principal = await self._gate.admit(bearer_token(request.headers.get("authorization")))
        principal.require("tokens")
        return principal

    async def create_token(self, request: Request) -> Response:
        principal = await self._principal(request)
        job_id = check_job_id(request.path_params["job_id"])
        asked = _read(await json_object(request, may_be_empty=True), _TokenRequest)
        if self._mint is None:
            raise WireError("not_found", "this relay makes no tokens: DELTAWIRE_JWT_SECRET is not set")
        if not 1 <= asked.ttl_s <= MAX_LIFE_S:
            raise WireError("invalid_request", f"ttl_s is 1 to {MAX_LIFE_S}", param="ttl_s")
        if not asked.cap or len(set(asked.cap)) != len(asked.cap):
            raise WireError("invalid_request", "cap has one capability or more, each once", param="cap")
        for capability in asked.cap:
            principal.require(capability)
        # Whosever the job is: the token is of the key's tenant, and opens no other's. So nothing is looked
        # up, and nothing told about what there is.
        token, claims = self._mint.token(principal, job_id, asked.cap, ttl_s=asked.ttl_s, subject=asked.sub)
        answer = {
            "object": "token",
            "token": token,
            "token_id": claims.jti,
            "job_id": job_id,
            "cap": claims.cap,
            "expires_at": claims.exp,
        }
        return json_answer(201, answer, {"Cache-Control": "no-store"})

    async def revoke(self, request: Request) -> Response:
        principal = await self._principal(request)
        asked = _read(await json_object(request), _RevocationRequest)
        given = [value for value in (asked.token, asked.token_id, asked.sub) if value is not None]
        if len(given) != 1:
            raise WireError("invalid_request", "the body has one of token, token_id and sub")
        if self._revocations is None or self._verifier is None:
            raise WireError("not_found", "this relay takes no tokens")
        now = time.time()
        tenant, expires_at = principal.tenant or "default", now + MAX_LIFE_S
        if asked.sub is not None:
            revocation = Revocation(tenant, "sub", _name(asked.sub, "sub"), now, expires_at)
        elif asked.token_id is not None:
            revocation = Revocation(tenant, "id", _name(asked.token_id, "token_id"), now, expires_at)
        else:
            revocation = await self._of_token(cast(str, asked.token), tenant, now)
        await self._revocations.revoke(revocation)
        answer = {
            "object": "revocation",
            "sub" if revocation.kind == "sub" else "token_id": revocation.value,
            "revoked_at": revocation.at,
            "expires_at": revocation.expires_at,
        }
        return json_answer(200, answer)

    async def _of_token(self, text: str, tenant: str, now: float) -> Revocation:
        assert self._verifier is not None  # noqa: S101 - asked before
        try:
            token = self._verifier.verify(text, now)
        except WireError as error:
            # Not the caller's own credential, so no 401.
            raise WireError("invalid_request", f"the token: {error.error.message}", param="token") from error
        if token.claims.tenant != tenant:
            raise WireError("invalid_request", "the token is none of this tenant's", param="token")
        return Revocation(tenant, "id", token.id, now, token.claims.exp)


class _TokenRequest(msgspec.Struct, forbid_unknown_fields=True):
    cap: list[Capability] = msgspec.field(default_factory=lambda: ["read"])
    ttl_s: int = TTL_S
    sub: str | None = None


class _RevocationRequest(msgspec.Struct, forbid_unknown_fields=True):
    token: str | None = None
    token_id: str | None = None
    sub: str | None = None


def _read(body: dict[str, Any], kind: type[T]) -> T:
    try:
        return msgspec.convert(body, kind)
    except msgspec.ValidationError as error:
        raise WireError("invalid_request", f"the body does not fit: {error}") from error


def _name(text: str, field: str) -> str:
    if not 0 < len(text) <= MAX_NAME_CHARACTERS or not text.isprintable():
        raise WireError(
            "invalid_request", f"{field} has 1 to {MAX_NAME_CHARACTERS} printable characters", param=field
        )
    return text
