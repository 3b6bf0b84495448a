import { afterEach, beforeEach, expect, test, vi } from "vitest";

import { backOff, Pauses } from "../src/retries";

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

test.each([
  [1, 0.25, 0.5],
  [2, 0.5, 1],
  [3, 1, 2],
  [4, 2, 4],
  [5, 2.5, 5],
  [1000, 2.5, 5],
])("after %d failures in a row, the next attempt comes after %d to %d seconds", (failures, least, most) => {
  for (let draw = 0; draw < 100; draw++) {
    const seconds = backOff(failures);
    expect(seconds).toBeGreaterThanOrEqual(least);
    expect(seconds).toBeLessThanOrEqual(most);
  }
});

test("a pause ends by itself, or is cut short with those that wait too", async () => {
  const pauses = new Pauses();
  const ended: string[] = [];
  for (const [name, seconds] of [["short", 1], ["long", 60], ["longer", 90]] as const) {
    void pauses.wait(seconds).then(() => ended.push(name));
  }
  await vi.advanceTimersByTimeAsync(2000);
  expect(ended).toEqual(["short"]);
  pauses.end();
  await vi.advanceTimersByTimeAsync(0);
  expect(ended).toEqual(["short", "long", "longer"]);
  expect(vi.getTimerCount()).toBe(0);
});
