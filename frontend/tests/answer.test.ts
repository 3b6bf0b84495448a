import { afterEach, beforeEach, expect, test, vi } from "vitest";

import type { AnswerRequest } from "../src/contract";
import { Answer } from "../src/streams/answer";
import type { AnswerOptions, Running } from "../src/streams/answer";
import { FakeServer } from "./server";

const REQUEST: AnswerRequest = { type: "answer", model: "m", messages: [{ role: "user", content: "Hi" }] };
const PIECES = ["One", " two", " three", " four"];

beforeEach(() => void vi.useFakeTimers());
afterEach(() => void vi.useRealTimers());

function follow(server: FakeServer, begin: ConstructorParameters<typeof Answer>[0] = REQUEST, recover?: AnswerOptions["recover"]) {
  const heard = { text: "", tokens: 0, ends: [] as string[], waits: [] as string[], places: [] as number[] };
  const answer = new Answer(begin, {
    connect: server.connect,
    ...(recover ? { recover } : {}),
    listener: {
      started: () => undefined,
      waiting: (code) => heard.waits.push(code),
      queued: (place) => heard.places.push(place),
      text: (text, tokens) => {
        heard.text += text;
        heard.tokens += tokens;
      },
      finished: (reason) => heard.ends.push(reason),
      failed: (code) => heard.ends.push(`failed: ${code}`),
    },
  });
  return { answer, heard };
}

const pass = (seconds = 0) => vi.advanceTimersByTimeAsync(seconds * 1000 + 10);

test("an answer is asked for, and its pieces come in order", async () => {
  const server = new FakeServer(PIECES);
  const { heard } = follow(server);
  await pass();
  server.makeAll();
  await pass();
  expect(heard).toMatchObject({ text: PIECES.join(""), tokens: 4, ends: ["stop"], waits: [] });
  expect(server.received).toEqual([REQUEST]);
});

// The connection is lost after each number of frames, and again after each number of frames.
const cuts = [1, 2, 3, 4, 5].flatMap((first) => [0, 1, 2, 3].map((second) => [first, second] as const));
test.each(cuts)("a stream that is cut after %d frames, and then after %d, gives each token once", async (first, second) => {
  const server = new FakeServer(PIECES);
  server.cuts.push(first, second);
  const { heard } = follow(server);
  for (let step = 0; step < 8; step++) {
    await pass(1);
    server.make();
  }
  await pass(30);
  expect(heard).toMatchObject({ text: PIECES.join(""), tokens: 4, ends: ["stop"] });
  expect(server.received.filter(({ type }) => type === "answer")).toHaveLength(1);
});

test.each([0, 1, 2, 3, 4])("attaching after %d tokens gives the rest", async (position) => {
  const server = new FakeServer(PIECES);
  server.made = 3;
  const { heard } = follow(server, { generation: "generation-1", position });
  await pass();
  server.makeAll();
  await pass();
  expect(heard).toMatchObject({ text: PIECES.slice(position).join(""), ends: ["stop"] });
});

test("attempts to reconnect get rarer, but never rare, and the first success ends them", async () => {
  const server = new FakeServer(PIECES);
  const { heard } = follow(server);
  await pass();
  server.isUp = false;
  server.loseConnections();
  await pass(120);
  expect(heard.waits.length).toBeGreaterThan(120 / 5);
  expect(heard.waits.length).toBeLessThan(60);
  server.isUp = true;
  server.makeAll();
  await pass(5);
  expect(heard).toMatchObject({ text: PIECES.join(""), ends: ["stop"] });
});

test("when the network is back, the next attempt is made at once", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await pass();
  server.isUp = false;
  server.loseConnections();
  await pass(60);
  server.isUp = true;
  server.makeAll();
  answer.hurry();
  await pass(0.1);
  expect(heard.ends).toEqual(["stop"]);
});

test("an attempt to connect that hangs is given up", async () => {
  const server = new FakeServer(PIECES);
  server.isSilent = true;
  const { heard } = follow(server);
  await pass(9);
  expect(heard.waits).toEqual([]);
  server.isSilent = false;
  server.makeAll();
  await pass(3);
  expect(heard).toMatchObject({ text: PIECES.join(""), waits: ["connection_lost"], ends: ["stop"] });
});

test("a request whose fate is unknown is only sent again if nothing came of it", async () => {
  const server = new FakeServer(PIECES);
  server.cuts.push(0);
  const recover = vi.fn(async () => null);
  const { heard } = follow(server, REQUEST, recover);
  await pass(1);
  server.makeAll();
  await pass(1);
  expect(recover).toHaveBeenCalledTimes(1);
  expect(server.received).toEqual([REQUEST, REQUEST]);
  expect(heard.text).toBe(PIECES.join(""));
});

test("a request whose fate is unknown is attached to if it runs", async () => {
  const server = new FakeServer(PIECES);
  server.cuts.push(0);
  const { heard } = follow(server, REQUEST, async () => ({ generation: "generation-1", position: 0 }));
  await pass(1);
  server.makeAll();
  await pass(1);
  expect(server.received.map(({ type }) => type)).toEqual(["answer", "attach"]);
  expect(heard.text).toBe(PIECES.join(""));
});

/** An answer whose request was lost, and of which is being found out what came of it. */
async function followLost() {
  const server = new FakeServer(PIECES);
  server.cuts.push(0);
  let found: (running: Running | null | "over") => void = () => undefined;
  const recover = vi.fn(() => new Promise<Running | null | "over">((resolve) => void (found = resolve)));
  const followed = follow(server, REQUEST, recover);
  await pass(1);
  expect(recover).toHaveBeenCalledTimes(1);
  expect(server.connections).toBe(0);
  return { server, recover, found: (running: Running | null | "over") => found(running), ...followed };
}

test.each([null, { generation: "generation-1", position: 0 }])("many reasons to hope are one attempt: %j", async (running) => {
  const { server, recover, found, answer, heard } = await followLost();
  answer.hurry();
  answer.hurry();
  found(running);
  await pass();
  answer.hurry();
  await pass(1);
  expect(recover).toHaveBeenCalledTimes(1);
  expect(server.received.map(({ type }) => type)).toEqual(["answer", running === null ? "answer" : "attach"]);
  expect(server.connections).toBe(1);
  server.makeAll();
  await pass(1);
  expect(heard).toMatchObject({ text: PIECES.join(""), ends: ["stop"] });
  expect(server.connections).toBe(0);
});

test("an attempt that failed is not the last", async () => {
  const server = new FakeServer(PIECES);
  server.cuts.push(0);
  const recover = vi.fn(async () => null).mockRejectedValueOnce(new Error("no network"));
  const { answer, heard } = follow(server, REQUEST, recover);
  while (recover.mock.calls.length === 0) await pass();
  answer.hurry();
  await pass();
  expect(recover).toHaveBeenCalledTimes(2);
  server.makeAll();
  await pass();
  expect(heard.ends).toEqual(["stop"]);
});

test("who leaves while it is found out what runs keeps no connection", async () => {
  const { server, found, answer, heard } = await followLost();
  answer.hurry();
  answer.leave();
  found({ generation: "generation-1", position: 0 });
  server.makeAll();
  await pass(60);
  expect(server.connections).toBe(0);
  expect(server.received).toEqual([REQUEST]);
  expect(heard).toMatchObject({ text: "", ends: [] });
});

test("what is stopped while it is found out what runs is stopped", async () => {
  const { server, found, answer, heard } = await followLost();
  answer.stop();
  found({ generation: "generation-1", position: 0 });
  await pass(1);
  expect(server.isStopped).toBe(true);
  expect(server.received.map(({ type }) => type)).toEqual(["answer", "attach", "stop"]);
  expect(heard.ends).toEqual(["stopped"]);
  expect(server.connections).toBe(0);
});

test("what is stopped, and does not run, is not asked for again", async () => {
  const { server, found, answer, heard } = await followLost();
  answer.stop();
  found(null);
  await pass(1);
  expect(server.received).toEqual([REQUEST]);
  expect(heard.ends).toEqual(["stopped"]);
  expect(server.connections).toBe(0);
});

test("an answer waits for a model that is being loaded", async () => {
  const server = new FakeServer(PIECES);
  server.isLoading = true;
  const { heard } = follow(server);
  await pass(7);
  server.isLoading = false;
  server.makeAll();
  await pass();
  expect(heard).toMatchObject({ waits: ["model_loading"], ends: ["stop"] });
});

test("other errors end the answer", async () => {
  const server = new FakeServer(PIECES);
  server.refusals.push("missing_blocks");
  const { heard } = follow(server);
  await pass(60);
  expect(heard).toMatchObject({ waits: [], ends: ["failed: missing_blocks"] });
  expect(server.received).toHaveLength(1);
});

test("stopping ends the generation, and keeps what came", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await pass();
  server.make();
  answer.stop();
  await pass();
  expect(server.isStopped).toBe(true);
  expect(heard).toMatchObject({ text: "One", ends: ["stopped"] });
});

test("stopping before the server has begun stops it as soon as it has", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await vi.advanceTimersByTimeAsync(0); // open, and the request is on its way
  answer.stop();
  await pass(1);
  expect(server.isStopped).toBe(true);
  expect(heard.ends).toEqual(["stopped"]);
});

test("stopping without a connection tells the server when it can be reached", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await pass();
  server.isUp = false;
  server.loseConnections();
  await pass(0.1);
  server.isUp = true;
  answer.stop();
  await pass(1);
  expect(server.isStopped).toBe(true);
  expect(heard.ends).toEqual(["stopped"]);
});

test("stopping between two attempts asks for nothing more", async () => {
  const server = new FakeServer(PIECES);
  server.refusals.push("session_expired");
  const { answer, heard } = follow(server);
  await pass(0.2);
  answer.stop();
  await pass(30);
  expect(heard.ends).toEqual(["stopped"]);
  expect(server.received).toHaveLength(1);
});

test("a stop that nobody confirms ends after a while", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await pass();
  server.isUp = false;
  server.loseConnections();
  answer.stop();
  await pass(6);
  expect(heard.ends).toEqual(["stopped"]);
});

test("who has left hears nothing more, and the generation goes on", async () => {
  const server = new FakeServer(PIECES);
  const { answer, heard } = follow(server);
  await pass();
  answer.leave();
  server.makeAll();
  await pass(60);
  expect(heard).toMatchObject({ text: "", ends: [] });
  expect(server.isStopped).toBe(false);
});
