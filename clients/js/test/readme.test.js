/** The README's code, as it stands there, but for the address and the key. */

import { execFile } from "node:child_process";
import { readFileSync } from "node:fs";
import { promisify } from "node:util";
import { describe, expect, test } from "vitest";
import { Client } from "../src/index.js";
import { API_KEY, RELAY, request, token } from "./support.js";

const ROOT = new URL("..", import.meta.url);
const BLOCKS = [...readFileSync(new URL("README.md", ROOT), "utf8").matchAll(/```js\n(.*?)```/gs)].map(
  ([, code]) => code,
);

/** What a module prints that finds this package by its name. */
async function run(code) {
  const here = code
    .replaceAll("http://127.0.0.1:8080", RELAY)
    .replace("new Client({ baseUrl", `new Client({ apiKey: "${API_KEY}", baseUrl`);
  const { stdout, stderr } = await promisify(execFile)(process.execPath, ["--input-type=module", "-e", here], {
    cwd: ROOT,
    env: { ...process.env, DELTAWIRE_API_KEY: API_KEY },
  });
  expect(stderr).toBe("");
  return stdout;
}

describe.skipIf(!RELAY)("the README", { concurrent: true }, () => {
  test("has three blocks", () => expect(BLOCKS).toHaveLength(3));

  test("shows a page how", async () => {
    const job = await new Client({ baseUrl: RELAY, apiKey: API_KEY }).submit(request({ text: "Hello, reader." }));
    const page = `
      const [jobId, paragraph, stopButton] = [${JSON.stringify(job.id)}, {}, {}];
      const { fetch: real } = globalThis;
      globalThis.fetch = (url, how) => (url.startsWith("/chat/") ? new Response(${JSON.stringify(await token(job.id))}) : real(url, how));
      process.on("exit", () => console.log(paragraph.textContent, stopButton.hidden));
    `;
    expect(await run(page + BLOCKS[0])).toBe("Hello, reader. true\n");
  });

  test("prints a text", async () => expect(await run(BLOCKS[1])).toContain("Whisper of tokens"));

  test("prints a result", async () => expect(await run(BLOCKS[2])).toMatch(/Whisper of tokens.* \[\] null \d+/s));
});
