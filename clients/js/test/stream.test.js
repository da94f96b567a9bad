/** The reading loop, on sockets, answers and a page that the tests hold in their hands, in time that costs nothing. */

import { afterEach, beforeEach, describe, expect, test, vi } from "vitest";
import * as deltawire from "../src/index.js";
import { Lost, verdict } from "../src/lost.js";

const { Client } = deltawire;
const JOB = "j1";

/** Every WebSocket that the client opens, to be played by the test. */
class Socket {
  static all = [];
  static get last() {
    return Socket.all.at(-1);
  }
  said = [];
  isClosed = false;

  constructor(url, how) {
    Object.assign(this, { url, how });
    Socket.all.push(this);
  }
  send(text) {
    this.said.push(JSON.parse(text));
  }
  close() {
    this.isClosed = true;
  }
  open() {
    this.onopen?.();
    return this;
  }
  tell(...messages) {
    for (const message of messages) this.onmessage?.({ data: JSON.stringify(message) });
    return this;
  }
  lose(code = 1006) {
    this.onclose?.({ code, reason: "" });
  }
}

const numbered = (type, number, more) => ({
  type,
  job_id: JOB,
  sequence_number: number,
  attempt: 1,
  created_at: 1,
  ...more,
});
const delta = (number, content, more) =>
  numbered("delta", number, { chunk: { choices: [{ index: 0, delta: { content } }] }, ...more });
const subscribed = (more) => ({
  type: "subscribed",
  job_id: JOB,
  status: "in_progress",
  attempt: 1,
  latest_sequence_number: 9,
  recovered: true,
  ...more,
});
const error = (code, type, more) => ({
  type: "error",
  error: { message: code, type, code, param: null, retryable: false, retry_after_s: null, ...more },
});
const END = { completion: null, usage: null, usage_source: "unavailable", timings: {} };

/** Reads a stream to its end beside the test. */
function read(stream) {
  const reading = { events: [], numbers: [], error: undefined, isOver: false };
  (async () => {
    try {
      for await (const event of stream) {
        reading.events.push(event);
        reading.numbers.push(event.sequence_number);
      }
    } catch (error) {
      reading.error = error;
    }
    reading.isOver = true;
  })();
  return reading;
}

const tick = (ms = 0) => vi.advanceTimersByTimeAsync(ms);

function client(options) {
  return new Client({
    baseUrl: "http://relay/",
    WebSocket: Socket,
    fetch: () => Promise.reject(new TypeError("no network")),
    ...options,
  });
}

beforeEach(() => {
  vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout", "Date", "performance"] });
  Socket.all = [];
});
afterEach(() => {
  vi.useRealTimers();
  vi.unstubAllGlobals();
});

describe("a stream", () => {
  test("goes on over a lost connection, every event once, to its one end", async () => {
    const stream = client().stream(JOB);
    const reading = read(stream);
    await tick();
    expect(Socket.last.url).toBe("ws://relay/v1/ws");
    expect(Socket.last.open().said).toEqual([
      { type: "subscribe", job_id: JOB, starting_after: 0, mode: "replay", merge: false },
    ]);
    Socket.last.tell(subscribed(), numbered("queued", 1), numbered("in_progress", 2), delta(3, "a")).lose();
    await tick(250);
    expect(Socket.all).toHaveLength(2);
    expect(Socket.last.open().said[0].starting_after).toBe(3);
    Socket.last.tell(subscribed(), delta(3, "a"), delta(5, "bc", { first_sequence_number: 4 }));
    await tick();
    expect(stream.status).toBe("in_progress");
    expect(deltawire.textOf(stream.completion)).toBe("abc");
    Socket.last.tell(numbered("completed", 6, END), numbered("completed", 7, END));
    await tick();
    expect(reading).toMatchObject({ numbers: [1, 2, 3, 5, 6], isOver: true, error: undefined });
    expect(stream).toMatchObject({ position: 6, status: "completed" });
    expect(Socket.last.isClosed).toBe(true);
    await tick(100_000);
    expect(Socket.all).toHaveLength(2);
  });

  test("reads again what is missing", async () => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.tell(subscribed(), numbered("queued", 1), delta(3, "b"));
    await tick(250);
    expect(Socket.all).toHaveLength(2);
    Socket.last.open();
    expect(Socket.last.said[0].starting_after).toBe(1);
    Socket.last.tell(subscribed(), delta(2, "a"), delta(3, "b"));
    await tick();
    expect(reading.numbers).toEqual([1, 2, 3]);
  });

  test("begins with a snapshot, and asks for it once", async () => {
    const stream = client().stream(JOB, { mode: "snapshot" });
    const said = [];
    (async () => {
      for await (const text of stream.text()) said.push(text);
    })();
    await tick();
    expect(Socket.last.open().said[0].mode).toBe("snapshot");
    const completion = {
      choices: [{ index: 0, message: { role: "assistant", content: "abc" }, finish_reason: null }],
      usage: null,
    };
    Socket.last
      .tell(subscribed(), { type: "snapshot", job_id: JOB, sequence_number: 7, completion }, delta(8, "d"))
      .lose();
    await tick(250);
    expect(Socket.last.open().said[0]).toMatchObject({ mode: "replay", starting_after: 8 });
    // Redis has lost some: what is said again is not shown again.
    completion.choices[0].message.content = "abcde";
    Socket.last.tell(subscribed({ recovered: false }), {
      type: "snapshot",
      job_id: JOB,
      sequence_number: 9,
      completion,
    });
    await tick();
    expect(said).toEqual(["abc", "d", "e"]);
    expect(deltawire.textOf(stream.completion)).toBe("abcde");
  });

  test("forgets what a lost attempt had said", async () => {
    const stream = client().stream(JOB, { startingAfter: 1 });
    read(stream);
    await tick();
    Socket.last.tell(
      subscribed(),
      delta(2, "wrong"),
      numbered("restarted", 3, { discard_through: 2 }),
      delta(4, "right"),
    );
    await tick();
    expect(deltawire.textOf(stream.completion)).toBe("right");
  });

  test("ends where there is nothing more", async () => {
    const reading = read(client().stream(JOB, { startingAfter: 9 }));
    await tick();
    Socket.last.tell(subscribed({ status: "completed" }));
    await tick();
    expect(reading).toMatchObject({ events: [], isOver: true, error: undefined });
  });

  test("ignores what it does not know", async () => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.tell(
      subscribed(),
      { type: "heartbeat", positions: {} },
      { type: "news" },
      numbered("queued", 1, { more: 1 }),
    );
    await tick();
    expect(reading.numbers).toEqual([1]);
  });

  test("waits as long as the relay says", async () => {
    read(client().stream(JOB));
    await tick();
    Socket.last.tell(subscribed(), { type: "goodbye", code: 4001, retry_after_s: 7 }).lose(4001);
    await tick(6_900);
    expect(Socket.all).toHaveLength(1);
    await tick(400);
    expect(Socket.all).toHaveLength(2);
  });

  test("gives a silent connection up", async () => {
    read(client({ transport: "websocket" }).stream(JOB));
    await tick();
    Socket.last.tell(subscribed());
    await tick(30_000);
    Socket.last.tell({ type: "heartbeat", positions: {} });
    await tick(34_000);
    expect(Socket.all).toHaveLength(1);
    await tick(1_500);
    expect(Socket.all[0].isClosed).toBe(true);
    expect(Socket.all).toHaveLength(2);
    await tick(10_500); // of which nothing is ever heard
    expect(Socket.all).toHaveLength(3);
  });

  test("gives the relay up, in time", async () => {
    const reading = read(client({ giveUpAfterS: 30 }).stream(JOB));
    for (let waited = 0; waited < 29; waited += 1) {
      await tick(1_000);
      Socket.last?.lose();
    }
    expect(reading.isOver).toBe(false);
    expect(Socket.all.length).toBeLessThan(60);
    await tick(10_000);
    Socket.last.lose();
    await tick(10_000);
    Socket.last.lose();
    await tick();
    expect(reading.error).toBeInstanceOf(deltawire.UnreachableError);
  });

  test("does not give up where it hears something now and then", async () => {
    const reading = read(client({ giveUpAfterS: 30, transport: "websocket" }).stream(JOB));
    for (let times = 0; times < 20; times += 1) {
      await tick(5_000);
      Socket.last.tell(subscribed()).lose();
    }
    expect(reading.isOver).toBe(false);
  });

  test("takes the end of a job that is lost, but no hole after a snapshot", async () => {
    const [lost, torn] = [read(client().stream(JOB)), read(client().stream(JOB))];
    await tick();
    const unrecovered = subscribed({ recovered: false });
    Socket.all[0].tell(unrecovered, numbered("failed", 7, END));
    const snapshot = { type: "snapshot", job_id: JOB, sequence_number: 4, completion: null };
    Socket.all[1].tell(unrecovered, snapshot, delta(6, "b"));
    await tick();
    expect(lost).toMatchObject({ numbers: [7], isOver: true, error: undefined });
    expect(torn).toMatchObject({ numbers: [4], isOver: false });
  });

  test("gives what came while its reader was busy", async () => {
    const stream = client().stream(JOB)[Symbol.asyncIterator]();
    const first = stream.next();
    await tick();
    Socket.last.tell(subscribed(), numbered("queued", 1));
    await first;
    Socket.last.tell(numbered("in_progress", 2));
    expect((await stream.next()).value.sequence_number).toBe(2);
    await stream.return();
  });

  test("holds no more than a bound for a slow reader", async () => {
    const stream = client().stream(JOB)[Symbol.asyncIterator]();
    const first = stream.next();
    await tick();
    const socket = Socket.last.tell(subscribed(), numbered("queued", 1), delta(2, "x".repeat(17_000_000)));
    expect(socket.isClosed).toBe(true);
    expect((await first).value.sequence_number).toBe(1);
    expect((await stream.next()).value.sequence_number).toBe(2);
    const next = stream.next();
    await tick(250);
    Socket.last.open().tell(subscribed(), delta(3, "y"));
    expect(Socket.last.said[0].starting_after).toBe(2);
    expect((await next).value.sequence_number).toBe(3);
    await stream.return();
    expect(Socket.last.isClosed).toBe(true);
  });
});

describe("its end by the caller", () => {
  test("a signal throws its reason, wherever the stream waits", async () => {
    for (const after of ["nothing", "an event", "a loss"]) {
      const leaving = new AbortController();
      const reading = read(client().stream(JOB, { signal: leaving.signal }));
      await tick();
      if (after === "an event") Socket.last.tell(subscribed(), numbered("queued", 1));
      if (after === "a loss") Socket.last.lose();
      await tick();
      leaving.abort(new Error(after));
      await tick();
      expect(reading.error?.message).toBe(after);
      expect(Socket.last.isClosed).toBe(true);
    }
  });

  test("a signal does not wait for a token", async () => {
    const getToken = () => new Promise(() => {});
    const reading = read(client({ getToken }).stream(JOB, { signal: AbortSignal.abort(new Error("left")) }));
    await tick();
    expect(reading.error.message).toBe("left");
    expect(Socket.all).toHaveLength(0);
  });

  test("nor does a command's, or its time", async () => {
    const relay = client({ getToken: () => new Promise(() => {}), timeoutS: 0.05 });
    const leaving = new AbortController();
    const asking = relay.submit({}, undefined, { signal: leaving.signal });
    leaving.abort(new Error("left"));
    await expect(asking).rejects.toThrow("left");
    await expect(relay.cancel(JOB)).rejects.toBeInstanceOf(deltawire.UnreachableError);
  });
});

describe("a log whose end was lost", () => {
  test.each([
    ["behind a snapshot", [numbered("snapshot", 5, { completion: null })]],
    ["alone", []],
  ])("has another end, %s", async (_, before) => {
    const reading = read(client().stream(JOB, { startingAfter: 9 }));
    await tick();
    Socket.last.tell(subscribed({ status: "failed", recovered: false, latest_sequence_number: 6 }), ...before);
    Socket.last.tell(numbered("failed", 6, END));
    await tick();
    expect(reading).toMatchObject({ error: undefined, isOver: true });
    expect(reading.events.at(-1)).toMatchObject({ type: "failed", sequence_number: 6 });
  });
});

test("an answer in the relay's place that says nothing is no result", async () => {
  const fetch = async () => new Response(null, { status: 204 });
  await expect(client({ fetch, transport: "sse" }).result(JOB)).rejects.toBeInstanceOf(deltawire.ServerError);
});

describe("text", () => {
  test("of an attempt whose beginning was missed is told whole", async () => {
    const said = [];
    const reading = (async () => {
      for await (const text of client().stream(JOB).text()) said.push(text);
    })();
    await tick();
    const completion = (content) => ({ choices: [{ index: 0, message: { content }, finish_reason: null }] });
    Socket.last.tell(subscribed(), delta(1, "one "), numbered("snapshot", 5, { completion: completion("one two ") }));
    Socket.last.tell(numbered("snapshot", 90, { completion: completion("eins, zwei, ") }), delta(91, "drei"));
    Socket.last.tell(numbered("completed", 92, END));
    await reading;
    expect(said).toEqual(["one ", "two ", "eins, zwei, ", "drei"]);
  });
});

describe("the credential", () => {
  const inPage = () => vi.stubGlobal("location", { origin: "http://page" });

  test("is a page's first message, and never in the URL", async () => {
    inPage();
    read(client({ getToken: async ({ jobId }) => `token of ${jobId}` }).stream(JOB));
    await tick();
    expect(Socket.last.how).toBe("deltawire.v1");
    expect(Socket.last.url).not.toContain("token");
    expect(Socket.last.open().said[0]).toEqual({ type: "authenticate", token: "token of j1" });
  });

  test("is a header elsewhere", async () => {
    read(client({ apiKey: "key" }).stream(JOB));
    await tick();
    expect(Socket.last.how).toEqual({ protocols: "deltawire.v1", headers: { Authorization: "Bearer key" } });
  });

  test("is asked for once, and again when it has expired", async () => {
    inPage();
    let asked = 0;
    const relay = client({ getToken: () => `token ${++asked}` });
    const reading = read(relay.stream(JOB));
    await tick();
    Socket.last.tell({ type: "authenticated", expires_at: 1 }, subscribed(), numbered("queued", 1)).lose();
    await tick(250);
    expect(Socket.last.open().said[0].token).toBe("token 1");
    Socket.last.tell(subscribed(), delta(2, "a"), { type: "goodbye", code: 4005, retry_after_s: 0 }).lose(4005);
    await tick(250);
    expect(Socket.last.open().said).toMatchObject([{ token: "token 2" }, { starting_after: 2 }]);
    // A token that is refused as soon as it is new is not asked for for ever.
    for (let times = 0; times < 3; times += 1) {
      Socket.last.tell(error("token_expired", "authentication_error")).lose(4005);
      await tick(2_000);
    }
    expect(reading.error).toBeInstanceOf(deltawire.AuthenticationError);
    expect(asked).toBe(3);
  });

  test("may expire as often as it lives, and is asked for once by all streams of a job", async () => {
    inPage();
    let asked = 0;
    const relay = client({ getToken: () => `token ${++asked}` });
    const readings = [read(relay.stream(JOB)), read(relay.stream(JOB))];
    for (let times = 1; times <= 5; times += 1) {
      await tick(1_000);
      const [one, other] = Socket.all.slice(-2);
      for (const socket of [one, other]) expect(socket.open().said[0].token).toBe(`token ${times}`);
      one.tell(subscribed(), numbered("queued", 1)).lose(4005);
      await tick(1_000); // it has another one when the other loses it
      other.tell(subscribed(), numbered("queued", 1)).lose(4005);
    }
    await tick(1_000);
    expect(readings).toMatchObject([{ isOver: false }, { isOver: false }]);
    expect(asked).toBe(6);
  });

  test("is asked for again where there is no network, but not where it is refused", async () => {
    let asked = 0;
    const offline = async () => {
      if (++asked === 1) throw new TypeError("Failed to fetch");
      throw new Error("log in first");
    };
    const reading = read(client({ getToken: offline }).stream(JOB));
    await tick(300);
    expect(reading.error.message).toBe("log in first");
    expect(Socket.all).toHaveLength(0);
  });

  test("of a command is renewed at 401, once", async () => {
    const seen = [];
    const fetch = async (url, { headers }) => {
      seen.push(headers.Authorization);
      return new Response("{}", { status: seen.length < 2 ? 401 : 200 });
    };
    let asked = 0;
    const relay = client({ fetch, getToken: () => `t${++asked}` });
    expect(await relay.retrieve(JOB)).toEqual({});
    expect(seen).toEqual(["Bearer t1", "Bearer t2"]);
    const strict = client({ fetch: async () => new Response("{}", { status: 401 }), getToken: () => "t" });
    await expect(strict.retrieve(JOB)).rejects.toBeInstanceOf(deltawire.AuthenticationError);
  });

  test("of a new job is what came with it", async () => {
    const fetch = async () => Response.json({ id: JOB, token: "its own" }, { status: 202 });
    const relay = client({ fetch, getToken: () => "may submit" });
    await relay.submit({});
    read(relay.stream(JOB));
    await tick();
    expect(Socket.last.how.headers.Authorization).toBe("Bearer its own");
  });
});

describe("refusals", () => {
  test.each([
    ["unknown_job", "not_found_error", deltawire.NotFoundError],
    ["forbidden", "permission_error", deltawire.PermissionDeniedError],
    ["invalid_job_id", "invalid_request_error", deltawire.InvalidRequestError],
    ["invalid_credentials", "authentication_error", deltawire.AuthenticationError],
    ["subscription_limit", "rate_limit_error", deltawire.RateLimitError],
  ])("%s is an error of its own", async (code, type, kind) => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.tell(error(code, type, {}));
    await tick();
    expect(reading.error).toBeInstanceOf(kind);
    expect(reading.error).toBeInstanceOf(deltawire.JobUnavailableError);
    expect(reading.error).toMatchObject({ name: kind.name, message: code, error: { code } });
  });

  test("that may pass are tried again, when the relay says", async () => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.tell({
      ...error("redis_unavailable", "server_error", { retryable: true, retry_after_s: 3 }),
      job_id: JOB,
    });
    await tick(2_900);
    expect(Socket.all).toHaveLength(1);
    await tick(400);
    expect(Socket.all).toHaveLength(2);
    expect(reading.isOver).toBe(false);
  });

  test.each([
    [{ code: 1006 }, "again"],
    [{ code: 4001, error: { retryable: false } }, "again"],
    [{ code: 4013 }, "again"],
    [{ code: 4005 }, "with another token"],
    [{ status: 401 }, "with another token"],
    [{ code: 4504, error: { retryable: true } }, "never"],
    [{ status: 404 }, "never"],
    [{ status: 429 }, "again"],
    [{ status: 503 }, "again"],
    [{ error: { retryable: false } }, "never"],
  ])("%o means %s", (details, meaning) => {
    expect(verdict(new Lost("", details))).toBe(meaning);
  });
});

describe("where WebSockets do not get through", () => {
  const events = (...messages) =>
    new Response(`retry: 1\n\n${messages.map((message) => `data: ${JSON.stringify(message)}\n\n`).join("")}`);

  test("it is SSE, with the credential in a header, for other streams too, until the network changes", async () => {
    const seen = [];
    const fetch = async (url, { headers }) => {
      seen.push([url, headers]);
      return events(subscribed(), numbered("queued", 1), delta(2, "a"), numbered("cancelled", 3, END));
    };
    const relay = client({ fetch, apiKey: "key" });
    const reading = read(relay.stream(JOB, { merge: true }));
    await tick();
    Socket.last.lose();
    await tick(250);
    expect(reading).toMatchObject({ numbers: [1, 2, 3], isOver: true });
    const url = "http://relay/v1/jobs/j1/events?starting_after=0&mode=replay&merge=true";
    expect(seen).toEqual([[url, { Authorization: "Bearer key" }]]);
    read(relay.stream("j2"));
    await tick();
    expect([seen.length, Socket.all.length]).toEqual([2, 1]);
    await tick(300_000);
    read(relay.stream("j3"));
    await tick();
    expect(Socket.all).toHaveLength(2);
  });

  test("a relay that is away is not taken for that", async () => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.lose(); // now by SSE, where fetch fails, too
    await tick(2_000);
    expect(Socket.all).toHaveLength(2);
    Socket.last.open().tell(subscribed(), numbered("queued", 1));
    await tick();
    expect(reading.numbers).toEqual([1]);
  });

  test("an event stream that ends is asked for again", async () => {
    const answers = [
      new Response("busy", { status: 503, headers: { "Retry-After": "5" } }),
      events(subscribed(), numbered("queued", 1)),
      events(subscribed(), { type: "goodbye", code: 4001, retry_after_s: 1 }),
      new Response(null, { status: 204 }),
    ];
    let asked = 0;
    const reading = read(client({ transport: "sse", fetch: async () => answers[asked++] }).stream(JOB));
    await tick(4_900);
    expect(asked).toBe(1);
    await tick(10_000);
    expect(reading).toMatchObject({ numbers: [1], isOver: true, error: undefined });
    expect(asked).toBe(4);
  });

  test("and so where there are none at all", async () => {
    const fetch = async () => events(subscribed(), numbered("completed", 1, END));
    const reading = read(
      new Client({ baseUrl: "http://relay", WebSocket: undefined, transport: "sse", fetch }).stream(JOB),
    );
    await tick();
    expect(reading.isOver).toBe(true);
  });
});

describe("a page", () => {
  let page;

  beforeEach(() => {
    page = new EventTarget();
    const document = Object.assign(new EventTarget(), { visibilityState: "visible" });
    vi.stubGlobal("document", document);
    vi.stubGlobal("addEventListener", page.addEventListener.bind(page));
    vi.stubGlobal("navigator", { onLine: true });
  });

  const wakes = {
    visibilitychange: () => document.dispatchEvent(new Event("visibilitychange")),
    resume: () => document.dispatchEvent(new Event("resume")),
    pageshow: () => page.dispatchEvent(new Event("pageshow")),
    online: () => page.dispatchEvent(new Event("online")),
  };

  test.each(Object.entries(wakes))("that wakes by %s believes a connection for 20 s", async (name, wake) => {
    read(client().stream(JOB));
    await tick();
    Socket.last.open().tell(subscribed(), numbered("queued", 1));
    await tick(19_900);
    wake();
    await tick();
    expect(Socket.all).toHaveLength(1);
    await tick(200);
    wake();
    await tick();
    expect(Socket.all).toHaveLength(2);
    expect(Socket.last.open().said[0].starting_after).toBe(1);
  });

  test("that is hidden does not wake", async () => {
    read(client().stream(JOB));
    await tick();
    Socket.last.tell(subscribed());
    await tick(21_000);
    document.visibilityState = "hidden";
    wakes.visibilitychange();
    await tick();
    expect(Socket.all).toHaveLength(1);
  });

  test("that wakes does not wait for its own caution, but for the relay's word", async () => {
    vi.spyOn(Math, "random").mockReturnValue(0.99);
    read(client({ transport: "websocket" }).stream(JOB));
    for (let times = 0; times < 6; times += 1) {
      await tick(5_000);
      Socket.last.lose();
    }
    await tick(100);
    expect(Socket.all).toHaveLength(6);
    wakes.online();
    await tick();
    expect(Socket.all).toHaveLength(7);
    Socket.last.tell(subscribed(), { type: "goodbye", code: 4001, retry_after_s: 9 }).lose(4001);
    await tick(100);
    wakes.online();
    await tick(8_000);
    expect(Socket.all).toHaveLength(7);
  });

  test("on its way to the back-forward cache closes, and comes back", async () => {
    const reading = read(client().stream(JOB));
    await tick();
    Socket.last.open().tell(subscribed(), numbered("queued", 1));
    await tick();
    page.dispatchEvent(new Event("pagehide"));
    expect(Socket.last.isClosed).toBe(true);
    await tick(60_000);
    expect(Socket.all).toHaveLength(1);
    wakes.pageshow();
    await tick();
    expect(Socket.last.open().said[0].starting_after).toBe(1);
    Socket.last.tell(subscribed(), numbered("cancelled", 2, END));
    await tick();
    expect(reading).toMatchObject({ numbers: [1, 2], isOver: true });
  });

  test("that comes online tries WebSockets again", async () => {
    const relay = client({ transport: "auto" });
    read(relay.stream(JOB));
    await tick();
    Socket.last.lose();
    await tick();
    wakes.online();
    await tick();
    expect(Socket.all).toHaveLength(2);
  });

  test("that is offline does not give up", async () => {
    navigator.onLine = false;
    const reading = read(client({ transport: "websocket" }).stream(JOB));
    for (let times = 0; times < 60; times += 1) {
      await tick(10_000);
      Socket.last.lose();
    }
    expect(reading.isOver).toBe(false);
    await tick();
    wakes.online();
    await tick();
    Socket.last.tell(subscribed(), numbered("cancelled", 1, END));
    await tick();
    expect(reading).toMatchObject({ isOver: true, error: undefined });
  });
});
