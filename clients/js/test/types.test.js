/** What a program in TypeScript sees of the package, as it is published. */

import { execFile } from "node:child_process";
import { cp, mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import { expect, test } from "vitest";

const ROOT = fileURLToPath(new URL("..", import.meta.url));

const RIGHT = `
import { Client, JobFailedError, type JobEvent, type Result, type ClientOptions, textOf } from "deltawire";
const options: ClientOptions = { baseUrl: "http://relay", getToken: async ({ jobId }) => jobId ?? "" };
declare const WebSocket: new (address: string, protocols?: string[]) => { send(data: string): void; close(): void };
const client = new Client({ ...options, WebSocket });
export async function read(id: string): Promise<Result> {
  const stream = client.stream(id, { mode: "snapshot" });
  for await (const event of stream) {
    const seen: JobEvent = event;
    if (seen.type === "delta") console.log(seen.chunk, seen.sequence_number);
    if (seen.type === "failed") console.log(seen.error?.code);
  }
  const text: string = textOf(stream.completion);
  try {
    return await client.result(id);
  } catch (error) {
    if (error instanceof JobFailedError) return error.result;
    throw new Error(text);
  }
}
`;

const tsc = (directory, ...how) =>
  new Promise((resolve) => {
    const program = join(ROOT, "node_modules", "typescript", "bin", "tsc");
    execFile(process.execPath, [program, ...how], { cwd: directory }, (_, stdout) => resolve(stdout));
  });

test("the sources and the example agree with their types", async () => expect(await tsc(ROOT)).toBe(""));

test("its types are strict ones", async () => {
  const directory = await mkdtemp(join(tmpdir(), "deltawire-types-"));
  const installed = join(directory, "node_modules", "deltawire");
  await mkdir(installed, { recursive: true });
  for (const name of ["package.json", "src"]) await cp(join(ROOT, name), join(installed, name), { recursive: true });
  expect(await tsc(ROOT, "-p", "tsconfig.build.json", "--outDir", join(installed, "types"))).toBe("");
  await rm(join(installed, "src"), { recursive: true });
  await writeFile(join(directory, "right.ts"), RIGHT);
  await writeFile(join(directory, "wrong.ts"), RIGHT.replace('"snapshot"', '"snap"'));
  const strictly = [
    "--strict",
    "--noEmit",
    "--module",
    "nodenext",
    "--target",
    "es2022",
    "--lib",
    "es2023,dom",
    "--types",
    "",
  ];
  expect(await tsc(directory, ...strictly, "right.ts", "wrong.ts")).toMatch(/^wrong\.ts\(\d+,\d+\): error TS2322.*\n$/);
  await rm(directory, { recursive: true });
});
