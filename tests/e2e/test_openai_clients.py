"""The clients that people have already, against a running deltawire: nothing changed but address and key.

What they print is what the gateway says to the same programs.
"""

import asyncio
import json
import re
import sys
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import pytest_asyncio
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletionChunk
from playwright.async_api import Browser, Page

from deltawire.gateway.prose import HAIKU
from tests.support.chromium import Pages, chromium
from tests.support.node import MODULES, need_openai_sdk, run_with_openai_sdk
from tests.support.openai_endpoint import Endpoint, door_of, gateway_of
from tests.support.relay_process import Keyring
from tests.support.system import WAIT_S, System, cancel, gateway_records, watch

KEYS = Keyring(app=("acme", ("submit", "read", "cancel")))
KEY = KEYS["app"]
#: Where the programs were copied from; not everybody has it.
SOURCE = Path(__file__).parents[2].parent / "shared" / "seed-streaming.txt"
GRACE_S = 2.0
THINKING = "test_a_model_that_thinks_for_long"
#: Headers wait for the first chunk for 15 s.
THINKS_S = 17

ASK: dict[str, Any] = {
    "model": "gpt-5.4",
    "messages": [{"role": "user", "content": "Write a haiku about streaming."}],
}
#: Minutes of it, so that there is something to go away from, however slow the machine is.
LONG = {"deltas": 6_000, "rate": 20}


@pytest.fixture(scope="module")
def pages() -> Iterator[Pages]:
    """A web site, of whose two origins the relay knows one."""
    with Pages(MODULES) as pages:
        yield pages


@pytest.fixture(scope="module")
def system(pages: Pages) -> Iterator[System]:
    """A deltawire whose relay wants a key."""
    environment = {"DELTAWIRE_API_KEYS": KEYS.text, "DELTAWIRE_ALLOWED_ORIGINS": pages.origin}
    with System(relay_environment=environment) as system:
        yield system


@pytest.fixture(scope="module")
def door(system: System) -> Endpoint:
    return door_of(system, KEY)


@pytest.fixture(scope="module")
def gateway(system: System) -> Endpoint:
    return gateway_of(system)


@pytest.fixture
async def client(door: Endpoint) -> AsyncIterator[AsyncOpenAI]:
    async with door.async_sdk() as client:
        yield client


async def run(*command: str) -> str:
    """A command's output; it must succeed."""
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE
    )
    output, errors = await process.communicate()
    assert process.returncode == 0, errors.decode()
    return output.decode()


def data_of(stream: str) -> list[str]:
    """The payloads of an event stream."""
    return re.findall(r"^data: (.*)$", stream, re.MULTILINE)


def text_in(payloads: list[str]) -> str:
    """The content of chunks in JSON, each with a choice in it, as tutorials take for granted."""
    return "".join(json.loads(chunk)["choices"][0]["delta"].get("content") or "" for chunk in payloads)


async def read(
    stream: AsyncIterator[ChatCompletionChunk], into: list[ChatCompletionChunk] | None = None
) -> list[ChatCompletionChunk]:
    """All chunks; those up to an error are in `into`."""
    chunks = [] if into is None else into
    async for chunk in stream:
        chunks.append(chunk)
    return chunks


@pytest.fixture(scope="module", autouse=True)
def thinking(request: pytest.FixtureRequest, door: Endpoint) -> Iterator[list[Future[str]]]:
    """The programs, with a model that thinks for longer than headers wait, run beside all other tests."""
    if not any(item.name == THINKING for item in request.session.items):
        yield []
        return
    think = {"stream": True, "script": {"first_delta_s": THINKS_S, "rate": 0}}
    in_json, in_python = json.dumps(think)[1:-1], f"stream=True, extra_body={think}"
    programs = [
        run("sh", "-c", door.example("stream.sh").replace('"stream":true', in_json)),
        run(sys.executable, "-c", door.example("stream.py").replace("stream=True", in_python)),
        run_with_openai_sdk(door.example("stream.mjs").replace("stream: true", in_json)),
    ]
    with ThreadPoolExecutor() as executor:
        yield [executor.submit(asyncio.run, program) for program in programs]


# The programs of the gateway's own documentation.


@pytest.mark.parametrize("name", ["stream.sh", "stream.py", "stream.mjs", "stream.html"])
def test_the_programs_are_what_people_have(name: str) -> None:
    """Line by line what the documentation of a gateway has, but for address and key, and a page around."""
    if not SOURCE.exists():
        pytest.skip("the documentation that the programs are from is not here")
    gateways = Endpoint("https://api.getinfinityblue.com/v1", "YOUR_API_KEY").example(name)
    if name.endswith(".html"):
        gateways = gateways.partition('const apiKey = "YOUR_API_KEY";\n\n')[2].removesuffix("</script>\n")
    original = "\n".join(line.strip() for line in SOURCE.read_text().splitlines())
    assert "\n".join(line.strip() for line in gateways.strip().splitlines()) in original


async def test_curl_prints_the_chunks(door: Endpoint, gateway: Endpoint) -> None:
    """Each on a `data: ` line of its own; the last is [DONE]."""
    here, there = [data_of(await run("sh", "-c", at.example("stream.sh"))) for at in (door, gateway)]
    assert here[-1] == there[-1] == "[DONE]"
    assert text_in(here[:-1]) == text_in(there[:-1]) == HAIKU
    assert len(here) == len(there)


async def test_the_python_sdk_prints_the_text(door: Endpoint, gateway: Endpoint) -> None:
    """The OpenAI SDK for Python."""
    assert await run(sys.executable, "-c", door.example("stream.py")) == HAIKU
    assert await run(sys.executable, "-c", gateway.example("stream.py")) == HAIKU


async def test_the_node_sdk_prints_the_text(door: Endpoint, gateway: Endpoint) -> None:
    """The OpenAI SDK for Node."""
    assert await run_with_openai_sdk(door.example("stream.mjs")) == HAIKU
    assert await run_with_openai_sdk(gateway.example("stream.mjs")) == HAIKU


# The same in a browser, from a page of another origin. One Chromium, in the module's loop.


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


in_browser = pytest.mark.asyncio(loop_scope="module")


async def output_of(page: Page, text: str) -> None:
    """Waits until the page shows exactly this. Raises Playwright's TimeoutError."""
    await page.wait_for_function("text => document.getElementById('output').textContent === text", arg=text)


@in_browser
async def test_a_page_shows_the_text(
    browser: Browser, pages: Pages, door: Endpoint, gateway: Endpoint
) -> None:
    """`fetch` and a reader that splits lines by hand, in a real Chromium."""
    for path, at in ("/door", door), ("/gateway", gateway):
        pages.pages[path] = at.example("stream.html")
        page = await browser.new_page()
        await page.goto(pages.origin + path)
        await output_of(page, HAIKU)
        await page.close()


@in_browser
async def test_a_page_of_an_unknown_origin_sees_an_error(
    browser: Browser, pages: Pages, door: Endpoint
) -> None:
    """`fetch` itself fails, as for any address that does not know the page's origin."""
    pages.pages["/unknown"] = door.example("stream.html")
    page = await browser.new_page()
    async with page.expect_event("pageerror") as error:
        await page.goto(pages.other_origin + "/unknown")
    assert "Failed to fetch" in str(await error.value)
    assert await page.text_content("#output") == ""
    await page.close()


SDK_IN_A_PAGE = """<!doctype html><title></title><pre id="output"></pre><script type="module">
import OpenAI from "/modules/openai/index.mjs";
const client = new OpenAI({ baseURL: "%s", apiKey: "%s", dangerouslyAllowBrowser: true });
const { data: stream, response } = await client.chat.completions.create(%s).withResponse();
document.title = response.headers.get("x-job-id");
for await (const chunk of stream) {
  document.getElementById("output").textContent += chunk.choices[0].delta.content ?? "";
}
</script>"""


@in_browser
async def test_the_sdk_works_in_a_page(
    browser: Browser, pages: Pages, system: System, door: Endpoint
) -> None:
    """OpenAI's SDK for JavaScript, with the headers of its own; CORS lets it see which job it is."""
    need_openai_sdk()
    pages.pages["/sdk"] = SDK_IN_A_PAGE % (*door, json.dumps({**ASK, "stream": True}))
    page = await browser.new_page()
    await page.goto(pages.origin + "/sdk")
    await output_of(page, HAIKU)
    assert (await watch(system, await page.title(), token=KEY))[-1]["type"] == "completed"
    await page.close()


LEAVING = """<!doctype html><title></title><pre id="output"></pre><script type="module">
const response = await fetch("%s/chat/completions", {
  method: "POST",
  headers: { "Authorization": "Bearer %s", "Content-Type": "application/json" },
  body: JSON.stringify(%s),
});
document.title = response.headers.get("x-job-id");
const reader = response.body.getReader();
while (!(await reader.read()).done) document.getElementById("output").textContent += "*";
</script>"""


@in_browser
async def test_a_closed_tab_ends_the_stream(
    browser: Browser, pages: Pages, system: System, door: Endpoint
) -> None:
    """The page has read some of it, and which job it is (CORS exposes `x-job-id`)."""
    body = json.dumps({**ASK, "stream": True, "script": LONG})
    pages.pages["/leaving"] = LEAVING % (*door, body)
    page = await browser.new_page()
    await page.goto(pages.origin + "/leaving")
    await page.wait_for_function("document.getElementById('output').textContent.length >= 3")
    job_id, left_at = await page.title(), time.time()
    await page.close()
    await check_closed(system, job_id, left_at)


# A client that goes away.


async def check_closed(system: System, job_id: str, left_at: float) -> None:
    """Its grace after the client has left, the gateway sees us hang up, and the job ends as abandoned."""
    async with asyncio.timeout(WAIT_S):
        while True:
            [record] = await gateway_records(system, job_id)
            if record["finished_at"] or record["closed_at"]:
                break
            await asyncio.sleep(0.05)
    assert record["closed_by"] == "client"
    assert record["sent_deltas"] < record["total_deltas"]
    after_s = record["closed_at"] - left_at
    print(f"the gateway's connection was closed {after_s:.2f} s after the client had left")
    assert after_s > GRACE_S
    terminal = (await watch(system, job_id, token=KEY))[-1]
    assert terminal["type"] == "cancelled", terminal
    assert terminal["cancel"]["reason"] == "abandoned"


async def test_a_closed_stream_of_the_sdk_ends(system: System, client: AsyncOpenAI) -> None:
    """Two seconds after the client has left, the gateway's connection is closed."""
    answer = await client.chat.completions.with_raw_response.create(
        **ASK, stream=True, extra_body={"script": LONG}
    )
    stream = answer.parse()
    async for chunk in stream:
        if chunk.choices[0].delta.content:
            break
    left_at = time.time()
    await stream.close()
    await check_closed(system, answer.headers["x-job-id"], left_at)


async def test_a_killed_curl_ends_the_stream(system: System, door: Endpoint) -> None:
    """SIGKILL, in the middle of it."""
    body = json.dumps({**ASK, "stream": True, "script": LONG})
    process = await asyncio.create_subprocess_exec(
        *("curl", "-siN", f"{door.base_url}/chat/completions", "-H", f"Authorization: Bearer {door.api_key}"),
        *("-H", "Content-Type: application/json", "-d", body),
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    head = (await process.stdout.readuntil(b"\r\n\r\n")).decode()
    await process.stdout.readuntil(b"\n\ndata: ")
    left_at = time.time()
    process.kill()
    await process.wait()
    [job_id] = re.findall(r"^x-job-id: (\S+)", head, re.MULTILINE | re.IGNORECASE)
    await check_closed(system, job_id, left_at)


async def test_another_viewer_keeps_it_alive(system: System, client: AsyncOpenAI) -> None:
    """With a second watcher on the job the stream goes on to its end, long after the client has left."""
    script = {"deltas": 100, "rate": 20}  # five seconds of it, more than the grace and the looking for it
    answer = await client.chat.completions.with_raw_response.create(
        **ASK, stream=True, extra_body={"script": script}
    )
    job_id = answer.headers["x-job-id"]
    stream = answer.parse()
    is_there = asyncio.Event()
    second = asyncio.create_task(watch(system, job_id, token=KEY, on_event=lambda _: is_there.set()))
    await asyncio.wait_for(is_there.wait(), WAIT_S)
    assert (await anext(stream)).choices
    await stream.close()
    assert (await second)[-1]["type"] == "completed"
    [record] = await gateway_records(system, job_id)
    assert record["closed_by"] is None
    assert record["sent_deltas"] == 100


# The Python SDK, further.


async def test_no_chunk_is_without_choices_unless_asked_for(client: AsyncOpenAI) -> None:
    """The usage-only chunk comes if the client asked for it, as the last one, and else not."""
    plain = await read(await client.chat.completions.create(**ASK, stream=True))
    assert all(chunk.choices for chunk in plain)
    with_usage = await read(
        await client.chat.completions.create(**ASK, stream=True, stream_options={"include_usage": True})
    )
    assert not with_usage[-1].choices
    assert with_usage[-1].usage
    assert with_usage[-1].usage.completion_tokens == 17
    assert len(with_usage) == len(plain) + 1


async def test_an_answer_that_is_not_streamed(client: AsyncOpenAI) -> None:
    """One object, and the SDK knows the job's id as the request's id."""
    answer = await client.chat.completions.with_raw_response.create(**ASK)
    completion = answer.parse()
    assert completion.choices[0].message.content == HAIKU
    assert completion.choices[0].finish_reason == "stop"
    assert completion.usage
    assert completion._request_id == answer.headers["x-job-id"]


async def test_a_stream_is_watched_elsewhere(system: System, client: AsyncOpenAI) -> None:
    """`x-job-id` names the job: a WebSocket has the same chunks while the SDK reads them."""
    async with client.chat.completions.with_streaming_response.create(**ASK, stream=True) as answer:
        watching = asyncio.create_task(watch(system, answer.headers["x-job-id"], token=KEY))
        chunks = await read(await answer.parse())
    events = await watching
    published = [event["chunk"] for event in events if event["type"] == "delta"]
    assert [chunk.to_dict() for chunk in chunks] == [chunk for chunk in published if chunk["choices"]]
    assert events[-1]["type"] == "completed"


async def test_a_stream_is_cancelled_elsewhere(system: System, client: AsyncOpenAI) -> None:
    """The SDK that reads it raises."""
    answer = await client.chat.completions.with_raw_response.create(
        **ASK, stream=True, extra_body={"script": LONG}
    )
    stream = answer.parse()
    assert (await anext(stream)).choices
    assert (await cancel(system, answer.headers["x-job-id"], token=KEY))["cancelled_from"] == "in_progress"
    with pytest.raises(openai.APIError) as raised:
        await read(stream)
    assert raised.value.code == "cancelled"


async def test_the_models_are_listed(client: AsyncOpenAI) -> None:
    """Those of the gateway, as OpenAI's objects, as soon as a worker has said them."""
    models: dict[str, str] = {}
    async with asyncio.timeout(WAIT_S):
        while not models:
            models = {model.id: model.object async for model in client.models.list()}
    assert models["gpt-5.4"] == "model"
    assert (await client.models.retrieve("gpt-5.4")).id == "gpt-5.4"
    with pytest.raises(openai.NotFoundError) as raised:
        await client.models.retrieve("no-such-model")
    assert raised.value.code == "model_not_found"


async def test_an_idempotency_key_names_one_job(system: System, client: AsyncOpenAI) -> None:
    """The second stream is the first one again, and the gateway was asked once."""
    answers = [
        await client.chat.completions.with_raw_response.create(
            **ASK, stream=True, extra_headers={"Idempotency-Key": "one haiku, please"}
        )
        for _ in range(2)
    ]
    first, second = [await read(answer.parse()) for answer in answers]
    assert first == second
    [job_id] = {answer.headers["x-job-id"] for answer in answers}
    assert len(await gateway_records(system, job_id)) == 1


# Errors are those that the SDK has for them.


@pytest.mark.parametrize("stream", [True, False])
async def test_a_limited_rate(client: AsyncOpenAI, *, stream: bool) -> None:
    """429 with OpenAI's type and code, and how long to wait; the request's id is the job's."""
    script = {"fault": "status", "status": 429, "retry_after": 30}
    with pytest.raises(openai.RateLimitError) as raised:
        await client.chat.completions.create(**ASK, stream=stream, extra_body={"script": script})
    error = raised.value
    assert (error.type, error.code) == ("rate_limit_error", "rate_limit_exceeded")
    assert error.response.headers["retry-after"] == "30"
    assert error.request_id == error.response.headers["x-job-id"]


async def test_the_sdk_waits_as_long_as_it_is_told(
    system: System, door: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It tries again by itself, after the gateway's `Retry-After`."""
    slept: list[float] = []
    monkeypatch.setattr("openai._base_client.time.sleep", slept.append)
    script = {"fault": "status", "status": 429, "retry_after": 30}
    limited = {**ASK, "model": "limited"}
    with door.sdk(max_retries=1) as client, pytest.raises(openai.RateLimitError):
        client.chat.completions.create(**limited, stream=True, extra_body={"script": script})
    assert slept == [30.0]
    assert [record["model"] for record in await gateway_records(system)].count("limited") == 2


async def test_a_bad_request(client: AsyncOpenAI) -> None:
    """Ours and the gateway's are told in the same way, with the parameter at fault."""
    with pytest.raises(openai.BadRequestError) as ours:
        await client.chat.completions.create(**{**ASK, "messages": []}, stream=True)
    with pytest.raises(openai.BadRequestError) as theirs:
        await client.chat.completions.create(**ASK, stream=True, extra_body={"script": {"nonsense": 1}})
    assert ours.value.type == theirs.value.type == "invalid_request_error"
    assert (theirs.value.param, theirs.value.code) == ("script.nonsense", "unknown_parameter")


async def test_a_wrong_key(system: System, client: AsyncOpenAI) -> None:
    """The client's is the client's fault; ours, at the gateway, is not."""
    async with door_of(system, "dw_wrong").async_sdk() as stranger:
        with pytest.raises(openai.AuthenticationError):
            await stranger.chat.completions.create(**ASK, stream=True)
        with pytest.raises(openai.AuthenticationError):
            await stranger.models.list()
    with pytest.raises(openai.InternalServerError) as raised:
        await client.chat.completions.create(
            **ASK, stream=True, extra_body={"script": {"fault": "status", "status": 401}}
        )
    assert raised.value.status_code == 502


@pytest.mark.parametrize("fault", ["error", "cut", "reset"])
async def test_what_breaks_in_mid_stream_raises(client: AsyncOpenAI, fault: str) -> None:
    """After the text so far; a stream that is not whole never looks whole."""
    script = {"fault": fault, "after": 5, "rate": 0}
    stream = await client.chat.completions.create(**ASK, stream=True, extra_body={"script": script})
    chunks: list[ChatCompletionChunk] = []
    with pytest.raises(openai.APIError) as raised:
        await read(stream, chunks)
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said
    assert HAIKU.startswith(said)
    assert raised.value.message
    assert raised.value.code


ERRORS_IN_NODE = """
import OpenAI from "openai";
import { text } from "node:stream/consumers";
const [at, bodies] = JSON.parse(await text(process.stdin));
const client = new OpenAI({ apiKey: at[1], baseURL: at[0], maxRetries: 0 });
const told = [];
for (const body of bodies) {
  let chunks = 0;
  try {
    for await (const chunk of await client.chat.completions.create(body)) chunks += chunk.choices.length;
    told.push(["no error", chunks > 0]);
  } catch (error) {
    told.push([error.constructor.name, chunks > 0]);
  }
}
process.stdout.write(JSON.stringify(told));
"""


async def test_the_node_sdk_raises_them_too(door: Endpoint) -> None:
    """Before the first chunk by status, in mid-stream by the error object."""
    faults: list[dict[str, Any]] = [
        {"fault": "status", "status": 429, "retry_after": 30},
        {"nonsense": 1},
        {"fault": "error", "after": 5, "rate": 0},
        {"fault": "cut", "after": 5, "rate": 0},
        {"rate": 0},
    ]
    bodies = [{**ASK, "stream": True, "script": script} for script in faults]
    told = json.loads(await run_with_openai_sdk(ERRORS_IN_NODE, json.dumps([door, bodies])))
    assert told == [
        ["RateLimitError", False],
        ["BadRequestError", False],
        ["APIError", True],
        ["APIError", True],
        ["no error", True],
    ]


def test_a_model_that_thinks_for_long(thinking: list[Future[str]]) -> None:
    """The headers have gone, and a comment instead of a chunk; no client minds."""
    by_curl, *by_sdks = [program.result() for program in thinking]
    assert by_curl.startswith(":")
    assert text_in(data_of(by_curl)[:-1]) == HAIKU
    assert by_sdks == [HAIKU, HAIKU]
