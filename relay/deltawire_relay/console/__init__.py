"""The console (PROTOCOL.md §5.12): the files beside this module, and headers that keep the page harmless."""

import hashlib
from collections.abc import Callable
from importlib.resources import files
from typing import Final

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

PAGE: Final = "index.html"
_MEDIA_TYPES: Final = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS: Final = {
    # Only what comes from here, nothing inline, and no text becomes markup: a model's output is hostile.
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for each time: a relay that was updated shows it
}


def console_routes(*, is_on: bool) -> list[Route]:
    """`GET /`, and what the page is made of. They need no credential: what they show does."""
    if not is_on:
        return []
    answers: dict[str, Callable[[Request], Response]] = {}
    for file in files(__name__).iterdir():
        _, dot, ending = file.name.rpartition(".")
        if media_type := _MEDIA_TYPES.get(dot + ending):
            answers[file.name] = _file(file.read_bytes(), media_type)

    async def page(request: Request) -> Response:
        return answers[PAGE](request)

    async def asset(request: Request) -> Response:
        if (answer := answers.get(request.path_params["name"])) is None:
            raise HTTPException(404)
        return answer(request)

    return [Route("/", page), Route("/console/{name}", asset)]


def _file(content: bytes, media_type: str) -> Callable[[Request], Response]:
    headers = {**_HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    def answer(request: Request) -> Response:
        # A proxy that compresses makes the tag a weak one (RFC 9110 §8.8.3).
        tags = [tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")]
        if headers["ETag"] in tags:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    return answer
