/** The page's state: where one is, which chat is open, what is chosen. Puts the parts together. */

import { computed, signal } from "@preact/signals";

import type { Chat, ChatSettings, Message, Model } from "../contract";
import { BrowserHistory } from "../history/browser";
import type { ChatChanges, ExportFormat, History } from "../history/history";
import { ServerHistory } from "../history/server";
import { request, RequestError } from "../http";
import { backOff, Pauses } from "../retries";
import { openSocket } from "../streams/answer";
import { texts } from "../texts";
import { Chats } from "./chats";
import { Conversation } from "./conversation";
import type { Surroundings } from "./conversation";
import { Models } from "./models";
import { preference } from "./preferences";
import { hashOf, routeOf } from "./routes";
import type { Route } from "./routes";

const NOTICE_SECONDS = 6;

export type Sheet =
  | { kind: "model" | "settings" | "help" | "removeAll" }
  | { kind: "rename" | "remove" | "share"; chat: Chat };

export class App {
  readonly models = new Models();
  readonly chosenModel = preference<string>("model", "");
  readonly theme = preference("theme", "system", ["system", "light", "dark"]);
  readonly sidebar = preference("sidebar", "open", ["open", "closed"]);
  readonly route = signal<Route>({ view: "chat", id: null });
  readonly chats = signal<Chats | null>(null);
  /** The open chat; null while it is being read. */
  readonly conversation = signal<Conversation | null>(null);
  readonly loadFailure = signal<string | null>(null);
  readonly sheet = signal<Sheet | null>(null);
  readonly notice = signal("");
  /** What screen readers are told, quietly. */
  readonly announcement = signal("");
  /** The sidebar over the page, on narrow screens. */
  readonly isDrawerOpen = signal(false);
  /** What stands in the message field. */
  readonly draft = signal("");
  /** The question that is being edited. */
  readonly editing = signal<string | null>(null);
  /** Chats whose answers are being made. */
  readonly answering = computed(() => {
    const all = [...this.#open.value.values()];
    return new Set(all.filter(({ live }) => live.value !== null).map(({ chat }) => chat.value.id));
  });
  readonly model = computed<Model | undefined>(() =>
    this.models.findOrDefault(this.conversation.value?.chat.value.model || this.chosenModel.value),
  );
  /** What answers wait for. */
  readonly #waits = computed(() => [...this.#open.value.values()].map(({ live }) => live.value?.waitingFor ?? "").join());
  readonly #pauses = new Pauses();
  #history: History | null = null;
  /** Chats that were opened, as long as they are shown or answering. */
  readonly #open = signal<ReadonlyMap<string, Conversation>>(new Map());
  /** Chats that were begun to be read; only the last one is still wanted. */
  #readings = 0;
  #noticeTimer: ReturnType<typeof setTimeout> | undefined;

  get history(): History | null {
    return this.#history;
  }

  async start(): Promise<void> {
    addEventListener("hashchange", () => void this.#follow(routeOf(location.hash)));
    addEventListener("online", () => this.hurry());
    addEventListener("focus", () => this.hurry());
    document.addEventListener("visibilitychange", () => this.#lookAgain());
    // What one of them learns of the server, the others need not wait for.
    this.models.isUnreachable.subscribe((isUnreachable) => isUnreachable || this.#isReached());
    this.#waits.subscribe(() => this.#pauses.end());
    void this.models.watch(this.#pauses, () => !document.hidden, () => this.model.value?.key ?? "");
    const route = routeOf(location.hash);
    if (route.view !== "chat") this.route.value = route;
    this.#history = await this.#openHistory();
    const chats = new Chats(this.#history);
    this.chats.value = chats;
    await this.#follow(routeOf(location.hash));
    await chats.refresh();
    for (let failures = 1; chats.hasFailed.value; failures++) {
      await this.#pauses.wait(backOff(failures));
      await chats.refresh();
    }
  }

  /** Do not wait for the next attempts to reach the server: there is reason to hope. */
  hurry(): void {
    this.#pauses.end();
    this.#open.value.forEach((conversation) => conversation.hurry());
  }

  go(route: Route): void {
    this.isDrawerOpen.value = false;
    if (hashOf(route) === hashOf(routeOf(location.hash))) void this.#follow(route);
    else location.hash = hashOf(route);
  }

  newChat(): void {
    this.#release();
    this.go({ view: "chat", id: null });
  }

  chooseModel(key: string): void {
    this.chosenModel.value = key;
    const conversation = this.conversation.value;
    if (conversation !== null && conversation.chat.value.model !== key) void this.attempt(conversation.change({ model: key }));
  }

  async send(text: string): Promise<void> {
    const conversation = this.conversation.value;
    if (conversation === null || conversation.isAnswering || this.model.value === undefined) return;
    const model = this.model.value.key;
    if (conversation.chat.value.model !== model) await conversation.change({ model }).catch(() => undefined);
    await this.#ask(conversation, conversation.send(text), text);
  }

  async edit(id: string, text: string): Promise<void> {
    this.editing.value = null;
    const conversation = this.conversation.value;
    if (conversation !== null) await this.#ask(conversation, conversation.edit(id, text), text);
  }

  async changeSettings(settings: ChatSettings): Promise<void> {
    const conversation = this.conversation.value;
    if (conversation !== null) await this.attempt(conversation.change({ settings }));
  }

  /** Change any chat of the list. */
  async changeChat(chat: Chat, changes: ChatChanges): Promise<void> {
    const open = this.#open.value.get(chat.id);
    if (open !== undefined) {
      await this.attempt(open.change(changes));
    } else if (this.#history !== null) {
      const changed = await this.attempt(this.#history.change(chat.id, changes));
      if (changed !== undefined) this.chats.value?.note(changed);
    }
  }

  async deleteChat(chat: Chat): Promise<void> {
    const open = this.#open.value.get(chat.id);
    open?.stop();
    if (this.#history === null || (await this.attempt(this.#history.delete(chat.id).then(() => true))) === undefined) return;
    this.chats.value?.forget(chat.id);
    open?.leave();
    this.#close(chat.id);
    if (this.conversation.value?.chat.value.id === chat.id) this.newChat();
  }

  async deleteAll(): Promise<void> {
    this.#open.value.forEach((conversation) => conversation.stop());
    if (this.#history === null || (await this.attempt(this.#history.deleteAll().then(() => true))) === undefined) return;
    this.#open.value.forEach((conversation) => conversation.leave());
    this.#open.value = new Map();
    await this.chats.value?.refresh();
    this.newChat();
  }

  async share(chat: Chat): Promise<string | undefined> {
    const token = await this.attempt(this.#history?.share(chat.id));
    if (token !== undefined) this.#noteShared(chat, token);
    return token;
  }

  async unshare(chat: Chat): Promise<void> {
    if (this.#history === null) return;
    const isDone = await this.attempt(this.#history.unshare(chat.id).then(() => true));
    if (isDone) this.#noteShared(chat, null);
  }

  export(chat: Chat, format: ExportFormat): Promise<string | undefined> {
    return this.attempt(this.#history?.export(chat.id, format));
  }

  async import(text: string): Promise<void> {
    const chats = await this.attempt(this.#history?.import(text));
    if (chats === undefined) return;
    this.tell(texts.notices.imported(chats.length));
    await this.chats.value?.refresh();
    if (chats.length === 1) this.go({ view: "chat", id: chats[0]!.id });
  }

  /** Await; what goes wrong is told, and gives undefined. */
  async attempt<T>(work: Promise<T> | undefined): Promise<T | undefined> {
    try {
      return await work;
    } catch (error) {
      this.tell(sentenceOf(error, texts.notices.saveFailed));
      return undefined;
    }
  }

  async #openHistory(): Promise<History> {
    for (let failures = 1; ; failures++) {
      try {
        const { enabled, expire_days } = await request<{ enabled: boolean; expire_days: number | null }>("GET", "api/history");
        return enabled ? new ServerHistory(expire_days) : await BrowserHistory.open();
      } catch (error) {
        if (!isLost(error)) return BrowserHistory.open();
        await this.#pauses.wait(backOff(failures));
      }
    }
  }

  /** Show a short message for a while. */
  tell(text: string): void {
    clearTimeout(this.#noticeTimer);
    this.notice.value = text;
    this.#noticeTimer = setTimeout(() => (this.notice.value = ""), NOTICE_SECONDS * 1000);
  }

  async #ask(conversation: Conversation, asking: Promise<void>, text: string): Promise<void> {
    this.#keepOpen(conversation);
    this.announcement.value = "";
    this.hurry();
    try {
      await asking;
    } catch (error) {
      // The text must not be lost, nor what was written meanwhile.
      if (this.draft.value === "") this.draft.value = text;
      this.tell(sentenceOf(error, texts.composer.notAsking));
      return;
    }
    const { id } = conversation.chat.value;
    if (this.conversation.value === conversation) {
      // Without an event: the chat is open already.
      history.replaceState(null, "", hashOf({ view: "chat", id }));
      this.route.value = { view: "chat", id };
    }
    this.announcement.value = texts.chat.writing;
  }

  async #follow(route: Route): Promise<void> {
    this.loadFailure.value = null;
    this.editing.value = null;
    this.isDrawerOpen.value = false;
    this.route.value = route;
    if (route.view !== "chat" || this.#history === null) return;
    const shown = this.conversation.value;
    if (route.id === null) {
      if (shown === null || shown.isSaved) this.#show(Conversation.begin(this.model.value?.key ?? this.chosenModel.value, {}, this.#surroundings()));
      return;
    }
    if (shown?.chat.value.id === route.id) return;
    const open = this.#open.value.get(route.id);
    if (open !== undefined) return this.#show(open);
    this.#release();
    this.conversation.value = null;
    await this.#read(route.id);
  }

  async #read(id: string): Promise<void> {
    const reading = ++this.#readings;
    const isStillWanted = () => reading === this.#readings && this.route.value.view === "chat" && (this.route.value as { id: string | null }).id === id;
    for (let failures = 1; isStillWanted(); failures++) {
      try {
        const chat = await this.#history!.read(id);
        if (!isStillWanted()) return;
        this.loadFailure.value = null;
        return this.#show(Conversation.resume(chat, this.#surroundings()));
      } catch (error) {
        if (!isStillWanted()) return;
        if (!isLost(error)) return void (this.loadFailure.value = isFaulty(error) ? texts.notices.loadFailed : texts.notices.notFound);
        this.loadFailure.value = texts.notices.loadWaits;
        await this.#pauses.wait(backOff(failures));
      }
    }
  }

  #show(conversation: Conversation): void {
    if (this.conversation.value !== conversation) this.#release();
    this.conversation.value = conversation;
    if (conversation.isSaved) this.#keepOpen(conversation);
  }

  /** The shown chat is left; if it is being answered, it goes on in the background. */
  #release(): void {
    const shown = this.conversation.value;
    if (shown !== null && !shown.isAnswering) this.#close(shown.chat.value.id);
  }

  #keepOpen(conversation: Conversation): void {
    this.#open.value = new Map(this.#open.value).set(conversation.chat.value.id, conversation);
  }

  #close(id: string): void {
    const open = new Map(this.#open.value);
    open.delete(id);
    this.#open.value = open;
  }

  #noteShared(chat: Chat, shared: string | null): void {
    const open = this.#open.value.get(chat.id);
    if (open !== undefined) open.noteShared(shared);
    else this.chats.value?.note({ ...chat, shared });
  }

  #surroundings(): Surroundings {
    return {
      history: this.#history!,
      connect: openSocket,
      modelFor: (key) => this.models.findOrDefault(key),
      schedule: nextFrame,
      changed: (chat) => this.chats.value?.note(chat),
      answered: (message) => this.#answered(message),
    };
  }

  #isReached(): void {
    if (this.notice.value === texts.failures["connection_lost"]) this.notice.value = "";
    this.hurry();
  }

  /** Somebody comes back to the page: other tabs may have changed the list. */
  #lookAgain(): void {
    if (document.hidden) return;
    this.hurry();
    if (this.chats.value?.next.value === null) void this.chats.value.refresh();
  }

  #answered(message: Message): void {
    if (message.state === "failed") this.#pauses.end(); // to see how the model is
    const shown = this.conversation.value;
    if (shown?.tree.value.get(message.id) !== undefined) this.announcement.value = announcementOf(message);
    else this.#open.value.forEach((open) => !open.isAnswering && open !== shown && this.#close(open.chat.value.id));
  }
}

/** The words for an error. */
export function sentenceOf(error: unknown, otherwise: string = texts.failureElse): string {
  return (error instanceof RequestError && texts.failures[error.code]) || otherwise;
}

function isLost(error: unknown): boolean {
  return error instanceof RequestError && error.code === "connection_lost";
}

function isFaulty(error: unknown): boolean {
  return !(error instanceof RequestError) || error.code === "internal_error";
}

function announcementOf({ state, error, content }: Message): string {
  if (state === "failed") return texts.failures[error ?? ""] ?? texts.failureElse;
  if (state === "stopped") return texts.stopped;
  return `${texts.chat.complete} ${content.length <= 500 ? content : ""}`.trim();
}

/** A page that nobody sees has no frames. */
function nextFrame(callback: () => void): void {
  if (document.hidden) setTimeout(callback, 250);
  else requestAnimationFrame(callback);
}
