// A conversation in the terminal over the WebSocket API: what you type is answered token by token.
// Usage: node --experimental-websocket websocket_chat.mjs [URL of the server]   (from Node 22 on, without the option)
import { once } from "node:events";
import readline from "node:readline";

const MAX_ANSWER_TOKENS = 100;

const url = process.argv[2] ?? "http://localhost:5000";
const [model] = (await (await fetch(`${url}/api/models`)).json()).models;
const { sep_token, stop_token, extra_stop_sequences, generation } = model.chat;
const separator = sep_token || "\n";
const stopTexts = [stop_token, ...extra_stop_sequences];

const websocket = new WebSocket(`${url.replace(/^http/, "ws")}/api/v2/generate`);
await once(websocket, "open");

/** The one reply to a message. */
async function ask(message) {
  websocket.send(JSON.stringify(message));
  const [{ data }] = await once(websocket, "message");
  const reply = JSON.parse(data);
  if (!reply.ok) throw new Error(reply.traceback);
  return reply;
}

/** The answer's pieces: one request for each token, so that the answer can be ended at any time. */
async function* answer(inputs) {
  let text = "";
  for (let tokens = 0; tokens < MAX_ANSWER_TOKENS; tokens++) {
    const request = { type: "generate", max_new_tokens: 1, ...generation };
    const { outputs } = await ask(tokens === 0 ? { ...request, inputs } : request);
    text += outputs;
    yield outputs;
    if (stopTexts.some((stopText) => text.endsWith(stopText))) return;
  }
}

await ask({ type: "open_inference_session", model: model.key, max_length: model.max_session_length });
console.log(`${model.name} is listening. An empty line ends the conversation.`);
for await (const question of readline.createInterface({ input: process.stdin })) {
  if (!question) break;
  for await (const piece of answer(`Human: ${question}${separator}Assistant:`)) process.stdout.write(piece);
  console.log();
}
websocket.close();
