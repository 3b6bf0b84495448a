import { expect, test } from "vitest";

import type { Frame } from "../src/contract";
import { FrameReader } from "../src/streams/frames";

const piece = (outputs: string, position: number, token_count = 1): Frame => ({ ok: true, outputs, token_count, stop: false, position });

test("each token is given out once, whatever is sent again", () => {
  const reader = new FrameReader();
  const frames = [piece("a", 1), piece("b", 2), piece("b", 2), piece("a", 1), piece("cd", 4, 2)];
  const texts = frames.flatMap((frame) => reader.read(frame)).map((event) => event.kind === "text" && event.text);
  expect(texts).toEqual(["a", "b", "cd"]);
  expect(reader.position).toBe(4);
});

test("missing tokens are noticed and not skipped", () => {
  const reader = new FrameReader();
  expect(reader.read(piece("c", 3))).toEqual([{ kind: "gap" }]);
  expect(reader.position).toBe(0);
});

test("the last frame gives its text, the reason and the prompt's tokens", () => {
  const reader = new FrameReader(2);
  const last: Frame = { ok: true, outputs: "!", token_count: 1, stop: true, position: 3, finish_reason: "length", prompt_tokens: 9 };
  expect(reader.read(last)).toEqual([
    { kind: "text", text: "!", tokens: 1 },
    { kind: "finished", reason: "length", promptTokens: 9 },
  ]);
});

test("text that was held back comes with the last frame, without a token", () => {
  const reader = new FrameReader(2);
  const last: Frame = { ok: true, outputs: " #", token_count: 0, stop: true, position: 2, finish_reason: "stop" };
  expect(reader.read(last).map((event) => event.kind)).toEqual(["text", "finished"]);
});

test("places in the queue, beginnings and errors are told apart", () => {
  const reader = new FrameReader();
  expect(reader.read({ ok: true, generation: "g" })).toEqual([{ kind: "started", generation: "g" }]);
  expect(reader.read({ ok: true, queue_place: 3 })).toEqual([{ kind: "queued", place: 3 }]);
  expect(reader.read({ ok: true })).toEqual([]);
  expect(reader.read({ ok: false, code: "worker_lost" })).toEqual([{ kind: "failed", code: "worker_lost" }]);
  expect(reader.read({ ok: false })).toEqual([{ kind: "failed", code: "internal_error" }]);
});
