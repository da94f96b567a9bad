"""The example applications, by their own servers, with the deltawire of our own pytest plugin behind them."""

import base64
import importlib.util
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import httpx
import pytest

from deltawire.redis_server import free_port
from deltawire.testing.scripted_gateway import ScriptedGateway
from deltawire.testing.server import DeltawireServer
from tests.support.chromium import chromium
from tests.support.processes import end

EXAMPLES: Final = Path(__file__).parents[2] / "examples"
pytestmark = pytest.mark.timeout(300)
NAMES: Final = ("django", "fastapi", "flask")
WEBHOOK_SECRET: Final = "whsec_" + base64.b64encode(bytes(range(32))).decode()
WAIT_S: Final = 120
PORT: Final = free_port()  # of one after the other: there is one webhook
URL: Final = f"http://127.0.0.1:{PORT}"


def load_run() -> Any:
    """examples/run.py, a program."""
    spec = importlib.util.spec_from_file_location("run", EXAMPLES / "run.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def deltawire_environment() -> Mapping[str, str]:
    webhook = f'[webhooks.app]\nurl = "{URL}/hooks/deltawire"\nsecret = "{WEBHOOK_SECRET}"\n'
    return {"DELTAWIRE_ALLOWED_ORIGINS": URL, "DELTAWIRE_WEBHOOKS": webhook}


@pytest.fixture(scope="module", params=NAMES)
def app(
    request: pytest.FixtureRequest,
    deltawire_server: DeltawireServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[str]:
    """An example application, at URL; its name."""
    name = str(request.param)
    directory = tmp_path_factory.mktemp(name)
    environment = {
        **os.environ,
        **deltawire_server.environment,
        "WEBHOOK_SECRET": WEBHOOK_SECRET,
        "DATABASE": str(directory / "chat.sqlite3"),
    }
    *prepare, run = load_run().commands(name, str(PORT))
    for command in prepare:
        subprocess.run(command, env=environment, cwd=EXAMPLES / name, check=True)
    log = directory / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            run, env=environment, cwd=EXAMPLES / name, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        eventually(lambda: process.poll() is not None or is_up(URL))
        assert process.poll() is None, log.read_text()
        yield name
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        end(process)


def eventually(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + WAIT_S
    while not (value := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return value


def is_up(url: str) -> bool:
    try:
        return httpx.get(f"{url}/login", trust_env=False).status_code == 200
    except httpx.TransportError:
        return False


class Visitor(httpx.Client):
    """A browser without scripts."""

    def __init__(self, url: str = URL) -> None:
        super().__init__(base_url=url, follow_redirects=True, trust_env=False, timeout=WAIT_S)

    def fill(self, path: str, fields: dict[str, str], *, page: str | None = None) -> httpx.Response:
        """Sends the form of a page, by default of the same path, with what is hidden in it."""
        hidden = re.findall(r'name="(csrf\w+)" value="(\w+)"', self.get(page or path).text)
        return self.post(path, data={**dict(hidden), **fields})

    def log_in(self, user: str, password: str) -> httpx.Response:
        return self.fill("/login", {"username": user, "password": password})

    def ask(self, prompt: str) -> str:
        """The path of its answer."""
        answer = self.fill("/answers", {"prompt": prompt}, page="/")
        assert answer.status_code == 200, answer.text
        return answer.url.path

    def shows(self, path: str, status: str) -> str | None:
        """What is saved of an answer, if it is."""
        page = self.get(path).text
        found = re.search(r'<article id="answer">(.*?)</article>\s*<p id="status">(\w+)</p>', page, re.DOTALL)
        return found[1] if found and found[2] == status else None

    def events_of(self, path: str) -> str:
        """Where the page looks for the events of an answer."""
        (url,) = re.findall(r'data-events="(.*?)"', self.get(path).text)
        return str(url).replace("&amp;", "&")


@pytest.fixture
def ada(app: str) -> Iterator[Visitor]:
    del app
    with Visitor() as visitor:
        assert "Ask" in visitor.log_in("ada", "lovelace").text
        yield visitor


def test_an_answer_is_saved_though_nobody_watches(ada: Visitor, deltawire_gateway: ScriptedGateway) -> None:
    """By the webhook; in the database when the job has ended."""
    deltawire_gateway.reply("Rivers <reach> the sea.")
    path = ada.ask("Where do rivers go?")
    text = eventually(lambda: ada.shows(path, "completed"))
    assert text == "Rivers &lt;reach&gt; the sea."
    (asked,) = deltawire_gateway.requests
    assert asked["messages"] == [{"role": "user", "content": "Where do rivers go?"}]
    assert "Where do rivers go?</a> completed" in ada.get("/").text


def test_strangers_are_refused(ada: Visitor, deltawire_gateway: ScriptedGateway) -> None:
    """Who is not logged in sees no answer, and asks and stops nothing; nor does a wrong password help."""
    deltawire_gateway.script({"fault": "stall"})
    path = ada.ask("Where do rivers go?")
    with Visitor() as stranger:
        for page in ("/", path):
            assert stranger.get(page).url.path == "/login"
        for action in ("/answers", f"{path}/stop"):
            answer = stranger.fill(action, {"prompt": "Hi"}, page="/login")
            assert answer.status_code == 403 or answer.url.path == "/login"
        for user, password in (("ada", "hopper"), ("ada", ""), ("eve", ""), ("eve", "lovelace")):
            assert "Ask" not in stranger.log_in(user, password).text
    assert "Stop" in ada.get(path).text
    assert len(deltawire_gateway.requests) <= 1


def test_another_user_cannot_read_the_job(
    ada: Visitor, deltawire_gateway: ScriptedGateway, deltawire_server: DeltawireServer
) -> None:
    """Neither by the application nor by the relay, with what her own job opens."""
    deltawire_gateway.script({"fault": "stall"})
    path = ada.ask("Where do rivers go?")
    with Visitor() as grace:
        grace.log_in("grace", "hopper")
        assert grace.get(path).status_code == 404
        assert grace.fill(f"{path}/stop", {}, page="/").status_code == 404
        assert "Where do rivers go?" not in grace.get("/").text
        hers = grace.events_of(grace.ask("And the sea?"))
    not_hers = ada.events_of(path).partition("?")[0]
    ticket = hers.partition("ticket=")[2]
    assert not_hers.startswith(deltawire_server.url)
    assert httpx.get(not_hers, params={"ticket": ticket}, trust_env=False).status_code == 404
    assert httpx.get(not_hers, trust_env=False).status_code == 401
    assert "Stop" in ada.get(path).text


def test_only_deltawire_says_what_the_answer_is(ada: Visitor, deltawire_gateway: ScriptedGateway) -> None:
    """A message to the webhook that is not signed by it changes nothing."""
    deltawire_gateway.script({"fault": "stall"})
    path = ada.ask("Where do rivers go?")
    job_id = ada.events_of(path).split("/")[5]
    completion = {"choices": [{"message": {"content": "forged"}}]}
    job = {"id": job_id, "status": "completed", "completion": completion}
    message = {"data": {**job, "metadata": {"answer": path.rpartition("/")[2]}}}
    signed = {
        "webhook-id": "msg_1",
        "webhook-timestamp": str(int(time.time())),
        "webhook-signature": "v1,AAAA",
    }
    for headers in ({}, signed):
        answer = httpx.post(f"{URL}/hooks/deltawire", json=message, headers=headers, trust_env=False)
        assert answer.status_code == 401
    assert "forged" not in ada.get(path).text


async def test_in_a_browser(
    app: str, deltawire_gateway: ScriptedGateway, deltawire_server: DeltawireServer
) -> None:
    """Log in, ask, watch, reload in mid-stream, look again later, stop; then the text is the database's."""
    del app, deltawire_server
    deltawire_gateway.script({"deltas": 10_000, "rate": 20})
    async with chromium() as browser:
        page = await browser.new_page()
        errors: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda line: errors.append(line.text) if line.type == "error" else None)
        page.set_default_timeout(WAIT_S * 1_000)
        await page.goto(f"{URL}/")
        await page.fill("[name=username]", "ada")
        await page.fill("[name=password]", "lovelace")
        await page.click("button")
        await page.fill("[name=prompt]", "Tell me of rivers.")
        await page.click("button")

        async def text_longer_than(length: int) -> str:
            await page.wait_for_function(
                "length => document.querySelector('#answer')?.textContent.length > length", arg=length
            )
            return str(await page.text_content("#answer"))

        before = await text_longer_than(100)
        await page.reload()
        after = await text_longer_than(len(before) + 100)
        assert after.startswith(before)
        assert len(deltawire_gateway.requests) == 1
        await page.click("text=Stop")
        await page.wait_for_function("document.querySelector('#status')?.textContent === 'cancelled'")
        # Saved a moment later; what the page shows then has come from there.
        deadline = time.monotonic() + WAIT_S
        while not await page.query_selector("#answer:not([data-events])"):
            assert time.monotonic() < deadline
            await page.reload()
        saved = str(await page.text_content("#answer"))
        assert saved.startswith(after)
        assert await page.text_content("#status") == "cancelled"
        await page.click("text=All answers")
        assert "Tell me of rivers. cancelled" in (await page.text_content("ul") or "").replace("\n", " ")
        assert errors == []


@pytest.mark.parametrize("name", NAMES)
def test_one_command_runs_it(name: str, tmp_path: Path) -> None:
    """`python examples/run.py NAME`, as examples/README.md says; Ctrl-C ends all of it."""
    port, relay_port = free_port(), free_port()
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("DELTAWIRE_")},
        "PORT": str(port),
        "DELTAWIRE_PORT": str(relay_port),
        "DELTAWIRE_WORKER_PORT": str(free_port()),
        "DATABASE": str(tmp_path / "chat.sqlite3"),
    }
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, EXAMPLES / "run.py", name],
            env=environment,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        eventually(lambda: process.poll() is not None or f"{name}: {url}" in log.read_text())
        assert process.poll() is None, log.read_text()
        with Visitor(url) as ada:
            ada.log_in("ada", "lovelace")
            path = ada.ask("Write a haiku about streaming.")
            assert eventually(lambda: ada.shows(path, "completed"))
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does it
        process.wait(WAIT_S)
        for address in (url, f"http://127.0.0.1:{relay_port}"):
            with pytest.raises(httpx.ConnectError):
                httpx.get(address, trust_env=False)
    finally:
        end(process)


@pytest.mark.parametrize("name", NAMES)
def test_the_part_that_is_deltawire_is_small(name: str) -> None:
    """It is marked, and some 25 lines without blank ones, docstrings, comments and decorators."""
    source = (EXAMPLES / name / ("chat/views.py" if name == "django" else "app.py")).read_text()
    (part,) = re.findall(r"# --- deltawire: begin -*\n(.*)# --- deltawire: end", source, re.DOTALL)
    lines = [line.strip() for line in part.splitlines()]
    assert len([line for line in lines if line and not line.startswith(("#", "@", '"""'))]) <= 30


def test_pages_differ_only_where_their_template_languages_do() -> None:
    """A change in one application's pages is made in the others'."""
    for name in ("base.html", "home.html", "answer.html", "login.html"):
        assert (EXAMPLES / "flask/templates" / name).read_text() == (
            EXAMPLES / "fastapi/templates" / name
        ).read_text()
    django = (EXAMPLES / "django/templates/answer.html").read_text().replace("{% csrf_token %}", "")
    assert django == (EXAMPLES / "flask/templates/answer.html").read_text()
