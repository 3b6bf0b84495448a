// @ts-check
/**
 * The page: what is on it, and what people do there. What a chat is stands in chat.js.
 *
 * Text of models and people is only ever set as textContent: to the page it is hostile.
 *
 * @typedef {import("./chat.js").Turn} Turn
 * @typedef {import("./session.js").Model} Model
 */

import { Chat, textOf } from "./chat.js";
import { fetchModels } from "./session.js";
import { failureSentence, modelRemark, modelSentence, queueSentence, waitingSentence } from "./words.js";

const READY_POLL_SECONDS = 30;
const UNREADY_POLL_SECONDS = 3;
const NEAR_THE_END_PIXELS = 80;

const page = {
  model: /** @type {HTMLSelectElement} */ (byId("model")),
  newChat: /** @type {HTMLButtonElement} */ (byId("new-chat")),
  welcome: byId("welcome"),
  samples: byId("samples"),
  turns: byId("turns"),
  toLatest: byId("to-latest"),
  modelStatus: byId("model-status"),
  composer: /** @type {HTMLFormElement} */ (byId("composer")),
  message: /** @type {HTMLTextAreaElement} */ (byId("message")),
  send: /** @type {HTMLButtonElement} */ (byId("send")),
  stop: byId("stop"),
  modelLinks: byId("model-links"),
  announcer: byId("announcer"),
  turnTemplate: /** @type {HTMLTemplateElement} */ (byId("turn")),
};

/** @type {Model[]} */
let models = [];
/** @type {Map<Turn, HTMLElement>} */
const articles = new Map();
/** @type {Set<Turn>} Turns that changed since the last frame. */
const changedTurns = new Set();
let followsAnswer = true;
let scrolledTo = 0;

const chat = new Chat((turn) => {
  // Tokens can come faster than frames; and a page that nobody sees has no frames.
  if (changedTurns.size === 0) requestAnimationFrame(showChanges);
  changedTurns.add(turn);
});

/* Sending and stopping */

page.composer.addEventListener("submit", (event) => {
  event.preventDefault();
  const question = page.message.value.trim();
  if (question === "" || chosenModel() === undefined || chat.isAnswering) return;
  page.message.value = "";
  fitMessage();
  ask(question);
});

page.message.addEventListener("keydown", (event) => {
  // While a word is being composed (Chinese, Japanese...), Enter belongs to the input method.
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  page.composer.requestSubmit();
});

page.message.addEventListener("input", fitMessage);
page.stop.addEventListener("click", () => chat.stop());
page.newChat.addEventListener("click", startNewChat);

/** @param {string} question */
function ask(question) {
  const model = chosenModel();
  if (model === undefined || chat.isAnswering) return;
  followsAnswer = true;
  run(chat.ask(question, model));
}

/** @param {Promise<void>} answering */
async function run(answering) {
  showControls();
  focusMessage();
  await answering;
  showControls();
}

function startNewChat() {
  chat.reset();
  articles.clear();
  changedTurns.clear();
  page.turns.replaceChildren();
  showControls();
  focusMessage();
}

function showControls() {
  page.send.hidden = chat.isAnswering;
  page.stop.hidden = !chat.isAnswering;
  page.newChat.disabled = articles.size === 0 && !chat.isAnswering;
  page.welcome.hidden = articles.size > 0 || chat.isAnswering;
}

function fitMessage() {
  page.message.style.height = "auto";
  page.message.style.height = `${page.message.scrollHeight}px`;
}

function focusMessage() {
  // On a touch screen this would bring up the keyboard, over the answer.
  if (matchMedia("(pointer: fine)").matches) page.message.focus();
}

/* Turns */

function showChanges() {
  for (const turn of changedTurns) showTurn(turn);
  changedTurns.clear();
  if (followsAnswer) scrollToEnd();
  else page.toLatest.hidden = pixelsBelow() < NEAR_THE_END_PIXELS;
}

/** @param {Turn} turn */
function showTurn(turn) {
  const article = articles.get(turn) ?? addArticle(turn);
  const answer = /** @type {HTMLElement} */ (article.querySelector(".answer"));
  answer.textContent = textOf(turn);
  article.dataset.state = turn.state;
  showOutcome(turn, article);
  if (turn.state === "finished") page.announcer.textContent = answer.textContent;
}

/** @param {Turn} turn */
function addArticle(turn) {
  for (const button of page.turns.querySelectorAll(".outcome button")) button.remove();
  const fragment = /** @type {DocumentFragment} */ (page.turnTemplate.content.cloneNode(true));
  const article = /** @type {HTMLElement} */ (fragment.firstElementChild);
  /** @type {HTMLElement} */ (article.querySelector(".question")).textContent = turn.question;
  page.turns.append(article);
  articles.set(turn, article);
  showControls();
  return article;
}

/** @param {Turn} turn @param {HTMLElement} article */
function showOutcome(turn, article) {
  const outcome = /** @type {HTMLElement} */ (article.querySelector(".outcome"));
  const sentence = /** @type {HTMLElement} */ (outcome.querySelector("p"));
  const button = /** @type {HTMLButtonElement | null} */ (outcome.querySelector("button"));
  const text = outcomeSentence(turn);
  if (sentence.textContent !== text) {
    sentence.textContent = text;
    page.announcer.textContent = text;
  }
  outcome.hidden = text === "";
  if (button === null) return; // another turn follows
  button.hidden = turn.state !== "failed";
  if (turn.state === "failed") [button.textContent, button.onclick] = remedy(turn, article);
}

/** @param {Turn} turn */
function outcomeSentence(turn) {
  if (turn.place !== null) return queueSentence(turn.place);
  if (turn.state === "waiting") return waitingSentence(turn.error ?? "");
  if (turn.state === "failed") return failureSentence(turn.error ?? "");
  return turn.state === "stopped" ? "You stopped this answer." : "";
}

/**
 * What can be done about a failed turn: a button's words and deed.
 *
 * @param {Turn} turn
 * @param {HTMLElement} article
 * @returns {[string, () => void]}
 */
function remedy(turn, article) {
  switch (turn.error) {
    case "maximum_length_exceeded":
      return ["Start a new chat", startNewChat];
    case "message_too_large":
      return [
        "Edit the message",
        () => {
          chat.withdraw(turn);
          articles.delete(turn);
          article.remove();
          page.message.value = turn.question;
          fitMessage();
          showControls();
          focusMessage();
        },
      ];
    default:
      return ["Try again", () => run(chat.retry(turn, chosenModel() ?? turn.model))];
  }
}

/* Following the answer, unless people scroll away from its end */

addEventListener("scroll", () => {
  const { scrollTop } = document.documentElement;
  const below = pixelsBelow();
  // The slightest movement upwards counts, or each new token would undo it.
  followsAnswer = below < (scrollTop < scrolledTo ? 2 : NEAR_THE_END_PIXELS);
  scrolledTo = scrollTop;
  page.toLatest.hidden = below < NEAR_THE_END_PIXELS;
});

page.toLatest.addEventListener("click", () => {
  scrollToEnd();
  focusMessage();
});

function pixelsBelow() {
  const { scrollHeight, clientHeight, scrollTop } = document.documentElement;
  return scrollHeight - clientHeight - scrollTop;
}

function scrollToEnd() {
  scrollTo({ top: document.documentElement.scrollHeight });
}

/* Models */

function chosenModel() {
  return models.find((model) => model.key === page.model.value);
}

async function watchModels() {
  for (;;) {
    if (!document.hidden) await refreshModels();
    const ready = chosenModel()?.state === "ready";
    await new Promise((resolve) => setTimeout(resolve, 1000 * (ready ? READY_POLL_SECONDS : UNREADY_POLL_SECONDS)));
  }
}

async function refreshModels() {
  try {
    showModels(await fetchModels());
  } catch {
    page.modelStatus.textContent = "The server cannot be reached. Trying again…";
    page.modelStatus.hidden = false;
  }
}

/** @param {Model[]} newModels */
function showModels(newModels) {
  // Rebuilding the list would close it under the hands of someone who is choosing.
  if (JSON.stringify(newModels) !== JSON.stringify(models)) {
    const chosen = chosenModel()?.key ?? newModels.find((model) => model.default)?.key;
    models = newModels;
    page.model.replaceChildren(...families().map(familyGroup));
    page.model.disabled = false;
    if (chosen !== undefined && models.some((model) => model.key === chosen)) page.model.value = chosen;
  }
  showChosenModel();
}

function families() {
  return [...new Set(models.map((model) => model.family))];
}

/** @param {string} family */
function familyGroup(family) {
  const group = document.createElement("optgroup");
  group.label = family;
  for (const model of models.filter((candidate) => candidate.family === family)) {
    const remark = modelRemark(model);
    group.append(new Option(remark ? `${model.name} (${remark})` : model.name, model.key));
  }
  return group;
}

function showChosenModel() {
  const model = chosenModel();
  if (model === undefined) return;
  page.modelStatus.textContent = modelSentence(model);
  page.modelStatus.hidden = page.modelStatus.textContent === "";
  showSamples(model);
  page.modelLinks.replaceChildren();
  if (model.model_card) page.modelLinks.append(newTabLink("Model card", model.model_card));
  if (model.license) page.modelLinks.append(newTabLink("Licence", model.license));
}

/** @param {Model} model */
function showSamples(model) {
  if (page.samples.dataset.model === model.key) return; // whoever is on a button stays there
  page.samples.dataset.model = model.key;
  page.samples.replaceChildren(
    ...model.chat.sample_questions.map((question) => {
      const item = document.createElement("li");
      const button = document.createElement("button");
      button.type = "button";
      button.className = "quiet";
      button.textContent = question;
      button.onclick = () => ask(question);
      item.append(button);
      return item;
    }),
  );
}

/** @param {string} words @param {string} url */
function newTabLink(words, url) {
  const link = document.createElement("a");
  link.textContent = words;
  link.href = url;
  link.target = "_blank";
  link.rel = "noopener";
  return link;
}

page.model.addEventListener("change", showChosenModel);

/** @param {string} id */
function byId(id) {
  return /** @type {HTMLElement} */ (document.getElementById(id));
}

watchModels();
