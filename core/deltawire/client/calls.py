"""What the clients ask for: addresses, credentials, bodies; and whether they ask again. No I/O, no clock."""

import logging
import os
import re
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, get_args
from urllib.parse import urlencode, urlsplit

import httpx
import msgspec

from deltawire.environment import Environment
from deltawire.keys import RANDOM_KEY
from deltawire.loopback import is_loopback
from deltawire.messages import CancelResult

from .errors import AuthenticationError, JobUnavailableError, NotFoundError, ServerError
from .following import MAX_MESSAGE_BYTES, Following, backoff_s, job_path, may_pass
from .result import PydanticModel

SUBPROTOCOL: Final = "deltawire.v1"
CLOSE_TIMEOUT_S: Final = 1.0  # for the relay to answer a close frame; nothing depends on it
ADDRESS: Final = "http://127.0.0.1"
JWT_DOTS: Final = 2
_NO_NAME: Final = re.compile("[^A-Za-z0-9_-]")
EVENT_STREAM_HEADERS: Final = {"Accept": "text/event-stream", "Accept-Encoding": "identity"}
_log = logging.getLogger(__name__)

Transport = Literal["websocket", "sse"]
Request = Mapping[str, Any]
"""A chat.completions body: `model`, `messages`, and whatever else the gateway understands."""
Options = Mapping[str, Any]
"""A job's options (PROTOCOL.md §1.2); durations are seconds."""


class Call(msgspec.Struct, frozen=True):
    """One HTTP request. `body` is JSON; None: there is none."""

    method: str
    path: str
    body: dict[str, Any] | None = None
    headers: dict[str, str] = {}

    @property
    def content(self) -> bytes | None:
        return None if self.body is None else msgspec.json.encode(self.body)

    def headers_with(self, credential: str | None) -> dict[str, str]:
        kind = {} if self.body is None else {"Content-Type": "application/json"}
        return kind | bearer(credential) | self.headers


Failed = Callable[[JobUnavailableError], float | None]
"""What comes of a try that has failed, as `Tries.failed` says it."""


class Tries:
    """Those of one call. One that is to wait for more than `max_wait_s` seconds is not repeated."""

    def __init__(self, call: Call, *, max_retries: int, max_wait_s: float) -> None:
        self._call = call
        self._max_retries = max_retries
        self._max_wait_s = max_wait_s
        self._failures = 0

    def failed(self, error: JobUnavailableError) -> float | None:
        """In how many seconds to ask again, after this has come of a try; None: it is done all the same.

        Raises `error` where there is no point in that.
        """
        if self._failures and self._call.method == "DELETE" and isinstance(error, NotFoundError):
            return None  # by a try whose answer was lost
        told_s = error.retry_after_s or 0.0
        if self._failures >= self._max_retries or told_s > self._max_wait_s or not may_pass(error):
            raise error
        self._failures += 1
        _log.info("%s %s: %s; asking again", self._call.method, self._call.path, error)
        return max(told_s, backoff_s(self._failures))


def bearer(credential: str | None) -> dict[str, str]:
    """Raises AuthenticationError for what no header can hold; what libraries say of that would show it."""
    if not credential:
        return {}
    if not (credential.isascii() and credential.isprintable()):
        raise AuthenticationError(
            "the credential has characters that none has, such as a line end", status=401
        )
    return {"Authorization": f"Bearer {credential}"}


def is_token(credential: object) -> bool:
    """Whether it is a token, and no API key: what one submits is read by the token that the answer holds."""
    return isinstance(credential, str) and credential.count(".") == JWT_DOTS


def address(base_url: str | None) -> str:
    """By default DELTAWIRE_PUBLIC_URL, else this machine's DELTAWIRE_PORT, or 8080. Raises ValueError."""
    here = f"{ADDRESS}:{os.environ.get('DELTAWIRE_PORT') or 8080}"
    url = (base_url or os.environ.get("DELTAWIRE_PUBLIC_URL") or here).rstrip("/")
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"a relay's address begins with http:// or https://, unlike {url!r}")
    try:
        parts = urlsplit(url)
        is_whole = bool(parts.hostname) and parts.port != 0 and not (parts.query or parts.fragment)
    except ValueError:
        is_whole = False
    if not is_whole:
        raise ValueError(f"this is no address of a relay: {url!r}")
    return url


def known(transport: Transport) -> Transport:
    """Itself. Raises ValueError."""
    if transport not in get_args(Transport):
        raise ValueError(f"there is no transport {transport!r}: websocket, sse")
    return transport


def default_api_key() -> str | None:
    """DELTAWIRE_API_KEY, or what the file DELTAWIRE_API_KEY_FILE holds. Raises ConfigurationError."""
    return Environment().secret("DELTAWIRE_API_KEY") or None


def http_options(base_url: str, timeout_s: float) -> dict[str, Any]:
    """For httpx. Each open event stream holds a connection, so there is no limit of ours on them.

    Reading the machine's certificates takes 20 ms; without TLS nobody needs them (no redirect is followed).
    """
    is_tls = base_url.startswith("https:")
    return {
        "base_url": base_url,
        "timeout": timeout_s,
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
        "verify": httpx.create_ssl_context() if is_tls else False,
        "trust_env": not _is_here(base_url),
    }


def websocket_options(base_url: str, headers: dict[str, str], timeout_s: float) -> dict[str, Any]:
    """For websockets. It sends no pings: the relay's heartbeats tell that it is alive."""
    return {
        "subprotocols": [SUBPROTOCOL],
        "additional_headers": headers,
        "compression": None,
        "max_size": MAX_MESSAGE_BYTES,
        "open_timeout": timeout_s,
        "close_timeout": CLOSE_TIMEOUT_S,
        "ping_interval": None,
        "proxy": None if _is_here(base_url) else True,
    }


def _is_here(base_url: str) -> bool:
    """Whether it is on this machine, which a proxy of the environment's is not: to that it is another one."""
    return is_loopback(urlsplit(base_url).hostname or "")


def websocket_url(base_url: str, following: Following) -> str:
    return f"ws{base_url.removeprefix('http')}{following.path('ws')}"


def with_model(request: Request, response_format: type[PydanticModel] | None) -> dict[str, Any]:
    """The request with the model's JSON schema as its `response_format`."""
    if response_format is None:
        return dict(request)
    schema = response_format.model_json_schema()
    name = _NO_NAME.sub("_", response_format.__name__)[:64]  # a generic's has brackets
    declared = {"name": name, "schema": strict(schema, schema), "strict": True}
    return {**request, "response_format": {"type": "json_schema", "json_schema": declared}}


def strict(schema: Any, root: dict[str, Any], inside: frozenset[str] = frozenset()) -> Any:  # JSON
    """A schema as OpenAI's strict mode wants it ("Structured outputs", supported schemas).

    Every property is required, no other is allowed, `oneOf` is `anyOf`, and nothing stands beside a `$ref`:
    what did is put into a copy of what it refers to, but for one that holds itself (`inside`: those that are
    being copied).
    """
    if isinstance(schema, list):
        return [strict(item, root, inside) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        name = schema["$ref"]
        beside = {key: value for key, value in schema.items() if key not in ("$ref", "default")}
        if not beside or name in inside:
            return {"$ref": name}
        target: Any = root
        for part in name.removeprefix("#/").split("/"):
            target = target[part]
        return strict(target | beside, root, inside | {name})
    made: dict[str, Any] = {}
    for key, value in schema.items():
        if key in ("properties", "$defs"):
            made[key] = {name: strict(one, root, inside) for name, one in value.items()}
        elif key in ("enum", "const"):
            made[key] = value
        elif key not in ("default", "discriminator"):
            made["anyOf" if key == "oneOf" else key] = strict(value, root, inside)
    if "properties" in made:
        made["required"] = list(made["properties"])
        made.setdefault("additionalProperties", False)
    return made


def submission(request: dict[str, Any], options: Options | None, idempotency_key: str | None) -> Call:
    """Without a key of the caller's it has one of its own: an answer may be lost, and the call repeated."""
    key = f"{RANDOM_KEY}{uuid.uuid4().hex}" if idempotency_key is None else idempotency_key
    body = {"request": request} if options is None else {"request": request, "options": dict(options)}
    return Call("POST", "/v1/jobs", body, {"Idempotency-Key": key})


def cancellation(job_id: str, reason: str) -> Call:
    return Call("POST", f"{job_path(job_id)}/cancel", {"reason": reason})


def cancelled(job_id: str, answer: dict[str, Any]) -> CancelResult:
    """Raises ServerError."""
    try:
        return msgspec.convert({"type": "cancel_result", "job_id": job_id, **answer}, CancelResult)
    except msgspec.ValidationError as error:
        raise ServerError("this is no answer of a relay") from error


def retrieval(job_id: str) -> Call:
    return Call("GET", job_path(job_id))


def ticketing(job_id: str, subject: str | None, ttl_s: float) -> Call:
    body = {"cap": ["read"], "ttl_s": ttl_s} | ({} if subject is None else {"sub": subject})
    return Call("POST", f"{job_path(job_id)}/tokens", body)


def ticket_url(base_url: str, events_url: str, answer: dict[str, Any], snapshot: bool) -> str:
    """Tokens need no escaping; an address that the relay does not know to be public is where we reach it."""
    url = events_url if events_url.startswith("http") else f"{base_url}{events_url}"
    return f"{url}?{'mode=snapshot&' if snapshot else ''}ticket={answer['token']}"


def deletion(job_id: str) -> Call:
    return Call("DELETE", job_path(job_id))


def listing(limit: int, after: str, status: str) -> Call:
    params = {"limit": str(limit), "after": after, "status": status}
    return Call("GET", f"/v1/jobs?{urlencode({name: value for name, value in params.items() if value})}")


def accepted(answer: dict[str, Any], options: Options | None, credential: object) -> dict[str, Any]:
    """What a handle is made of, from the answer to a submission. Raises ServerError."""
    if not isinstance(answer.get("id"), str):
        raise ServerError("this is no answer of a relay")
    return {
        "job_id": answer["id"],
        "status": answer.get("status", "queued"),
        "token": answer.get("token"),
        "urls": answer.get("urls"),
        "credential": answer.get("token") if is_token(credential) else None,
        "renews": callable(credential),
        "metadata": dict((options or {}).get("metadata") or {}),
    }
