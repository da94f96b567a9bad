"""deploy/proxies: nginx and Caddy before two real relays; what cannot be run is read."""

import asyncio
import json
import re
import signal
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
import yaml
from websockets.asyncio.client import connect

from deltawire.client import AsyncClient
from tests.support.proxies import RECIPES, Proxy, program, put
from tests.support.system import System, check_whole, eventually, request, submit

ROOT: Final = Path(__file__).parents[2]
KINDS: Final = ("nginx", "caddy")
WAIT_S: Final = 60.0
INSIDE: Final = ("/metrics", "/healthz", "/readyz")
REQUESTS: Final = re.compile(r'deltawire_http_requests_total\{route="/v1/jobs/\{[^/]*\}"')


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System(relays=2) as system:
        yield system


@pytest.fixture(scope="module")
def proxies(system: System) -> Iterator[dict[str, Proxy]]:
    """Both, before the same relays."""
    with ExitStack() as stack:
        yield {kind: stack.enter_context(Proxy(kind, system.relay_ports)) for kind in KINDS}


@pytest.fixture(params=KINDS)
def proxy(request: pytest.FixtureRequest, proxies: dict[str, Proxy]) -> Proxy:
    return proxies[request.param]


def client(proxy: Proxy) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=proxy.url, verify=proxy.tls(), trust_env=False, timeout=WAIT_S)


async def events(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """What an SSE body has to say, without control messages."""
    async for line in response.aiter_lines():
        if line.startswith("data: {") and "created" in line:
            yield json.loads(line.removeprefix("data: "))


async def test_an_event_arrives_while_its_job_streams(system: System, proxy: Proxy) -> None:
    """The gateway falls silent after three deltas: they are here, and the job goes on."""
    job = await submit(system, request(deltas=9, fault="stall", after=3, rate=0))
    async with (
        client(proxy) as http,
        asyncio.timeout(WAIT_S),
        http.stream("GET", f"/v1/jobs/{job}/events") as response,
    ):
        assert "content-encoding" not in response.headers
        stream = events(response)
        seen = [await anext(stream)]
        while sum(event["type"] == "delta" for event in seen) < 4:  # the role, and three
            seen.append(await anext(stream))
        assert (await http.get(f"/v1/jobs/{job}")).json()["status"] == "in_progress"
        assert (await http.post(f"/v1/jobs/{job}/cancel")).status_code == 200
        seen += [event async for event in stream]
    assert check_whole(seen)["type"] == "cancelled"


async def test_openai_clients_are_served_as_it_comes(proxy: Proxy) -> None:
    """The same for /v1/chat/completions, which ends with its client."""
    body = {**request(deltas=9, fault="stall", after=3, rate=0), "stream": True}
    async with client(proxy) as http, asyncio.timeout(WAIT_S):
        async with http.stream("POST", "/v1/chat/completions", json=body) as response:
            stream = events(response)
            assert [(await anext(stream))["object"] for _ in range(4)] == ["chat.completion.chunk"] * 4
            job = response.headers["x-job-id"]
        # It was told at once that the client has left, so the job is given up: 2 s later.
        while (await http.get(f"/v1/jobs/{job}")).json()["status"] == "in_progress":  # noqa: ASYNC110
            await asyncio.sleep(0.1)


async def test_a_websocket_gets_through(system: System, proxy: Proxy) -> None:
    job = await submit(system, request(deltas=5))
    async with connect(
        f"wss://localhost:{proxy.port}/v1/jobs/{job}/ws", ssl=proxy.tls(), proxy=None
    ) as socket:
        seen = [message async for text in socket if "created_at" in (message := json.loads(text))]
    assert check_whole(seen)["type"] == "completed"


async def test_a_large_body_gets_through_and_too_large_a_one_is_the_relays_to_refuse(proxy: Proxy) -> None:
    async with client(proxy) as http:
        taken = await http.post("/v1/jobs", json={"request": request("x" * 9_000_000, deltas=1)})
        assert taken.status_code == 202
        await http.post(f"/v1/jobs/{taken.json()['id']}/cancel")
        refused = await http.post("/v1/jobs", json={"request": request("x" * 10_600_000)})
        assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")


async def test_what_is_for_insiders_stays_inside(proxy: Proxy) -> None:
    async with client(proxy) as http:
        for path in INSIDE:
            assert (await http.get(path)).status_code == 404


def test_it_speaks_http_2(proxy: Proxy) -> None:
    command = ["curl", "-s", "--http2", "--cacert", str(proxy.certificate), "-o", "/dev/null"]
    said = subprocess.run(
        [*command, "-w", "%{http_version}", f"{proxy.url}/v1/models"],
        capture_output=True,
        check=True,
        text=True,
    )
    assert said.stdout == "2"


async def asked_by(proxy: Proxy, metrics_url: str, path: str) -> None:
    """Asks a proxy until the relay with these metrics answers: fail_timeout, fail_duration are over."""

    async def answers() -> list[str]:
        said = await relay.get(metrics_url)
        return [line for line in said.text.splitlines() if REQUESTS.match(line)]

    async with client(proxy) as http, httpx.AsyncClient(trust_env=False) as relay, asyncio.timeout(WAIT_S):
        before = await answers()
        while await answers() == before:
            await http.get(path)


async def test_relays_are_killed_and_stopped_and_clients_notice_nothing(
    system: System, proxies: dict[str, Proxy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever follows a job resumes at the other relay; and while one drains, no request fails."""
    trusted = tmp_path / "certificates.pem"
    trusted.write_text("".join(proxy.certificate.read_text() for proxy in proxies.values()))
    monkeypatch.setenv("SSL_CERT_FILE", str(trusted))
    monkeypatch.setenv("NO_PROXY", "localhost")

    async def follow(proxy: Proxy, job: str) -> list[int]:
        async with AsyncClient(proxy.url) as follower:
            return [event.sequence_number async for event in follower.events(job)]

    async def ask(proxy: Proxy, job: str, answers: list[int]) -> None:
        async with client(proxy) as http:
            while True:
                answers.append((await http.get(f"/v1/jobs/{job}")).status_code)
                answers.append((await http.post("/v1/jobs", json={"request": request()})).status_code)

    job = await submit(system, request(deltas=100_000, rate=50))
    followers = [asyncio.create_task(follow(proxy, job)) for proxy in proxies.values()]
    viewers = [client(proxy) for proxy in proxies.values()]
    await asyncio.sleep(0.5)
    # Those whom it has served go to the other one.
    system.relays[0].signal(signal.SIGKILL)
    system.relays[0].wait()
    await asyncio.to_thread(system.launch_relay(in_place_of=0).wait_until_ready)
    for proxy in proxies.values():
        await asked_by(proxy, f"{system.relay_url}/metrics", f"/v1/jobs/{job}")
    answers: dict[str, list[int]] = {kind: [] for kind in proxies}
    asking = [asyncio.create_task(ask(proxy, job, answers[kind])) for kind, proxy in proxies.items()]
    await eventually(lambda: all(len(codes) > 10 for codes in answers.values()))
    system.relays[1].signal(signal.SIGTERM)
    assert await asyncio.to_thread(system.relays[1].wait) == 0
    before = {kind: len(codes) for kind, codes in answers.items()}
    await eventually(lambda: all(len(answers[kind]) > before[kind] + 10 for kind in proxies))
    for task in asking:
        task.cancel()
    await asyncio.wait(asking)
    await asyncio.to_thread(system.launch_relay(in_place_of=1).wait_until_ready)
    async with viewers[0] as one, viewers[1]:
        assert (await one.post(f"/v1/jobs/{job}/cancel")).status_code == 200
    for numbers in await asyncio.gather(*followers):
        assert numbers == list(range(1, len(numbers) + 1))
    said = {kind: proxy.logs for kind, proxy in proxies.items()}
    assert {kind: set(codes) for kind, codes in answers.items()} == {kind: {200, 202} for kind in KINDS}, said


class _Echo(BaseHTTPRequestHandler):
    """Answers with the headers that it gets."""

    def do_GET(self) -> None:
        body = json.dumps(self.headers.items()).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture(scope="module")
def echo() -> Iterator[int]:
    """In the place of a relay, a server that says what it was told. Its port."""
    with ThreadingHTTPServer(("127.0.0.1", 0), _Echo) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("kind", KINDS)
async def test_strangers_say_nothing_about_themselves(kind: Any, echo: int) -> None:
    """The relay hears of one address, the one that the proxy has seen; and no log has a ticket."""
    with Proxy(kind, [echo, echo]) as proxy:
        async with client(proxy) as http:
            answer = await http.get(
                "/v1/jobs/a/events?ticket=secret-ticket",
                headers={
                    "X-Forwarded-For": "203.0.113.7",
                    "X-Forwarded-Proto": "gopher",
                    "Forwarded": "for=x",
                },
            )
        heard = [(name.lower(), value) for name, value in answer.json()]
        assert [value for name, value in heard if name == "x-forwarded-for"] == ["127.0.0.1"]
        assert [value for name, value in heard if name == "x-forwarded-proto"] == ["https"]
        assert ("host", f"localhost:{proxy.port}") in heard
        if kind == "nginx":
            await eventually(lambda: "/v1/jobs/a/events" in proxy.logs)
        assert "secret-ticket" not in proxy.logs


@pytest.mark.parametrize("listen", ["listen.conf", "listen-tls.conf"])
def test_the_nginx_of_the_compose_files_has_no_errors(
    listen: str, tmp_path: Path, proxies: dict[str, Proxy]
) -> None:
    """As nginx itself reads it."""
    compose = ROOT / "deploy" / "compose"
    (tmp_path / "nginx-relay.conf").write_text((RECIPES / "nginx-relay.conf").read_text())
    text = (compose / listen).read_text()
    if "ssl" in text:  # for others: what is for insiders stays inside
        assert all(f"location = {path} {{ return 404; }}" in text for path in INSIDE)
        nginx = proxies["nginx"]
        text = put(
            text,
            ("/run/secrets/tls_certificate.pem", str(nginx.certificate)),
            ("/run/secrets/tls_key.pem", str(nginx.path / "key.pem")),
        )
    (tmp_path / "listen.conf").write_text(text)
    (tmp_path / "nginx.conf").write_text(put((compose / "nginx.conf").read_text(), ("/tmp/", f"{tmp_path}/")))
    command = [program("nginx"), "-t", "-e", "stderr", "-c", str(tmp_path / "nginx.conf")]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    assert said.returncode == 0, said.stderr


def test_the_traefik_recipe_is_whole() -> None:
    """Its two files name each other's entry points, resolvers, middlewares and services."""
    static = yaml.safe_load((RECIPES / "traefik.yml").read_text())
    dynamic = yaml.safe_load((RECIPES / "traefik-relays.yml").read_text())["http"]
    assert static["providers"]["file"]["filename"] == "/etc/traefik/traefik-relays.yml"
    for entry_point in static["entryPoints"].values():
        assert "forwardedHeaders" not in entry_point
    assert static["entryPoints"]["websecure"]["transport"]["respondingTimeouts"]["writeTimeout"] == "0s"
    for router in dynamic["routers"].values():
        assert {*router["entryPoints"]} <= {*static["entryPoints"]}
        assert {*router["middlewares"]} <= {*dynamic["middlewares"]}
        assert router["service"] in dynamic["services"]
        assert router["tls"]["certResolver"] in static["certificatesResolvers"]
