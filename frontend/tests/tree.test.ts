import { expect, test } from "vitest";

import type { Message } from "../src/contract";
import { newMessage } from "../src/history/history";
import { promptOf, Tree } from "../src/state/tree";

let clock = 0;
const message = (id: string, parent: string | null, more: Partial<Message> = {}) =>
  newMessage({ id, parent, role: id.startsWith("q") ? "user" : "assistant", content: `text of ${id}`, created_at: ++clock, ...more });

const MESSAGES = [message("q1", null), message("a1", "q1"), message("a1b", "q1"), message("q2", "a1"), message("a2", "q2"), message("q2b", "a1")];
const tree = new Tree(MESSAGES);
const ids = (messages: Message[]) => messages.map(({ id }) => id);

test("a branch goes from the root to its leaf", () => {
  expect(ids(tree.branch("a2"))).toEqual(["q1", "a1", "q2", "a2"]);
  expect(ids(tree.branch("a1b"))).toEqual(["q1", "a1b"]);
});

test("without a leaf, the newest branch is shown", () => {
  expect(ids(tree.branch(null))).toEqual(["q1", "a1b"]);
  expect(ids(tree.branch("gone"))).toEqual(["q1", "a1b"]);
  expect(new Tree().branch(null)).toEqual([]);
});

test("versions are those with the same parent, oldest first", () => {
  expect(ids(tree.versions("a1"))).toEqual(["a1", "a1b"]);
  expect(ids(tree.versions("q2b"))).toEqual(["q2", "q2b"]);
  expect(tree.versions("gone")).toEqual([]);
});

test("an answer that failed without a word is no version", () => {
  const grown = tree.with(message("a1c", "q1", { content: "", state: "failed", error: "worker_lost" }));
  expect(ids(grown.versions("a1"))).toEqual(["a1", "a1b"]);
  expect(ids(grown.versions("a1c"))).toEqual(["a1", "a1b", "a1c"]);
});

test("a version is shown to the end of its newest branch", () => {
  expect(tree.leafUnder("a1")).toBe("q2b");
  expect(tree.leafUnder("q2")).toBe("a2");
  expect(tree.leafUnder("a1b")).toBe("a1b");
});

test("a changed tree leaves the old one as it was", () => {
  const changed = tree.with({ ...MESSAGES[1]!, content: "other" });
  expect(changed.get("a1")?.content).toBe("other");
  expect(tree.get("a1")?.content).toBe("text of a1");
});

test("circles and lost parents harm nobody", () => {
  const broken = new Tree([message("q1", "a1"), message("a1", "q1"), message("q9", "gone")]);
  expect(ids(broken.branch("a1"))).toEqual(["q1", "a1"]);
  expect(ids(broken.branch("q9"))).toEqual(["q9"]);
  expect(broken.leafUnder("q1")).toBe("q1");
});

test("the model is told the branch, with the system prompt first", () => {
  expect(promptOf(tree.branch("q2"), "Be brief.")).toEqual([
    { role: "system", content: "Be brief." },
    { role: "user", content: "text of q1" },
    { role: "assistant", content: "text of a1" },
    { role: "user", content: "text of q2" },
  ]);
});

test("a question that got no answer is not told, unless it is the last", () => {
  const branch = [message("q1", null), message("a1", "q1", { content: "" }), message("q2", "a1")];
  expect(promptOf(branch, null)).toEqual([{ role: "user", content: "text of q2" }]);
  expect(promptOf(branch.slice(0, 2), "")).toEqual([{ role: "user", content: "text of q1" }]);
});

test("the oldest turns can be left out, but not the last", () => {
  const branch = tree.branch("q2");
  expect(promptOf(branch, null, 1)).toEqual([{ role: "user", content: "text of q2" }]);
  expect(promptOf(branch, null, 9)).toEqual([{ role: "user", content: "text of q2" }]);
});
