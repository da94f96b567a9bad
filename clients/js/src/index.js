/**
 * The client of deltawire, for browsers and Node.
 *
 *     const client = new Client({ baseUrl: "https://deltawire.example.com", getToken });
 *     for await (const text of client.stream(jobId, { mode: "snapshot" }).text()) show(text);
 */
export { Client } from "./client.js";
export { Stream, textOf } from "./stream.js";
export * from "./errors.js";
export * from "./types.js";
/** @typedef {import("./relay.js").ClientOptions} ClientOptions */
/** @typedef {import("./stream.js").StreamOptions} StreamOptions */
