/**
 * One answer over the WebSocket API: asked for, or attached to; followed over lost connections until its end.
 *
 * A generation belongs to the server and outlives the connection. So a lost one is made anew, and attached where
 * the last one ended. Knows no page, and no history.
 */

import type { AnswerRequest, FinishReason, Frame } from "../contract";
import { backOff } from "../retries";
import { FrameReader } from "./frames";

/** What of a WebSocket is used here. */
export interface Socket {
  onopen: (() => void) | null;
  onmessage: ((event: { data: string }) => void) | null;
  onclose: (() => void) | null;
  send(text: string): void;
  close(): void;
}

export interface Listener {
  /** The server has begun; `generation` attaches to it. */
  started(generation: string): void;
  /** Nothing comes at the moment, and why: an error's code that passes by itself. */
  waiting(code: string): void;
  queued(place: number): void;
  text(text: string, tokens: number): void;
  finished(reason: FinishReason, promptTokens: number | null): void;
  failed(code: string): void;
}

export interface Running {
  generation: string;
  /** Tokens that are known already. */
  position: number;
}

export interface AnswerOptions {
  connect: () => Socket;
  listener: Listener;
  /**
   * Asked when the connection was lost before the server said that it has begun: gives what runs, null if nothing
   * does and it is to be asked for again, or "over" if whoever is asked takes it from here.
   */
  recover?: () => Promise<Running | null | "over">;
}

/** An attempt to connect that takes longer has failed. */
const CONNECT_SECONDS = 10;
/** How long a stopped answer's last frame is waited for. */
const STOP_SECONDS = 5;

export class Answer {
  readonly #request: AnswerRequest | null;
  readonly #options: AnswerOptions;
  #reader: FrameReader;
  #generation: string | null = null;
  #socket: Socket | null = null;
  #isConnected = false;
  #wasAsked = false;
  /** It is found out what runs, or a connection is about to be made. */
  #isReconnecting = false;
  #failures = 0;
  #timer: ReturnType<typeof setTimeout> | undefined;
  #stopTimer: ReturnType<typeof setTimeout> | undefined;
  #isStopping = false;
  #isOver = false;

  /** Starts at once: asks for an answer, or attaches to one that runs. */
  constructor(begin: AnswerRequest | Running, options: AnswerOptions) {
    this.#options = options;
    this.#request = "type" in begin ? begin : null;
    this.#reader = new FrameReader("type" in begin ? 0 : begin.position);
    if (!("type" in begin)) this.#generation = begin.generation;
    this.#connect();
  }

  /** Tokens of this generation so far. */
  get position(): number {
    return this.#reader.position;
  }

  /** End the generation. What came of it stays; `finished("stopped")` follows. */
  stop(): void {
    if (this.#isOver || this.#isStopping) return;
    this.#isStopping = true;
    if (!this.#wasAsked && this.#generation === null) return this.#finish("stopped", null);
    this.#sendStop();
    this.#stopTimer = setTimeout(() => this.#finish("stopped", null), STOP_SECONDS * 1000);
    if (this.#socket === null) this.hurry(); // to tell the server
  }

  /** No longer listen. The generation goes on. */
  leave(): void {
    this.#end();
  }

  /** Do not wait for the next attempt: there is reason to hope. */
  hurry(): void {
    if (this.#isOver || this.#isReconnecting || this.#socket !== null || this.#failures === 0) return;
    clearTimeout(this.#timer);
    void this.#reconnect();
  }

  #connect(): void {
    this.#hangUp();
    const socket = this.#options.connect();
    this.#socket = socket;
    this.#timer = setTimeout(() => this.#lost(), CONNECT_SECONDS * 1000);
    socket.onopen = () => {
      if (socket !== this.#socket) return;
      clearTimeout(this.#timer);
      this.#isConnected = true;
      this.#begin();
    };
    socket.onmessage = (event) => {
      if (socket === this.#socket) this.#receive(JSON.parse(event.data) as Frame);
    };
    socket.onclose = () => {
      if (socket === this.#socket) this.#lost();
    };
  }

  #begin(): void {
    if (this.#generation !== null) {
      this.#send({ type: "attach", generation: this.#generation, position: this.#reader.position });
    } else if (this.#isStopping) {
      return this.#finish("stopped", null); // nothing runs that could be stopped
    } else if (this.#request !== null) {
      this.#wasAsked = true;
      this.#send(this.#request);
    }
    if (this.#isStopping) this.#sendStop();
  }

  #receive(frame: Frame): void {
    const { listener } = this.#options;
    for (const event of this.#reader.read(frame)) {
      if (this.#isOver) return;
      if (event.kind !== "failed") this.#failures = 0;
      switch (event.kind) {
        case "started":
          this.#generation = event.generation;
          listener.started(event.generation);
          if (this.#isStopping) this.#sendStop();
          break;
        case "queued":
          listener.queued(event.place);
          break;
        case "waiting":
          listener.waiting(event.code);
          break;
        case "text":
          listener.text(event.text, event.tokens);
          break;
        case "gap":
          this.#connect();
          return;
        case "finished":
          this.#finish(event.reason, event.promptTokens);
          break;
        case "failed":
          this.#refused(event.code);
      }
    }
  }

  /** The server sent an error; it closes the connection after it. */
  #refused(code: string): void {
    this.#hangUp();
    if (this.#isStopping) return this.#finish("stopped", null);
    if (code === "session_expired" && this.#generation === null) {
      this.#wasAsked = false;
      return this.#again(code);
    }
    this.#end();
    this.#options.listener.failed(code);
  }

  #lost(): void {
    this.#hangUp();
    if (this.#isOver) return;
    this.#again("connection_lost");
  }

  #again(code: string): void {
    this.#failures++;
    if (!this.#isStopping) this.#options.listener.waiting(code);
    this.#timer = setTimeout(() => void this.#reconnect(), backOff(this.#failures) * 1000);
  }

  async #reconnect(): Promise<void> {
    this.#isReconnecting = true;
    try {
      await this.#recover();
    } catch {
      if (!this.#isOver) this.#again("connection_lost");
      return;
    } finally {
      this.#isReconnecting = false;
    }
    if (!this.#isOver) this.#connect();
  }

  /** Find out what came of the request, if that is unknown. */
  async #recover(): Promise<void> {
    const { recover } = this.#options;
    if (!recover || !this.#wasAsked || this.#generation !== null) return;
    const found = await recover();
    if (this.#isOver || found === null) return;
    if (found === "over") return this.leave();
    this.#generation = found.generation;
    this.#reader = new FrameReader(found.position);
  }

  #finish(reason: FinishReason, promptTokens: number | null): void {
    if (this.#isOver) return;
    this.#end();
    this.#options.listener.finished(reason, promptTokens);
  }

  #end(): void {
    this.#isOver = true;
    clearTimeout(this.#stopTimer);
    this.#hangUp();
  }

  #sendStop(): void {
    if (this.#isConnected && this.#generation !== null) this.#send({ type: "stop", generation: this.#generation });
  }

  #send(message: object): void {
    this.#socket?.send(JSON.stringify(message));
  }

  #hangUp(): void {
    clearTimeout(this.#timer);
    this.#isConnected = false;
    const socket = this.#socket;
    this.#socket = null;
    if (socket === null) return;
    socket.onopen = socket.onmessage = socket.onclose = null;
    socket.close();
  }
}

/** The address is relative to the page's, so that the page also works under a sub-path. */
export function openSocket(): Socket {
  const url = new URL("api/v2/generate", document.baseURI);
  url.hash = "";
  url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
  return new WebSocket(url) as Socket;
}
