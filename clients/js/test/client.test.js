/** The client in Node, on a real deltawire. */

import { createServer } from "node:http";
import { WebSocket as OfWs } from "ws";
import { describe, expect, test, vi } from "vitest";
import * as deltawire from "../src/index.js";
import { API_KEY, Proxy, RELAY, eventually, request, token } from "./support.js";

const { Client, textOf } = deltawire;
const TOOL = {
  type: "function",
  function: { name: "look_up", parameters: { type: "object", properties: { city: { type: "string" } } } },
};

/** With a WebSocket in Node 20, too. */
const OWN = globalThis.WebSocket ?? OfWs;
const clientOf = (options) => new Client({ baseUrl: RELAY, apiKey: API_KEY, WebSocket: OWN, ...options });

async function readAll(stream) {
  const events = [];
  for await (const event of stream) events.push(event);
  return events;
}

/** Every event once, in order, one end, and their sum is what the job says. */
async function checkWhole(events, stream, id) {
  const numbers = events.map((event) => event.sequence_number);
  expect(numbers).toEqual(numbers.map((_, index) => index + 1));
  const job = await clientOf().retrieve(id);
  expect(job.status).toBe("completed");
  expect(stream).toMatchObject({
    status: job.status,
    position: job.latest_sequence_number,
    completion: job.completion,
  });
  const said = events
    .filter((event) => event.type === "delta")
    .map((event) => event.chunk.choices[0]?.delta?.content ?? "");
  expect(said.join("")).toBe(textOf(job.completion));
}

describe.skipIf(!RELAY)("in Node", { concurrent: true, timeout: 200_000 }, () => {
  test.each(["websocket", "sse", "auto"])("a job is read from its beginning to its end by %s", async (transport) => {
    const client = clientOf({ transport });
    const job = await client.submit(request({ rate: 200 }));
    expect(job).toMatchObject({ object: "job", status: "queued" });
    const stream = client.stream(job.id);
    await checkWhole(await readAll(stream), stream, job.id);
    // What is over already is read in the same way, by others, or from where one is.
    const again = client.stream(job.id);
    await checkWhole(await readAll(again), again, job.id);
    expect(await readAll(client.stream(job.id, { startingAfter: stream.position }))).toEqual([]);
    const text = [];
    for await (const piece of client.stream(job.id, { mode: "snapshot", merge: true }).text()) text.push(piece);
    expect(text.join("")).toBe(textOf(stream.completion));
  });

  test.each(["websocket", "sse"])("a connection that is cut a hundred times loses nothing by %s", async (transport) => {
    const proxy = await new Proxy().start();
    proxy.bytesFor = () => (proxy.connections > 100 ? Infinity : 1_000 + Math.floor(Math.random() * 2_000));
    const client = clientOf({ baseUrl: proxy.url, transport });
    const job = await clientOf().submit(request({ deltas: 1_400, rate: 200 }));
    const stream = client.stream(job.id);
    await checkWhole(await readAll(stream), stream, job.id);
    expect(proxy.connections).toBeGreaterThan(100);
    await proxy.close();
  });

  test("many jobs go over one client", async () => {
    const client = clientOf();
    const jobs = await Promise.all(Array.from({ length: 20 }, () => client.submit(request({ deltas: 20, rate: 50 }))));
    const results = await Promise.all(jobs.map((job) => client.result(job.id)));
    expect(results.map((result) => result.id)).toEqual(jobs.map((job) => job.id));
  });

  test.each([
    ["through a proxy that knows no WebSockets", { upgrades: false }],
    ["through one that does", {}],
  ])("it gets %s", async (_, how) => {
    const proxy = await new Proxy(how).start();
    const client = clientOf({ baseUrl: proxy.url });
    const job = await client.submit(request({ deltas: 20 }));
    const stream = client.stream(job.id);
    await checkWhole(await readAll(stream), stream, job.id);
    await proxy.close();
  });

  test("it does without WebSockets where there are none", async () => {
    vi.stubGlobal("WebSocket", undefined); // as in Node 20
    const client = clientOf({ WebSocket: undefined });
    expect(() => clientOf({ WebSocket: undefined, transport: "websocket" })).toThrow(TypeError);
    vi.unstubAllGlobals();
    const job = await client.submit(request());
    expect((await client.result(job.id)).status).toBe("completed");
  });

  test("it takes the WebSocket of ws", async () => {
    const client = clientOf({ WebSocket: OfWs, transport: "websocket" });
    const job = await client.submit(request());
    const stream = client.stream(job.id);
    await checkWhole(await readAll(stream), stream, job.id);
  });

  test.each(["websocket", "sse"])("a token that expires in mid-stream is replaced by %s", async (transport) => {
    const job = await clientOf().submit(request({ deltas: 150, rate: 10 }));
    const asked = [];
    const getToken = ({ jobId }) => {
      asked.push(jobId);
      return token(jobId, { cap: ["read"], ttl_s: asked.length === 1 ? 1 : 60 });
    };
    const stream = new Client({ baseUrl: RELAY, getToken, transport, WebSocket: OWN }).stream(job.id);
    await checkWhole(await readAll(stream), stream, job.id);
    expect(asked).toEqual([job.id, job.id]);
  });

  test("a result has what can be relied on", async () => {
    const client = clientOf();
    const [calls, json] = await Promise.all([
      client.submit({ ...request(), tools: [TOOL], tool_choice: "required" }),
      client.submit({ ...request({ text: '{"a": 1}' }), response_format: { type: "json_object" } }),
    ]);
    const [call] = (await client.result(calls.id)).tool_calls;
    expect(call.function.name).toBe("look_up");
    expect(JSON.parse(call.function.arguments)).toBeTypeOf("object");
    expect(await client.result(json.id)).toMatchObject({
      status: "completed",
      text: '{"a": 1}',
      parsed: { a: 1 },
      tool_calls: [],
    });
  });

  test("an end that is no completion is an error, with all that there is", async () => {
    const client = clientOf();
    const failed = await client.submit(request({ fault: "status", status: 400 }));
    await expect(client.result(failed.id)).rejects.toMatchObject({
      name: "JobFailedError",
      result: { status: "failed", source: "upstream" },
    });
    const cut = await client.submit(request({ fault: "cut", after: 3, rate: 0 }));
    const error = await client.result(cut.id).catch((error) => error);
    expect(error).toBeInstanceOf(deltawire.JobIncompleteError);
    expect(error.result).toMatchObject({
      incomplete_details: { reason: "upstream_eof" },
      text: expect.stringMatching(/./),
    });
    const stopped = await client.submit(request({ deltas: 600, rate: 20 }));
    const result = client.result(stopped.id, {
      onEvent: ({ type }) => type === "delta" && client.cancel(stopped.id, { reason: "enough" }),
    });
    await expect(result).rejects.toMatchObject({ name: "JobCancelledError", result: { cancel: { reason: "enough" } } });
    expect(await client.cancel(stopped.id)).toMatchObject({
      status: "cancelled",
      cancelled_from: null,
      delivered: true,
    });
  });

  test("an idempotency key names one job", async () => {
    const submit = () => clientOf().submit(request(), undefined, { idempotencyKey: "once in JavaScript" });
    expect((await submit()).id).toBe((await submit()).id);
  });

  test("a submission whose answer was lost is one job", async () => {
    const proxy = await new Proxy().start();
    proxy.bytesFor = () => (proxy.connections > 2 ? Infinity : 0); // the relay has answered, and nobody hears it
    const keys = [];
    const fetch = (url, how) => {
      if (how.method === "POST") keys.push(how.headers["Idempotency-Key"]);
      return globalThis.fetch(url, how);
    };
    const client = clientOf({ baseUrl: proxy.url, fetch });
    const job = await client.submit(request());
    expect(keys).toEqual([keys[0], keys[0], keys[0]]);
    expect(job.id).toMatch(/^[0-9a-f]{32}$/);
    expect((await client.result(job.id)).status).toBe("completed");
    expect((await clientOf().submit(request(), undefined, { idempotencyKey: keys[0] })).id).toBe(job.id);
    expect((await client.submit(request())).id).not.toBe(job.id); // another call is another job
    await proxy.close();
  });

  test("a cancel whose answer was lost says how the job ended", async () => {
    const proxy = await new Proxy().start();
    const job = await clientOf().submit(request({ deltas: 600, rate: 20 }));
    await eventually(async () => (await clientOf().retrieve(job.id)).status === "in_progress");
    proxy.bytesFor = () => (proxy.connections > 1 ? Infinity : 0);
    expect(await clientOf({ baseUrl: proxy.url }).cancel(job.id)).toEqual({
      status: "cancelled",
      cancelled_from: null,
      delivered: true,
    });
    await proxy.close();
  });

  test("a signal ends a wait", async () => {
    const client = clientOf();
    const job = await client.submit(request({ deltas: 600, rate: 20 }));
    await expect(client.result(job.id, { signal: AbortSignal.timeout(300) })).rejects.toMatchObject({
      name: "TimeoutError",
    });
    await client.cancel(job.id);
  });

  test.each(["websocket", "sse"])("refusals are errors of their kinds by %s", async (transport) => {
    const client = clientOf({ transport });
    await expect(client.submit({ model: "m" })).rejects.toBeInstanceOf(deltawire.InvalidRequestError);
    await expect(client.submit(request(), { nonsense: 1 })).rejects.toMatchObject({
      error: { code: "unknown_option" },
    });
    await expect(client.retrieve("no-such-job")).rejects.toBeInstanceOf(deltawire.NotFoundError);
    await expect(readAll(client.stream("no such job"))).rejects.toBeInstanceOf(deltawire.InvalidRequestError);
    const stranger = clientOf({ apiKey: "dw_wrong", transport });
    await expect(stranger.retrieve("j")).rejects.toBeInstanceOf(deltawire.AuthenticationError);
    await expect(readAll(stranger.stream("j"))).rejects.toBeInstanceOf(deltawire.AuthenticationError);
    const nobody = clientOf({ baseUrl: "http://127.0.0.1:9", transport, giveUpAfterS: 0.5 });
    await expect(nobody.retrieve("j")).rejects.toBeInstanceOf(deltawire.UnreachableError);
    await expect(readAll(nobody.stream("j"))).rejects.toBeInstanceOf(deltawire.UnreachableError);
  });
});

describe("a command", () => {
  const refusal = (status, code, retryable, retryAfterS = null) => [
    status,
    { error: { code, message: code, type: "server_error", param: null, retryable, retry_after_s: retryAfterS } },
  ];
  const lost = [0];
  const done = [200, { id: "j" }];

  /** An HTTP server that gives these answers, [status, body, headers], one after the other; 0 is none at all. */
  async function desk(answers) {
    const asked = [];
    const server = createServer(async (asking, answer) => {
      let body = "";
      for await (const piece of asking) body += piece;
      asked.push({ key: asking.headers["idempotency-key"], body, at: performance.now() });
      const [status, said, headers] = answers.shift();
      if (!status) return asking.socket.destroy();
      answer.writeHead(status, headers).end(JSON.stringify(said));
    });
    await new Promise((resolve) => server.listen(0, "127.0.0.1", resolve));
    const close = () => new Promise((resolve) => server.close(resolve).closeAllConnections());
    return { asked, close, baseUrl: `http://127.0.0.1:${server.address().port}` };
  }

  test.each([
    ["whose answer is lost", [lost, lost, done]],
    ["that a proxy refuses for now", [[502], [503, { error: "no relay" }], done]],
    ["that may succeed later", [refusal(503, "redis_unavailable", true), refusal(500, "internal_error", true), done]],
    ["that comes too often", [[429], refusal(429, "tenant_queue_full", true, 0.1), done]],
  ])("%s is sent again as it was", async (_, answers) => {
    const { asked, baseUrl, close } = await desk([...answers]);
    expect((await new Client({ baseUrl }).submit(request())).id).toBe("j");
    expect(asked).toHaveLength(3);
    expect(asked[0].key).toMatch(/^random-./);
    expect(new Set(asked.map(({ key, body }) => `${key} ${body}`)).size).toBe(1);
    await close();
  });

  test.each([
    ["after the second time", [[503], [503], [503]], {}, deltawire.ServerError],
    ["after none, if one wants", [lost], { maxRetries: 0 }, deltawire.UnreachableError],
    ["at once where it is wrong", [refusal(400, "invalid_request", false)], {}, deltawire.JobUnavailableError],
    ["at once where time mends nothing", [refusal(502, "x", false)], {}, deltawire.ServerError],
    ["where it would come too late", [refusal(503, "overloaded", true, 2)], { timeoutS: 1 }, deltawire.ServerError],
    ["where a proxy says so", [[503, {}, { "Retry-After": "11" }]], {}, deltawire.ServerError],
    ["where what answers is no relay", [[200]], {}, deltawire.ServerError],
  ])("fails %s", async (_, answers, options, kind) => {
    const { asked, baseUrl, close } = await desk([...answers]);
    await expect(new Client({ baseUrl, ...options }).retrieve("j")).rejects.toBeInstanceOf(kind);
    expect(asked).toHaveLength(answers.length);
    await close();
  });

  test("is sent again when it is told to", async () => {
    const { asked, baseUrl, close } = await desk([[503, {}, { "Retry-After": "1" }], done]);
    await new Client({ baseUrl }).retrieve("j");
    expect(asked[1].at - asked[0].at).toBeGreaterThan(950);
    await close();
  });

  test("is not sent again when its signal has ended it", async () => {
    const { asked, baseUrl, close } = await desk([[503, {}, { "Retry-After": "9" }]]);
    const leaving = new AbortController();
    const asking = new Client({ baseUrl }).retrieve("j", { signal: leaving.signal });
    await eventually(() => asked.length);
    leaving.abort(new Error("left"));
    await expect(asking).rejects.toThrow("left");
    expect(asked).toHaveLength(1);
    await close();
  });
});
