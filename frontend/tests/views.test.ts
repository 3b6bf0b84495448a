import { expect, test } from "vitest";

import type { Chat, Model } from "../src/contract";
import { grouped } from "../src/state/chats";
import { Following } from "../src/state/following";
import { hashOf, routeOf } from "../src/state/routes";
import type { Route } from "../src/state/routes";
import { coverage, ranges, reportOf } from "../src/state/swarm";

const extent = (scrollTop: number, scrollHeight = 1000) => ({ scrollTop, scrollHeight, clientHeight: 400 });

test("the view follows until the reader scrolls up, however little", () => {
  const following = new Following();
  following.scrolled(extent(600));
  expect(following.isFollowing).toBe(true);
  following.scrolled(extent(590));
  expect(following.isFollowing).toBe(false);
});

test("the view follows again when the reader comes back to the end", () => {
  const following = new Following();
  following.scrolled(extent(600));
  following.scrolled(extent(100));
  following.scrolled(extent(300));
  expect(following.isFollowing).toBe(false);
  following.scrolled(extent(560));
  expect(following.isFollowing).toBe(true);
});

test("content that shrinks is not the reader's will", () => {
  const following = new Following();
  following.scrolled(extent(600));
  following.scrolled(extent(500, 900));
  expect(following.isFollowing).toBe(true);
});

test("there is more below only if it is worth a click", () => {
  expect(Following.hasMoreBelow(extent(560))).toBe(false);
  expect(Following.hasMoreBelow(extent(500))).toBe(true);
});

test.each<[Route, string]>([
  [{ view: "chat", id: null }, "#/"],
  [{ view: "chat", id: "a b" }, "#/chat/a%20b"],
  [{ view: "shared", token: "t/k" }, "#/shared/t%2Fk"],
  [{ view: "swarm" }, "#/swarm"],
])("a place has an address, and an address a place: %j", (route, hash) => {
  expect(hashOf(route)).toBe(hash);
  expect(routeOf(hash)).toEqual(route);
});

test.each(["", "#", "#/chat", "#/nowhere", "#/shared/"])("an address that leads nowhere is a new chat: %j", (hash) => {
  expect(routeOf(hash)).toEqual({ view: "chat", id: null });
});

test("a broken escape in an address is taken as it is", () => {
  expect(routeOf("#/chat/%E0%A4%A")).toEqual({ view: "chat", id: "%E0%A4%A" });
});

test("chats are grouped by days as people count them", () => {
  const now = new Date(2026, 4, 20, 0, 30);
  const chat = (id: string, hours: number, pinned = false) => ({ id, pinned, updated_at: now.getTime() / 1000 - hours * 3600 }) as Chat;
  const groups = grouped([chat("p", 900, true), chat("a", 0.2), chat("b", 1), chat("c", 30), chat("d", 2000)], now);
  expect(groups.map(({ period, chats }) => [period, chats.map(({ id }) => id)])).toEqual([
    ["pinned", ["p"]],
    ["today", ["a"]],
    ["yesterday", ["b"]],
    ["week", ["c"]],
    ["older", ["d"]],
  ]);
});

test("blocks are written as people write them", () => {
  expect(ranges([1, 2, 3, 7, 9, 10])).toBe("1–3, 7, 9–10");
  expect(ranges([])).toBe("");
});

test("without the swarm's state, the machines of /api/status are shown", () => {
  const model = { key: "m", name: "Model", state: "broken", missing_blocks: [3] } as unknown as Model;
  const report = reportOf(model, { model_name: "m", total_blocks: 4, peers: [{ peer_id: "x", start: 0, end: 3 }] });
  expect(report).toMatchObject({ status: "broken", server_rows: [{ peer_id: "x", state: "online", span: { start: 0, end: 3 } }] });
  expect(coverage(report)).toEqual([1, 1, 1, 0]);
});
