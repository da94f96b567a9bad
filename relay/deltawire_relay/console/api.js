// The relay, asked by fetch. The key goes in a header; it is in no address, and in sessionStorage only.

const KEY = "deltawire.key";
const SILENT_MS = 40_000; // a comment comes every 15 s: without one, or an answer, the connection is dead
const FINAL = new Set([400, 401, 403, 404]);
export const TERMINAL = new Set(["completed", "incomplete", "failed", "cancelled"]);

export const readKey = () => sessionStorage.getItem(KEY) ?? "";
export const keepKey = (key) => (key ? sessionStorage.setItem(KEY, key) : sessionStorage.removeItem(KEY));

/** The relay said no. */
export class Refused extends Error {
  constructor(status, error) {
    super(error.message ?? `the answer was ${status}`);
    Object.assign(this, { status, code: error.code, retryAfterS: error.retry_after_s });
  }
}

/** The relay said nothing. */
export class Away extends Error {
  message = "The relay cannot be reached. Trying again.";
}

/** The response. Throws Refused, Away, or what `signal` was aborted with. */
export async function ask(path, { body, signal } = {}) {
  const headers = {};
  if (body) headers["Content-Type"] = "application/json";
  // A header takes no other characters; a key has none.
  if (readKey()) headers.Authorization = `Bearer ${readKey().replace(/[^\x21-\x7e]/g, "")}`;
  const opening = new AbortController(); // until the answer begins: a stream may last
  const timer = setTimeout(() => opening.abort(), SILENT_MS);
  const either = AbortSignal.any(signal ? [signal, opening.signal] : [opening.signal]);
  const how = { method: body ? "POST" : "GET", body: body && JSON.stringify(body), headers, signal: either };
  const response = await fetch(path, { ...how, cache: "no-store", credentials: "omit", redirect: "error" })
    .catch((error) => Promise.reject(signal?.aborted ? error : new Away()))
    .finally(() => clearTimeout(timer));
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new Refused(response.status, told.error ?? {});
}

export const askJson = async (path, how) => (await ask(path, how)).json();

/** What a person is to read; `scope` is what the question needs. */
export function words(error, scope) {
  if (error instanceof Away) return error.message;
  if (!(error instanceof Refused)) return String(error);
  if (error.code === "forbidden") return `This key has no scope “${scope}”, which this part needs.`;
  if (error.code === "redis_unavailable") return "The relay cannot reach Redis. Trying again; nothing is lost.";
  if (error.code === "missing_credentials") return "An API key is needed here.";
  if (error.status === 401) return `This key is refused: ${error.message}.`;
  if (error.code === "unknown_job") return "There is no such job: it has expired, was deleted, or is not for this key.";
  const later = error.retryAfterS ? ` Come again in ${Math.ceil(error.retryAfterS)} s.` : "";
  return `${error.status === 429 ? "Too many: " : ""}${error.message} (${error.code}).${later}`;
}

/** Shorter where the network comes back, or `signal` is aborted. */
const sleep = (ms, signal) =>
  new Promise((resolve) => {
    const over = AbortSignal.any([signal, AbortSignal.timeout(ms)]);
    over.addEventListener("abort", resolve);
    globalThis.addEventListener("online", resolve, { signal: over });
    if (over.aborted) resolve();
  });

/**
 * A job's frames, {raw, message, number}, to the terminal one, over any number of connections: first a snapshot of what
 * there is (of a new job the events themselves), then the rest, each event once. `onLost(error)` hears when a connection
 * is lost, `onOpen` when there is one. Throws Refused where coming again does not help.
 */
export async function* frames(id, { signal, isNew, onLost, onOpen }) {
  let position = 0;
  for (let failures = 0; !signal.aborted; failures += 1) {
    const connection = new AbortController();
    let waitMs = Math.min(500 * 2 ** failures, 10_000) * (0.5 + Math.random() / 2);
    try {
      const query = position || isNew ? `starting_after=${position}` : "mode=snapshot";
      const either = AbortSignal.any([signal, connection.signal]);
      const response = await ask(`v1/jobs/${encodeURIComponent(id)}/events?${query}`, { signal: either });
      if (response.status === 204) return;
      onOpen();
      for await (const raw of blocks(response.body, () => connection.abort())) {
        failures = 0;
        const lines = raw.split("\n");
        const field = (name) => lines.filter((line) => line.startsWith(name)).map((line) => line.slice(name.length));
        const data = field("data: ").join("\n");
        const message = data ? JSON.parse(data) : null;
        const number = Number(field("id: ")[0] ?? 0);
        if (field("retry: ")[0]) waitMs = Number(field("retry: ")[0]);
        position = Math.max(position, number);
        yield { raw, message, number };
        if (number && TERMINAL.has(message?.type)) return;
        if (message?.type === "error" && !message.error.retryable) {
          throw new Refused(message.error.code === "unknown_job" ? 404 : 401, message.error);
        }
      }
      onLost(new Away());
    } catch (error) {
      if (signal.aborted || (error instanceof Refused && FINAL.has(error.status))) throw error;
      if (error instanceof Refused && error.retryAfterS) waitMs = error.retryAfterS * 1000;
      onLost(error instanceof Refused ? error : new Away());
    } finally {
      connection.abort();
    }
    await sleep(waitMs, signal);
  }
}

/** The stream's blocks, without the empty line behind each (WHATWG HTML §9.2; the relay's lines end in LF alone). */
async function* blocks(body, end) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const timer = setTimeout(end, SILENT_MS);
    const { done, value } = await reader.read().finally(() => clearTimeout(timer));
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    yield* parts;
  }
}
