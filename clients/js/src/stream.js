import { AuthenticationError, UnreachableError, refusal } from "./errors.js";
import { Fold } from "./fold.js";
import { Lost, backoffMs, verdict } from "./lost.js";
import { overEventStream, overWebSocket } from "./connection.js";
import { isOffline, watchPage } from "./page.js";
import { sleep, unlessAborted } from "./relay.js";

/** @import { Relay } from "./relay.js" */
/** @import { Json, JobEvent, Status } from "./types.js" */

/**
 * @typedef {object} StreamOptions
 * @property {"replay" | "snapshot"} [mode] "snapshot": the text so far as one event, then the rest.
 * @property {number} [startingAfter] The number of the last event that the caller has. Default: 0, from the beginning.
 * @property {boolean} [merge] Text deltas that wait for a slow reader come as one (PROTOCOL.md §6.6).
 * @property {AbortSignal} [signal] Ends the stream; reading it throws the signal's reason.
 */

const TERMINAL = new Set(["completed", "incomplete", "failed", "cancelled"]);
/** In this time a heartbeat has come, so that a page that wakes knows a dead connection. */
const STALE_MS = 20_000;
const MAX_TOLD_MS = 60_000;

/**
 * The events of one job: every one once, in order, to the terminal one, over as many connections as that takes. It is
 * read once, by whichever of its two iterators; leaving the loop closes it. Throws JobUnavailableError.
 */
export class Stream {
  /** The number of the last event that was read. */
  position;
  /** The job's, as far as it was read. @type {Status} */
  status = "unknown";

  #relay;
  #jobId;
  #options;
  #fold = new Fold();
  /** @type {Json | null} What the terminal event says. */ #whole = null;
  #hasBegun = false;
  #mayMissEvents = false;
  #connection = new AbortController();
  #pause = new AbortController();
  /** When a frame came, by a clock that goes on while the machine sleeps. */ #heardAt = 0;
  /** By one that need not. @type {number | null} */ #failingSince = null;
  /** @type {Promise<void> | null} Until the page comes out of the back-forward cache. */ #hidden = null;
  #show = () => {};
  /** @type {AsyncGenerator<JobEvent, void> | undefined} */ #events;

  /** @param {Relay} relay @param {string} jobId @param {StreamOptions} options */
  constructor(relay, jobId, options) {
    this.#relay = relay;
    this.#jobId = jobId;
    this.#options = options;
    this.position = options.startingAfter ?? 0;
  }

  /**
   * The `chat.completion` so far, the sum of what was read (open choices: `finish_reason: null`); null before the first
   * delta. With `startingAfter` it lacks what came before.
   * @returns {Json | null}
   */
  get completion() {
    return this.#whole ?? this.#fold.completion();
  }

  [Symbol.asyncIterator]() {
    this.#events ??= this.#run();
    return this.#events;
  }

  /** The text of the first choice, as it comes. What a `restarted` attempt had said is not taken back. */
  async *text() {
    let said = "";
    for await (const event of this) {
      let text = "";
      if (event.type === "delta") {
        for (const { index = 0, delta } of event.chunk.choices ?? []) {
          if (index === 0 && typeof delta?.content === "string") text += delta.content;
        }
      } else if (event.type === "snapshot") {
        const whole = textOf(event.completion);
        text = whole.startsWith(said) ? whole.slice(said.length) : whole; // of another attempt nothing was said
        said = whole.slice(0, whole.length - text.length);
      } else if (event.type === "restarted") {
        said = "";
      }
      said += text;
      if (text) yield text;
    }
  }

  /** @returns {AsyncGenerator<JobEvent, void>} */
  async *#run() {
    const { signal } = this.#options;
    const unwatch = watchPage({ onWake: this.#onWake, onHide: this.#onHide });
    const state = { failures: 0, renewals: 0 };
    try {
      for (;;) {
        while (this.#hidden) await unlessAborted(signal, this.#hidden);
        signal?.throwIfAborted();
        const isEventStream = this.#relay.wantsEventStream;
        const attempt = { retryAfterS: 0, code: 0, wasTried: false, wasHeard: false, isEventStream };
        const credential = this.#relay.credential(this.#jobId);
        try {
          const token = await unlessAborted(signal, credential).catch(lostIfOffline);
          attempt.wasTried = true;
          for await (const message of this.#connect(token, isEventStream)) {
            if (message.type === "over") return;
            this.#failingSince = null;
            attempt.wasHeard = true;
            if (message.type === "goodbye") {
              [attempt.code, attempt.retryAfterS] = [message.code, message.retry_after_s];
            } else if (message.type === "error") {
              const { error, job_id: jobId } = message;
              attempt.retryAfterS = error.retry_after_s ?? 0;
              // One about the job leaves a socket open; one that may pass, and is not, comes before a close code.
              if (jobId || !error.retryable || isEventStream) throw new Lost(error.message, { error });
            } else if (message.type === "subscribed") {
              state.renewals = 0;
              this.status = message.status;
              this.#mayMissEvents = !message.recovered;
              const hasAll = message.recovered && message.latest_sequence_number <= this.position;
              if (TERMINAL.has(this.status) && hasAll) return;
            } else {
              if (message.type !== "authenticated") state.failures = 0;
              if (!this.#takes(message)) continue;
              yield /** @type {JobEvent} */ (message);
              if (TERMINAL.has(message.type)) return;
            }
          }
          signal?.throwIfAborted();
          state.failures = 0; // we have ended it ourselves, to begin anew
        } catch (lost) {
          if (!(lost instanceof Lost)) throw lost;
          lost.code ||= attempt.code;
          await this.#recover(lost, attempt, state, credential);
        }
      }
    } finally {
      unwatch();
      this.#connection.abort();
    }
  }

  /** @param {string | undefined} token @param {boolean} isEventStream */
  #connect(token, isEventStream) {
    const { fetch, WebSocket, baseUrl } = this.#relay;
    const { mode = "replay", merge = false, signal } = this.#options;
    const how = { starting_after: this.position, mode: this.#hasBegun ? "replay" : mode, merge };
    this.#connection = new AbortController();
    this.#heardAt = Date.now();
    const either = signal ? AbortSignal.any([signal, this.#connection.signal]) : this.#connection.signal;
    const watched = { onFrame: () => void (this.#heardAt = Date.now()), signal: either };
    if (isEventStream) {
      const query = new URLSearchParams(Object.entries(how).map(([name, value]) => [name, `${value}`]));
      const url = `${baseUrl}/v1/jobs/${encodeURIComponent(this.#jobId)}/events?${query}`;
      return overEventStream(fetch, url, token, watched);
    }
    const subscribe = { type: "subscribe", job_id: this.#jobId, ...how };
    return overWebSocket(WebSocket, `${baseUrl.replace(/^http/, "ws")}/v1/ws`, token, subscribe, watched);
  }

  /**
   * Takes an event into account; false if it is known, or none. Throws Lost where events are missing.
   * @param {Json} message
   */
  #takes(message) {
    const { type, sequence_number: number, first_sequence_number: first = number } = message;
    if (!Number.isInteger(number)) return false;
    if (type === "snapshot") {
      this.#fold = Fold.from(message.completion);
    } else if (!(this.#mayMissEvents && TERMINAL.has(type))) {
      // That may be all that is left of a log that was lost, whose numbers went further.
      if (number <= this.position) return false;
      if (first !== this.position + 1 && !this.#mayMissEvents) throw new Lost("events are missing");
    }
    this.#hasBegun = true;
    this.#mayMissEvents = false;
    this.position = number;
    if (type === "delta") this.#fold.add(message.chunk);
    else if (type === "restarted") this.#fold = new Fold();
    else if (type === "queued" || type === "in_progress" || TERMINAL.has(type)) this.status = type;
    if (TERMINAL.has(type)) this.#whole = message.completion;
    return true;
  }

  /**
   * Waits until it is time to connect again. Throws where there is no use in that.
   * @param {Lost} lost
   * @param {{ retryAfterS: number, wasTried: boolean, wasHeard: boolean, isEventStream: boolean }} attempt
   * @param {{ failures: number, renewals: number }} state @param {Promise<string | undefined>} credential
   */
  async #recover(lost, attempt, state, credential) {
    const { signal } = this.#options;
    const what = verdict(lost);
    if (what === "never") throw refusal(lost.error, lost.status, lost.message);
    if (what === "with another token" && !(state.renewals++ < 2 && this.#relay.renew(this.#jobId, credential))) {
      throw new AuthenticationError(lost.message, { error: lost.error });
    }
    const didNotPass = attempt.wasTried && !attempt.wasHeard && !lost.status && what === "again";
    if (didNotPass) this.#relay.webSocketsMayPass(attempt.isEventStream);
    const now = performance.now();
    this.#failingSince ??= now;
    if (now - this.#failingSince > this.#relay.giveUpAfterMs && !isOffline()) {
      throw new UnreachableError(lost.message, { error: lost.error, cause: lost });
    }
    state.failures += 1;
    const toldMs = Math.min(MAX_TOLD_MS, 1000 * Math.max(attempt.retryAfterS, lost.retryAfterS));
    this.#pause = new AbortController();
    // A page that wakes cuts our own caution short, but not what the relay has asked for.
    await sleep(toldMs, signal);
    await sleep(backoffMs(state.failures) - toldMs, signal, this.#pause.signal);
  }

  #onWake = (/** @type {boolean} */ isOnline) => {
    if (isOnline) this.#relay.webSocketsMayPass(true); // it may be another network
    this.#hidden = null;
    this.#show();
    this.#failingSince = null;
    if (Date.now() - this.#heardAt > STALE_MS) this.#connection.abort();
    this.#pause.abort();
  };

  #onHide = () => {
    this.#hidden ??= new Promise((resolve) => (this.#show = resolve));
    this.#connection.abort();
  };
}

/** The first choice's text; "" where there is none. @param {Json | null} completion @returns {string} */
export function textOf(completion) {
  const content = completion?.choices?.find((/** @type {Json} */ choice) => choice.index === 0)?.message.content;
  if (typeof content === "string") return content;
  const parts = Array.isArray(content) ? content : []; // what odd chunks left there is no text
  return parts.map((part) => (part?.type === "text" && typeof part.text === "string" ? part.text : "")).join("");
}

/** @param {unknown} cause @returns {never} */
function lostIfOffline(cause) {
  throw cause instanceof TypeError ? new Lost(`no token: ${cause}`, { cause }) : cause;
}
