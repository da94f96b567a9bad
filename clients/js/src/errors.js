/**
 * What can go wrong, as one tree:
 *
 *     DeltawireError
 *     ├── JobUnavailableError      refused, or not reached; `error` is what the relay said, if it said something
 *     │   ├── UnreachableError     no answer for too long
 *     │   ├── InvalidRequestError, AuthenticationError, PermissionDeniedError, NotFoundError
 *     │   └── RateLimitError, ServerError      may pass: `error.retryable`, `error.retry_after_s`
 *     └── JobEndedError            `result()` only: the job ended, but not as `completed`; `result` is all of it
 *         └── JobFailedError, JobCancelledError, JobIncompleteError
 *
 * An AbortSignal that is used throws its own reason, as everywhere.
 */

/** @import { Result, WireError } from "./types.js" */

export class DeltawireError extends Error {
  name = this.constructor.name;
}

export class JobUnavailableError extends DeltawireError {
  /** @param {string} message @param {{ error?: WireError | null, cause?: unknown }} [details] */
  constructor(message, { error = null, cause } = {}) {
    super(message, { cause });
    /** PROTOCOL.md §8.1. @type {WireError | null} */
    this.error = error;
  }
}

export class UnreachableError extends JobUnavailableError {}
export class InvalidRequestError extends JobUnavailableError {}
export class AuthenticationError extends JobUnavailableError {}
export class PermissionDeniedError extends JobUnavailableError {}
export class NotFoundError extends JobUnavailableError {}
export class RateLimitError extends JobUnavailableError {}
export class ServerError extends JobUnavailableError {}

export class JobEndedError extends DeltawireError {
  /** @param {string} message @param {Result} result */
  constructor(message, result) {
    super(message);
    /** @type {Result} */
    this.result = result;
  }
}

export class JobFailedError extends JobEndedError {}
export class JobCancelledError extends JobEndedError {}
export class JobIncompleteError extends JobEndedError {}

/** @type {{ [type: string]: typeof JobUnavailableError }} */
const BY_TYPE = {
  invalid_request_error: InvalidRequestError,
  authentication_error: AuthenticationError,
  permission_error: PermissionDeniedError,
  not_found_error: NotFoundError,
  rate_limit_error: RateLimitError,
  server_error: ServerError,
};

/** @type {{ [status: number]: typeof JobUnavailableError }} For what speaks in the relay's place. */
const BY_STATUS = { 401: AuthenticationError, 403: PermissionDeniedError, 404: NotFoundError, 429: RateLimitError };

/**
 * The error for a refusal: by what was said, else by the status.
 * @param {WireError | null} error @param {number} status @param {string} otherwise
 */
export function refusal(error, status, otherwise) {
  const byStatus = BY_STATUS[status] ?? (status >= 400 && status < 500 ? InvalidRequestError : ServerError);
  return new ((error && BY_TYPE[error.type]) ?? byStatus)(error?.message ?? otherwise, { error });
}

/** The error for a job that is over, but not completed. @param {Result} result */
export function ending(result) {
  switch (result.status) {
    case "failed":
      return new JobFailedError(result.error?.message ?? "the job failed", result);
    case "cancelled":
      return new JobCancelledError(`the job was cancelled (${result.cancel?.reason})`, result);
    default:
      return new JobIncompleteError(`the job's answer is incomplete (${result.incomplete_details?.reason})`, result);
  }
}
