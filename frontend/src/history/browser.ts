/** The history of this browser alone, for servers that keep none. The same behaviour as the server's. */

import type { Chat, Message, WholeChat } from "../contract";
import { RequestError } from "../http";
import { newId } from "../ids";
import { asMarkdown, fromExport, toExport } from "./exports";
import { newMessage } from "./history";
import type { ChatChanges, ChatPage, ExportFormat, History, NewChat, NewMessage } from "./history";
import { DatabaseShelf, MemoryShelf } from "./shelf";
import type { Shelf } from "./shelf";

const PAGE_SIZE = 50;

export class BrowserHistory implements History {
  readonly isOnServer = false;
  readonly expireDays = null;
  readonly #shelf: Shelf;

  constructor(shelf: Shelf) {
    this.#shelf = shelf;
  }

  static async open(): Promise<BrowserHistory> {
    try {
      return new BrowserHistory(await DatabaseShelf.open());
    } catch {
      return new BrowserHistory(new MemoryShelf());
    }
  }

  async list(query: string, cursor: string | null): Promise<ChatPage> {
    const words = query.trim().toLowerCase();
    const found: Chat[] = [];
    for (const chat of await this.#shelf.chats()) {
      if (words === "" || (await this.#mentions(chat, words))) found.push(chat);
    }
    found.sort((a, b) => Number(b.pinned) - Number(a.pinned) || b.updated_at - a.updated_at);
    const start = Number(cursor ?? 0);
    const end = start + PAGE_SIZE;
    return { chats: found.slice(start, end), next: end < found.length ? String(end) : null };
  }

  async create(chat: NewChat): Promise<Chat> {
    const now = Date.now() / 1000;
    const whole = { ...chat, pinned: false, current: null, created_at: now, updated_at: now, shared: null };
    await this.#shelf.putChat(whole);
    return whole;
  }

  async read(id: string): Promise<WholeChat> {
    const chat = await this.#chat(id);
    const messages = (await this.#shelf.messages(id)).map(({ chat: _, ...message }) => message);
    return { ...chat, messages: messages.sort((a, b) => a.created_at - b.created_at) };
  }

  async change(id: string, changes: ChatChanges): Promise<Chat> {
    const chat = { ...(await this.#chat(id)), ...changes };
    await this.#shelf.putChat(chat);
    return chat;
  }

  delete(id: string): Promise<void> {
    return this.#shelf.delete(id);
  }

  async deleteAll(): Promise<void> {
    for (const chat of await this.#shelf.chats()) await this.#shelf.delete(chat.id);
  }

  async addQuestion(chatId: string, question: NewMessage): Promise<Message> {
    const message = newMessage({ ...question, role: "user" });
    await this.#put(chatId, message);
    return message;
  }

  saveAnswer(chatId: string, message: Message): Promise<void> {
    return this.#put(chatId, message);
  }

  async export(id: string, format: ExportFormat): Promise<string> {
    const chat = await this.read(id);
    return format === "json" ? toExport(chat) : asMarkdown(chat);
  }

  async import(text: string): Promise<Chat[]> {
    const chats: Chat[] = [];
    for (const { messages, ...chat } of fromExport(text)) {
      const id = newId();
      const ids = new Map(messages.map((message) => [message.id, newId()]));
      const renamed = messages.map((message) => ({
        ...message,
        id: ids.get(message.id)!,
        parent: (message.parent !== null && ids.get(message.parent)) || null,
        chat: id,
      }));
      const current = (chat.current !== null && ids.get(chat.current)) || null;
      const imported = { ...chat, id, current, shared: null };
      await this.#shelf.putMessages(renamed);
      await this.#shelf.putChat(imported);
      chats.push(imported);
    }
    return chats;
  }

  async share(): Promise<string> {
    throw new RequestError("history_disabled");
  }

  async unshare(): Promise<void> {
    throw new RequestError("history_disabled");
  }

  async #chat(id: string): Promise<Chat> {
    const chat = await this.#shelf.chat(id);
    if (chat === undefined) throw new RequestError("unknown_chat");
    return chat;
  }

  async #put(chatId: string, message: Message): Promise<void> {
    await this.#shelf.putMessages([{ ...message, chat: chatId }]);
    await this.change(chatId, { current: message.id });
    await this.#shelf.putChat({ ...(await this.#chat(chatId)), updated_at: Date.now() / 1000 });
  }

  async #mentions(chat: Chat, words: string): Promise<boolean> {
    if (chat.title.toLowerCase().includes(words)) return true;
    const messages = await this.#shelf.messages(chat.id);
    return messages.some((message) => message.content.toLowerCase().includes(words));
  }
}
