/**
 * The two ways to a job's messages, alike: they yield each, in order; throw Lost where they end by themselves; and
 * return where `signal` ends them, at once, whether or not somebody reads them just then.
 */

import { Lost, parsed, refused } from "./lost.js";
import { bearer } from "./relay.js";

/** @import { Json } from "./types.js" */
/** @typedef {{ onFrame(): void, signal: AbortSignal }} Watched */

const PROTOCOL = "deltawire.v1";
const FIRST_FRAME_MS = 10_000;
/** Something comes every 15 s: a heartbeat, or a comment. */
const SILENCE_MS = 35_000;
/** A WebSocket cannot be told to wait. One whose reader lags so far behind ends, and is opened again from there. */
const MAX_WAITING_CHARACTERS = 16_777_216;

/**
 * A WebSocket that subscribes when it opens. A page cannot send headers with it, so its token is the first message;
 * elsewhere there is no Origin, without which the relay wants the header (PROTOCOL.md §5.1).
 * @param {new (url: string, ...rest: any[]) => any} WebSocket @param {string} url @param {string | undefined} token
 * @param {Json} subscribe @param {Watched} watched @returns {AsyncGenerator<Json, void>}
 */
export async function* overWebSocket(WebSocket, url, token, subscribe, { onFrame, signal }) {
  const isPage = globalThis.location !== undefined;
  const greeting = isPage && token ? [{ type: "authenticate", token }, subscribe] : [subscribe];
  /** Node's own takes this in the protocol's place, and so does that of `ws`. @type {any} */
  const how = isPage ? PROTOCOL : { protocols: PROTOCOL, headers: bearer(token) };
  /** @type {string[]} */ let queue = [];
  let waiting = 0;
  /** @type {Lost | "stopped" | undefined} */ let end;
  let wake = () => {};
  const finish = (/** @type {Lost | "stopped"} */ why) => {
    end ??= why;
    clearTimeout(timer);
    socket.onopen = socket.onmessage = socket.onclose = null; // closing may take long where the network is away
    socket.close();
    wake();
  };
  const stop = () => finish("stopped");
  if (signal.aborted) return;
  let /** @type {WebSocket} */ socket;
  try {
    socket = new WebSocket(url, how);
  } catch (cause) {
    throw new Lost(`${cause}`, { code: 1006, cause }); // a page's policy, say
  }
  const silent = () => finish(new Lost("nothing was heard for too long", { code: 1006 }));
  let timer = setTimeout(silent, FIRST_FRAME_MS);
  signal.addEventListener("abort", stop);
  socket.onopen = () => greeting.forEach((message) => socket.send(JSON.stringify(message)));
  socket.onclose = ({ code, reason }) => finish(new Lost(`the connection closed (${code} ${reason})`, { code }));
  socket.onerror = () => {}; // a close follows, which says more
  socket.onmessage = ({ data }) => {
    clearTimeout(timer);
    timer = setTimeout(silent, SILENCE_MS);
    onFrame();
    queue.push(data);
    waiting += data.length;
    if (waiting > MAX_WAITING_CHARACTERS) finish(new Lost("the reader lags"));
    wake();
  };
  try {
    for (;;) {
      const batch = queue;
      [queue, waiting] = [[], 0];
      for (const data of batch) yield message(data);
      if (queue.length) continue;
      if (end === "stopped") return;
      if (end) throw end;
      await new Promise((resolve) => (wake = () => resolve(undefined)));
    }
  } finally {
    signal.removeEventListener("abort", stop);
    finish("stopped");
  }
}

/**
 * An event stream, by `fetch`, so with headers. Where there is nothing more it yields `over`.
 * @param {typeof globalThis.fetch} fetch @param {string} url @param {string | undefined} token
 * @param {Watched} watched @returns {AsyncGenerator<Json, void>}
 */
export async function* overEventStream(fetch, url, token, { onFrame, signal }) {
  const ended = new AbortController();
  /**
   * Only while we wait: a reader that takes its time is no silence.
   * @template T @param {number} ms @param {Promise<T>} what
   */
  const within = async (ms, what) => {
    const timer = setTimeout(() => ended.abort(new Lost("nothing was heard for too long")), ms);
    return what.finally(() => clearTimeout(timer));
  };
  try {
    const either = AbortSignal.any([signal, ended.signal]);
    const asking = fetch(url, { headers: bearer(token), cache: "no-store", signal: either });
    const response = await within(FIRST_FRAME_MS, asking);
    if (response.status === 204) return yield { type: "over" };
    if (!response.ok || !response.body) throw refused(response, await response.text());
    const reader = response.body.getReader();
    const decoder = new TextDecoder();
    for (let rest = ""; ;) {
      const { done, value } = await within(SILENCE_MS, reader.read());
      if (done) throw new Lost("the event stream ended");
      onFrame();
      const lines = (rest + decoder.decode(value, { stream: true })).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) if (line.startsWith("data: ")) yield message(line.slice(6));
    }
  } catch (cause) {
    if (signal.aborted) return;
    throw cause instanceof Lost ? cause : new Lost(`the relay cannot be reached: ${cause}`, { cause });
  } finally {
    ended.abort();
  }
}

/** @param {string} data @returns {Json} */
function message(data) {
  const value = parsed(data);
  if (typeof value?.type !== "string") throw new Lost("what came is not this protocol's");
  return value;
}
