/** Where chats are kept: by the server, or, where it keeps none, by this browser. */

import type { Chat, Message, WholeChat } from "../contract";

export interface ChatPage {
  chats: Chat[];
  /** For the next page; null if there is none. */
  next: string | null;
}

export type NewChat = Pick<Chat, "id" | "title" | "model" | "settings">;
export type ChatChanges = Partial<Pick<Chat, "title" | "pinned" | "model" | "settings" | "current">>;
export type NewMessage = Pick<Message, "id" | "parent" | "content">;
export type ExportFormat = "json" | "markdown";

/** All methods reject with a `RequestError`. */
export interface History {
  /** Whether the server keeps the chats: it writes the answers itself, and can share them. */
  readonly isOnServer: boolean;
  /** Days until an unused chat is deleted; null = never. */
  readonly expireDays: number | null;
  /** Pinned chats first, then the newest. `query` searches titles and messages. */
  list(query: string, cursor: string | null): Promise<ChatPage>;
  create(chat: NewChat): Promise<Chat>;
  read(id: string): Promise<WholeChat>;
  change(id: string, changes: ChatChanges): Promise<Chat>;
  delete(id: string): Promise<void>;
  deleteAll(): Promise<void>;
  addQuestion(chatId: string, message: NewMessage): Promise<Message>;
  /** Keep what there is of an answer; the server does that itself. */
  saveAnswer(chatId: string, message: Message): Promise<void>;
  export(id: string, format: ExportFormat): Promise<string>;
  /** Read what `export` gave as JSON. */
  import(text: string): Promise<Chat[]>;
  /** A read-only copy of the shown branch as it is now, for whoever has the token. */
  share(id: string): Promise<string>;
  unshare(id: string): Promise<void>;
}

let latest = 0;

/** The time in seconds; later with each call, so that messages keep their order. */
function now(): number {
  latest = Math.max(Date.now(), latest + 1);
  return latest / 1000;
}

export function newMessage(values: Pick<Message, "id" | "parent" | "role" | "content"> & Partial<Message>): Message {
  return {
    model: null,
    created_at: now(),
    state: "complete",
    error: null,
    generation: null,
    position: null,
    finish_reason: null,
    tokens: null,
    seconds: null,
    first_token_seconds: null,
    ...values,
  };
}
