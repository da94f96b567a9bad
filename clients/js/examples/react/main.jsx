import { StrictMode } from "react";
import { createRoot } from "react-dom/client";
import { Client } from "deltawire";
import { useJob } from "./useJob.js";

const client = new Client({
  baseUrl: import.meta.env.VITE_DELTAWIRE_URL,
  // The application's own backend knows who may read which job.
  getToken: async ({ jobId }) => (await fetch(`/token?job=${jobId}`)).text(),
});

/** @param {{ jobId: string }} props */
function Answer({ jobId }) {
  const { text, status, error, stop } = useJob(client, jobId);
  const isRunning = !error && ["unknown", "queued", "in_progress"].includes(status);
  return (
    <article aria-busy={isRunning}>
      <p style={{ whiteSpace: "pre-wrap" }}>{text}</p>
      <p role="status">{error ? error.message : status}</p>
      <button onClick={stop} disabled={!isRunning}>
        Stop
      </button>
    </article>
  );
}

const jobId = new URLSearchParams(location.search).get("job") ?? "";
const root = /** @type {HTMLElement} */ (document.getElementById("root"));
createRoot(root).render(
  <StrictMode>
    <Answer jobId={jobId} />
  </StrictMode>,
);
