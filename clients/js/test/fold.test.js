import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { Fold } from "../src/fold.js";
import { textOf } from "../src/index.js";

/** Streams, and what the server's own fold says of each of their beginnings (see tests/e2e/test_javascript.py). */
const SERVERS = process.env.DELTAWIRE_FOLDS && JSON.parse(readFileSync(process.env.DELTAWIRE_FOLDS, "utf8"));

const chunk = (delta, more) => ({ id: "c", created: 1, model: "m", choices: [{ index: 0, delta, ...more }] });

function fold(...chunks) {
  const result = new Fold();
  for (const each of chunks) result.add(each);
  return result;
}

test("texts are joined into a completion", () => {
  const said = fold(chunk({ role: "assistant", content: "" }), chunk({ content: "Hel" }), chunk({ content: "lo" }));
  said.add(chunk({}, { finish_reason: "stop" }));
  expect(said.completion()).toEqual({
    id: "c",
    object: "chat.completion",
    created: 1,
    model: "m",
    choices: [{ index: 0, message: { role: "assistant", content: "Hello" }, logprobs: null, finish_reason: "stop" }],
    usage: null,
  });
  expect(textOf(said.completion())).toBe("Hello");
});

test("nothing folds to nothing", () => {
  expect(new Fold().completion()).toBe(null);
  expect(textOf(null)).toBe("");
});

test.each([5, true, { text: "a" }, [5, null, { type: "text", text: 5 }]])(
  "content that is none, %j, is no text",
  (content) => {
    expect(textOf(fold(chunk({ content })).completion())).toBe("");
  },
);

test("what was shown does not change", () => {
  const piece = chunk({ content: [{ type: "text", text: "a" }] }, { logprobs: { content: [1] } });
  const growing = fold(structuredClone(piece));
  const shown = growing.completion();
  const before = structuredClone(shown);
  growing.add(structuredClone(piece));
  expect(shown).toEqual(before);
});

test("a chunk cannot reach what all objects share", () => {
  const evil = JSON.parse(
    '{"__proto__":{"isEvil":1},"choices":[{"delta":{"__proto__":{"isEvil":1},"constructor":{"a":"b"}}}]}',
  );
  const said = fold(evil, evil);
  expect({}.isEvil).toBe(undefined);
  expect(Object.a).toBe(undefined);
  expect(said.completion().choices[0].message.isEvil).toBe(undefined);
});

describe.skipIf(!SERVERS)("as the server's own", () => {
  test("after every chunk of every stream", () => {
    for (const { chunks, completions } of [...SERVERS.streams, ...SERVERS.odd]) {
      const growing = new Fold();
      chunks.forEach((each, at) => {
        growing.add(each);
        expect(growing.completion(), JSON.stringify(chunks)).toStrictEqual(completions[at]);
      });
    }
  });

  test("wherever a snapshot was taken", () => {
    for (const { chunks, completions } of SERVERS.streams) {
      for (let at = 1; at < chunks.length; at += 1) {
        const growing = Fold.from(structuredClone(completions[at - 1]));
        for (const each of chunks.slice(at)) growing.add(each);
        expect(growing.completion(), `${at} ${JSON.stringify(chunks)}`).toStrictEqual(completions.at(-1));
      }
    }
  });
});
