// @ts-check
/**
 * The chat: its turns, the session under them, and what happens when that breaks. Knows no page.
 *
 * A session's context is the chat's text; so a lost session costs nothing but a replay. That is how a chat goes
 * on after a stop (v2 ends a generation by closing its connection), after a lost connection, and with another
 * model.
 *
 * @typedef {import("./session.js").Model} Model
 *
 * @typedef {object} Turn
 * @property {string} question
 * @property {string} answer As the model wrote it, stop text included.
 * @property {"answering" | "waiting" | "finished" | "stopped" | "failed"} state
 * @property {string | null} error The code of what the turn waits for, or failed with.
 * @property {number | null} place In the queue for the swarm's memory, if it waits there; 1 = next.
 * @property {Model} model
 */

import { nextQuestion, visibleText, wholeChat, withoutStopText } from "./prompts.js";
import { Session, SessionError } from "./session.js";

const LONGEST_BACK_OFF_SECONDS = 15;
const MOST_RECONNECTIONS = 8;
const LOADING_POLL_SECONDS = 3;
/** The codes of errors that pass by themselves: a new session will do. */
const RECONNECTABLE = ["connection_lost", "model_loading", "session_expired"];

export class Chat {
  /** @type {Turn[]} */
  #turns = [];
  /** @type {Session | null} */
  #session = null;
  /** @type {AbortController | null} Ends the answer that is being made. */
  #stopper = null;
  /** @type {(turn: Turn) => void} */
  #changed;

  /** @param {(turn: Turn) => void} changed Called after each change of a turn. */
  constructor(changed) {
    this.#changed = changed;
  }

  get isAnswering() {
    return this.#stopper !== null;
  }

  /** @param {string} question @param {Model} model */
  ask(question, model) {
    // A question that never got an answer would only confuse the model.
    this.#turns = this.#turns.filter((turn) => turn.state === "finished" || textOf(turn) !== "");
    /** @type {Turn} */
    const turn = { question, answer: "", state: "answering", error: null, place: null, model };
    this.#turns.push(turn);
    return this.#answer(turn, this.#continuation(turn), RECONNECTABLE);
  }

  /** Go on with the last turn after it failed. @param {Turn} turn @param {Model} model */
  retry(turn, model) {
    turn.model = model;
    // A worker that was lost may need a moment to be back. Only people ask for that: it may be their question
    // that ends it each time.
    return this.#answer(turn, null, [...RECONNECTABLE, "worker_lost"]);
  }

  /** Take the last turn back. @param {Turn} turn */
  withdraw(turn) {
    this.#turns = this.#turns.filter((other) => other !== turn);
  }

  /** End the answer; what there is of it stays. */
  stop() {
    this.#stopper?.abort();
    this.#closeSession();
  }

  /** Forget everything. */
  reset() {
    this.stop();
    this.#turns = [];
  }

  /**
   * The new text for the open session; null if the chat needs a new one.
   *
   * @param {Turn} turn
   */
  #continuation(turn) {
    const previous = this.#turns.at(-2);
    const fits = this.#session?.isOpen && this.#session.model.key === turn.model.key;
    return fits && previous ? nextQuestion(previous.answer, turn.question, turn.model.chat) : null;
  }

  /** @param {Turn} turn @param {string | null} continuation @param {string[]} retryable Error codes. */
  async #answer(turn, continuation, retryable) {
    const { signal } = (this.#stopper = new AbortController());
    this.#update(turn, "answering", null);
    for (let attempt = 0; ; ) {
      try {
        const inputs = continuation ?? this.#openSession(turn);
        const receive = (/** @type {string} */ outputs) => {
          attempt = 0;
          turn.answer += outputs;
          this.#update(turn, "answering", null);
        };
        await this.#session?.generate(inputs, receive, (place) => this.#update(turn, "waiting", null, place));
        return this.#end(turn, "finished", null);
      } catch (error) {
        if (!(error instanceof SessionError)) throw error;
        this.#closeSession();
        continuation = null;
        if (!signal.aborted) {
          const delay = retryable.includes(error.code) ? retryDelaySeconds(error.code, attempt++) : null;
          if (delay === null) return this.#end(turn, "failed", error.code);
          this.#update(turn, "waiting", error.code);
          await sleep(delay, signal);
        }
        if (signal.aborted) return this.#end(turn, "stopped", null);
      }
    }
  }

  /** @param {Turn} turn @param {Turn["state"]} state @param {string | null} error */
  #end(turn, state, error) {
    this.#stopper = null;
    this.#update(turn, state, error);
  }

  /** A new session, and the text of the chat for it. @param {Turn} turn */
  #openSession(turn) {
    this.#closeSession();
    this.#session = new Session(turn.model);
    const exchanges = this.#turns.map(({ question, answer, model }) => ({
      question,
      answer: withoutStopText(answer, model.chat),
    }));
    return wholeChat(exchanges, turn.model.chat);
  }

  #closeSession() {
    this.#session?.close();
    this.#session = null;
  }

  /** @param {Turn} turn @param {Turn["state"]} state @param {string | null} error @param {number | null} place */
  #update(turn, state, error, place = null) {
    turn.state = state;
    turn.error = error;
    turn.place = place;
    // A turn that was forgotten still has to end, but that is nobody's business.
    if (this.#turns.includes(turn)) this.#changed(turn);
  }
}

/** The answer as people see it. @param {Turn} turn */
export function textOf(turn) {
  return visibleText(turn.answer, turn.model.chat, turn.state !== "answering" && turn.state !== "waiting");
}

/**
 * Seconds until the next attempt; null = people have to decide.
 *
 * @param {string} code
 * @param {number} attempt Attempts in a row that brought no text, before this one.
 */
function retryDelaySeconds(code, attempt) {
  if (code === "model_loading") return LOADING_POLL_SECONDS;
  return attempt < MOST_RECONNECTIONS ? Math.min(0.5 * 2 ** attempt, LONGEST_BACK_OFF_SECONDS) : null;
}

/** @param {number} seconds @param {AbortSignal} signal Ends it early. */
function sleep(seconds, signal) {
  return new Promise((resolve) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      resolve(undefined);
    });
  });
}
