import { Lost, parsed, refused, repeatInMs } from "./lost.js";
import { ServerError, UnreachableError, refusal } from "./errors.js";

/** @import { Json } from "./types.js" */

/**
 * @typedef {object} ClientOptions
 * @property {string} [baseUrl] The relay's address, such as https://deltawire.example.com. Default: the page's origin.
 * @property {string} [apiKey] A backend's key, or any one token. A page must not hold a key.
 * @property {(job: { jobId?: string }) => Promise<string> | string} [getToken] Gives a token for a job, or (no id) one
 *   that may submit. Called once for each job, and again when the relay says that the token has expired, or 401. What
 *   it throws is thrown; but a stream tries again after a TypeError, as `fetch` throws where there is no network.
 * @property {"auto" | "websocket" | "sse"} [transport] "auto": WebSockets, or SSE where they do not get through.
 * @property {number} [timeoutS] Of each try of a command. Default: 10.
 * @property {number} [maxRetries] How often a command is sent again that got no answer, or one that says that it may
 *   succeed later (429, 5xx): after what the answer asks for (for more than `timeoutS` it is not), and up to 0.2 s,
 *   0.4 s, … 5 s by itself. However often it is sent, `submit` makes one job. Default: 2.
 * @property {number} [giveUpAfterS] How long a stream tries to reach the relay. Default: 120, of a page that is awake
 *   and not offline.
 * @property {typeof globalThis.fetch} [fetch]
 * @property {new (url: string, ...rest: any[]) => any} [WebSocket] For Node before 22, from `ws`; without one it is SSE.
 */

/** @typedef {{ jobId?: string, body?: Json, headers?: Record<string, string>, signal?: AbortSignal }} Details */

const MAX_TOKENS = 1000;
/** How long "WebSockets do not get through" is believed. */
const BELIEVE_MS = 300_000;

/** The relay as this client knows it: where, by what right, and what gets through. */
export class Relay {
  /** @type {Map<string | undefined, Promise<string | undefined>>} By job. */ #tokens = new Map();
  #noWebSocketsSince = -Infinity;

  /** @param {ClientOptions} options */
  constructor({ baseUrl = globalThis.location?.origin, apiKey, getToken, transport = "auto", ...options }) {
    if (!baseUrl) throw new TypeError("baseUrl is missing, and there is no page to take it from");
    this.baseUrl = baseUrl.replace(/\/+$/, "");
    this.timeoutMs = (options.timeoutS ?? 10) * 1000;
    this.maxRetries = options.maxRetries ?? 2;
    this.giveUpAfterMs = (options.giveUpAfterS ?? 120) * 1000;
    this.fetch = options.fetch ?? ((...request) => globalThis.fetch(...request));
    this.WebSocket = options.WebSocket ?? globalThis.WebSocket;
    this.transport = transport;
    this.apiKey = apiKey;
    this.getToken = getToken;
    if (transport === "websocket" && !this.WebSocket) throw new TypeError("there is no WebSocket here: give one");
  }

  /** What opens a job (or, without an id, submits one); asked for once. @param {string} [jobId] */
  credential(jobId) {
    let token = this.#tokens.get(jobId);
    if (!token) {
      token = Promise.resolve({ jobId }).then(this.getToken ?? (() => this.apiKey));
      this.remember(jobId, token);
      token.catch(() => this.#forget(jobId, token));
    }
    return token;
  }

  /** @param {string | undefined} jobId @param {Promise<string | undefined>} token */
  remember(jobId, token) {
    this.#tokens.set(jobId, token);
    if (this.#tokens.size > MAX_TOKENS) this.#tokens.delete(this.#tokens.keys().next().value);
  }

  /** Whether there may be another one in the place of one that was refused. @param {string | undefined} jobId
   * @param {Promise<string | undefined>} token */
  renew(jobId, token) {
    this.#forget(jobId, token);
    return this.getToken !== undefined;
  }

  /** @param {string | undefined} jobId @param {Promise<string | undefined> | undefined} token */
  #forget(jobId, token) {
    if (this.#tokens.get(jobId) === token) this.#tokens.delete(jobId); // else somebody has renewed it
  }

  /** Whether the next connection is to be an event stream. */
  get wantsEventStream() {
    if (this.transport !== "auto") return this.transport === "sse";
    return !this.WebSocket || Date.now() - this.#noWebSocketsSince < BELIEVE_MS;
  }

  /** What an attempt, or another network, says of WebSockets. @param {boolean} isSo */
  webSocketsMayPass(isSo) {
    this.#noWebSocketsSince = isSo ? -Infinity : Date.now();
  }

  /**
   * A command's answer, asked for again where that may help. Throws JobUnavailableError.
   * @param {string} method @param {string} path @param {Details} details @returns {Promise<any>}
   */
  async call(method, path, details) {
    const bounds = { maxRetries: this.maxRetries, maxWaitMs: this.timeoutMs };
    for (let failures = 0, isRenewed = false; ;) {
      const credential = this.credential(details.jobId);
      try {
        return await this.#ask(method, path, credential, details);
      } catch (lost) {
        if (!(lost instanceof Lost)) throw lost;
        if (lost.status === 401 && !isRenewed && this.renew(details.jobId, credential)) {
          isRenewed = true;
          continue;
        }
        const waitMs = repeatInMs(lost, ++failures, bounds);
        if (waitMs === null) {
          throw lost.status ? refusal(lost.error, lost.status, lost.message) : new UnreachableError(lost.message, lost);
        }
        await sleep(waitMs, details.signal);
        details.signal?.throwIfAborted();
      }
    }
  }

  /**
   * The same, once. Throws Lost.
   * @param {string} method @param {string} path @param {Promise<string | undefined>} credential
   * @param {Details} details
   */
  async #ask(method, path, credential, { body, headers, signal }) {
    const tooLong = AbortSignal.timeout(this.timeoutMs);
    const either = signal ? AbortSignal.any([signal, tooLong]) : tooLong;
    const token = await unlessAborted(either, credential).catch((cause) => {
      throw cause === tooLong.reason ? new UnreachableError(`no token came: ${cause}`, { cause }) : cause;
    });
    let response, text;
    try {
      response = await this.fetch(this.baseUrl + path, {
        method,
        headers: { ...bearer(token), ...(body && { "Content-Type": "application/json" }), ...headers },
        body: body && JSON.stringify(body),
        signal: either,
      });
      text = await response.text();
    } catch (cause) {
      signal?.throwIfAborted();
      throw new Lost(`no relay at ${this.baseUrl}: ${cause}`, { cause });
    }
    if (!response.ok) throw refused(response, text);
    const answer = parsed(text);
    if (answer === undefined) throw new ServerError(`${this.baseUrl} answered ${response.status}, but no JSON`);
    return answer;
  }
}

/** @param {string | undefined} token @returns {Record<string, string>} */
export function bearer(token) {
  return token ? { Authorization: `Bearer ${token}` } : {};
}

/** @template T @param {AbortSignal | undefined} signal @param {Promise<T>} what @returns {Promise<T>} */
export function unlessAborted(signal, what) {
  if (!signal) return what;
  return new Promise((resolve, reject) => {
    const abort = () => reject(signal.reason);
    if (signal.aborted) abort();
    signal.addEventListener("abort", abort);
    what.then(resolve, reject).finally(() => signal.removeEventListener("abort", abort));
  });
}

/** @param {number} ms @param {(AbortSignal | undefined)[]} signals Any of them ends it; it does not throw. */
export function sleep(ms, ...signals) {
  return new Promise((resolve) => {
    if (ms <= 0 || signals.some((signal) => signal?.aborted)) return resolve(undefined);
    const done = () => {
      clearTimeout(timer);
      for (const signal of signals) signal?.removeEventListener("abort", done);
      resolve(undefined);
    };
    const timer = setTimeout(done, ms);
    for (const signal of signals) signal?.addEventListener("abort", done);
  });
}
