// Jobs and processes, as tables that change in place: a row keeps its focus while others come and go.
import { age, rate, seconds, speed } from "./format.js";
import { statusWord } from "./job.js";

/** Asks now and again: never twice at a time, and not while nobody sees the page. */
export function poll(everyMs, look) {
  let timer = 0;
  let isLooking = false;
  const run = async () => {
    clearTimeout(timer);
    if (document.hidden || isLooking) return;
    isLooking = true;
    await look();
    isLooking = false;
    timer = setTimeout(run, everyMs);
  };
  document.addEventListener("visibilitychange", run);
  run();
  return run;
}

/** Rows are {id, cells}, a cell is a text or {text, kind, href, title}; the first one names its row. */
function fill(body, rows) {
  const old = new Map([...body.rows].map((row) => [row.dataset.id, row]));
  for (const [place, { id, cells, isCurrent = false }] of rows.entries()) {
    const row = old.get(id) ?? newRow(body, id, cells);
    old.delete(id);
    for (const [column, cell] of cells.entries()) {
      const { text = cell, kind, href, title } = Object(cell);
      const inner = row.cells[column].firstElementChild ?? row.cells[column];
      if (inner.textContent !== String(text)) inner.textContent = text;
      if (kind) inner.dataset.kind = kind;
      if (title) inner.title = title;
      if (href) inner.href = href;
      if (href) inner.toggleAttribute("aria-current", isCurrent);
    }
    if (body.rows[place] !== row) body.insertBefore(row, body.rows[place] ?? null);
  }
  for (const row of old.values()) row.remove();
}

function newRow(body, id, cells) {
  const row = document.createElement("tr");
  row.dataset.id = id;
  const heads = body.closest("table").tHead.rows[0].cells;
  for (const [column, cell] of cells.entries()) {
    const box = document.createElement(column ? "td" : "th");
    if (!column) box.scope = "row";
    box.className = heads[column].className;
    if (cell?.href) box.append(document.createElement("a"));
    else if (cell?.kind) box.append(Object.assign(document.createElement("span"), { className: "mark" }));
    row.append(box);
  }
  return row;
}

export function showJobs(body, jobs, current) {
  const row = (job) => {
    const name = {
      text: job.id.length > 14 ? `${job.id.slice(0, 12)}…` : job.id,
      href: `?job=${encodeURIComponent(job.id)}`,
      title: job.id,
    };
    const status = { text: statusWord(job.status), kind: job.status };
    const cells = [
      name,
      status,
      seconds(job.timings?.first_delta_s),
      rate(speed(job)),
      age(Date.now() / 1000 - job.created_at),
    ];
    return { id: job.id, isCurrent: job.id === current, cells };
  };
  fill(body, jobs.map(row));
}

/** Rates are told by two looks: what a process says now, and what it said `before`. */
export function change({ at, counts }, before, name) {
  const past = before?.counts[name];
  return past === undefined || at <= before.at ? null : Math.max(0, counts[name] - past) / (at - before.at);
}

function showProcesses(body, processes, figures) {
  const row = (each) => {
    const where = `${each.host}:${each.pid}`;
    const late = seconds(Math.max(0, each.counts.loop_late_s ?? 0));
    return {
      id: each.name,
      cells: [{ text: where, title: where }, ...figures(each), late, age(each.at - each.started_at), each.version],
    };
  };
  fill(body, processes.map(row));
}

export function showWorkers(body, workers, before) {
  showProcesses(body, workers, (each) => {
    const { running = 0, places = "–", parked = 0 } = each.counts;
    const perSecond = (name) => rate(change(each, before.get(each.name), name));
    return [`${running} of ${places}`, parked, perSecond("events_total"), perSecond("ended_total")];
  });
}

export function showRelays(body, relays, before) {
  showProcesses(body, relays, (each) => [
    each.counts.jobs ?? 0,
    each.counts.readers ?? 0,
    seconds(delay([each], before)),
  ]);
}

/** The mean from publishing to writing since the look before, of all these relays; null where there was none. */
export function delay(relays, before) {
  const sum = (name) => relays.reduce((total, each) => total + (change(each, before.get(each.name), name) ?? 0), 0);
  const count = sum("delays_total");
  return count ? sum("delays_s_total") / count : null;
}
