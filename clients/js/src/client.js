import { Relay } from "./relay.js";
import { Stream, textOf } from "./stream.js";
import { ServerError, ending } from "./errors.js";

/** @import { ClientOptions } from "./relay.js" */
/** @import { StreamOptions } from "./stream.js" */
/** @import { CancelResult, Job, JobEvent, Json, Result, Terminal } from "./types.js" */

/**
 * One relay, for any number of jobs. Every stream has a connection of its own: tokens are for one job each, and a
 * stream that is read slowly holds up no other. All methods throw JobUnavailableError, or the reason of their `signal`.
 */
export class Client {
  #relay;

  /** @param {ClientOptions} [options] */
  constructor(options = {}) {
    this.#relay = new Relay(options);
  }

  /**
   * Enqueues a chat.completions body, once. With an `idempotencyKey` you may repeat it, and it names the same job.
   * @param {Json} request @param {Json} [options] PROTOCOL.md §1.2
   * @param {{ idempotencyKey?: string, signal?: AbortSignal }} [how]
   * @returns {Promise<Job>}
   */
  async submit(request, options, { idempotencyKey, signal } = {}) {
    const headers = { "Idempotency-Key": idempotencyKey || randomKey() };
    const body = options ? { request, options } : { request };
    const job = await this.#relay.call("POST", "/v1/jobs", { body, headers, signal });
    // What a token submits is read by the token that comes with it.
    if (job.token && this.#relay.getToken) this.#relay.remember(job.id, Promise.resolve(job.token));
    return job;
  }

  /**
   * Reads a job's events; nothing happens before the first is asked for.
   * @param {string} jobId @param {StreamOptions} [options]
   */
  stream(jobId, options = {}) {
    return new Stream(this.#relay, jobId, options);
  }

  /**
   * Cancels; says what that met. It may be repeated. Where it was sent again, since no answer came, `cancelled_from` is
   * null if the job had ended by then, and be it by this call.
   * @param {string} jobId @param {{ reason?: string, signal?: AbortSignal }} [how]
   * @returns {Promise<CancelResult>}
   */
  cancel(jobId, { reason = "client", signal } = {}) {
    return this.#relay.call("POST", `${path(jobId)}/cancel`, { jobId, body: { reason }, signal });
  }

  /**
   * The job as it stands, PROTOCOL.md §5.3.
   * @param {string} jobId @param {{ signal?: AbortSignal }} [how] @returns {Promise<Json>}
   */
  retrieve(jobId, { signal } = {}) {
    return this.#relay.call("GET", path(jobId), { jobId, signal });
  }

  /**
   * Waits for the end. Throws JobEndedError unless that is `completed`. `onEvent` hears every event meanwhile.
   * @param {string} jobId @param {{ signal?: AbortSignal, onEvent?: (event: JobEvent) => void }} [how]
   * @returns {Promise<Result>}
   */
  async result(jobId, { signal, onEvent } = {}) {
    /** @type {any} */
    let last;
    for await (const event of this.stream(jobId, { mode: "snapshot", signal })) {
      onEvent?.(event);
      last = event;
    }
    if (!last) throw new ServerError("what answers is no relay: the stream has no end");
    const { type: status, ...terminal } = /** @type {Terminal} */ (last);
    // An event has no room for a completion of any size.
    const { completion, outputs } = terminal.completion_url ? await this.retrieve(jobId, { signal }) : terminal;
    const output = outputs?.find((/** @type {Json} */ each) => each.index === 0);
    const calls = output?.tool_calls === "complete" ? completion.choices[0].message.tool_calls : undefined;
    const text = textOf(completion);
    const result = {
      ...terminal,
      completion,
      outputs: outputs ?? [],
      id: jobId,
      status,
      text,
      tool_calls: calls ?? [],
    };
    const whole = { ...result, parsed: output?.parsed ?? null };
    if (status !== "completed") throw ending(whole);
    return whole;
  }
}

/** @param {string} jobId */
function path(jobId) {
  return `/v1/jobs/${encodeURIComponent(jobId)}`;
}

/** So that a repeat finds the first one's job (PROTOCOL.md §5.2). Pages without TLS have no `randomUUID`. */
function randomKey() {
  return `random-${crypto.getRandomValues(new Uint32Array(4)).join("-")}`;
}
