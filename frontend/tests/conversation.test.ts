import { afterEach, beforeEach, expect, test, vi } from "vitest";

import type { Message, Model, WholeChat } from "../src/contract";
import { BrowserHistory } from "../src/history/browser";
import type { History } from "../src/history/history";
import { MemoryShelf } from "../src/history/shelf";
import { RequestError } from "../src/http";
import { Conversation, titleOf } from "../src/state/conversation";
import type { Surroundings } from "../src/state/conversation";
import { FakeServer } from "./server";

const MODEL = {
  key: "m",
  name: "Model",
  chat: { generation: { do_sample: true, temperature: 0.6, top_k: 0, top_p: 0.9, repetition_penalty: 1 }, sample_questions: [] },
} as unknown as Model;
const PIECES = ["One", " two", " three", " four"];

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

const pass = (seconds = 0) => vi.advanceTimersByTimeAsync(seconds * 1000 + 20);

function surroundings(server: FakeServer, history: History = new BrowserHistory(new MemoryShelf())): Surroundings & { ended: Message[] } {
  const ended: Message[] = [];
  return {
    history,
    connect: server.connect,
    modelFor: () => MODEL,
    schedule: (callback) => void setTimeout(callback, 16),
    changed: () => undefined,
    answered: (message) => ended.push(message),
    ended,
  };
}

/** As the server's history: it knows what its answers came to, and nothing of what the page has. */
class HistoryOnServer extends BrowserHistory {
  override readonly isOnServer = true as unknown as false;
  override async saveAnswer(): Promise<void> {}
  keep(chat: string, message: Message): Promise<void> {
    return super.saveAnswer(chat, message);
  }
}

async function asked(text = "Hi", server = new FakeServer(PIECES), history?: History) {
  const around = surroundings(server, history);
  const conversation = Conversation.begin("m", {}, around);
  await conversation.send(text);
  await pass();
  return { server, around, conversation };
}

test("a question is kept, asked, and answered", async () => {
  const { server, around, conversation } = await asked();
  server.make();
  await pass();
  expect(conversation.live.value?.content).toBe("One");
  server.makeAll();
  await pass();
  expect(conversation.isAnswering).toBe(false);
  expect(conversation.branch.value.map(({ role, content, state }) => [role, content, state])).toEqual([
    ["user", "Hi", "complete"],
    ["assistant", "One two three four", "complete"],
  ]);
  expect(around.ended).toHaveLength(1);
  expect(server.received[0]).toMatchObject({ messages: [{ role: "user", content: "Hi" }], temperature: 0.6, model: "m" });
  const kept = await around.history.read(conversation.chat.value.id);
  expect(kept.title).toBe("Hi");
  expect(kept.messages).toEqual(conversation.branch.value);
});

test("many tokens in a frame change the page once", async () => {
  const { server, conversation } = await asked();
  let changes = 0;
  const unsubscribe = conversation.live.subscribe(() => void changes++);
  changes = 0;
  for (let step = 0; step < 3; step++) server.make();
  await pass();
  expect(changes).toBe(1);
  expect(conversation.live.value?.content).toBe("One two three");
  unsubscribe();
});

test("a connection that is lost right after a token is told as lost, with the token", async () => {
  const { server, conversation } = await asked();
  server.make();
  server.isUp = false;
  server.loseConnections();
  await vi.advanceTimersByTimeAsync(100);
  expect(conversation.live.value).toMatchObject({ content: "One", waitingFor: "connection_lost" });
});

test("the next question is told with what was said", async () => {
  const { server, conversation } = await asked();
  server.makeAll();
  await pass();
  await conversation.send("And?");
  await pass();
  expect(server.received.at(-1)?.["messages"]).toEqual([
    { role: "user", content: "Hi" },
    { role: "assistant", content: "One two three four" },
    { role: "user", content: "And?" },
  ]);
});

test("settings of the chat go over the model's, and the system prompt is told first", async () => {
  const server = new FakeServer(PIECES);
  const conversation = Conversation.begin("m", { temperature: 0.1, system: "Be brief.", max_new_tokens: 9 }, surroundings(server));
  await conversation.send("Hi");
  await pass();
  expect(server.received[0]).toMatchObject({ temperature: 0.1, top_p: 0.9, max_new_tokens: 9 });
  expect((server.received[0]?.["messages"] as unknown[])[0]).toEqual({ role: "system", content: "Be brief." });
  expect(server.received[0]).not.toHaveProperty("system");
});

test("regenerating keeps the old answer as a version", async () => {
  const { server, conversation } = await asked();
  server.makeAll();
  await pass();
  const first = conversation.branch.value[1]!;
  server.made = 0;
  server.pieces = [{ text: "Other", count: 1 }];
  conversation.regenerate(first.id);
  await pass();
  server.makeAll();
  await pass();
  const second = conversation.branch.value[1]!;
  expect(second.content).toBe("Other");
  expect(conversation.tree.value.versions(second.id).map(({ id }) => id)).toEqual([first.id, second.id]);
  await conversation.show(first.id);
  expect(conversation.branch.value[1]).toEqual(first);
});

test("editing a question makes a branch", async () => {
  const { server, conversation } = await asked();
  server.makeAll();
  await pass();
  const question = conversation.branch.value[0]!;
  await conversation.edit(question.id, "Hello");
  await pass();
  expect(server.received.at(-1)?.["messages"]).toEqual([{ role: "user", content: "Hello" }]);
  expect(conversation.tree.value.versions(question.id)).toHaveLength(2);
});

test("a stopped answer keeps what came, and can be continued", async () => {
  const { server, conversation } = await asked();
  server.make();
  await pass();
  conversation.stop();
  await pass();
  const stopped = conversation.branch.value[1]!;
  expect(stopped).toMatchObject({ content: "One", state: "stopped" });
  server.isStopped = false;
  server.made = 0;
  server.pieces = [{ text: " and more", count: 1 }];
  conversation.continue(stopped.id);
  await pass();
  server.makeAll();
  await pass();
  expect(server.received.at(-1)?.["messages"]).toEqual([
    { role: "user", content: "Hi" },
    { role: "assistant", content: "One" },
  ]);
  expect(conversation.branch.value[1]).toMatchObject({ id: stopped.id, content: "One and more", state: "complete" });
});

test("a failed answer says why, and keeps what came", async () => {
  const server = new FakeServer(PIECES);
  server.refusals.push("attention_cache_full");
  const { conversation } = await asked("Hi", server);
  expect(conversation.branch.value[1]).toMatchObject({ content: "", state: "failed", error: "attention_cache_full" });
});

test("a question that cannot be kept leaves everything as it was", async () => {
  const server = new FakeServer(PIECES);
  const history = new BrowserHistory(new MemoryShelf());
  vi.spyOn(history, "addQuestion").mockRejectedValueOnce(new RequestError("connection_lost"));
  const conversation = Conversation.begin("m", {}, surroundings(server, history));
  await expect(conversation.send("Hi")).rejects.toThrow("connection_lost");
  expect(conversation.branch.value).toEqual([]);
  expect(server.received).toEqual([]);
  await conversation.send("Hi");
  expect(conversation.branch.value).toHaveLength(2);
});

test.each([0, 1, 2, 3, 4])("a page that is opened again after %d tokens has each token once (browser's history)", async (made) => {
  const { server, around, conversation } = await asked();
  for (let step = 0; step < made; step++) {
    server.make();
    await pass(1.1); // kept each second
  }
  conversation.leave();
  const { id } = conversation.chat.value;
  const again = Conversation.resume(await around.history.read(id), around);
  await pass();
  server.makeAll();
  await pass();
  expect(again.branch.value[1]).toMatchObject({ content: PIECES.join(""), state: "complete" });
});

test.each([0, 1, 2, 3, 4])("a page that is opened again after %d tokens has each token once (server's history)", async (known) => {
  const history = new HistoryOnServer(new MemoryShelf());
  const { server, around, conversation } = await asked("Hi", new FakeServer(PIECES), history);
  const answer = conversation.branch.value[1]!;
  conversation.leave();
  server.made = 3;
  // What the server told of it when it was asked, which is older than what it has made.
  const position = Math.min(known, 3);
  await history.keep(conversation.chat.value.id, {
    ...answer,
    generation: "generation-1",
    content: PIECES.slice(0, position).join(""),
    position,
    tokens: position,
  });
  const again = Conversation.resume(await history.read(conversation.chat.value.id), around);
  await pass();
  server.makeAll();
  await pass();
  expect(again.branch.value[1]).toMatchObject({ content: PIECES.join(""), tokens: PIECES.length });
});

test("a continued answer that is opened again keeps its beginning", async () => {
  const history = new HistoryOnServer(new MemoryShelf());
  const { server, around, conversation } = await asked("Hi", new FakeServer(PIECES), history);
  const answer = conversation.branch.value[1]!;
  conversation.leave();
  server.made = 2;
  await history.keep(conversation.chat.value.id, { ...answer, generation: "generation-1", content: "One. One", position: 1, tokens: 3, seconds: 9 });
  const again = Conversation.resume(await history.read(conversation.chat.value.id), around);
  await pass();
  server.makeAll();
  await pass();
  expect(again.branch.value[1]).toMatchObject({ content: "One. One two three four", tokens: 6 });
  expect(again.branch.value[1]?.seconds).toBeGreaterThan(9);
});

test("an answer that the server has forgotten is read from its history", async () => {
  const history = new HistoryOnServer(new MemoryShelf());
  const { server, around, conversation } = await asked("Hi", new FakeServer(PIECES), history);
  const answer = { ...conversation.branch.value[1]!, generation: "generation-1" };
  conversation.leave();
  await history.keep(conversation.chat.value.id, answer);
  const found = (await history.read(conversation.chat.value.id)) as WholeChat;
  await history.keep(conversation.chat.value.id, { ...answer, state: "complete", generation: null, content: "All of it." });
  server.hasForgotten = true;
  const again = Conversation.resume(found, around);
  await pass(1);
  expect(again.branch.value[1]).toMatchObject({ content: "All of it.", state: "complete" });
});

test("an answer that nobody knows any more was interrupted", async () => {
  const { server, around, conversation } = await asked();
  server.make();
  await pass(1.1);
  server.make();
  await pass(1.1);
  conversation.leave();
  server.hasForgotten = true;
  const again = Conversation.resume(await around.history.read(conversation.chat.value.id), around);
  await pass(1);
  expect(again.branch.value[1]).toMatchObject({ state: "interrupted", content: "One two" });
});

test("a lost connection in mid-answer is made anew, and the answer goes on", async () => {
  const { server, conversation } = await asked();
  server.make();
  await pass();
  server.isUp = false;
  server.loseConnections();
  await pass(3);
  expect(conversation.live.value).toMatchObject({ content: "One", waitingFor: "connection_lost" });
  server.isUp = true;
  server.makeAll();
  await pass(5);
  expect(conversation.branch.value[1]).toMatchObject({ content: PIECES.join(""), state: "complete" });
});

test("an answer waits for a model that is being loaded", async () => {
  const server = new FakeServer(PIECES);
  server.isLoading = true;
  const { conversation } = await asked("Hi", server);
  expect(conversation.live.value).toMatchObject({ waitingFor: "model_loading", content: "" });
  server.isLoading = false;
  server.makeAll();
  await pass();
  expect(conversation.tree.value.messages).toHaveLength(2);
  expect(conversation.branch.value[1]).toMatchObject({ content: PIECES.join(""), state: "complete" });
});

test("what waits for a model can be stopped", async () => {
  const server = new FakeServer(PIECES);
  server.isLoading = true;
  const { conversation } = await asked("Hi", server);
  conversation.stop();
  await pass(1);
  expect(conversation.branch.value[1]).toMatchObject({ content: "", state: "stopped" });
  expect(server.isStopped).toBe(true);
});

test("making room leaves out the older half of the questions", async () => {
  const server = new FakeServer(["A"]);
  const conversation = Conversation.begin("m", {}, surroundings(server));
  for (const text of ["One", "Two", "Three", "Four"]) {
    server.made = 0;
    await conversation.send(text);
    await pass();
    server.makeAll();
    await pass();
  }
  server.refusals.push("maximum_length_exceeded");
  conversation.regenerate(conversation.branch.value.at(-1)!.id);
  await pass();
  const failed = conversation.branch.value.at(-1)!;
  expect(failed.error).toBe("maximum_length_exceeded");
  conversation.makeRoom(failed.id);
  await pass();
  const told = server.received.at(-1)?.["messages"] as { role: string; content: string }[];
  expect(told.filter(({ role }) => role === "user").map(({ content }) => content)).toEqual(["Three", "Four"]);
});

test("a continued answer counts with what it had", async () => {
  const { server, conversation } = await asked();
  server.makeAll();
  await pass();
  const first = conversation.branch.value[1]!;
  server.made = 0;
  conversation.continue(first.id);
  await pass();
  server.makeAll();
  await pass();
  const whole = conversation.branch.value[1]!;
  expect(whole).toMatchObject({ tokens: 2 * PIECES.length, first_token_seconds: first.first_token_seconds });
  expect(whole.seconds).toBeGreaterThan(first.seconds!);
});

test("an answer that failed before the connection was lost is not asked for again", async () => {
  const history = new HistoryOnServer(new MemoryShelf());
  const server = new FakeServer(PIECES);
  server.cuts.push(0);
  const conversation = Conversation.begin("m", {}, surroundings(server, history));
  await conversation.send("Hi");
  await pass();
  const answer = conversation.branch.value[1]!;
  await history.keep(conversation.chat.value.id, { ...answer, state: "failed", error: "missing_blocks" });
  await pass(5);
  expect(conversation.branch.value[1]).toMatchObject({ state: "failed", error: "missing_blocks" });
  expect(server.received).toHaveLength(1);
});

test("a title is the beginning of the first line, in whole words", () => {
  expect(titleOf("  Hello\nworld")).toBe("Hello");
  expect(titleOf(`${"word ".repeat(30)}`)).toBe(`${"word ".repeat(12).trim()}…`);
  expect(titleOf("x".repeat(100))).toBe(`${"x".repeat(60)}…`);
});
