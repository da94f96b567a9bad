/** How connections and commands fail, and what comes of it. No I/O, no clock. */

/** @import { WireError } from "./types.js" */

const MAX_BACKOFF_MS = 5_000;

export class Lost extends Error {
  /**
   * @param {string} message
   * @param {{ code?: number, status?: number, error?: WireError | null, retryAfterS?: number, cause?: unknown }} [how]
   */
  constructor(message, { code = 0, status = 0, error = null, retryAfterS = 0, cause } = {}) {
    super(message, { cause });
    this.code = code;
    this.status = status;
    this.error = error;
    this.retryAfterS = retryAfterS;
  }
}

/**
 * What the end of a connection means (PROTOCOL.md §6.5, §8.1).
 * @param {{ code: number, status: number, error: WireError | null }} lost
 * @returns {"again" | "with another token" | "never"}
 */
export function verdict({ code, status, error }) {
  if (code === 4005 || status === 401 || error?.code === "token_expired") return "with another token";
  if (code >= 4500 && code < 4600) return "never";
  if (status >= 400 && status < 500 && status !== 408 && status !== 429) return "never";
  const mayComeBack = code >= 4000 && code < 4500;
  return error && !error.retryable && !mayComeBack ? "never" : "again";
}

/**
 * An answer that is no success, the relay's or a proxy's; `text` is its body.
 * @param {Response} response @param {string} text
 */
export function refused({ status, headers }, text) {
  const said = parsed(text)?.error;
  const error = typeof said?.retryable === "boolean" ? said : null;
  const retryAfterS = error?.retry_after_s ?? (Number(headers.get("Retry-After")) || 0);
  return new Lost(error?.message ?? `the relay answered ${status}`, { status, error, retryAfterS });
}

/**
 * In how many milliseconds a command is sent again that has failed `failures` times, lastly so; null: it is not.
 * @param {Lost} lost @param {number} failures @param {{ maxRetries: number, maxWaitMs: number }} bounds
 */
export function repeatInMs(lost, failures, { maxRetries, maxWaitMs }) {
  const toldMs = 1000 * lost.retryAfterS;
  if (failures > maxRetries || toldMs > maxWaitMs || verdict(lost) !== "again") return null;
  return Math.max(toldMs, backoffMs(failures));
}

/** How long to wait after so many failures in a row: doubled each time, with jitter. @param {number} failures 1, 2, … */
export function backoffMs(failures) {
  return Math.random() * Math.min(MAX_BACKOFF_MS, 100 * 2 ** failures);
}

/** JSON's value, or undefined. @param {string} text @returns {any} */
export function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
