/** The list of chats, and its search. */

import { computed, signal } from "@preact/signals";

import type { Chat } from "../contract";
import type { History } from "../history/history";

export type Period = "pinned" | "today" | "yesterday" | "week" | "older";

export interface Group {
  period: Period;
  chats: Chat[];
}

const DAY_SECONDS = 24 * 60 * 60;

export class Chats {
  /** Null until they are known. */
  readonly all = signal<Chat[] | null>(null);
  readonly query = signal("");
  readonly next = signal<string | null>(null);
  readonly hasFailed = signal(false);
  readonly groups = computed(() => grouped(this.all.value ?? [], new Date()));
  readonly #history: History;

  constructor(history: History) {
    this.#history = history;
  }

  /** Rejects never: what went wrong is in `hasFailed`. */
  async refresh(): Promise<void> {
    const query = this.query.value;
    try {
      const page = await this.#history.list(query, null);
      if (query !== this.query.value) return; // somebody typed on
      this.all.value = page.chats;
      this.next.value = page.next;
      this.hasFailed.value = false;
    } catch {
      this.hasFailed.value = true;
    }
  }

  async loadMore(): Promise<void> {
    const cursor = this.next.value;
    if (cursor === null) return;
    const page = await this.#history.list(this.query.value, cursor);
    const known = new Set(this.all.value?.map((chat) => chat.id));
    this.all.value = [...(this.all.value ?? []), ...page.chats.filter((chat) => !known.has(chat.id))];
    this.next.value = page.next;
  }

  async search(query: string): Promise<void> {
    this.query.value = query;
    await this.refresh();
  }

  /** Show what is known of a chat: a new one, or a changed one. */
  note(chat: Chat): void {
    const others = (this.all.value ?? []).filter((other) => other.id !== chat.id);
    const isShown = others.length !== (this.all.value ?? []).length;
    if (this.query.value !== "" && !isShown) return;
    this.all.value = [...others, chat].sort((a, b) => Number(b.pinned) - Number(a.pinned) || b.updated_at - a.updated_at);
  }

  forget(id: string): void {
    this.all.value = (this.all.value ?? []).filter((chat) => chat.id !== id);
  }
}

/** The chats by the time of their last change, as people count days; their order stays. */
export function grouped(chats: readonly Chat[], now: Date): Group[] {
  const today = new Date(now.getFullYear(), now.getMonth(), now.getDate()).getTime() / 1000;
  const groups = new Map<Period, Chat[]>();
  for (const chat of chats) {
    const period = periodOf(chat, today);
    const group = groups.get(period);
    if (group) group.push(chat);
    else groups.set(period, [chat]);
  }
  return [...groups].map(([period, members]) => ({ period, chats: members }));
}

function periodOf(chat: Chat, today: number): Period {
  if (chat.pinned) return "pinned";
  if (chat.updated_at >= today) return "today";
  if (chat.updated_at >= today - DAY_SECONDS) return "yesterday";
  return chat.updated_at >= today - 7 * DAY_SECONDS ? "week" : "older";
}
