import { afterEach, expect, test } from "vitest";

import { request } from "../src/http";

const timeout = AbortSignal.timeout;
afterEach(() => void (AbortSignal.timeout = timeout));

const REPLY = 'data:application/json,{"models":[]}';

test("a reply is read", async () => {
  expect(await request("GET", REPLY)).toEqual({ models: [] });
});

test("a browser that knows no limits in time reads without one", async () => {
  Reflect.deleteProperty(AbortSignal, "timeout");
  expect(await request("GET", REPLY)).toEqual({ models: [] });
});

test("what is no reply is a lost connection", async () => {
  await expect(request("GET", "data:text/html,<p>hello")).rejects.toMatchObject({ code: "connection_lost" });
});
