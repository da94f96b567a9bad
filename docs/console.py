"""Makes docs/console.webp, the console at work, in a Chromium of this machine: `python -m docs.console`."""

import asyncio
import base64
import re
from pathlib import Path
from typing import Any, Final

from playwright.async_api import ViewportSize, expect
from tests.support.chromium import chromium
from tests.support.system import System, cancel, request, submit

PICTURE: Final = Path(__file__).with_suffix(".webp")
SIZE: Final = ViewportSize(width=1280, height=925)
STORY: Final = '{"script": {"deltas": 600, "rate": 20}}'


async def _draw(system: System) -> None:
    for number in range(24):
        script: dict[str, Any] = {"deltas": 20 + 7 * (number % 5), "rate": 60 + 25 * (number % 4)}
        script["first_delta_s"] = round(0.05 + 0.03 * (number * number % 7), 2)
        if number % 9 == 5:
            script |= {"fault": "cut", "after": 10}
        await submit(system, request("Hello", **script))
    async with chromium() as browser:
        page = await browser.new_page(viewport=SIZE, color_scheme="light")
        await page.goto(system.relay_url)
        await page.fill("#prompt", "Tell me a long story about rivers.")
        await page.locator("#further").evaluate("(field, text) => (field.value = text)", STORY)
        await page.click("#ask [type=submit]")
        await expect(page.locator("#fact-number")).to_have_text(re.compile(r"^2\d\d$"), timeout=60_000)
        await page.locator("#text").focus()
        session = await page.context.new_cdp_session(page)  # Playwright's own screenshots know no WebP
        shot = await session.send("Page.captureScreenshot", {"format": "webp", "quality": 85})
        PICTURE.write_bytes(base64.b64decode(shot["data"]))
        await cancel(system, await page.locator("#job-id").inner_text())


if __name__ == "__main__":
    with System(workers=2, relays=2) as running:
        asyncio.run(_draw(running))
