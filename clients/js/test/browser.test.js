/** Pages in a real Chromium, on a real deltawire. What takes a minute runs side by side. */

import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { build } from "vite";
import { setTimeout as sleep } from "node:timers/promises";
import { Client } from "../src/index.js";
import { API_KEY, Proxy, RELAY, eventually, request, startChromium, startSite } from "./support.js";

const MINUTE_MS = 60_000;
/** Longer than a minute, in which a page is away. */
const LONG = { deltas: 680, rate: 10 };
const SITE = `http://127.0.0.1:${process.env.DELTAWIRE_SITE_PORT}`;

/** Shows a job's text, and keeps the numbers of its events and what has happened to the page. */
const WATCH = `<!doctype html><title>watch</title><link rel="icon" href="data:," /><pre id="text"></pre><script type="module">
  import { Client, textOf } from "/src/index.js";
  const asked = new URLSearchParams(location.search);
  const getToken = async ({ jobId }) => (await fetch("/token?job=" + jobId)).text();
  const client = new Client({ baseUrl: asked.get("relay"), getToken });
  window.events = [];
  window.happened = [];
  for (const name of ["freeze", "resume"]) document.addEventListener(name, () => happened.push(name));
  for (const name of ["online", "offline"]) addEventListener(name, () => happened.push(name));
  addEventListener("pageshow", ({ persisted }) => persisted && happened.push("restored"));
  const stream = client.stream(asked.get("job"), { mode: asked.get("mode") ?? "replay" });
  for await (const event of stream) {
    events.push(event);
    document.getElementById("text").textContent = textOf(stream.completion);
  }
</script>`;

describe.skipIf(!RELAY)("in Chromium", { concurrent: true, timeout: 200_000 }, () => {
  let client;
  let chromium;
  let site;

  beforeAll(async () => {
    client = new Client({ baseUrl: RELAY, apiKey: API_KEY });
    process.env.VITE_DELTAWIRE_URL = RELAY;
    [chromium, site] = await Promise.all([
      startChromium(),
      startSite({ "/watch": WATCH, "/elsewhere": "<!doctype html><title>elsewhere</title>" }),
      build({ root: new URL("../examples/react", import.meta.url).pathname, base: "./", logLevel: "warn" }),
    ]);
  });
  afterAll(async () => {
    await chromium?.close();
    site?.closeAllConnections();
    site?.close();
  });

  /** A page that watches a job through `relay`, and has seen something of it. */
  async function watch(job, { relay = RELAY, mode = "replay" } = {}) {
    const page = await chromium.newPage();
    await page.goto(`${SITE}/watch?job=${job.id}&mode=${mode}&relay=${encodeURIComponent(relay)}`);
    await grown(page, 0);
    return page;
  }
  const grown = (page, by) => eventually(async () => (await count(page)) > by, `more than ${by} events`);
  const count = (page) => page.evaluate("events.length");

  /** How many events a page has when none has come for a second, in which there were ten. */
  async function standstill(page) {
    for (let before; ; await sleep(1_000)) {
      const now = await count(page);
      if (now === before) return now;
      before = now;
    }
  }

  /** The page has every event once, in order, and the text that the job has at its end. */
  async function checkWhole(page, job) {
    const { text } = await client.result(job.id);
    expect(text).not.toBe("");
    await eventually(() => page.evaluate("events.at(-1)?.type === 'completed'"), "the end");
    const numbers = await page.evaluate("events.map((event) => event.sequence_number)");
    expect(numbers).toEqual(numbers.map((_, index) => index + 1));
    expect(await page.textContent("#text")).toBe(text);
    await page.close();
  }

  test("a page that was frozen for a minute goes on", async () => {
    const job = await client.submit(request(LONG));
    const page = await watch(job);
    const devtools = await page.context().newCDPSession(page);
    await devtools.send("Page.setWebLifecycleState", { state: "frozen" });
    await eventually(() => page.evaluate("happened.includes('freeze')"), "the freeze");
    const before = await standstill(page);
    await sleep(MINUTE_MS);
    const asleep = await count(page);
    expect(asleep).toBeLessThan(before + 60); // of six hundred: a few slip through, in a task that had begun
    await devtools.send("Page.setWebLifecycleState", { state: "active" });
    await page.bringToFront();
    await eventually(() => page.evaluate("happened.includes('resume')"), "the resumption");
    await grown(page, asleep);
    await checkWhole(page, job);
  });

  test("a page that was offline for a minute goes on as soon as it is not", async () => {
    const job = await client.submit(request(LONG));
    const proxy = await new Proxy().start();
    const page = await watch(job, { relay: proxy.url });
    const devtools = await page.context().newCDPSession(page);
    const beOffline = (offline) =>
      devtools.send("Network.emulateNetworkConditions", {
        offline,
        latency: 0,
        downloadThroughput: -1,
        uploadThroughput: -1,
      });
    proxy.freeze(); // what was open stays half-open, as when a phone leaves its network
    proxy.isAway = true;
    await beOffline(true);
    const before = await standstill(page);
    await sleep(MINUTE_MS);
    expect(await count(page)).toBe(before);
    proxy.isAway = false;
    await beOffline(false);
    await grown(page, before);
    await eventually(() => page.evaluate("happened.includes('online')"), "the network");
    expect(await page.evaluate("happened")).toEqual(["offline", "online"]);
    await checkWhole(page, job);
    await proxy.close();
  });

  test("a page that comes out of the back-forward cache goes on", async () => {
    const job = await client.submit(request({ deltas: 120, rate: 10 }));
    const page = await watch(job);
    await page.goto(`${SITE}/elsewhere`);
    await sleep(3_000);
    await page.evaluate("history.back()");
    await eventually(() => page.title().then((title) => title === "watch"), "the page");
    await eventually(() => page.evaluate("happened.includes('restored')"), "event.persisted");
    await checkWhole(page, job);
  });

  test("a page that is reloaded has the text so far at once, and then the rest", async () => {
    const job = await client.submit(request({ deltas: 2_000, rate: 10 })); // however slow the page is to come
    const page = await watch(job, { mode: "snapshot" });
    await grown(page, 10);
    const before = await page.textContent("#text");
    await page.reload();
    await grown(page, 0);
    const [first] = await page.evaluate("events");
    expect(first.type).toBe("snapshot");
    expect(first.completion.choices[0].message.content.startsWith(before)).toBe(true);
    await client.cancel(job.id);
    const { completion } = await eventually(async () => {
      const shown = await client.retrieve(job.id);
      return shown.status === "cancelled" && shown;
    }, "the end");
    const text = completion.choices[0].message.content;
    await eventually(async () => (await page.textContent("#text")) === text, "the text");
    await page.close();
  });

  test("a page behind a proxy without WebSockets has it by SSE", async () => {
    const job = await client.submit(request({ deltas: 20, rate: 10 }));
    const proxy = await new Proxy({ upgrades: false }).start();
    await checkWhole(await watch(job, { relay: proxy.url }), job);
    await proxy.close();
  });

  // Within a second: of a machine that is busy with other things it may take another attempt.
  test(
    "two tabs of the React example show the same, and a stop in one shows in the other",
    { retry: 2, timeout: 30_000 },
    async () => {
      const job = await client.submit(request({ deltas: 400, rate: 10 }));
      const tabs = await Promise.all([chromium.newWindow(), chromium.newWindow()]);
      for (const tab of tabs) await tab.goto(`${SITE}/examples/react/dist/index.html?job=${job.id}`);
      const texts = () => Promise.all(tabs.map((tab) => tab.textContent("p")));
      await eventually(async () => (await texts()).every((text) => text.length > 30), "text in both");
      const shown = tabs[1].evaluate(async () => {
        const status = document.querySelector("[role=status]");
        while (status.textContent !== "cancelled") await new Promise((resolve) => setTimeout(resolve, 5));
        return Date.now();
      });
      const stoppedAt = await tabs[0].evaluate(() => {
        document.querySelector("button").click();
        return Date.now();
      });
      expect((await shown) - stoppedAt).toBeLessThan(1_000);
      await tabs[0].getByText("cancelled").waitFor();
      const [one, other] = await texts();
      expect(one).toBe(other);
      expect((await client.retrieve(job.id)).completion.choices[0].message.content).toBe(one);
      for (const tab of tabs) await tab.context().close();
    },
  );
});
