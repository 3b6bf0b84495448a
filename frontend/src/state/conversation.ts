/**
 * One chat: its messages, the answer that is being made, and what people do with them. Knows no page.
 *
 * Everything is kept in the history first and shown from the tree; only the growing answer lives outside of it,
 * so that a token changes nothing but its own message.
 */

import { computed, signal } from "@preact/signals";
import type { ReadonlySignal } from "@preact/signals";

import type { AnswerRequest, Chat, ChatSettings, Message, Model, WholeChat } from "../contract";
import { newMessage } from "../history/history";
import type { ChatChanges, History } from "../history/history";
import { RequestError } from "../http";
import { newId } from "../ids";
import { Answer } from "../streams/answer";
import type { Listener, Running, Socket } from "../streams/answer";
import { promptOf, Tree } from "./tree";

const SAVE_PERIOD_MILLISECONDS = 1000;
const LONGEST_TITLE = 60;

/** The answer that is being made. */
export interface Live {
  id: string;
  content: string;
  /** Why nothing comes at the moment: the code of an error that passes. */
  waitingFor: string | null;
  /** In the queue for room in the swarm; 1 = next. */
  place: number | null;
  tokens: number;
  /** Milliseconds, as `performance.now()`; null until the first token. */
  firstTokenAt: number | null;
}

export interface Surroundings {
  history: History;
  connect: () => Socket;
  /** The model with this key, or the one that is used in its place. */
  modelFor: (key: string) => Model | undefined;
  /** Runs the callback soon, at most once a frame. */
  schedule: (callback: () => void) => void;
  /** The chat's entry in lists has changed. */
  changed: (chat: Chat) => void;
  /** An answer has ended. */
  answered: (message: Message) => void;
}

export class Conversation {
  readonly chat;
  readonly tree;
  readonly live = signal<Live | null>(null);
  /** The shown branch, oldest first. */
  readonly branch: ReadonlySignal<Message[]>;
  /** How many of the oldest questions the model is no longer told. */
  readonly leftOut = signal(0);
  /** Tokens of the context after the last answer, as the server counted them. */
  readonly contextTokens = signal<number | null>(null);
  readonly #around: Surroundings;
  #isSaved: boolean;
  #answer: Answer | null = null;
  #arrived = "";
  #isFlushing = false;
  #askedAt = 0;
  #savedAt = 0;

  constructor(chat: Chat, messages: Message[], isSaved: boolean, around: Surroundings) {
    this.chat = signal(chat);
    this.tree = signal(new Tree(messages));
    this.branch = computed(() => this.tree.value.branch(this.chat.value.current));
    this.#around = around;
    this.#isSaved = isSaved;
  }

  /** A chat that is kept from its first message on. */
  static begin(model: string, settings: ChatSettings, around: Surroundings): Conversation {
    const now = Date.now() / 1000;
    const nothing = { title: "", pinned: false, current: null, shared: null, created_at: now, updated_at: now };
    return new Conversation({ id: newId(), model, settings, ...nothing }, [], false, around);
  }

  /** A chat from the history. Goes on listening to an answer that is still being made. */
  static resume({ messages, ...chat }: WholeChat, around: Surroundings): Conversation {
    const conversation = new Conversation(chat, messages, true, around);
    const last = conversation.branch.value.at(-1);
    if (last?.state === "answering") conversation.#attach(last);
    return conversation;
  }

  get isAnswering(): boolean {
    return this.live.value !== null;
  }

  get isSaved(): boolean {
    return this.#isSaved;
  }

  /** Ask. Rejects with a `RequestError`, and is as before, if the question could not be kept. */
  async send(text: string): Promise<void> {
    const last = this.branch.value.at(-1);
    await this.#ask(text, last?.role === "user" ? last.parent : (last?.id ?? null));
  }

  /** Ask otherwise; the old question stays as a version. */
  async edit(id: string, text: string): Promise<void> {
    await this.#ask(text, this.tree.value.get(id)?.parent ?? null);
  }

  /** Answer once more; the old answer stays as a version. */
  regenerate(id: string): void {
    const message = this.tree.value.get(id);
    const question = message?.role === "user" ? message : this.tree.value.get(message?.parent ?? null);
    if (question !== undefined && !this.isAnswering) this.#askForAnswer(question);
  }

  /** Go on with an answer that was cut. */
  continue(id: string): void {
    const message = this.tree.value.get(id);
    if (message === undefined || message.parent === null || this.isAnswering) return;
    this.#start({ ...message, state: "answering", error: null, generation: null, finish_reason: null }, message.id, message.parent);
  }

  /** End the answer; what there is of it stays. */
  stop(): void {
    this.#answer?.stop();
  }

  /** No longer listen to the answer; it goes on. */
  leave(): void {
    this.#answer?.leave();
  }

  /** The network is back. */
  hurry(): void {
    this.#answer?.hurry();
  }

  /** Show the branch of this version. */
  async show(id: string): Promise<void> {
    if (this.isAnswering) return;
    await this.change({ current: this.tree.value.leafUnder(id) });
  }

  /** Leave out the older half of what the model was told, and try again. */
  makeRoom(id: string): void {
    const questions = this.branch.value.filter((message) => message.role === "user").length;
    const told = questions - this.leftOut.value;
    this.leftOut.value += Math.max(1, Math.floor(told / 2));
    const message = this.tree.value.get(id);
    if (message?.content) this.continue(id);
    else this.regenerate(id);
  }

  /** Change the chat's entry. Rejects with a `RequestError`, and is as before, if that could not be kept. */
  async change(changes: ChatChanges): Promise<void> {
    const before = this.chat.value;
    this.#changeChat(changes);
    if (!this.#isSaved) return;
    try {
      await this.#around.history.change(before.id, changes);
    } catch (error) {
      this.#changeChat(Object.fromEntries(Object.keys(changes).map((key) => [key, before[key as keyof Chat]])));
      throw error;
    }
  }

  noteShared(token: string | null): void {
    this.#changeChat({ shared: token });
  }

  async #ask(text: string, parent: string | null): Promise<void> {
    if (this.isAnswering) return;
    const { history } = this.#around;
    const before = { chat: this.chat.value, tree: this.tree.value };
    const question = newMessage({ id: newId(), parent, role: "user", content: text });
    this.tree.value = before.tree.with(question);
    this.#changeChat({ current: question.id, ...(before.chat.title ? {} : { title: titleOf(text) }) });
    try {
      if (!this.#isSaved) {
        const { id, title, model, settings } = this.chat.value;
        await history.create({ id, title, model, settings });
        this.#isSaved = true;
      }
      const kept = await history.addQuestion(before.chat.id, { id: question.id, parent, content: text });
      this.tree.value = this.tree.value.with(kept);
    } catch (error) {
      this.tree.value = before.tree;
      this.chat.value = this.#isSaved ? { ...this.chat.value, current: before.chat.current } : before.chat;
      throw error;
    }
    this.#askForAnswer(question);
  }

  #askForAnswer(question: Message): void {
    const id = newId();
    const { model } = this.chat.value;
    this.#start(newMessage({ id, parent: question.id, role: "assistant", content: "", model, state: "answering" }), question.id, question.id);
  }

  /** @param leaf The end of what the model is told. @param parent The question. */
  #start(message: Message, leaf: string, parent: string): void {
    const { id: chat, settings, model: key } = this.chat.value;
    const model = this.#around.modelFor(key);
    const { system, max_new_tokens, ...sampling } = settings;
    const request: AnswerRequest = {
      type: "answer",
      model: model?.key ?? key,
      messages: promptOf(this.tree.value.branch(leaf), system, this.leftOut.value),
      ...model?.chat.generation,
      ...sampling,
      ...(max_new_tokens ? { max_new_tokens } : {}),
      ...(this.#around.history.isOnServer ? { record: { chat, message: message.id, parent } } : {}),
    };
    this.#follow({ ...message, model: request.model }, request);
  }

  #attach(message: Message): void {
    const { isOnServer } = this.#around.history;
    if (message.generation === null) {
      // It was asked for, but the page was closed before the server said that it has begun.
      if (!isOnServer) this.#put({ ...message, state: "interrupted" });
      return;
    }
    this.#follow(message, { generation: message.generation, position: message.position ?? 0 });
  }

  #follow(message: Message, begin: AnswerRequest | Running): void {
    this.#put(message);
    this.#changeChat({ current: message.id, updated_at: Date.now() / 1000 });
    this.#savedAt = performance.now();
    this.#askedAt = this.#savedAt - 1000 * (message.seconds ?? 0);
    this.#arrived = "";
    const { id, content } = message;
    this.live.value = { id, content, waitingFor: null, place: null, tokens: message.tokens ?? 0, firstTokenAt: null };
    this.#answer = new Answer(begin, {
      connect: this.#around.connect,
      listener: this.#listener(message),
      ...(this.#around.history.isOnServer ? { recover: () => this.#recover(message) } : {}),
    });
  }

  #listener(begun: Message): Listener {
    const message = { ...begun };
    return {
      started: (generation) => {
        message.generation = generation;
        this.#save({ ...message });
      },
      waiting: (code) => this.#update({ waitingFor: code, place: null }),
      queued: (place) => this.#update({ waitingFor: null, place }),
      text: (text, tokens) => this.#receive(message, text, tokens),
      finished: (reason, promptTokens) => {
        if (promptTokens !== null) this.contextTokens.value = promptTokens + (this.#answer?.position ?? 0);
        message.finish_reason = reason;
        this.#end(message, reason === "stopped" ? "stopped" : "complete", null);
      },
      failed: (code) => {
        if (code === "unknown_generation") void this.#readEnd(message);
        else if (code === "engine_error") this.#end(message, "interrupted", null); // the server is being stopped
        else this.#end(message, "failed", code);
      },
    };
  }

  /** Tokens can come faster than frames; what came since the last one is shown at once. */
  #receive(message: Message, text: string, tokens: number): void {
    const live = this.live.value;
    if (live === null) return;
    this.#arrived += text;
    live.tokens += tokens;
    live.firstTokenAt ??= performance.now();
    if (!this.#isFlushing) {
      this.#isFlushing = true;
      this.#around.schedule(() => this.#flush());
    }
    if (performance.now() - this.#savedAt > SAVE_PERIOD_MILLISECONDS) {
      this.#savedAt = performance.now();
      this.#save({ ...message, ...this.#figures(message, live), content: live.content + this.#arrived, position: this.#answer?.position ?? null });
    }
  }

  #flush(): void {
    this.#isFlushing = false;
    const live = this.live.value;
    if (live === null || this.#arrived === "") return;
    const content = live.content + this.#arrived;
    this.#arrived = "";
    this.live.value = { ...live, content, waitingFor: null, place: null };
  }

  #update(changes: Partial<Live>): void {
    this.#flush(); // text that came before, or it would undo this
    if (this.live.value !== null) this.live.value = { ...this.live.value, ...changes };
  }

  #end(begun: Message, state: Message["state"], error: string | null): void {
    this.#flush();
    const live = this.live.value;
    if (live === null) return;
    this.#settle({ ...begun, ...this.#figures(begun, live), content: live.content, state, error, generation: null, position: null });
  }

  /** How long it has become, and taken; with what was there before it was continued. */
  #figures(begun: Message, live: Live): Pick<Message, "tokens" | "seconds" | "first_token_seconds"> {
    const seconds = (time: number) => (time - this.#askedAt) / 1000;
    const first = live.firstTokenAt === null ? null : seconds(live.firstTokenAt);
    return { tokens: live.tokens, seconds: seconds(performance.now()), first_token_seconds: begun.first_token_seconds ?? first };
  }

  #settle(message: Message): void {
    this.live.value = null;
    this.#answer = null;
    this.#put(message);
    this.#save(message);
    this.#changeChat({ updated_at: Date.now() / 1000 });
    this.#around.answered(message);
  }

  /** The server no longer knows the generation: the history says how it ended. */
  async #readEnd(begun: Message): Promise<void> {
    const { history } = this.#around;
    if (!history.isOnServer) return this.#end(begun, "interrupted", null);
    try {
      const found = (await history.read(this.chat.value.id)).messages.find(({ id }) => id === begun.id);
      if (found === undefined || found.state === "answering") return this.#end(begun, "interrupted", null);
      this.#arrived = "";
      this.#settle(found);
    } catch (error) {
      this.#end(begun, "failed", error instanceof RequestError ? error.code : "internal_error");
    }
  }

  /** The connection was lost before the server said that it has begun. */
  async #recover(begun: Message): Promise<Running | null | "over"> {
    const { messages } = await this.#around.history.read(this.chat.value.id);
    const found = messages.find(({ id }) => id === begun.id);
    const isContinued = begun.content !== "";
    if (found === undefined || (isContinued && found.state !== "answering" && found.content === begun.content)) return null;
    if (found.generation !== null) {
      this.#update({ content: found.content, tokens: found.tokens ?? 0 });
      return { generation: found.generation, position: found.position ?? 0 };
    }
    this.#settle(found);
    return "over";
  }

  #put(message: Message): void {
    this.tree.value = this.tree.value.with(message);
  }

  #save(message: Message): void {
    // What cannot be kept is still shown; the next save may succeed.
    this.#around.history.saveAnswer(this.chat.value.id, message).catch(() => undefined);
  }

  #changeChat(changes: Partial<Chat>): void {
    this.chat.value = { ...this.chat.value, ...changes };
    if (this.#isSaved) this.#around.changed(this.chat.value);
  }
}

/** A chat's title: the beginning of its first question. */
export function titleOf(text: string): string {
  const line = text.trim().split(/\s*\n/, 1)[0]!.replace(/\s+/g, " ");
  if (line.length <= LONGEST_TITLE) return line;
  const words = line.slice(0, LONGEST_TITLE).replace(/\s+\S*$/, "");
  return `${words || line.slice(0, LONGEST_TITLE)}…`;
}
