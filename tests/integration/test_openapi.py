"""docs/openapi.yaml is what a relay does: routes, shapes, and answers to what schemathesis thinks of."""

import asyncio
import re
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final, get_args

import msgspec
import pytest
import yaml
from starlette.routing import Route

from deltawire.api_keys import parse_api_keys
from deltawire.errors import Error
from deltawire.events import Output, Status, UsageSource
from deltawire.options import Options
from deltawire_relay import http_app, hub, server, subscriber
from tests.support.relay_process import Keyring, relay_in_process
from tests.support.system import System

DOCUMENT: Final = Path(__file__).parents[2] / "docs/openapi.yaml"
CONFIGURATION: Final = Path(__file__).parents[1] / "support/schemathesis.toml"
Json = dict[str, Any]


@pytest.fixture(scope="module")
def document() -> Json:
    read: Json = yaml.safe_load(DOCUMENT.read_text())
    return read


@pytest.fixture(scope="module")
def schemas(document: Json) -> Json:
    found: Json = document["components"]["schemas"]
    return found


# -- the shapes


def test_the_options_are_those_of_a_job(schemas: Json) -> None:
    """All but the tenant, which the credential says; defaults that are told are true."""
    properties = schemas["Options"]["properties"]
    defaults = msgspec.structs.asdict(Options())
    assert properties.keys() == defaults.keys() - {"tenant"}
    told = {name: schema["default"] for name, schema in properties.items() if "default" in schema}
    assert told == {name: defaults[name] for name in told}


def test_errors_and_outputs_have_the_fields_that_they_have(schemas: Json) -> None:
    for name, struct in (("Error", Error), ("Output", Output)):
        fields = set(struct.__struct_fields__)
        assert set(schemas[name]["properties"]) == set(schemas[name]["required"]) == fields


def test_the_words_are_the_same(schemas: Json) -> None:
    assert set(schemas["Status"]["enum"]) == set(get_args(Status))
    sources = schemas["JobSummary"]["properties"]["usage_source"]["enum"]
    assert set(sources) == {*get_args(UsageSource), None}


# -- a relay


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    """Whose gateway says all at once."""
    with System(relays=0, gateway_rate=0) as system:
        yield system


KEYS = Keyring(all=("acme", ["read", "cancel", "submit", "list", "tokens", "metrics"]))


@pytest.fixture
async def routes(monkeypatch: pytest.MonkeyPatch) -> list[Route]:
    """What a relay that is started from now on serves."""
    served: list[Route] = []
    make = http_app.http_app

    def recorded(made: list[Route], *args: Any) -> Any:  # an ASGI application
        served.extend(made)
        return make(made, *args)

    monkeypatch.setattr(server, "http_app", recorded)
    return served


@pytest.fixture
async def relay(system: System, routes: list[Route], monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[str]:
    # schemathesis waits for each stream's end, and likes numbers above it.
    monkeypatch.setattr(hub, "UNKNOWN_JOB_TIMEOUT_S", 0.1)
    monkeypatch.setattr(subscriber, "HEAL_TIMEOUT_S", 0.1)
    settings: Json = {"api_keys": parse_api_keys(KEYS.text)}
    settings["jwt_secrets"] = ("a secret of this test, and of no other",)
    async with relay_in_process(system.redis_url, monkeypatch, **settings) as address:
        yield f"http://{address}"


def told(document: Json) -> set[tuple[str, str]]:
    """The operations of the document."""
    return {
        (path, method.upper())
        for path, item in document["paths"].items()
        for method in item.keys() - {"parameters"}
    }


def served(routes: list[Route]) -> set[tuple[str, str]]:
    """Those of a relay; HEAD goes without saying."""
    return {
        (re.sub(r":\w+}", "}", route.path), method)
        for route in routes
        for method in (route.methods or set()) - {"HEAD"}
    }


async def test_it_names_every_route_and_no_other(document: Json, relay: str, routes: list[Route]) -> None:
    assert told(document) == served(routes)


async def test_a_relay_answers_as_it_says(
    document: Json, relay: str, routes: list[Route], tmp_path: Path
) -> None:
    """Whatever is asked for: nothing fails, and no status, media type or shape is not in the document."""
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "--config-file", str(CONFIGURATION)),
        *("run", str(DOCUMENT), "--url", relay, "--header", f"Authorization: Bearer {KEYS['all']}"),
    ]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    said, _ = await process.communicate()
    assert process.returncode == 0, said.decode()
