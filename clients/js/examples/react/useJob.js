import { useCallback, useEffect, useState } from "react";
import { textOf } from "deltawire";

/** @import { Client, Status } from "deltawire" */
/**
 * @typedef {object} State
 * @property {Status} status
 * @property {{ [key: string]: any } | null} completion
 * @property {Error | null} error
 */

/** @type {State} */
const NOTHING = { status: "unknown", completion: null, error: null };

/**
 * A job as it grows, with the text so far first: after a reload, in a second tab, on another device.
 * @param {Client} client One for the whole application.
 * @param {string} jobId
 */
export function useJob(client, jobId) {
  const [state, setState] = useState(NOTHING);
  useEffect(() => {
    const leaving = new AbortController();
    const stream = client.stream(jobId, { mode: "snapshot", merge: true, signal: leaving.signal });
    let frame = 0;
    const show = (/** @type {Error | null} */ error = null) => {
      cancelAnimationFrame(frame);
      frame = 0;
      setState({ status: stream.status, completion: stream.completion, error });
    };
    const read = async () => {
      setState(NOTHING);
      try {
        // However fast the events come, a frame is drawn once.
        for await (const _ of stream) frame ||= requestAnimationFrame(() => show());
        show();
      } catch (error) {
        if (!leaving.signal.aborted) show(/** @type {Error} */ (error));
      }
    };
    read();
    return () => {
      leaving.abort();
      cancelAnimationFrame(frame);
    };
  }, [client, jobId]);
  const stop = useCallback(
    () => client.cancel(jobId).catch((error) => setState((before) => ({ ...before, error }))),
    [client, jobId],
  );
  return { ...state, text: textOf(state.completion), stop };
}
