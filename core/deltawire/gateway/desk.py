"""Which request gets which answer: routes, the API key, CORS, the inspection endpoints. No sockets."""

import hmac
import secrets
import time
from collections.abc import Callable
from email.utils import formatdate
from urllib.parse import parse_qs, urlsplit

import msgspec
from msgspec import Struct

from deltawire.gateway.answer import Reply, encode_error, encode_models
from deltawire.gateway.plan import Plan, make_plan
from deltawire.gateway.records import MAX_ID_CHARS, FaultCounter, Ledger, RequestRecord
from deltawire.gateway.script import BadRequestError, parse_request

_ROUTES: dict[str, tuple[str, ...]] = {
    "/v1/chat/completions": ("POST",),
    "/v1/models": ("GET", "HEAD"),
    "/requests": ("GET", "HEAD", "DELETE"),
    "/stats": ("GET", "HEAD"),
    "/healthz": ("GET", "HEAD"),
}

Headers = tuple[tuple[str, str], ...]


class HttpRequest(Struct, frozen=True):
    """A request as it came: names of headers in lower case, the last of equal ones."""

    method: str
    target: str
    headers: dict[str, str]
    body: bytes


class Answer(Struct, frozen=True):
    """What to send and, for a chat completion, the open record of it, which the sender has to end."""

    content: Reply | Plan
    headers: Headers
    record: RequestRecord | None = None


class Desk:
    """Answers requests. `ledger` and the count of faults are its only state.

    What `direct` makes of the body of a chat completion is taken for it. The API key opens `/v1` only: the
    other endpoints show nothing worth hiding, and tests need them.
    """

    def __init__(self, *, rate: float, api_key: str | None, direct: Callable[[bytes], bytes]) -> None:
        self._rate = rate
        self._direct = direct
        self._api_key = api_key.encode() if api_key else None
        self._started_at = time.time()
        self._faults = FaultCounter()
        self.ledger = Ledger()

    def answer(self, request: HttpRequest) -> Answer:
        """Never raises for anything that a client sent. Opens a record for each chat completion."""
        path, query = _split_target(request.target)
        request_id = "req_" + secrets.token_hex(16)
        headers: Headers = (("Date", formatdate(usegmt=True)), ("X-Request-Id", request_id))
        if path == "/v1" or path.startswith("/v1/"):
            headers += _allow_any_origin(request)
            if request.method == "OPTIONS":
                return Answer(Reply(status=204, body=b""), headers)
        record = None
        refusal = self._refuse(request, path)
        if path == "/v1/chat/completions" and request.method == "POST":
            record = self._open_record(request, request_id, is_authorized=refusal is None)
        if refusal is not None:
            return Answer(refusal, headers, record)
        if record is None:
            return Answer(self._inspect(request.method, path, query), headers)
        return Answer(self._complete(request, record), headers, record)

    def _refuse(self, request: HttpRequest, path: str) -> Reply | None:
        methods = _ROUTES.get(path)
        if methods is None:
            message = f"Invalid URL ({request.method} {path[:200]})"
            return Reply(status=404, body=encode_error(message, code="unknown_url"))
        if request.method not in methods:
            message = f"Not allowed to {request.method} on {path}."
            body = encode_error(message, code="method_not_supported")
            return Reply(status=405, body=body, headers=(("Allow", ", ".join(methods)),))
        if self._api_key is None or not path.startswith("/v1/"):
            return None
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._api_key):
            return None
        message = "Incorrect API key provided." if key else "You didn't provide an API key."
        body = encode_error(message, type_="authentication_error", code="invalid_api_key")
        return Reply(status=401, body=body, headers=(("WWW-Authenticate", "Bearer"),))

    def _open_record(self, request: HttpRequest, request_id: str, *, is_authorized: bool) -> RequestRecord:
        client_request_id = request.headers.get("x-client-request-id")
        record = RequestRecord(
            id=request_id,
            client_request_id=None if client_request_id is None else client_request_id[:MAX_ID_CHARS],
            model=None,
            received_at=time.time(),
            authorized=is_authorized,
        )
        self.ledger.open(record)
        return record

    def _complete(self, request: HttpRequest, record: RequestRecord) -> Reply | Plan:
        try:
            chat = parse_request(self._direct(request.body))
            record.model = chat.model
            if chat.script.fault and not self._faults.meets_fault(chat, record.client_request_id):
                chat = msgspec.structs.replace(chat, script=chat.script.without_fault())
            completion_id = "chatcmpl-" + secrets.token_hex(15)[:29]
            content = make_plan(
                chat, completion_id=completion_id, created=int(record.received_at), rate=self._rate
            )
        except BadRequestError as error:
            return Reply(status=400, body=encode_error(error.message, param=error.param, code=error.code))
        record.total_deltas = content.deltas if isinstance(content, Reply) else content.total_deltas
        return content

    def _inspect(self, method: str, path: str, query: str) -> Reply:
        ledger = self.ledger
        match method, path:
            case "DELETE", _:
                body = msgspec.json.encode({"object": "list", "deleted": ledger.clear()})
            case _, "/v1/models":
                body = encode_models(int(self._started_at))
            case _, "/requests":
                wanted = parse_qs(query, keep_blank_values=True).get("client_request_id", [None])[0]
                body = msgspec.json.encode({"object": "list", "data": ledger.find(wanted)})
            case _, "/stats":
                body = msgspec.json.encode(
                    {
                        "object": "stats",
                        "open_streams": ledger.open_requests,
                        "requests": ledger.requests,
                        "deltas_sent": ledger.deltas_sent,
                        "uptime_s": time.time() - self._started_at,
                    }
                )
            case _:
                body = b'{"status":"ok"}'
        return Reply(status=200, body=body)


def _split_target(target: str) -> tuple[str, str]:
    """Path and query, of a target in origin form or in absolute form, which clients of proxies send."""
    if not target.startswith("/"):
        try:
            parts = urlsplit(target)
        except ValueError:
            return target, ""
        return parts.path, parts.query
    path, _, query = target.partition("?")
    return path, query


def _allow_any_origin(request: HttpRequest) -> Headers:
    headers: Headers = (
        ("Access-Control-Allow-Origin", "*"),
        ("Access-Control-Expose-Headers", "X-Request-Id, Retry-After"),
    )
    if request.method != "OPTIONS":
        return headers
    # "*" would not cover Authorization (Fetch standard), so what is asked for is granted by name.
    wanted = request.headers.get("access-control-request-headers", "*")
    return (
        *headers,
        ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
        ("Access-Control-Allow-Headers", wanted),
        ("Access-Control-Max-Age", "600"),
    )
