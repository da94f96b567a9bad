/**
 * The fold: chunks added up into the `chat.completion` that the non-streaming call would have returned.
 *
 * The same rules as in core/deltawire/fold.py, which says why each is there; a test compares the two on recorded
 * and on odd streams. Odd shapes are skipped, never thrown.
 */

/** @typedef {{ [key: string]: any }} Json */

const SET_ONCE = new Set(["id", "type", "role", "index", "format"]);
const PADDING = new Set(["obfuscation", "p"]);
const FIRST_STAYS = new Set(["id", "created", "model"]);
const GROWING_PARTS = new Set(["text", "thinking"]);
const MAX_INDEX = 4095;

export class Fold {
  /** @type {Json} */ #top = {};
  /** @type {Map<number, Json>} */ #choices = new Map();
  /** @type {Json | null} */ #usage = null;
  /** @type {Json | null} What a snapshot said was used, wherever it had that from. */ #usageBefore = null;

  /**
   * A fold that goes on after a snapshot.
   * @param {Json | null} completion
   */
  static from(completion) {
    const fold = new Fold();
    if (completion) {
      const { choices, usage, object, ...top } = completion;
      fold.#top = top;
      fold.#usageBefore = usage;
      for (const choice of choices) {
        fold.#choices.set(choice.index, { ...fixed(choice), message: growing(choice.message) });
      }
    }
    return fold;
  }

  /** @param {Json} chunk */
  add(chunk) {
    for (const [key, value] of entriesOf(chunk)) {
      if (key === "choices") {
        for (const choice of Array.isArray(value) ? value : []) if (isObject(choice)) this.#addChoice(choice);
      } else if (key === "usage") {
        if (isObject(value) && Object.keys(value).length) this.#usage = value;
      } else if (FIRST_STAYS.has(key)) {
        if (value && !this.#top[key]) this.#top[key] = value;
      } else if (!PADDING.has(key) && (value !== null || !(key in this.#top))) {
        this.#top[key] = value;
      }
    }
  }

  /** @param {Json} choice */
  #addChoice(choice) {
    const index = Number.isInteger(choice.index) && choice.index >= 0 && choice.index <= MAX_INDEX ? choice.index : 0;
    const known = this.#choices.get(index) ?? { index, message: {}, logprobs: null, finish_reason: null };
    this.#choices.set(index, known);
    for (const [key, value] of entriesOf(choice)) {
      if (key === "delta") {
        if (isObject(value)) merge(known.message, value);
      } else if (key === "logprobs") {
        if (isObject(value)) {
          known.logprobs ??= {};
          for (const [name, entries] of entriesOf(value)) extend(known.logprobs, name, entries);
        }
      } else if (key === "finish_reason") {
        if (value !== null && value !== "") known.finish_reason = value;
      } else if (key !== "index" && key !== "message") {
        extend(known, key, value);
      }
    }
  }

  /** @returns {Json | null} */
  #used() {
    const places = [this.#top.x_groq, ...this.#choices.values()];
    const elsewhere = places.find((place) => isObject(place?.usage) && Object.keys(place.usage).length);
    return this.#usage ?? elsewhere?.usage ?? this.#usageBefore;
  }

  /**
   * The completion so far (open choices: `finish_reason: null`), nothing of which grows; null if there was no chunk.
   * @returns {Json | null}
   */
  completion() {
    if (!this.#usage && !this.#choices.size && !Object.keys(this.#top).length) return null;
    const { id = "", object, created = 0, model = "", ...top } = this.#top;
    const choices = [...this.#choices.values()].sort((one, other) => one.index - other.index).map(finished);
    return { id, object: "chat.completion", created, model, ...top, choices, usage: this.#used() };
  }
}

/** A list whose entries come in pieces, each found again by its index, and by what marks it. */
class Entries {
  mark = "type";
  /** @type {any[]} */ items = [];
  /** @type {Map<number | string, number>} By index, by `=MARK`, by `INDEX=MARK`. */ places = new Map();

  /** @param {any[]} items */
  constructor(items = []) {
    this.items = items;
  }

  /** @param {number} place */
  note(place) {
    const { index, [this.mark]: mark } = this.items[place];
    const last = (/** @type {number | string} */ key) => Math.max(place, this.places.get(key) ?? 0);
    if (Number.isInteger(index)) {
      this.places.set(index, last(index));
      if (said(mark)) this.places.set(`${index}=${mark}`, place);
    }
    if (said(mark)) this.places.set(`=${mark}`, last(`=${mark}`));
  }

  /** @param {any[]} items */
  merge(items) {
    const { places } = this;
    for (const item of items) {
      if (isObject(item) && Number.isInteger(item.index)) {
        const mark = said(item.type);
        let place = places.get(mark ? `${item.index}=${mark}` : item.index);
        if (place === undefined) {
          place = places.get(item.index);
          if (place !== undefined && said(this.items[place].type)) place = undefined; // numbered by type
        }
        this.mergeAt(place, item);
      } else if (isObject(item) && GROWING_PARTS.has(item.type)) {
        const goesOn = this.items.at(-1)?.type === item.type;
        this.mergeAt(goesOn ? this.items.length - 1 : undefined, item);
      } else {
        this.items.push(item);
      }
    }
  }

  /** @param {number | undefined} place @param {Json} item */
  mergeAt(place, item) {
    const isNew = place === undefined;
    const at = place ?? this.items.push({}) - 1;
    merge(this.items[at], item);
    if (isNew || item[this.mark]) this.note(at);
  }
}

/** As above; but gateways number tool calls in ways of their own, or not at all. */
class ToolCalls extends Entries {
  mark = "id";
  /** How many of them a snapshot had, which shows no indexes. */ restored = 0;

  /** @param {any[]} items */
  merge(items) {
    const { places } = this;
    for (const item of items) {
      if (!isObject(item)) {
        this.items.push(item);
        continue;
      }
      const { index } = item;
      const hasIndex = Number.isInteger(index);
      const id = said(item.id);
      let place = id ? places.get(hasIndex && !this.restored ? `${index}=${id}` : `=${id}`) : undefined;
      if (place === undefined) {
        const last = isObject(this.items.at(-1)) ? this.items.length - 1 : undefined;
        place = hasIndex ? places.get(index) : last;
        // After a snapshot the place stands for the index; where a gateway counts otherwise, calls come one by one.
        if (place === undefined && this.restored)
          place = index < this.restored ? index : nameIn(item) ? undefined : last;
        if (place !== undefined && isAnother(this.items[place], item, id, hasIndex)) place = undefined;
      }
      this.mergeAt(place, item);
    }
  }
}

/** @param {Json} item */
function nameIn(item) {
  const called = item.function || item.custom;
  return isObject(called) ? said(called.name) : "";
}

/**
 * Whether a piece that stands where `call` does, and has no id or another one, begins another call.
 * @param {Json} call @param {Json} item @param {string} id @param {boolean} hasIndex
 */
function isAnother(call, item, id, hasIndex) {
  const knownId = said(call.id);
  if (!nameIn(item)) return id !== "" && !hasIndex && knownId !== "";
  if (id && knownId) return true;
  const { arguments: begun } = item.function || item.custom;
  const begins = isObject(begun) || said(begun).startsWith("{");
  return begins && isObject(call.function) && isWhole(said(call.function.arguments));
}

/** @param {string} text */
function isWhole(text) {
  try {
    return text.endsWith("}") && Boolean(JSON.parse(text));
  } catch {
    return false;
  }
}

/** @param {Json} known @param {Json} delta */
function merge(known, delta) {
  for (const [key, value] of entriesOf(delta)) {
    const old = known[key];
    if (typeof value === "string") {
      known[key] = withText(key, old, value);
    } else if (value === null) {
      known[key] = old ?? null;
    } else if (isObject(value)) {
      if (isObject(old)) merge(old, value);
      else if (key === "arguments") known[key] = withText(key, old, JSON.stringify(value));
      else if (!SET_ONCE.has(key)) merge((known[key] = {}), value);
    } else if (Array.isArray(value)) {
      if (!(old instanceof Entries) && !SET_ONCE.has(key)) {
        const before = key === "content" && said(old) ? [{ type: "text", text: old }] : [];
        known[key] = entriesFor(key, before);
      }
      if (known[key] instanceof Entries) known[key].merge(value);
    } else if ((old ?? null) === null || !SET_ONCE.has(key) || old === "") {
      known[key] = value;
    }
  }
}

/**
 * What stands under `key` once a text has come.
 * @param {string} key @param {any} old @param {string} value
 */
function withText(key, old, value) {
  if (typeof old === "string") {
    if (SET_ONCE.has(key)) return old || value;
    return key === "name" && old === value ? old : old + value; // some repeat a tool's whole name
  }
  if (key === "content" && old instanceof Entries) {
    old.merge(value ? [{ type: "text", text: value }] : []);
    return old;
  }
  return (old ?? null) === null || !SET_ONCE.has(key) ? value : old;
}

/**
 * Lists go on where they ended; of anything else the last counts.
 * @param {Json} known @param {string} key @param {any} value
 */
function extend(known, key, value) {
  if (Array.isArray(value)) {
    if (Array.isArray(known[key])) for (const item of value) known[key].push(item);
    else known[key] = [...value];
  } else if (value !== null || !(key in known)) {
    known[key] = value;
  }
}

/** @param {Json} choice @returns {Json} */
function finished(choice) {
  const { usage, ...rest } = fixed(choice);
  const message = plain(choice.message);
  message.role ||= "assistant";
  message.content ??= null;
  if (isObject(message.function_call)) message.function_call.arguments ??= "";
  const calls = message.tool_calls;
  if (Array.isArray(calls) && calls.every(isObject)) {
    if (calls.every((call) => Number.isInteger(call.index))) calls.sort((one, other) => one.index - other.index);
    for (const call of calls) {
      delete call.index;
      if (isObject(call.function)) call.function.arguments ??= "";
    }
  }
  return { ...rest, message };
}

/** A choice without its message, copied as deep as `extend` changes it. @param {Json} choice @returns {Json} */
function fixed({ message, ...choice }) {
  const copy = (/** @type {any} */ value) => (Array.isArray(value) ? [...value] : value);
  for (const [key, value] of entriesOf(choice)) {
    choice[key] = isObject(value)
      ? Object.fromEntries(entriesOf(value).map(([name, item]) => [name, copy(item)]))
      : copy(value);
  }
  return choice;
}

/** @param {any} value @returns {any} */
function plain(value) {
  if (value instanceof Entries) return value.items.map(plain);
  if (Array.isArray(value)) return value.map(plain);
  return isObject(value) ? Object.fromEntries(entriesOf(value).map(([key, item]) => [key, plain(item)])) : value;
}

/** The inverse. @param {any} value @param {string} key @returns {any} */
function growing(value, key = "") {
  if (Array.isArray(value)) {
    const entries = entriesFor(
      key,
      value.map((item) => growing(item)),
    );
    entries.items.forEach((item, place) => isObject(item) && entries.note(place));
    if (entries instanceof ToolCalls) entries.restored = entries.items.length;
    return entries;
  }
  return isObject(value)
    ? Object.fromEntries(entriesOf(value).map(([name, item]) => [name, growing(item, name)]))
    : value;
}

/** @param {string} key @param {any[]} items */
function entriesFor(key, items) {
  return key === "tool_calls" ? new ToolCalls(items) : new Entries(items);
}

/** @param {any} value @returns {value is Json} */
function isObject(value) {
  return typeof value === "object" && value !== null && !Array.isArray(value) && !(value instanceof Entries);
}

/** @param {any} value @returns {string} */
function said(value) {
  return typeof value === "string" ? value : "";
}

/** Without the one key that would reach what all objects share. @param {Json} value @returns {[string, any][]} */
function entriesOf(value) {
  return Object.entries(value).filter(([key]) => key !== "__proto__");
}
