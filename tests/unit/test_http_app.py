"""What every answer has in common, whichever route it is of (PROTOCOL §8.1, §9.5)."""

import httpx
import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from deltawire_relay.auth import Gate
from deltawire_relay.http_app import http_app

ORIGIN = "https://app.example"


async def broken(_: Request) -> Response:
    raise RuntimeError("a fault of ours")


@pytest.mark.parametrize(
    ("path", "status", "code"), [("/broken", 500, "internal_error"), ("/nowhere", 404, "not_found")]
)
async def test_a_page_may_read_any_error(path: str, status: int, code: str) -> None:
    """Of an origin that is allowed: a browser would tell it of a network failure otherwise."""
    app = http_app([Route("/broken", broken)], Gate([], [ORIGIN]))
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get(path, headers={"Origin": ORIGIN})
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.headers["Access-Control-Allow-Origin"] == ORIGIN
    assert "X-Should-Retry" in answer.headers["Access-Control-Expose-Headers"]


@pytest.mark.parametrize(
    ("origin", "is_allowed"),
    [("https://a.example.com", True), ("https://a.b.example.com", True), ("https://evil-example.com", False)],
)
async def test_a_page_below_a_name_may_read(origin: str, is_allowed: bool) -> None:
    """CORS goes by the same list of origins as the gate."""
    transport = httpx.ASGITransport(http_app([], Gate([], ["https://*.example.com"])))
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        preflight = await client.options("/v1/jobs", headers=asked)
        answer = await client.get("/v1/jobs", headers={"Origin": origin})
    for each in (preflight, answer):
        assert each.headers.get("Access-Control-Allow-Origin") == (origin if is_allowed else None)
