// Two small plots in SVG. The number beside them, and the tables, say the same in words.

const HEIGHT = 104;
const TOP = 16;

function shape(parent, name, attributes, text = "") {
  const node = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  node.textContent = text;
  return parent.appendChild(node);
}

/** The next of 1, 2, 5, 10 … */
function ceiling(value) {
  const size = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * size).find((step) => step >= value * 0.999);
}

/** An empty plot, and where a value stands in it. */
function frame(figure, values, format) {
  const svg = figure.querySelector("svg");
  const width = svg.clientWidth || 300;
  const top = ceiling(Math.max(...values, 1e-6));
  const y = (value) => HEIGHT - ((HEIGHT - TOP) * value) / top;
  svg.setAttribute("viewBox", `0 0 ${width} ${HEIGHT + 1}`);
  svg.replaceChildren();
  for (const value of values.length ? [top, top / 2, 0] : [0]) {
    shape(svg, "line", { x1: 0, x2: width, y1: y(value), y2: y(value), class: "grid" });
    if (value) shape(svg, "text", { x: 0, y: y(value) - 4 }, format(value));
  }
  return { svg, width, y };
}

function title(figure, number, words) {
  figure.querySelector("strong").textContent = number;
  figure.querySelector("svg").setAttribute("aria-label", words);
}

/** A bar for each point {value, label, kind}, the last one at the right. */
export function bars(figure, points, format, headline) {
  const values = points.map((point) => point.value);
  const { svg, width, y } = frame(figure, values, format);
  const step = Math.min(22, width / Math.max(points.length, 1));
  for (const [place, { value, label, kind }] of points.entries()) {
    const x = width - (points.length - place) * step;
    const height = Math.max(2, HEIGHT - y(value));
    const bar = shape(svg, "rect", { x, y: HEIGHT - height, width: step - 3, height, rx: 2, "data-kind": kind });
    shape(bar, "title", {}, `${label}: ${format(value)}`);
  }
  const range = points.length ? `, from ${format(Math.min(...values))} to ${format(Math.max(...values))}` : "";
  title(figure, headline, `${points.length} jobs${range}; median ${headline}`);
}

/** A line through values (null: nothing to tell), the last one at the right; `room` is how many there may be. */
export function line(figure, values, format, headline, room) {
  const known = values.filter((value) => value !== null);
  const { svg, width, y } = frame(figure, known, format);
  const x = (place) => width - 3 - ((values.length - 1 - place) * (width - 6)) / (room - 1);
  let path = "";
  for (const [place, value] of values.entries()) {
    if (value === null) continue;
    path += `${path ? "L" : "M"}${x(place).toFixed(1)} ${y(value).toFixed(1)}`;
  }
  if (known.length > 1) shape(svg, "path", { d: path, class: "line" });
  const last = values.findLastIndex((value) => value !== null);
  if (last >= 0) shape(svg, "circle", { cx: x(last), cy: y(values[last]), r: 3 });
  title(figure, headline, known.length ? `the last ${known.length} looks; now ${headline}` : "nothing was written yet");
}
