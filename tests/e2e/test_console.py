"""The console in a real Chromium: what a person sees and does (PROTOCOL §5.12)."""

import json
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from importlib.resources import files
from typing import Any, Final

import pytest
import pytest_asyncio
from playwright.async_api import Browser, Page, Route, expect

from tests.support.chromium import chromium
from tests.support.relay_process import Keyring
from tests.support.system import System, cancel, request, show, submit

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(300)]

AXE: Final = files("axe_playwright_python").joinpath("axe.min.js").read_text()
KEYS: Final = Keyring(
    all=("acme", ["read", "cancel", "submit", "list", "metrics"]),
    reader=("acme", ["read"]),
)
PHONE: Final = {"width": 360, "height": 740}
#: Long enough for whatever a test does meanwhile, on a machine that has much else to do.
SLOW: Final[dict[str, Any]] = {"deltas": 3_000, "rate": 20}
WAIT_MS: Final = 60_000

expect.set_options(timeout=WAIT_MS)


@pytest.fixture(scope="module")
def system() -> Iterator[System]:
    with System() as system:
        yield system


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as browser:
        yield browser


@asynccontextmanager
async def console(browser: Browser, address: str, **context: Any) -> AsyncIterator[Page]:
    """The page, in a context of its own. Whatever the browser complains of is a failure."""
    made = await browser.new_context(**context)
    try:
        made.set_default_timeout(WAIT_MS)
        page = await made.new_page()
        complaints: list[str] = []
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "console", lambda message: complaints.append(message.text) if "Security" in message.text else None
        )
        await page.goto(address)
        yield page
        assert complaints == []
    finally:
        await made.close()


@pytest_asyncio.fixture(loop_scope="module")
async def page(browser: Browser, system: System) -> AsyncIterator[Page]:
    async with console(browser, system.relay_url) as page:
        yield page


async def ask(page: Page, prompt: str = "Hello", /, **script: Any) -> str:
    """Runs a prompt as a person does, with further fields for the gateway; the job's id."""
    await page.fill("#prompt", prompt)
    if script:
        await page.locator("#options").evaluate("(details) => (details.open = true)")
        await page.fill("#further", json.dumps({"script": script}))
    before = await page.text_content("#job-id")
    await page.click("#ask [type=submit]")
    await expect(page.locator("#job-id")).not_to_have_text(before or "")
    return await page.text_content("#job-id") or ""


async def status_is(page: Page, status: str) -> None:
    await expect(page.locator("#status")).to_have_text(status)


async def frame(page: Page) -> None:
    """Waits until what has come by now stands there: the page shows it once a frame, the status at once."""
    await page.evaluate("new Promise(requestAnimationFrame)")


async def text_of(page: Page) -> str:
    await frame(page)
    return await page.locator("#text .said").first.text_content() or ""


async def has_text(page: Page, least: int = 20) -> str:
    """What is shown, once it is so many characters."""
    await expect(page.locator("#text")).to_have_text(re.compile(f".{{{least}}}", re.DOTALL))
    return await text_of(page)


async def completion_of(system: System, job_id: str, token: str | None = None) -> str:
    job = await show(system, job_id, token=token)
    return str(job["completion"]["choices"][0]["message"]["content"])


async def violations(page: Page) -> list[str]:
    """What axe finds, by its best practices, too. It gets in by the debugger, so the page's policy stays."""
    await page.evaluate(AXE)
    # Half-way from one colour to another a button has a contrast that nobody sees.
    await page.evaluate(
        "Promise.allSettled(document.getAnimations()"
        ".filter((each) => each instanceof CSSTransition).map((each) => each.finished))"
    )
    found = await page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{each['id']}: {node['html'][:120]} {node['failureSummary']}"
        for each in found["violations"]
        for node in each["nodes"]
    ]


async def overflow(page: Page) -> int:
    """By how much the page is wider than the screen."""
    width: int = await page.evaluate("document.documentElement.scrollWidth - innerWidth")
    return width


# -- One job


async def test_a_prompt_streams(page: Page, system: System) -> None:
    """Text while it runs, the whole of it in the end, and what it took."""
    job_id = await ask(page, deltas=60, rate=10)
    await status_is(page, "running")
    assert await has_text(page)
    await status_is(page, "completed")
    assert await text_of(page) == await completion_of(system, job_id)
    await expect(page.locator("#fact-speed")).to_contain_text("tokens/s")
    await expect(page.locator("#stop")).to_be_hidden()
    await expect(page.locator("#jobs tbody [aria-current]")).to_have_attribute("title", job_id)


async def test_a_job_is_stopped(page: Page, system: System) -> None:
    job_id = await ask(page, **SLOW)
    await has_text(page)
    await page.click("#stop")
    await status_is(page, "cancelled")
    await expect(page.locator("#notice")).to_contain_text("Cancelled: by this console; the gateway")
    assert await text_of(page) == await completion_of(system, job_id)
    assert (await show(system, job_id))["cancel"]["reason"] == "console"


async def test_a_reload_goes_on(page: Page, system: System) -> None:
    """The job stands in the address: the text so far, then the rest, and the prompt above it."""
    job_id = await ask(page, "What are rivers?", deltas=120, rate=10)
    before = await has_text(page)
    await page.reload()
    assert page.url.endswith(f"/?job={job_id}")
    await status_is(page, "running")
    assert (await has_text(page)).startswith(before)
    await expect(page.locator("#asked")).to_have_text("What are rivers?")
    await status_is(page, "completed")
    assert await text_of(page) == await completion_of(system, job_id)


async def test_a_second_tab_shows_the_same(page: Page, system: System) -> None:
    """A stop in one shows in the other, and both have the same text."""
    job_id = await ask(page, **SLOW)
    async with page.expect_popup() as popup:
        await page.click("#second")
    second = await popup.value
    await has_text(second)
    assert await second.text_content("#job-id") == job_id
    await expect(second.locator("#fact-tokens")).to_contain_text("more deltas")
    await expect(second.locator("#fact-first")).to_have_text("\u2013")  # it came before this tab
    await second.click("#stop")
    for each in (second, page):
        await status_is(each, "cancelled")
    assert await text_of(page) == await text_of(second) == await completion_of(system, job_id)


async def test_jobs_are_gone_through_by_the_list_and_the_history(page: Page) -> None:
    """A job of the list opens in the page; back shows the one before."""
    first, second = await ask(page, text="the first"), await ask(page, text="the second")
    await expect(page.locator("#text")).to_have_text("the second")
    await page.click(f"#jobs a[title='{first}']")
    await expect(page.locator("#text")).to_have_text("the first")
    await page.go_back()
    await expect(page.locator("#job-id")).to_have_text(second)
    await expect(page.locator("#text")).to_have_text("the second")


async def test_the_wire_is_shown_as_it_is(page: Page) -> None:
    """Every frame of a new job with its number, one after the other, from the first to the last event."""
    job_id = await ask(page, deltas=20, rate=20)
    await page.click("#show-wire")
    await status_is(page, "completed")
    await frame(page)
    numbers = await page.locator("#wire .number").all_text_contents()
    told = [int(number) for number in numbers if number.isdigit()]
    assert told == list(range(1, told[-1] + 1))
    last = await page.locator("#wire .raw").last.text_content() or ""
    number, data = last.split("\n")
    assert number == f"id: {told[-1]}"
    event = json.loads(data.removeprefix("data: "))
    assert (event["type"], event["job_id"]) == ("completed", job_id)
    await page.click("#show-text")
    await expect(page.locator("#wire-view")).to_be_hidden()


async def test_what_a_model_says_is_text(page: Page) -> None:
    """Neither markup nor control characters nor the direction of its script do anything."""
    hostile = (
        "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script>"
        "\x1b[31mred\x1b[0m \u202egnp.exe"
    )
    await ask(page, hostile, text=hostile)
    await status_is(page, "completed")
    assert await text_of(page) == hostile
    await page.click("#show-wire")
    await expect(page.locator("#wire")).to_contain_text("onerror")
    assert await page.locator("main img, main script, main iframe").count() == 0
    assert "owned" not in await page.title()


async def test_tool_calls_and_several_choices_are_told_apart(page: Page) -> None:
    chunk = {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": "m"}
    call = {
        "index": 0,
        "id": "1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"a":1}'},
    }
    deltas: list[Any] = [
        {"index": 0, "delta": {"role": "assistant", "reasoning_content": "Hm."}, "finish_reason": None},
        {"index": 0, "delta": {"content": "It rains."}, "finish_reason": "stop"},
        {"index": 1, "delta": {"tool_calls": [call]}, "finish_reason": "tool_calls"},
    ]
    await ask(page, chunks=[{**chunk, "choices": [delta]} for delta in deltas])
    await status_is(page, "completed")
    await frame(page)
    shown = await page.locator("#text > div").all_text_contents()
    assert shown == ["ReasoningHm.", "It rains.", 'Choice 2 · Tool call 1weather {"a":1}']


async def test_odd_chunks_end_nothing(page: Page) -> None:
    """A gateway may send anything; the rest is shown, and a text in parts is one."""
    parts = [{"type": "text", "text": "in parts "}, {"type": "thinking"}, None, {"type": "text", "text": 5}]
    odd: list[Any] = [{"choices": {"a": 1}}, {"choices": [None]}, {"choices": [{"index": 0, "delta": 5}]}]
    deltas = [
        *({"content": "before "}, {"tool_calls": {"a": 1}}, {"tool_calls": [None, 1]}),
        *({"content": parts}, {"content": "after"}),
    ]
    said = [{"choices": [{"index": 0, "delta": delta}]} for delta in deltas]
    end = {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}
    job_id = await ask(page, chunks=[*odd, *said, end])
    for _ in "live", "as a snapshot":
        await status_is(page, "completed")
        await expect(page.locator("#text")).to_have_text("before in parts after")
        await expect(page.locator("#notice")).to_be_hidden()
        await page.goto(page.url)
        await expect(page.locator("#job-id")).to_have_text(job_id)


async def test_a_long_answer_is_laid_out_by_stretches(page: Page) -> None:
    """All of it with each word would take a second a time; who copies it gets it as it is."""
    text = "\n\n".join(f"{number} " + "word " * 50 for number in range(400)) + "\n"
    job_id = await ask(page, text=text, rate=5_000)
    for _ in "live", "as a snapshot":
        await status_is(page, "completed")
        assert await text_of(page) == text
        longest = """Math.max(...[...document.querySelectorAll("#text .said, #text .said div")]
            .flatMap((box) => [...box.childNodes]).filter((node) => node.data).map((node) => node.length))"""
        assert await page.evaluate(longest) < 3_000
        copied = (
            "getSelection().selectAllChildren(document.querySelector('#text .said')), String(getSelection())"
        )
        assert (await page.evaluate(copied)).rstrip() == text.rstrip()
        await page.goto(page.url)
        await expect(page.locator("#job-id")).to_have_text(job_id)
    await page.click("#show-wire")
    await expect(page.locator("#wire")).to_contain_text("more characters")


async def test_long_prompts_fit(page: Page) -> None:
    """What the tab remembers of them is bounded: a job that was made must not look refused."""
    set_prompt = "(prompt) => (document.getElementById('prompt').value = prompt)"
    for number in range(4):
        await page.evaluate(set_prompt, f"{number} " + "x" * 2_000_000)
        before = await page.text_content("#job-id")
        await page.click("#ask [type=submit]")
        await expect(page.locator("#job-id")).not_to_have_text(before or "")
        await expect(page.locator("#asked")).to_contain_text(f"{number} x")


async def test_a_link_within_the_page_leaves_the_job_alone(page: Page) -> None:
    job_id = await ask(page, **SLOW)
    await has_text(page)
    await page.evaluate("document.querySelector('#text .said').id = 'same'")
    await page.evaluate("location.hash = '#prompt'")
    await page.go_back()
    await expect(page.locator("#job-id")).to_have_text(job_id)
    assert await page.locator("#same").count() == 1
    await page.click("#stop")


async def test_further_options_reach_the_job(page: Page, system: System) -> None:
    await page.locator("#options summary").click()
    await page.fill("#system", "Be brief.")
    await page.fill("[name='request.temperature']", "0.5")
    await page.check("#abandon")
    async with page.expect_request("**/v1/jobs") as sent:
        await ask(page, "Hi", text="ok")
    body: Any = (await sent.value).post_data_json
    assert body["request"]["messages"][0] == {"role": "system", "content": "Be brief."}
    assert (body["request"]["temperature"], body["options"]) == (0.5, {"on_abandon": "cancel"})
    await page.fill("#further", "{")
    await page.click("#ask [type=submit]")
    await expect(page.locator("#ask-error")).to_contain_text("no JSON")


# -- What goes wrong


async def test_ends_are_told_in_words(page: Page) -> None:
    await ask(page, fault="status", status=400)
    await status_is(page, "failed")
    await expect(page.locator("#notice")).to_contain_text("upstream_invalid_request, at the upstream")
    await ask(page, deltas=20, fault="cut", after=5)
    await status_is(page, "incomplete")
    await expect(page.locator("#notice")).to_contain_text("the gateway closed the stream before its end")


async def test_unknown_jobs_are_said_to_be(page: Page, system: System) -> None:
    await page.goto(f"{system.relay_url}/?job=nobody")
    await status_is(page, "no record yet")
    await expect(page.locator("#notice")).to_contain_text("No worker knows this job yet")
    await page.goto(f"{system.relay_url}/?job=%7B%7D")
    await expect(page.locator("#notice")).to_contain_text("invalid_job_id")


async def test_a_relay_that_went_away_comes_back(browser: Browser) -> None:
    """Meanwhile the page says so; afterwards it goes on where it was."""
    with System() as system:
        async with console(browser, system.relay_url) as page:
            job_id = await ask(page, **SLOW)
            before = await has_text(page)
            system.relay.stop(at_once=True)
            await expect(page.locator("#notice")).to_contain_text("Coming back")
            await expect(page.locator("#health")).to_have_text("relay is away")
            await expect(page.locator("#jobs .notice")).to_contain_text("The relay cannot be reached")
            system.launch_relay(in_place_of=0).wait_until_ready()
            await expect(page.locator("#notice")).to_be_hidden()
            await expect(page.locator("#health")).to_have_text("relay is up")
            await has_text(page, len(before) + 20)
            await cancel(system, job_id)
            await status_is(page, "cancelled")
            assert await text_of(page) == await completion_of(system, job_id)


async def test_a_page_whose_scripts_do_not_go_together_is_loaded_again(page: Page) -> None:
    """As while relays are upgraded, and the page names what another one does not have, or has otherwise."""
    refused: list[str] = []

    async def refuse(route: Route) -> None:
        refused.append(route.request.url)
        await route.fulfill(status=404)

    await page.route("**/console/plots.js", refuse, times=1)
    await page.reload()
    await expect(page.locator("html[data-is-whole]")).to_have_count(1)
    assert len(refused) == 1  # so the first load was not whole
    await ask(page)
    await status_is(page, "completed")


async def test_a_refusal_says_when_to_come_again(browser: Browser) -> None:
    tenants = "[tenants.default]\nmax_running = 1\nmax_queued = 1"
    with System(workers=0, relay_environment={"DELTAWIRE_TENANTS": tenants}) as system:
        for _ in range(2):
            await submit(system, request())
        async with console(browser, system.relay_url) as page:
            await page.fill("#prompt", "Hello")
            await page.keyboard.press("Control+Enter")
            await expect(page.locator("#ask-error")).to_contain_text("tenant_queue_full")
            await expect(page.locator("#ask-error")).to_contain_text("Come again in")
            await expect(page.locator("#workers .notice")).to_contain_text("No worker is running")


# -- Keys


@pytest.fixture(scope="module")
def guarded() -> Iterator[System]:
    with System(relay_environment={"DELTAWIRE_API_KEYS": KEYS.text}) as system:
        yield system


async def give_key(page: Page, key: str) -> None:
    await page.fill("#key", key)
    await page.keyboard.press("Enter")
    await expect(page.locator("#key-dialog")).to_be_hidden()


async def test_a_key_is_asked_for(browser: Browser, guarded: System) -> None:
    """It opens everything, goes along to a second tab, and stands in no address and in no lasting storage."""
    async with console(browser, guarded.relay_url) as page:
        addresses: list[str] = []
        page.context.on("request", lambda request: addresses.append(request.url))
        await expect(page.locator("#key-dialog")).to_be_visible()
        await give_key(page, "dw_wrong")
        await expect(page.locator("#jobs .notice")).to_contain_text("this API key is not known here")
        await page.click("#key-button")
        await give_key(page, KEYS["all"])
        job_id = await ask(page, **SLOW)
        await has_text(page)
        async with page.expect_popup() as popup:
            await page.click("#second")
        second = await popup.value
        await has_text(second)
        await expect(second.locator("#key-dialog")).to_be_hidden()
        await second.click("#stop")
        await status_is(page, "cancelled")
        await expect(page.locator("#relays tbody tr")).to_have_count(1)
        assert await text_of(page) == await completion_of(guarded, job_id, KEYS["all"])
        assert KEYS["all"] not in "".join(addresses) + await page.evaluate("JSON.stringify(localStorage)")
        assert KEYS["all"] not in guarded.logs()


async def test_another_key_counts_at_once(browser: Browser, guarded: System) -> None:
    """For the job that streams, too: the one before may expire, and who forgets it wants to see no more."""
    job_id = await submit(guarded, request(**SLOW), token=KEYS["all"])
    async with console(browser, f"{guarded.relay_url}/?job={job_id}") as page:
        await give_key(page, KEYS["all"])
        await has_text(page)
        await page.click("#key-button")
        await page.click("#forget")
        await expect(page.locator("#notice")).to_have_text("An API key is needed here.")
        await page.click("#key-button")
        await give_key(page, KEYS["reader"])
        await has_text(page)
        await expect(page.locator("#notice")).to_be_hidden()
    await cancel(guarded, job_id, token=KEYS["all"])


async def test_missing_scopes_are_named(browser: Browser, guarded: System) -> None:
    """Where they are missed; what the key may do works."""
    job_id = await submit(guarded, request(text="for readers"), token=KEYS["all"])
    async with console(browser, f"{guarded.relay_url}/?job={job_id}") as page:
        await give_key(page, KEYS["reader"])
        await expect(page.locator("#text")).to_have_text("for readers")
        await expect(page.locator("#jobs .notice")).to_contain_text("no scope “list”")
        for part in ("#workers", "#relays", "#plot-delay"):
            await expect(page.locator(f"{part} .notice")).to_contain_text("no scope “metrics”")
        await page.fill("#prompt", "Hello")
        await page.click("#ask [type=submit]")
        await expect(page.locator("#ask-error")).to_contain_text("no scope “submit”")
        running = await submit(guarded, request(**SLOW, first_delta_s=3), token=KEYS["all"])
        await page.goto(f"{guarded.relay_url}/?job={running}")
        await page.click("#stop")
        await expect(page.locator("#notice")).to_contain_text("no scope “cancel”")
        await has_text(page)  # which does not wipe it away
        await expect(page.locator("#notice")).to_contain_text("no scope “cancel”")
        await cancel(guarded, running, token=KEYS["all"])


# -- Lists and plots


async def test_lists_and_plots_are_live(page: Page, system: System) -> None:
    """What others submit comes by itself; processes and all three plots are there."""
    job_id = await submit(system, request(deltas=40, rate=20))
    row = page.locator("#jobs tbody tr", has=page.locator(f"a[title='{job_id}']"))
    await expect(row).to_contain_text("completed")
    await expect(page.locator("#workers tbody tr")).to_have_count(1)
    await expect(page.locator("#relays tbody tr")).to_have_count(1)
    for plot in ("#plot-first", "#plot-speed"):
        await expect(page.locator(f"{plot} rect").first).to_be_visible()
        await expect(page.locator(f"{plot} svg")).to_have_attribute(
            "aria-label", re.compile(r"^\d+ jobs, from .*; median")
        )
    running = await ask(page, **SLOW)
    await expect(page.locator("#plot-delay circle")).to_be_visible()
    await expect(page.locator("#plot-delay strong")).to_contain_text("s")
    await cancel(system, running)


# -- For everybody


async def test_the_keyboard_is_enough(page: Page, system: System) -> None:
    """From the first Tab to the help, with nothing clicked; single keys can be turned off."""
    await page.keyboard.press("Tab")
    await expect(page.locator(".skip")).to_be_focused()
    await page.keyboard.press("Enter")
    await expect(page.locator("#prompt")).to_be_focused()
    await page.keyboard.type("What is a wire? s/w")
    for _ in ("model", "run", "more options"):
        await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    for _ in ("system", "temperature", "tokens", "priority", "time-out", "abandon", "further"):
        await page.keyboard.press("Tab")
    await expect(page.locator("#further")).to_be_focused()
    await page.keyboard.type(json.dumps({"script": SLOW}))
    await page.keyboard.press("Control+Enter")
    await has_text(page)
    await expect(page.locator("#asked")).to_have_text("What is a wire? s/w")
    await page.keyboard.press("Tab")  # out of the field
    await page.keyboard.press("w")
    await expect(page.locator("#wire")).to_be_visible()
    await page.keyboard.press("s")
    await status_is(page, "cancelled")
    await page.keyboard.press("?")
    await expect(page.locator("#single")).to_be_focused()
    await page.keyboard.press("Space")
    await page.keyboard.press("Escape")
    await page.keyboard.press("w")
    await expect(page.locator("#wire")).to_be_visible()


async def test_only_what_matters_is_read_out(page: Page) -> None:
    """How the job stands, and its end; no token."""
    await page.evaluate(
        """() => {
          const say = document.querySelector("#say");
          globalThis.said = [];
          new MutationObserver(() => said.push(say.textContent)).observe(say, {childList: true});
        }"""
    )
    await ask(page, deltas=10, rate=20)
    await status_is(page, "completed")
    await page.wait_for_function("said.some((text) => text.startsWith('Completed'))")
    assert len(await page.evaluate("said")) <= 4
    assert await page.locator("#text").get_attribute("aria-live") == "off"


async def test_themes(browser: Browser, system: System) -> None:
    """The system's, unless somebody has chosen; the choice stays."""
    background = "getComputedStyle(document.documentElement).backgroundColor"
    async with console(browser, system.relay_url, color_scheme="light") as page:
        light = await page.evaluate(background)
        await page.emulate_media(color_scheme="dark")
        dark = await page.evaluate(background)
        assert dark != light
        await page.click("#theme")
        assert await page.evaluate(background) == light
        await page.reload()
        assert await page.evaluate(background) == light
        await page.click("#theme")
        await page.emulate_media(color_scheme="light")
        assert await page.evaluate(background) == dark


@pytest.mark.parametrize(
    "context",
    [
        pytest.param({"color_scheme": "light"}, id="light"),
        pytest.param({"color_scheme": "dark"}, id="dark"),
        pytest.param(
            {"color_scheme": "dark", "viewport": PHONE, "has_touch": True, "reduced_motion": "reduce"},
            id="phone",
        ),
    ],
)
async def test_nobody_is_kept_out(
    browser: Browser, system: System, guarded: System, context: dict[str, Any]
) -> None:
    """axe finds nothing in any state, and nothing is wider than the screen."""

    async def is_fine(page: Page) -> None:
        assert await violations(page) == []
        assert await overflow(page) <= 0

    async with console(browser, system.relay_url, **context) as page:
        await expect(page.locator("#relays tbody tr")).to_have_count(1)
        await page.locator("#options").evaluate("(details) => (details.open = true)")
        await is_fine(page)
        await ask(page, text="W" * 500 + " word" * 2_000, rate=8)
        await has_text(page, 240)
        await is_fine(page)
        await page.click("#show-wire")
        await is_fine(page)
        await page.click("#stop")
        await status_is(page, "cancelled")
        await is_fine(page)
        await page.click("#show-text")
        await ask(page, fault="status", status=500)
        await ask(page, text="The end.")
        await status_is(page, "completed")
        await is_fine(page)
        await page.evaluate("document.querySelector('#help').showModal()")
        await is_fine(page)
    async with console(browser, guarded.relay_url, **context) as page:
        await expect(page.locator("#key-dialog")).to_be_visible()
        await is_fine(page)
        await give_key(page, KEYS["reader"])
        await expect(page.locator("#relays .notice")).to_contain_text("metrics")
        await is_fine(page)
