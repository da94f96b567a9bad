// The console: what a person does, and what is asked of the relay for it.
import { TERMINAL, Away, askJson, keepKey, readKey, words } from "./api.js";
import { median, rate, seconds, speed } from "./format.js";
import { JobView } from "./job.js";
import { delay, poll, showJobs, showRelays, showWorkers } from "./lists.js";
import { bars, line } from "./plots.js";

const $ = (id) => document.getElementById(id);
const JOBS = 30;
const LOOKS = 60;
const PROMPTS = "deltawire.prompts";
const PROMPTS_KEPT = 20;
const PROMPT_CHARACTERS = 10_000; // a browser keeps five million for all of a site

const say = (text) => ($("say").textContent = text);
const rowsOf = (id) => $(id).querySelector("tbody");

/** Says something about parts of the page, or that all is well. */
function tell(parts, text = "", kind = "wait") {
  for (const notice of parts.map((id) => $(id).querySelector(".notice"))) {
    Object.assign(notice, { hidden: !text, textContent: text });
    notice.dataset.kind = kind;
  }
}

function complain(parts, error, scope) {
  tell(parts, words(error, scope), error instanceof Away || [401, 403].includes(error.status) ? "wait" : "failed");
  if (error.status === 401) wantKey(error);
}

// The API key

let wasAsked = false; // whoever closes the dialog is not asked again by itself

function wantKey(error) {
  $("key-button").hidden = false;
  $("key-why").textContent = words(error);
  if (wasAsked || document.querySelector("dialog[open]")) return;
  wasAsked = true;
  $("key-dialog").showModal();
}

function takeKey(value) {
  keepKey(value.trim());
  $("key").value = "";
  $("key-dialog").close();
  for (const look of looks) look();
  findModels();
  if (job.id && !job.end) openJob(job.id);
}

$("key-button").hidden = !readKey();
$("key-button").onclick = () => $("key-dialog").showModal();
$("key-dialog").querySelector("form").onsubmit = (event) => (event.preventDefault(), takeKey($("key").value));
$("forget").onclick = () => takeKey("");

// One job

const job = new JobView({ say, onRefused: wantKey, onChange: () => looks[0]?.() });

const prompts = () => JSON.parse(sessionStorage.getItem(PROMPTS) ?? "[]");

function openJob(id, isNew = false) {
  job.open(id, { isNew, prompt: prompts().find(([of]) => of === id)?.[1] });
}

const idOfPage = () => new URLSearchParams(location.search).get("job") || null;

function go(id, isNew = false) {
  history.pushState(null, "", `?job=${encodeURIComponent(id)}`);
  openJob(id, isNew);
  $("job").scrollIntoView({ block: "nearest" });
}

// A link within the page is history, too.
globalThis.addEventListener("popstate", () => idOfPage() === job.id || openJob(idOfPage()));
$("stop").onclick = () => job.stop();
$("show-text").onclick = () => job.show(false);
$("show-wire").onclick = () => job.show(true);
$("jobs").addEventListener("click", (event) => {
  const link = event.target.closest("a");
  if (!link || event.ctrlKey || event.metaKey || event.shiftKey) return;
  event.preventDefault();
  go(new URL(link.href).searchParams.get("job"));
});

// A prompt

/** The body of POST /v1/jobs. Throws SyntaxError. */
function body() {
  const system = $("system").value.trim();
  const user = { role: "user", content: $("prompt").value };
  const messages = system ? [{ role: "system", content: system }, user] : [user];
  const asked = { request: { model: $("model").value.trim(), messages }, options: {} };
  for (const input of $("options").querySelectorAll("input[name]")) {
    const [where, field] = input.name.split(".");
    if (input.value) asked[where][field] = Number(input.value);
  }
  if ($("abandon").checked) asked.options.on_abandon = "cancel";
  const further = $("further").value.trim();
  Object.assign(asked.request, further ? JSON.parse(further) : {});
  return asked;
}

$("ask").addEventListener("submit", async (event) => {
  event.preventDefault();
  const button = $("ask").querySelector("[type=submit]");
  if (button.disabled) return;
  $("ask-error").hidden = true;
  button.disabled = true;
  try {
    const { id } = await askJson("v1/jobs", { body: body() });
    sessionStorage.setItem(
      PROMPTS,
      JSON.stringify([[id, $("prompt").value.slice(0, PROMPT_CHARACTERS)], ...prompts()].slice(0, PROMPTS_KEPT)),
    );
    go(id, true);
  } catch (error) {
    const isJson = error instanceof SyntaxError;
    $("ask-error").textContent = isJson
      ? `The further fields are no JSON: ${error.message}`
      : words(error, "submit").replace("Trying again", "Try again");
    $("ask-error").hidden = false;
    if (error.status === 401) wantKey(error);
  }
  button.disabled = false;
});

for (const sample of document.querySelectorAll(".samples button")) {
  sample.onclick = () => {
    $("prompt").value = sample.textContent;
    // The demo's gateway can be asked to take its time; any other would refuse the field.
    if ($("model").value === "deltawire-scripted") $("further").value = sample.dataset.script ?? "";
    $("ask").requestSubmit();
  };
}

async function findModels() {
  try {
    const { data } = await askJson("v1/models");
    $("models").replaceChildren(
      ...data.map(({ id }) => Object.assign(document.createElement("option"), { value: id })),
    );
    if (data.length && $("model").value === $("model").defaultValue) $("model").value = data[0].id;
  } catch {
    // any model can be typed; what else is wrong the other parts say
  }
}

// What goes on

async function lookForJobs() {
  const parts = ["jobs", "plot-first", "plot-speed"];
  try {
    const { data, has_more: hasMore } = await askJson(`v1/jobs?limit=${JOBS}`);
    tell(parts);
    showJobs(rowsOf("jobs"), data, job.id);
    const running = data.filter(({ status }) => !TERMINAL.has(status)).length;
    $("jobs-sum").textContent = data.length
      ? `${running} active, ${hasMore ? `the newest ${data.length} shown` : `${data.length} in all`}`
      : "none yet";
    plotJobs(data.toReversed());
  } catch (error) {
    complain(parts, error, "list");
  }
}

function plotJobs(jobs) {
  const plot = (id, value, format) => {
    const points = jobs
      .map((each) => ({ value: value(each), label: each.id, kind: each.status }))
      .filter((point) => point.value);
    bars($(id), points, format, points.length ? format(median(points.map((point) => point.value))) : "–");
  };
  plot("plot-first", ({ timings }) => timings?.first_delta_s, seconds);
  plot("plot-speed", speed, rate);
}

let before = new Map();
const delays = [];

async function lookForProcesses() {
  const parts = ["workers", "relays", "plot-delay"];
  try {
    const { data } = await askJson("v1/processes");
    tell(parts);
    const [workers, relays] = ["worker", "relay"].map((kind) => data.filter((each) => each.kind === kind));
    showWorkers(rowsOf("workers"), workers, before);
    showRelays(rowsOf("relays"), relays, before);
    if (!workers.length) tell(["workers"], "No worker is running: jobs wait in the queue.");
    delays.push(delay(relays, before));
    delays.splice(0, delays.length - LOOKS);
    const last = delays.findLast((value) => value !== null);
    line($("plot-delay"), delays, seconds, seconds(last), LOOKS);
    before = new Map(data.map((each) => [each.name, each]));
  } catch (error) {
    complain(parts, error, "metrics");
  }
}

const HEALTH = {
  ok: ["ok", "relay is up"],
  degraded: ["wait", "Redis is silent"],
  redis_unavailable: ["failed", "Redis is away"],
  draining: ["wait", "relay is restarting"],
  away: ["failed", "relay is away"],
};

async function lookForHealth() {
  const answer = await fetch("readyz", { cache: "no-store" }).catch(() => null);
  const { status } = (await answer?.json().catch(() => null)) ?? {};
  // Some proxies keep the probe to themselves: an answer is an answer, then.
  const [kind, text] = HEALTH[status ?? (answer?.status < 500 ? "ok" : "away")];
  if ($("health").textContent === text) return;
  if ($("health").dataset.kind !== "wait" || kind !== "ok") say(text);
  $("health").dataset.kind = kind;
  $("health").firstElementChild.textContent = text;
}

// Keys, theme

const THEMES = { system: "light", light: "dark", dark: "system" };

function setTheme(theme) {
  document.documentElement.dataset.theme = theme;
  localStorage.setItem("deltawire.theme", theme);
  $("theme").ariaLabel = `Theme: ${theme}`;
  $("theme").lastElementChild.textContent = theme;
}

const nextTheme = () => setTheme(THEMES[document.documentElement.dataset.theme] ?? "system");
setTheme(document.documentElement.dataset.theme);
$("theme").onclick = nextTheme;
$("help-button").onclick = () => $("help").showModal();
$("single").checked = localStorage.getItem("deltawire.single") !== "off";
$("single").onchange = () => localStorage.setItem("deltawire.single", $("single").checked ? "on" : "off");

const SHORTCUTS = {
  "/": () => $("prompt").focus(),
  s: () => job.stop(),
  w: () => job.show($("wire-view").hidden),
  o: () => job.id && $("second").click(),
  t: nextTheme,
  "?": () => $("help").showModal(),
};

document.addEventListener("keydown", (event) => {
  if (event.isComposing || event.altKey || document.querySelector("dialog[open]")) return;
  if (event.ctrlKey || event.metaKey) {
    if (event.key === "Enter" && $("ask").contains(event.target)) $("ask").requestSubmit();
    return;
  }
  const isText = event.target.matches("textarea, select, input:not([type=checkbox])");
  if (isText || !$("single").checked || !Object.hasOwn(SHORTCUTS, event.key)) return;
  event.preventDefault();
  SHORTCUTS[event.key]();
});

const looks = [poll(3_000, lookForJobs), poll(2_000, lookForProcesses), poll(5_000, lookForHealth)];
findModels();
openJob(idOfPage());
document.documentElement.dataset.isWhole = ""; // see theme.js
