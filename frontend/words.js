// @ts-check
/**
 * What the page says when something is wrong, by the server's error code. Models' own words are never here.
 *
 * @typedef {import("./session.js").Model} Model
 */

/** @type {Record<string, string>} */
const WAITING = {
  connection_lost: "The connection to the server was lost. Trying to reach it again…",
  session_expired: "The server has forgotten this chat. Telling it again…",
  model_loading: "The model is still loading. The answer comes as soon as it is ready…",
  worker_lost: "The program that runs this model is being started again. The answer comes as soon as it is ready…",
};

/** @type {Record<string, string>} */
const FAILED = {
  attention_cache_full: "The machines that run this model have no room for another chat right now. Try again in a moment.",
  connection_lost: "The server cannot be reached. Check your internet connection, then try again.",
  deadline_exceeded: "The answer took longer than this server allows, so it was ended here.",
  maximum_length_exceeded: "This chat has grown longer than the model can remember. Start a new one to go on.",
  message_too_large: "This message is too long for the server. Please shorten it.",
  missing_blocks: "Nobody is running some of the parts of this model right now. Try again later, or choose another model.",
  model_not_public: "This model can only be used from the server's own page.",
  model_unavailable: "This model could not be started. Try again later, or choose another model.",
  session_expired: "The server keeps forgetting this chat. Try again in a moment.",
  swarm_unreachable: "The machines that run this model do not answer right now. Try again in a moment.",
  too_many_requests: "Too many people are using this server right now. Try again in a moment.",
  unknown_model: "This server no longer has this model. Reload the page to see the models it has.",
  worker_lost: "The program that runs this model broke off and is being started again. Try again in a moment.",
};

/** @param {string} code */
export function waitingSentence(code) {
  return WAITING[code] ?? "Trying again…";
}

/** @param {number} place 1 = next. */
export function queueSentence(place) {
  const others = place === 1 ? "You are next." : `There are ${place - 1} before you.`;
  return `The machines that run this model have no room for more chats at the moment. ${others}`;
}

/** @param {string} code */
export function failureSentence(code) {
  return FAILED[code] ?? "Something went wrong on the server. Try again; if it stays like this, tell the people who run it.";
}

/**
 * Why the model cannot answer at the moment; empty if it can.
 *
 * @param {Model} model
 */
export function modelSentence(model) {
  switch (model.state) {
    case "loading":
      return `${model.name} is still loading. You can write already: it answers when it is ready.`;
    case "broken":
      return `${model.name} cannot answer right now: nobody runs ${blocks(model.missing_blocks)}.`;
    case "unavailable":
      return `${model.name} cannot answer right now: it could not be started.`;
    default:
      return "";
  }
}

/** A word for the list of models; empty for a model that is ready. @param {Model} model */
export function modelRemark(model) {
  return { loading: "loading", broken: "incomplete", unavailable: "not running", ready: "" }[model.state];
}

/** @param {number[]} missing */
function blocks(missing) {
  if (missing.length === 0) return "some of its parts";
  return missing.length === 1 ? "one of its parts" : `${missing.length} of its parts`;
}
