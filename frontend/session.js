// @ts-check
/**
 * One inference session over the WebSocket API v2. This is the only module that knows the wire.
 *
 * A session belongs to its connection: closing it ends what is being generated. The address is relative to the
 * page's, so that the page also works under a sub-path.
 *
 * @typedef {import("./prompts.js").ChatFormat} ChatFormat
 *
 * @typedef {object} Model An entry of /api/models.
 * @property {string} key
 * @property {string} name
 * @property {string} family
 * @property {string | null} model_card
 * @property {string | null} license
 * @property {boolean} default
 * @property {"loading" | "ready" | "broken" | "unavailable"} state
 * @property {number[]} missing_blocks
 * @property {number} max_session_length
 * @property {ChatFormat} chat
 */

/** Why a generation failed: the server's error code, or "connection_lost". */
export class SessionError extends Error {
  /** @param {string} code */
  constructor(code) {
    super(code);
    this.code = code;
  }
}

/** The served models, in the order of their families. */
export async function fetchModels() {
  const response = await fetch("api/models");
  if (!response.ok) throw new SessionError("connection_lost");
  return /** @type {Model[]} */ ((await response.json()).models);
}

export class Session {
  /** @type {WebSocket} */
  #socket;
  /** @type {string[]} Frames for when the connection is open. */
  #unsent = [];
  /**
   * @type {{receive: (outputs: string) => void, wait: (place: number) => void, resolve: () => void,
   *   reject: (error: SessionError) => void} | null}
   */
  #generation = null;

  /** @param {Model} model */
  constructor(model) {
    this.model = model;
    const url = new URL("api/v2/generate", document.baseURI);
    url.protocol = url.protocol === "https:" ? "wss:" : "ws:";
    this.#socket = new WebSocket(url);
    this.#socket.onopen = () => this.#unsent.splice(0).forEach((frame) => this.#socket.send(frame));
    this.#socket.onmessage = (event) => this.#receive(JSON.parse(event.data));
    this.#socket.onclose = () => this.#fail("connection_lost");
    this.#send({
      type: "open_inference_session",
      model: model.key,
      max_length: model.max_session_length,
      queue_places: true,
    });
  }

  get isOpen() {
    return this.#socket.readyState <= WebSocket.OPEN;
  }

  /**
   * Add `inputs` to the context and generate until the model ends its answer.
   *
   * @param {string} inputs
   * @param {(outputs: string) => void} receive Gets each piece of the answer.
   * @param {(place: number) => void} wait Gets the place in the queue, while the swarm has no room; 1 = next.
   * @returns {Promise<void>} Rejects with a `SessionError`; the session is closed then.
   */
  generate(inputs, receive, wait) {
    const { stop_token, extra_stop_sequences, generation } = this.model.chat;
    return new Promise((resolve, reject) => {
      this.#generation = { receive, wait, resolve, reject };
      this.#send({
        type: "generate",
        inputs,
        max_new_tokens: 1, // one reply for each token
        stop_sequence: stop_token,
        extra_stop_sequences,
        ...generation,
      });
    });
  }

  /** End the session, and with it what is being generated, which then fails with "connection_lost". */
  close() {
    this.#socket.close();
    this.#fail("connection_lost"); // the closing handshake may take its time
  }

  /** @param {object} message */
  #send(message) {
    const frame = JSON.stringify(message);
    if (this.#socket.readyState === WebSocket.CONNECTING) this.#unsent.push(frame);
    else this.#socket.send(frame);
  }

  /** @param {{ok: boolean, outputs?: string, stop?: boolean, queue_place?: number, code?: string}} reply */
  #receive(reply) {
    if (!reply.ok) {
      this.#fail(reply.code ?? "internal_error");
      this.#socket.close();
    } else if (reply.queue_place !== undefined) {
      this.#generation?.wait(reply.queue_place);
    } else if (reply.outputs !== undefined && this.#generation) {
      this.#generation.receive(reply.outputs);
      if (reply.stop) {
        this.#generation.resolve();
        this.#generation = null;
      }
    }
  }

  /** @param {string} code */
  #fail(code) {
    this.#generation?.reject(new SessionError(code));
    this.#generation = null;
  }
}
