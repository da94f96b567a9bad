// Numbers and moments for people.

/** 0.0123 → "12 ms". */
export function seconds(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  if (value < 0.00995) return `${(value * 1000).toFixed(1)} ms`;
  if (value < 0.9995) return `${Math.round(value * 1000)} ms`;
  return value < 99.95 ? `${value.toFixed(1)} s` : `${Math.round(value)} s`;
}

export function rate(value) {
  if (value == null || !Number.isFinite(value)) return "–";
  return value < 9.95 ? value.toFixed(1) : String(Math.round(value));
}

export function age(value) {
  for (const [unit, size] of [
    ["d", 86_400],
    ["h", 3_600],
    ["m", 60],
  ]) {
    if (value >= 2 * size) return `${Math.floor(value / size)} ${unit}`;
  }
  return `${Math.max(0, Math.floor(value))} s`;
}

export function median(values) {
  const sorted = values.toSorted((a, b) => a - b);
  const middle = sorted.length >> 1;
  return sorted.length % 2 ? sorted[middle] : (sorted[middle - 1] + sorted[middle]) / 2;
}

/** Tokens per second of a job that has ended, or null. */
export function speed({ usage, timings }) {
  const streamed = timings?.total_s - timings?.first_delta_s;
  return usage?.completion_tokens && timings.first_delta_s != null && streamed > 0
    ? usage.completion_tokens / streamed
    : null;
}
