/**
 * A page's life, as far as it concerns a connection: it may be hidden, frozen, offline, or in the back-forward cache.
 *
 * `onWake` is called where a connection may have died unnoticed, `onHide` where one would keep the page out of the
 * cache. Returns what takes the listeners away again. Where there is no page nothing is ever called.
 *
 * @param {{ onWake(isOnline: boolean): void, onHide(): void }} callbacks
 * @returns {() => void}
 */
export function watchPage({ onWake, onHide }) {
  if (typeof document === "undefined" || typeof addEventListener === "undefined") return () => {};
  const listening = new AbortController();
  const { signal } = listening;
  const wake = () => onWake(false);
  document.addEventListener("visibilitychange", () => document.visibilityState === "visible" && wake(), { signal });
  document.addEventListener("resume", wake, { signal }); // a frozen page that was never hidden
  addEventListener("pageshow", wake, { signal });
  addEventListener("online", () => onWake(true), { signal });
  addEventListener("pagehide", onHide, { signal });
  return () => listening.abort();
}

/** Whether the browser says that there is no network; it may be wrong. */
export function isOffline() {
  return typeof document !== "undefined" && navigator.onLine === false;
}
