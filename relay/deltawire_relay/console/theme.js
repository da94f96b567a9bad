// Before the first paint, so that nothing flashes.
document.documentElement.dataset.theme = localStorage.getItem("deltawire.theme") ?? "system";

// While relays behind one address are upgraded, a page may be of one and its scripts of another, and not go together.
// The main one says that it came to its end; without that, all are fetched again, for about a minute.
const LOADS = "deltawire.loads";
addEventListener("load", () => {
  const before = Number(sessionStorage.getItem(LOADS));
  if ("isWhole" in document.documentElement.dataset) sessionStorage.removeItem(LOADS);
  else if (before < 6) {
    sessionStorage.setItem(LOADS, before + 1);
    setTimeout(() => location.reload(), 1_000 * 2 ** before);
  }
});
