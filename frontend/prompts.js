// @ts-check
/**
 * How a chat becomes text for the model, and how the model's text becomes what people see.
 *
 * Pure functions: they know neither the page nor the network. An "answer" is exactly what the model wrote, with
 * its stop text, unless it says otherwise: the model's context has it like that too.
 *
 * @typedef {object} ChatFormat How a model wants its chats worded.
 * @property {string} sep_token Stands between the turns.
 * @property {string} stop_token Ends an answer.
 * @property {string[]} extra_stop_sequences End an answer too.
 * @property {Record<string, number | boolean>} generation Sampling parameters.
 * @property {string[]} sample_questions What a new chat may begin with.
 *
 * @typedef {object} Exchange
 * @property {string} question
 * @property {string} answer Without stop text.
 */

const INTRODUCTION =
  "A chat between a curious human and an artificial intelligence assistant. " +
  "The assistant gives helpful, detailed, and polite answers to the human's questions.";

/**
 * The whole chat, for a new session. What the last answer already has is part of it, so that the model goes on
 * from there.
 *
 * @param {Exchange[]} exchanges
 * @param {ChatFormat} format
 */
export function wholeChat(exchanges, format) {
  const separator = separatorOf(format);
  const turns = exchanges.map(({ question, answer }) => turn(question, separator) + answer);
  return [INTRODUCTION, ...turns].join(separator);
}

/**
 * One more question, for a session whose context ends with `previousAnswer`.
 *
 * @param {string} previousAnswer
 * @param {string} question
 * @param {ChatFormat} format
 */
export function nextQuestion(previousAnswer, question, format) {
  const separator = separatorOf(format);
  return (previousAnswer.endsWith(separator) ? "" : separator) + turn(question, separator);
}

/**
 * What people see of an answer. While more may come, an end that could become stop text is held back.
 *
 * @param {string} answer
 * @param {ChatFormat} format
 * @param {boolean} complete
 */
export function visibleText(answer, format, complete) {
  const text = withoutStopText(answer, format);
  return (complete ? text : withoutBeginningOfStopText(text, format)).trim();
}

/** @param {string} text @param {ChatFormat} format */
export function withoutStopText(text, format) {
  const found = stopTexts(format).find((stopText) => text.endsWith(stopText));
  return found ? text.slice(0, -found.length) : text;
}

/** @param {string} question @param {string} separator */
function turn(question, separator) {
  return `Human: ${question}${separator}Assistant:`;
}

/** @param {ChatFormat} format */
function separatorOf(format) {
  return format.sep_token || "\n";
}

/** @param {ChatFormat} format */
function stopTexts(format) {
  return [format.stop_token, ...format.extra_stop_sequences];
}

/** @param {string} text @param {ChatFormat} format */
function withoutBeginningOfStopText(text, format) {
  let held = 0;
  for (const stopText of stopTexts(format)) {
    for (let length = stopText.length - 1; length > held; length--) {
      if (text.endsWith(stopText.slice(0, length))) held = length;
    }
  }
  return text.slice(0, text.length - held);
}
