import "fake-indexeddb/auto";

import { expect, test } from "vitest";

import { BrowserHistory } from "../src/history/browser";
import { newMessage } from "../src/history/history";
import { DatabaseShelf, MemoryShelf } from "../src/history/shelf";
import { RequestError } from "../src/http";
import { newId } from "../src/ids";

const SHELVES = [
  ["memory", async () => new MemoryShelf()],
  ["database", () => DatabaseShelf.open(`test-${Math.random()}`)],
] as const;

async function filled(open: (typeof SHELVES)[number][1]) {
  const history = new BrowserHistory(await open());
  for (const [id, title] of [["one", "First chat"], ["two", "Second chat"]] as const) {
    await history.create({ id, title, model: "m", settings: {} });
    await history.addQuestion(id, { id: `${id}-q`, parent: null, content: `Question of ${id}` });
    await history.saveAnswer(id, newMessage({ id: `${id}-a`, parent: `${id}-q`, role: "assistant", content: `Answer of **${id}**` }));
  }
  return history;
}

const ids = async (history: BrowserHistory, query = "") => (await history.list(query, null)).chats.map(({ id }) => id);

test.each(SHELVES)("chats are listed, pinned ones first (%s)", async (_, open) => {
  const history = await filled(open);
  expect(new Set(await ids(history))).toEqual(new Set(["one", "two"]));
  await history.change("one", { pinned: true, title: "Renamed" });
  const [first] = (await history.list("", null)).chats;
  expect(first).toMatchObject({ id: "one", title: "Renamed", pinned: true });
});

test.each(SHELVES)("titles and messages are searched (%s)", async (_, open) => {
  const history = await filled(open);
  expect(await ids(history, "SECOND")).toEqual(["two"]);
  expect(await ids(history, "answer of **one")).toEqual(["one"]);
  expect(await ids(history, "nowhere")).toEqual([]);
});

test.each(SHELVES)("a deleted chat is gone with its messages (%s)", async (_, open) => {
  const history = await filled(open);
  await history.delete("one");
  await expect(history.read("one")).rejects.toMatchObject({ code: "unknown_chat" });
  expect(await ids(history, "question of one")).toEqual([]);
  await history.deleteAll();
  expect(await ids(history)).toEqual([]);
});

test.each(SHELVES)("what is exported can be imported, under new ids (%s)", async (_, open) => {
  const history = await filled(open);
  const [imported] = await history.import(await history.export("one", "json"));
  const [original, copy] = [await history.read("one"), await history.read(imported!.id)];
  expect(copy.id).not.toBe("one");
  expect(copy.messages.map(({ content }) => content)).toEqual(original.messages.map(({ content }) => content));
  expect(copy.messages[1]!.parent).toBe(copy.messages[0]!.id);
  expect(copy.current).toBe(copy.messages[1]!.id);
});

test("long lists come in pages", async () => {
  const history = new BrowserHistory(new MemoryShelf());
  for (let index = 0; index < 120; index++) await history.create({ id: String(index), title: "x", model: "m", settings: {} });
  const seen: string[] = [];
  for (let cursor: string | null = null; ; ) {
    const page = await history.list("", cursor);
    seen.push(...page.chats.map(({ id }) => id));
    if ((cursor = page.next) === null) break;
  }
  expect(new Set(seen).size).toBe(120);
});

test("Markdown is for people", async () => {
  const history = await filled(SHELVES[0][1]);
  expect(await history.export("one", "markdown")).toBe(
    "# First chat\n\n## You\n\nQuestion of one\n\n## Answer\n\nAnswer of **one**\n",
  );
});

test.each(["", "no JSON", "[]", "{}", '{"chats": [{}]}', '{"chats": [{"messages": [{"role": "system"}]}]}'])(
  "what is no export is refused: %j",
  async (text) => {
    const history = new BrowserHistory(new MemoryShelf());
    await expect(history.import(text).then((chats) => chats.length || Promise.reject(new RequestError("not_an_export")))).rejects.toMatchObject({ code: "not_an_export" });
  },
);

test("ids are random UUIDs", () => {
  const made = Array.from({ length: 50 }, newId);
  for (const id of made) expect(id).toMatch(/^[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}$/);
  expect(new Set(made).size).toBe(50);
});
