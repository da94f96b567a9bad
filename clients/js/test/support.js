/** What the tests stand on: a relay in a proxy's hands, a web site, and requests to a scripted gateway. */

import { createServer as createTcpServer, connect } from "node:net";
import { createServer } from "node:http";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { setTimeout as sleep } from "node:timers/promises";
import { spawn } from "node:child_process";
import { tmpdir } from "node:os";
import { join } from "node:path";

/** A running deltawire (tests/e2e/test_javascript.py starts one), or undefined. */
export const RELAY = process.env.DELTAWIRE_URL;
export const API_KEY = process.env.DELTAWIRE_API_KEY;
const ROOT = new URL("..", import.meta.url);
const TYPES = { html: "text/html", js: "text/javascript", css: "text/css" };

/** A chat.completions body; `script` is what the gateway is asked to do. */
export function request(script, text = "Hello") {
  return { model: "gpt-5.4", messages: [{ role: "user", content: text }], ...(script && { script }) };
}

/** The first true value of `condition`. */
export async function eventually(condition, what = `${condition}`, timeoutMs = 30_000) {
  for (const deadline = Date.now() + timeoutMs; ; await sleep(20)) {
    const value = await condition();
    if (value) return value;
    if (Date.now() > deadline) throw new Error(`waited in vain for ${what}`);
  }
}

/** A proxy in front of the relay that cuts, freezes and refuses what passes through it, when told to. */
export class Proxy {
  connections = 0;
  isAway = false;
  /** What is cut after so many bytes from the relay, a number for each connection. */ bytesFor = () => Infinity;
  #pairs = new Set();
  #server = createTcpServer({ allowHalfOpen: false }, (client) => this.#serve(client));
  #upgrades;

  constructor({ upgrades = true } = {}) {
    this.#upgrades = upgrades;
  }

  async start() {
    await new Promise((resolve) => this.#server.listen(0, "127.0.0.1", resolve));
    return this;
  }

  get url() {
    return `http://127.0.0.1:${this.#server.address().port}`;
  }

  #serve(client) {
    client.on("error", () => {});
    if (this.isAway) return client.destroy();
    this.connections += 1;
    const server = connect(new URL(RELAY).port, "127.0.0.1");
    const pair = { client, server, isFrozen: false };
    const end = () => {
      this.#pairs.delete(pair);
      if (pair.isFrozen) return;
      client.destroy();
      server.destroy();
    };
    this.#pairs.add(pair);
    server.on("error", end).on("close", end);
    client.on("close", end);
    client.on("data", (data) => {
      if (!this.#upgrades && /^upgrade: websocket/im.test(data)) {
        client.end("HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
      } else if (!pair.isFrozen) server.write(data);
    });
    let left = this.bytesFor();
    server.on("data", (data) => {
      if (pair.isFrozen) return;
      client.write(data.subarray(0, left));
      left -= data.length;
      if (left <= 0) end();
    });
  }

  /** Ends what is open. */
  cut() {
    for (const { client, server } of this.#pairs) {
      client.destroy();
      server.destroy();
    }
  }

  /** What is open stays open, and nothing comes any more. */
  freeze() {
    for (const pair of this.#pairs) pair.isFrozen = true;
  }

  async close() {
    this.cut();
    await new Promise((resolve) => this.#server.close(resolve));
  }
}

/** A web site with this package's files, a page for each path of `pages`, and `/token?job=` as a backend's route. */
export async function startSite(pages) {
  const site = createServer(async (request, response) => {
    const { pathname, searchParams } = new URL(request.url, "http://site");
    const type = TYPES[pathname.split(".")[1]] ?? "text/html";
    try {
      const body =
        pathname === "/token"
          ? await token(searchParams.get("job"))
          : (pages[pathname] ?? (await readFile(new URL(`.${pathname}`, ROOT))));
      response.writeHead(200, { "Content-Type": `${type}; charset=utf-8` }).end(body);
    } catch {
      response.writeHead(404).end();
    }
  });
  await new Promise((resolve) => site.listen(process.env.DELTAWIRE_SITE_PORT, "127.0.0.1", resolve));
  return site;
}

/** A token for a job, as a backend gets one. */
export async function token(jobId, body = { cap: ["read", "cancel"] }) {
  const response = await fetch(`${RELAY}/v1/jobs/${jobId}/tokens`, {
    method: "POST",
    headers: { Authorization: `Bearer ${API_KEY}`, "Content-Type": "application/json" },
    body: JSON.stringify(body),
  });
  return (await response.json()).token;
}

/**
 * A real Chromium, as it is without anybody's settings: Playwright's own would keep its pages awake and out of the
 * back-forward cache. Throws where there is none.
 */
export async function startChromium() {
  const { chromium } = await import("playwright-core");
  const profile = await mkdtemp(join(tmpdir(), "deltawire-chromium-"));
  // Its own sandbox does not work in containers, for root least of all.
  const how = ["--headless", "--no-sandbox", "--remote-debugging-port=0", `--user-data-dir=${profile}`, "about:blank"];
  const program = spawn(process.env.CHROMIUM ?? "chromium", how, { stdio: ["ignore", "ignore", "pipe"] });
  const kill = () => program.kill();
  process.on("exit", kill);
  let said = "";
  program.stderr.on("data", (data) => (said += data));
  const ended = new Promise((resolve) => program.on("close", resolve));
  const address = await eventually(() => /ws:\/\/\S+/.exec(said)?.[0], `Chromium: ${said}`);
  const browser = await chromium.connectOverCDP(address, { noDefaults: true });
  return {
    newPage: () => browser.contexts()[0].newPage(),
    /** A page in a window of its own, which others do not hide. */
    newWindow: async () => (await browser.newContext()).newPage(),
    async close() {
      await browser.close();
      program.kill();
      await ended;
      process.off("exit", kill);
      await rm(profile, { recursive: true, force: true, maxRetries: 5 });
    },
  };
}
