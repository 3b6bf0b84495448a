/** A server of the answer frames, in the same process: generates on, whoever listens, and can lose connections. */

import type { Frame } from "../src/contract";
import type { Socket } from "../src/streams/answer";

interface Token {
  text: string;
  count: number;
}

export class FakeServer {
  /** Pieces of each answer. */
  pieces: Token[];
  finish: Frame = { ok: true, outputs: "", token_count: 0, stop: true, finish_reason: "stop", prompt_tokens: 7 };
  /** What was received, of all connections. */
  readonly received: Record<string, unknown>[] = [];
  /** Errors for the next requests. */
  readonly refusals: string[] = [];
  /** With what answers fail that have begun. */
  failure: string | null = null;
  /** Its model is being loaded: answers wait for it. */
  isLoading = false;
  /** Connections break after so many frames, in turn; then none breaks. */
  readonly cuts: number[] = [];
  /** Whether it can be reached at all. */
  isUp = true;
  /** Attempts to connect get no reply at all. */
  isSilent = false;
  made = 0;
  isStopped = false;
  hasForgotten = false;
  readonly #sockets = new Set<FakeSocket>();

  constructor(pieces: string[] | Token[]) {
    this.pieces = pieces.map((piece) => (typeof piece === "string" ? { text: piece, count: 1 } : piece));
  }

  readonly connect = (): Socket => {
    const socket = new FakeSocket(this, this.cuts.shift() ?? Infinity);
    this.#sockets.add(socket);
    return socket;
  };

  /** Generate one piece more; false if there is none. */
  make(): boolean {
    if (this.made >= this.pieces.length || this.isStopped) return false;
    this.made++;
    this.#sockets.forEach((socket) => socket.pump());
    return true;
  }

  makeAll(): void {
    while (this.make());
  }

  loseConnections(): void {
    this.#sockets.forEach((socket) => socket.lose());
  }

  forget(socket: FakeSocket): void {
    this.#sockets.delete(socket);
  }

  stop(): void {
    this.isStopped = true;
    this.#sockets.forEach((socket) => socket.pump());
  }

  /** How many are open, or being opened. */
  get connections(): number {
    return this.#sockets.size;
  }

  get tokensMade(): number {
    return this.pieces.slice(0, this.made).reduce((sum, { count }) => sum + count, 0);
  }
}

class FakeSocket implements Socket {
  onopen: (() => void) | null = null;
  onmessage: ((event: { data: string }) => void) | null = null;
  onclose: (() => void) | null = null;
  #position: number | null = null;
  #hasEnded = false;
  #isOpen = false;
  readonly #server: FakeServer;
  #framesLeft: number;

  constructor(server: FakeServer, framesLeft: number) {
    this.#server = server;
    this.#framesLeft = framesLeft;
    setTimeout(() => {
      if (server.isSilent) return;
      if (!server.isUp) return this.lose();
      this.#isOpen = true;
      this.onopen?.();
    });
  }

  send(text: string): void {
    const message = JSON.parse(text) as Record<string, unknown>;
    this.#server.received.push(message);
    setTimeout(() => this.#answer(message));
  }

  close(): void {
    this.#isOpen = false;
    this.#server.forget(this);
  }

  lose(): void {
    this.close();
    this.onclose?.();
  }

  /** Send what is new; all that is behind comes as one piece, as the real server does. */
  pump(): void {
    const server = this.#server;
    if (this.#position === null || this.#hasEnded || !this.#isOpen || (server.isLoading && !server.isStopped)) return;
    let position = 0;
    let text = "";
    for (const piece of server.pieces.slice(0, server.made)) {
      position += piece.count;
      if (position > this.#position) text += piece.text;
    }
    if (position > this.#position) {
      const count = position - this.#position;
      this.#position = position;
      this.#put({ ok: true, outputs: text, token_count: count, stop: false, position });
    }
    if (server.isStopped || server.made === server.pieces.length) {
      this.#hasEnded = true;
      this.#put({ ...server.finish, position, ...(server.isStopped ? { finish_reason: "stopped" as const } : {}) });
    }
  }

  #answer(message: Record<string, unknown>): void {
    if (!this.#isOpen) return;
    const refusal = message["type"] === "stop" ? undefined : this.#server.refusals.shift();
    if (refusal !== undefined || (message["type"] === "attach" && this.#server.hasForgotten)) {
      this.#put({ ok: false, code: refusal ?? "unknown_generation" });
      return this.lose();
    }
    if (message["type"] === "stop") return this.#server.stop();
    this.#position = message["type"] === "attach" ? (message["position"] as number) : 0;
    if (message["type"] === "answer") this.#put({ ok: true, generation: "generation-1" });
    if (this.#server.failure !== null) {
      this.#put({ ok: false, code: this.#server.failure });
      return this.lose();
    }
    if (this.#server.isLoading) this.#put({ ok: true, waiting_for: "model_loading" });
    this.pump();
  }

  #put(frame: Frame): void {
    if (!this.#isOpen) return;
    if (this.#framesLeft-- <= 0) return this.lose();
    this.onmessage?.({ data: JSON.stringify(frame) });
  }
}
