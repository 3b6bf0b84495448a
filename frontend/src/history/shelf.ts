/** Where the browser's own history keeps its records: IndexedDB, or the page's memory where that is closed to it. */

import type { Chat, Message } from "../contract";
import { RequestError } from "../http";

export interface StoredMessage extends Message {
  chat: string;
}

export interface Shelf {
  chats(): Promise<Chat[]>;
  chat(id: string): Promise<Chat | undefined>;
  messages(chatId: string): Promise<StoredMessage[]>;
  putChat(chat: Chat): Promise<void>;
  putMessages(messages: readonly StoredMessage[]): Promise<void>;
  /** Delete a chat and its messages. */
  delete(chatId: string): Promise<void>;
}

export class MemoryShelf implements Shelf {
  readonly #chats = new Map<string, Chat>();
  readonly #messages = new Map<string, StoredMessage>();

  async chats(): Promise<Chat[]> {
    return [...this.#chats.values()];
  }

  async chat(id: string): Promise<Chat | undefined> {
    return this.#chats.get(id);
  }

  async messages(chatId: string): Promise<StoredMessage[]> {
    return [...this.#messages.values()].filter((message) => message.chat === chatId);
  }

  async putChat(chat: Chat): Promise<void> {
    this.#chats.set(chat.id, structuredClone(chat));
  }

  async putMessages(messages: readonly StoredMessage[]): Promise<void> {
    for (const message of messages) this.#messages.set(message.id, structuredClone(message));
  }

  async delete(chatId: string): Promise<void> {
    this.#chats.delete(chatId);
    for (const message of await this.messages(chatId)) this.#messages.delete(message.id);
  }
}

export class DatabaseShelf implements Shelf {
  readonly #database: IDBDatabase;

  private constructor(database: IDBDatabase) {
    this.#database = database;
  }

  /** Rejects where the browser allows no database (some private windows). */
  static async open(name = "petals-chat"): Promise<DatabaseShelf> {
    const opening = indexedDB.open(name, 1);
    opening.onupgradeneeded = () => {
      opening.result.createObjectStore("chats", { keyPath: "id" });
      opening.result.createObjectStore("messages", { keyPath: "id" }).createIndex("chat", "chat");
    };
    return new DatabaseShelf(await result(opening));
  }

  chats(): Promise<Chat[]> {
    return result(this.#store("chats", "readonly").getAll());
  }

  chat(id: string): Promise<Chat | undefined> {
    return result(this.#store("chats", "readonly").get(id));
  }

  messages(chatId: string): Promise<StoredMessage[]> {
    return result(this.#store("messages", "readonly").index("chat").getAll(chatId));
  }

  putChat(chat: Chat): Promise<void> {
    const store = this.#store("chats", "readwrite");
    store.put(chat);
    return completion(store.transaction);
  }

  putMessages(messages: readonly StoredMessage[]): Promise<void> {
    const store = this.#store("messages", "readwrite");
    for (const message of messages) store.put(message);
    return completion(store.transaction);
  }

  async delete(chatId: string): Promise<void> {
    const transaction = this.#database.transaction(["chats", "messages"], "readwrite");
    transaction.objectStore("chats").delete(chatId);
    const keys = await result(transaction.objectStore("messages").index("chat").getAllKeys(chatId));
    for (const key of keys) transaction.objectStore("messages").delete(key);
    await completion(transaction);
  }

  #store(name: string, mode: IDBTransactionMode): IDBObjectStore {
    return this.#database.transaction(name, mode).objectStore(name);
  }
}

function result<T>(waited: IDBRequest<T>): Promise<T> {
  return new Promise((resolve, reject) => {
    waited.onsuccess = () => resolve(waited.result);
    waited.onerror = () => reject(storageError(waited.error));
  });
}

function completion(transaction: IDBTransaction): Promise<void> {
  return new Promise((resolve, reject) => {
    transaction.oncomplete = () => resolve();
    transaction.onabort = transaction.onerror = () => reject(storageError(transaction.error));
  });
}

function storageError(error: DOMException | null): RequestError {
  return new RequestError(error?.name === "QuotaExceededError" ? "storage_full" : "storage_failed");
}
