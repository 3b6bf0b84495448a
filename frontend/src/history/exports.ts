/** Chats as files: JSON, which can be read back, and Markdown for people. Pure. */

import type { Chat, Message, WholeChat } from "../contract";
import { RequestError } from "../http";
import { Tree } from "../state/tree";
import { texts } from "../texts";
import { newMessage } from "./history";

export const FORMAT = "petals-chat";
const STATES = ["complete", "stopped", "failed", "interrupted"];

export function toExport(chat: WholeChat): string {
  return `${JSON.stringify({ format: FORMAT, version: 1, chats: [chat] }, null, 2)}\n`;
}

export function asMarkdown(chat: WholeChat): string {
  const parts = [`# ${chat.title}`];
  if (chat.settings.system) parts.push(`## ${texts.settings.system}`, chat.settings.system);
  for (const message of new Tree(chat.messages).branch(chat.current)) {
    parts.push(`## ${message.role === "user" ? texts.chat.you : texts.chat.answer}`, message.content);
  }
  return `${parts.join("\n\n")}\n`;
}

/** The chats in an exported file, with whatever is missing filled in. Throws a `RequestError`. */
export function fromExport(text: string): WholeChat[] {
  let exported: unknown;
  try {
    exported = JSON.parse(text);
  } catch {
    throw new RequestError("not_an_export");
  }
  const chats = isObject(exported) && Array.isArray(exported["chats"]) ? exported["chats"] : [exported];
  return chats.map(chatFrom);
}

function chatFrom(value: unknown): WholeChat {
  if (!isObject(value) || !Array.isArray(value["messages"])) throw new RequestError("not_an_export");
  const now = Date.now() / 1000;
  const messages = value["messages"].map(messageFrom);
  const given = value as Partial<Chat>;
  return {
    id: "",
    title: typeof given.title === "string" ? given.title.slice(0, 200) : texts.sidebar.untitled,
    model: typeof given.model === "string" ? given.model : "",
    pinned: given.pinned === true,
    settings: isObject(given.settings) ? given.settings : {},
    current: typeof given.current === "string" ? given.current : null,
    created_at: typeof given.created_at === "number" ? given.created_at : now,
    updated_at: now,
    shared: null,
    messages,
  };
}

function messageFrom(value: unknown): Message {
  if (!isObject(value)) throw new RequestError("not_an_export");
  const { id, parent, role, content, model, created_at, state } = value;
  if (typeof id !== "string" || typeof content !== "string" || (role !== "user" && role !== "assistant")) {
    throw new RequestError("not_an_export");
  }
  return newMessage({
    id,
    parent: typeof parent === "string" ? parent : null,
    role,
    content,
    model: typeof model === "string" ? model : null,
    ...(typeof created_at === "number" ? { created_at } : {}),
    state: STATES.includes(state as string) ? (state as Message["state"]) : "complete",
  });
}

function isObject(value: unknown): value is Record<string, unknown> {
  return typeof value === "object" && value !== null && !Array.isArray(value);
}
