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
 * @property {Model} model
 */

import { nextQuestion, visibleText, wholeChat } from "./prompts.js";
import { Session, SessionError } from "./session.js";

const LONGEST_BACK_OFF_SECONDS = 15;
const MOST_RECONNECTIONS = 8;
const LOADING_POLL_SECONDS = 3;

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
    const turn = { question, answer: "", state: "answering", error: null, model };
    this.#turns.push(turn);
    return this.#answer(turn, this.#continuation(turn));
  }

  /** Go on with the last turn after it failed. @param {Turn} turn @param {Model} model */
  retry(turn, model) {
    turn.model = model;
    return this.#answer(turn, null);
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

  /** @param {Turn} turn @param {string | null} continuation */
  async #answer(turn, continuation) {
    const { signal } = (this.#stopper = new AbortController());
    let attempt = 0;
    for (;;) {
      this.#update(turn, "answering", null);
      try {
        const inputs = continuation ?? this.#openSession(turn);
        await this.#session?.generate(inputs, (outputs) => {
          attempt = 0;
          turn.answer += outputs;
          this.#tell(turn);
        });
        this.#stopper = null;
        return this.#update(turn, "finished", null);
      } catch (error) {
        if (!(error instanceof SessionError)) throw error;
        this.#closeSession();
        continuation = null;
        const delay = retryDelaySeconds(error.code, attempt++);
        if (!signal.aborted && delay !== null) {
          this.#update(turn, "waiting", error.code);
          await sleep(delay, signal);
        }
        if (signal.aborted || delay === null) {
          if (this.#stopper?.signal === signal) this.#stopper = null;
          return this.#update(turn, signal.aborted ? "stopped" : "failed", signal.aborted ? null : error.code);
        }
      }
    }
  }

  /** A new session, and the text of the chat for it. @param {Turn} turn */
  #openSession(turn) {
    this.#closeSession();
    this.#session = new Session(turn.model);
    return wholeChat(this.#turns, turn.model.chat);
  }

  #closeSession() {
    this.#session?.close();
    this.#session = null;
  }

  /** @param {Turn} turn @param {Turn["state"]} state @param {string | null} error */
  #update(turn, state, error) {
    turn.state = state;
    turn.error = error;
    this.#tell(turn);
  }

  /** A turn that was forgotten still has to end, but that is nobody's business. @param {Turn} turn */
  #tell(turn) {
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
  const lost = code === "connection_lost" || code === "session_expired";
  return lost && attempt < MOST_RECONNECTIONS ? Math.min(0.5 * 2 ** attempt, LONGEST_BACK_OFF_SECONDS) : null;
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
