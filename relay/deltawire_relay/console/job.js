// One job: its text, its events as they are on the wire, how it stands. What a model says is only ever text.
import { Away, TERMINAL, askJson, frames, words } from "./api.js";
import { rate, seconds, speed } from "./format.js";

const KEPT_FRAMES = 1000;
const KEPT_CHARACTERS = 20_000; // of a frame; a snapshot has all that was said
const STRETCH = 2000;
const $ = (id) => document.getElementById(id);

const INCOMPLETE = {
  length: "it reached the limit of tokens",
  content_filter: "a content filter stopped it",
  upstream_eof: "the gateway closed the stream before its end",
  idle_timeout: "the gateway fell silent",
  total_timeout: "it took longer than the job’s time-out",
};
const CANCELLED = {
  abandoned: "nobody watched it any more",
  deleted: "somebody deleted the job",
  console: "by this console",
};
const STATUS = { in_progress: "running", unknown: "no record yet" };

export const statusWord = (status) => STATUS[status] ?? status;

/** The objects in what should be an array of them: a gateway may send anything. */
const objects = (value) => (Array.isArray(value) ? value.filter((each) => each && typeof each === "object") : []);

/** The text of a content, also where that comes in parts. */
const textOf = (content) =>
  Array.isArray(content)
    ? objects(content)
        .map(({ text }) => (typeof text === "string" ? text : ""))
        .join("")
    : content;

/** The pieces of text in a choice of a chunk or of a completion: [what it is, text]. */
function* pieces({ delta, message }) {
  const said = delta ?? message ?? {};
  yield ["Reasoning", said.reasoning_content ?? said.reasoning];
  yield ["", textOf(said.content)];
  yield ["Refusal", said.refusal];
  for (const [place, call] of objects(said.tool_calls).entries()) {
    const what = `Tool call ${(call.index ?? place) + 1}`;
    if (call.function?.name) yield [what, `${call.function.name} `];
    yield [what, call.function?.arguments];
  }
}

/** The end in words: [title, text]. */
function ending(event) {
  const { timings, usage } = event;
  if (event.type === "completed") {
    const tokens = usage ? `, ${usage.completion_tokens} tokens` : "";
    return ["Completed", `in ${seconds(timings.total_s)}${tokens}`];
  }
  if (event.type === "incomplete") {
    return ["Incomplete", INCOMPLETE[event.incomplete_details.reason] ?? event.incomplete_details.reason];
  }
  if (event.type === "cancelled") {
    const { reason, requested_at: asked, upstream_closed_at: closed } = event.cancel;
    const gateway = closed ? `; the gateway’s stream was closed after ${seconds(Math.max(0, closed - asked))}` : "";
    return ["Cancelled", `${CANCELLED[reason] ?? `reason: ${reason}`}${gateway}`];
  }
  const { error, source, status_code: status } = event;
  const whence = [error.code, `at the ${source}`, status && `HTTP ${status}`].filter(Boolean).join(", ");
  return ["Failed", `${error.message} (${whence})${error.retryable ? ". Running it again may help." : ""}`];
}

export class JobView {
  id = null;
  #watching = new AbortController();
  #flushing = false;

  /** `say` speaks to screen readers, `onChange` hears when the status changes, `onRefused` when a key is wanted. */
  constructor({ say, onChange, onRefused }) {
    Object.assign(this, { say, onChange, onRefused });
  }

  get isRunning() {
    return this.id !== null && !this.failed && !TERMINAL.has(this.status);
  }

  /** Shows a job from now on; null shows none. */
  open(id, { prompt = "", isNew = false } = {}) {
    this.#watching.abort();
    this.#watching = new AbortController();
    Object.assign(this, { id, status: null, failed: false, createdAt: null, end: null });
    Object.assign(this, {
      first: null,
      last: null,
      deltas: 0,
      isLate: false,
      number: 0,
      frames: [],
      dropped: 0,
      unshown: 0,
      heardAt: 0,
    });
    this.#clear();
    this.#notice("");
    $("empty").hidden = id !== null;
    $("asked").hidden = !prompt;
    $("asked").textContent = prompt;
    $("facts").hidden = $("second").hidden = id === null;
    $("job-id").textContent = id ?? "";
    $("second").href = `?job=${encodeURIComponent(id)}`;
    const query = isNew ? "" : "?mode=snapshot";
    $("request-line").textContent = `GET /v1/jobs/${id}/events${query}`;
    this.show($("show-wire").ariaPressed === "true");
    this.#become(null);
    if (id) this.#watch(id, isNew, this.#watching.signal);
  }

  /** The text, or the wire. */
  show(isWire) {
    $("show-text").ariaPressed = String(!isWire);
    $("show-wire").ariaPressed = String(isWire);
    $("text").hidden = isWire || this.id === null;
    $("wire-view").hidden = !isWire || this.id === null;
    $("wire").replaceChildren();
    this.unshown = this.frames.length;
    this.#later();
  }

  async stop() {
    if (!this.isRunning) return;
    $("stop").disabled = true;
    this.say("Stopping");
    try {
      const { status } = await askJson(`v1/jobs/${encodeURIComponent(this.id)}/cancel`, {
        body: { reason: "console" },
      });
      if (status === "unknown") this.#notice("It has no record yet: it ends when a worker takes it.", "wait");
    } catch (error) {
      this.#notice(words(error, "cancel"), "failed");
      if (error.status === 401) this.onRefused(error);
    }
    $("stop").disabled = false;
  }

  async #watch(id, isNew, signal) {
    if (!isNew) {
      const found = (job) => !signal.aborted && (this.createdAt ??= job.created_at);
      askJson(`v1/jobs/${encodeURIComponent(id)}`, { signal }).then(found, () => {}); // the stream says what is wrong
    }
    try {
      const onLost = (error) =>
        this.#notice(`${error instanceof Away ? "The connection was lost. Coming back" : words(error)} …`, "wait");
      for await (const frame of frames(id, { signal, isNew, onLost, onOpen: () => this.#notice("") })) {
        if (signal.aborted) return;
        this.#take(frame);
      }
    } catch (error) {
      if (signal.aborted) return;
      this.failed = true;
      this.#notice(words(error, "read"), "failed");
      this.#become(this.status);
      if (error.status === 401) this.onRefused(error);
    }
  }

  #take({ raw, message, number }) {
    this.#keep(raw, message?.type ?? "comment", number);
    if (number) this.number = number;
    switch (message?.type) {
      case "subscribed":
        if (!message.recovered) this.#clear();
        if (message.status === "unknown")
          this.#notice("No worker knows this job yet. Waiting a minute for it.", "wait");
        this.#become(message.status);
        break;
      case "snapshot":
        this.#clear();
        this.isLate ||= this.deltas === 0 && message.completion !== null; // the first delta came before this page
        this.#add(message.completion);
        break;
      case "queued":
      case "in_progress":
        if (message.type === "queued") this.createdAt = message.created_at;
        this.#become(message.type);
        break;
      case "retrying":
        this.#notice(
          `The gateway refused (${message.reason}); it is asked again in ${seconds(message.delay_s)}.`,
          "wait",
        );
        break;
      case "restarted":
        this.#clear();
        this.#notice(`Its worker was lost: a new attempt begins (${message.reason}).`, "wait");
        break;
      case "delta":
        if (!this.deltas && $("notice").dataset.kind === "wait") this.#notice(""); // a refusal stays
        this.deltas += 1;
        this.first ??= message.created_at;
        this.#add(message.chunk);
        break;
      default:
        if (number && TERMINAL.has(message?.type)) this.#finish(message);
    }
    if (message?.created_at) this.last = message.created_at;
    this.#later();
  }

  #finish(event) {
    this.end = event;
    const [title, text] = ending(event);
    this.#become(event.type);
    this.#notice(event.type === "completed" ? "" : `${title}: ${text}${/[.!?]$/.test(text) ? "" : "."}`, event.type);
    this.say(`${title}: ${text}`);
  }

  #become(status) {
    if (status !== this.status && !TERMINAL.has(status) && status) this.say(`The job is ${statusWord(status)}`);
    this.status = status;
    const isRunning = this.isRunning && status !== null;
    $("status").hidden = status === null;
    $("status").dataset.kind = status ?? "";
    $("status").firstElementChild.textContent = statusWord(status) ?? "";
    $("stop").hidden = $("hint").hidden = !isRunning;
    $("text").classList.toggle("running", isRunning);
    document.title = status ? `${statusWord(status)} · deltawire console` : "deltawire console";
    this.onChange(this);
    this.#later();
  }

  #notice(text, kind = "wait") {
    $("notice").hidden = !text;
    $("notice").textContent = text;
    $("notice").dataset.kind = kind;
  }

  #clear() {
    this.parts = new Map();
    $("text").replaceChildren();
  }

  /** A chunk, or the completion of a snapshot. */
  #add(object) {
    for (const [place, choice] of objects(object?.choices).entries()) {
      const index = choice.index ?? place;
      for (const [what, text] of pieces(choice)) {
        if (typeof text !== "string" || !text) continue;
        const label = [index ? `Choice ${index + 1}` : "", what].filter(Boolean).join(" · ");
        this.#part(label, what).pending += text;
      }
    }
  }

  #part(label, what) {
    let part = this.parts.get(label);
    if (!part) {
      const box = document.createElement("div");
      box.className = what ? "aside" : "said";
      box.dir = "auto";
      if (label) box.append(Object.assign(document.createElement("h3"), { textContent: label }));
      part = { node: box.appendChild(document.createTextNode("")), pending: "" };
      this.parts.set(label, part);
      $("text").append(box);
    }
    return part;
  }

  #keep(raw, type, number) {
    const now = performance.now();
    if (raw.length > KEPT_CHARACTERS)
      raw = `${raw.slice(0, KEPT_CHARACTERS)} … and ${raw.length - KEPT_CHARACTERS} more characters`;
    this.frames.push({ raw, type, number, afterMs: this.heardAt ? now - this.heardAt : 0 });
    this.heardAt = now;
    this.unshown = Math.min(this.unshown + 1, KEPT_FRAMES);
    if (this.frames.length > KEPT_FRAMES)
      this.dropped += this.frames.splice(0, this.frames.length - KEPT_FRAMES).length;
  }

  /** Shows what has come, once a frame of the screen; a page that nobody sees has none. */
  #later() {
    if (this.#flushing) return;
    this.#flushing = true;
    requestAnimationFrame(() => {
      this.#flushing = false;
      following($("text"), () => this.#showText());
      if (!$("wire-view").hidden) following($("wire"), () => this.#showWire());
      this.#showFacts();
    });
  }

  #showText() {
    for (const part of this.parts.values()) {
      for (let rest = part.pending; rest;) {
        const end = rest.indexOf("\n", Math.max(0, STRETCH - part.node.length)) + 1 || rest.length;
        part.node.appendData(rest.slice(0, end));
        rest = rest.slice(end);
        if (part.node.length >= STRETCH && part.node.data.endsWith("\n")) close(part);
      }
      part.pending = "";
    }
  }

  #showWire() {
    if (this.unshown) $("wire").append(...this.frames.slice(-this.unshown).map(frameRow));
    this.unshown = 0;
    while ($("wire").childElementCount > KEPT_FRAMES) $("wire").firstElementChild.remove();
    $("wire-note").textContent = this.dropped ? `${this.dropped} older frames are not shown.` : "";
  }

  #showFacts() {
    const { end, first, last, createdAt, deltas, isLate } = this;
    const firstSeconds = !isLate && first && createdAt && first - createdAt;
    const live = deltas > 1 && last > first ? `${rate((deltas - 1) / (last - first))} deltas/s` : "–";
    const ended = end && speed(end);
    $("fact-first").textContent = seconds(end ? end.timings.first_delta_s : firstSeconds);
    $("fact-speed").textContent = ended ? `${rate(ended)} tokens/s` : live;
    const used = `${end?.usage?.completion_tokens ?? "–"}${end?.usage_source === "estimated" ? " (estimated)" : ""}`;
    $("fact-tokens").textContent = end ? used : deltas ? `${deltas} ${isLate ? "more " : ""}deltas` : "–";
    $("fact-time").textContent = seconds(end ? end.timings.total_s : last && createdAt && last - createdAt);
    $("fact-number").textContent = this.number || "–";
  }
}

/** Lines that are whole get a box of their own: all lines in a box are laid out anew with each word that comes. */
function close(part) {
  const open = document.createTextNode("");
  part.node.after(open);
  const lines = document.createElement("div");
  part.node.before(lines);
  lines.append(part.node);
  part.node = open;
}

/** Keeps the end in sight, unless somebody has scrolled up. */
function following(box, change) {
  const isAtEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  change();
  if (isAtEnd) box.scrollTop = box.scrollHeight;
}

function frameRow({ raw, type, number, afterMs }) {
  const row = document.createElement("div");
  row.className = "frame";
  row.dataset.kind = type;
  const cell = (name, text) => Object.assign(document.createElement("span"), { className: name, textContent: text });
  const [before, said = "", after = ""] = raw.split(/("content":"(?:[^"\\]|\\.)+")/, 3);
  const text = cell("raw", before);
  text.append(cell("hit", said), after + raw.slice(before.length + said.length + after.length));
  row.append(cell("number", number || "·"), cell("after", `+${Math.round(afterMs)} ms`), text);
  return row;
}
