import { defineConfig } from "vitest/config";

export default defineConfig({
  test: {
    include: ["test/*.test.js"],
    testTimeout: 40_000,
    hookTimeout: 60_000,
    maxWorkers: 3, // they wait most of the time
  },
});
