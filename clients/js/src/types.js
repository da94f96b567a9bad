/**
 * What travels, as PROTOCOL.md has it: names are those of the wire.
 *
 * @typedef {{ [key: string]: any }} Json
 *
 * @typedef {{ message: string, type: string, param: string | null, code: string, retryable: boolean,
 *   retry_after_s: number | null }} WireError
 *
 * @typedef {"completed" | "incomplete" | "failed" | "cancelled"} TerminalStatus
 * @typedef {"unknown" | "queued" | "in_progress" | TerminalStatus} Status
 *
 * @typedef {{ job_id: string, sequence_number: number, attempt: number, created_at: number }} Numbered
 * @typedef {Numbered & { type: "queued" }} Queued
 * @typedef {Numbered & { type: "in_progress", upstream: string, model: string }} InProgress
 * @typedef {Numbered & { type: "retrying", try: number, reason: string, delay_s: number }} Retrying
 * @typedef {Numbered & { type: "restarted", reason: string, discard_through: number }} Restarted
 * @typedef {Numbered & { type: "delta", chunk: Json, first_sequence_number?: number }} Delta
 * @typedef {{ type: "snapshot", job_id: string, sequence_number: number, completion: Json | null }} Snapshot
 *
 * @typedef {{ reason: string, requested_at: number | null, upstream_closed_at: number | null }} Cancellation
 * @typedef {{ index: number, tool_calls: "complete" | "incomplete" | null, parsed: any,
 *   parse_error: { reason: string, message: string } | null }} Output
 * @typedef {{ completion: Json | null, completion_url?: string, usage: Json | null,
 *   usage_source: "provider" | "estimated" | "unavailable",
 *   timings: { queued_s: number | null, first_delta_s: number | null, total_s: number | null },
 *   outputs?: Output[], error?: WireError, source?: string, status_code?: number | null, cancel?: Cancellation,
 *   incomplete_details?: { reason: string } }} Ending
 * @typedef {Numbered & Ending & { type: TerminalStatus }} Terminal
 *
 * Every event of a job, and the snapshot that may stand for the first of them.
 * @typedef {Queued | InProgress | Retrying | Restarted | Delta | Snapshot | Terminal} JobEvent
 *
 * @typedef {{ id: string, object: "job", status: Status, token: string | null,
 *   urls: { self: string, events: string, websocket: string, cancel: string } }} Job
 * @typedef {{ status: Status, cancelled_from: "queued" | "in_progress" | null, delivered: boolean }} CancelResult
 *
 * How a job ended, and what can be relied on in its first choice: `tool_calls` only if they are complete (their
 * arguments as they came), `parsed` only if it is valid.
 * @typedef {Ending & { id: string, status: TerminalStatus, text: string, tool_calls: Json[], parsed: any }} Result
 */
export {};
