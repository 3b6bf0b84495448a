/** The server's history, over HTTP. */

import type { Chat, Message, SharedChat, WholeChat } from "../contract";
import { request, RequestError } from "../http";
import type { ChatChanges, ChatPage, ExportFormat, History, NewChat, NewMessage } from "./history";

const PAGE_SIZE = 50;

export class ServerHistory implements History {
  readonly isOnServer = true;
  readonly expireDays: number | null;

  constructor(expireDays: number | null) {
    this.expireDays = expireDays;
  }

  list(query: string, cursor: string | null): Promise<ChatPage> {
    const parameters = new URLSearchParams({ limit: String(PAGE_SIZE) });
    if (query) parameters.set("query", query);
    if (cursor !== null) parameters.set("cursor", cursor);
    return request("GET", `api/chats?${parameters}`);
  }

  create(chat: NewChat): Promise<Chat> {
    return request("POST", "api/chats", chat);
  }

  read(id: string): Promise<WholeChat> {
    return request("GET", chatPath(id));
  }

  change(id: string, changes: ChatChanges): Promise<Chat> {
    return request("PATCH", chatPath(id), changes);
  }

  delete(id: string): Promise<void> {
    return request("DELETE", chatPath(id));
  }

  deleteAll(): Promise<void> {
    return request("DELETE", "api/chats");
  }

  addQuestion(chatId: string, message: NewMessage): Promise<Message> {
    return request("POST", `${chatPath(chatId)}/messages`, message);
  }

  async saveAnswer(): Promise<void> {
    // The server records what it generates.
  }

  async export(id: string, format: ExportFormat): Promise<string> {
    const response = await fetch(`${chatPath(id)}/export?format=${format}`).catch(() => null);
    if (response === null) throw new RequestError("connection_lost");
    if (!response.ok) throw new RequestError("internal_error");
    return response.text();
  }

  async import(text: string): Promise<Chat[]> {
    let exported: unknown;
    try {
      exported = JSON.parse(text);
    } catch {
      throw new RequestError("not_an_export");
    }
    return (await request<{ chats: Chat[] }>("POST", "api/chats/import", exported)).chats;
  }

  async share(id: string): Promise<string> {
    return (await request<{ token: string }>("POST", `${chatPath(id)}/share`)).token;
  }

  unshare(id: string): Promise<void> {
    return request("DELETE", `${chatPath(id)}/share`);
  }
}

export function readShared(token: string): Promise<SharedChat> {
  return request("GET", `api/shared/${encodeURIComponent(token)}`);
}

function chatPath(id: string): string {
  return `api/chats/${encodeURIComponent(id)}`;
}
