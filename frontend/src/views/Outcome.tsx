/** What became of an answer, in words, with the way out. */

import type { ComponentChildren } from "preact";

import type { Message } from "../contract";
import { app } from "../page";
import type { Conversation, Live } from "../state/conversation";
import { texts } from "../texts";
import { JoinCommand } from "./JoinCommand";

const SLOW_TOKENS_PER_SECOND = 3;
const LEAST_JUDGED_TOKENS = 16;

interface Properties {
  message: Message;
  live: Live | null;
  conversation: Conversation;
  isLast: boolean;
  isBusy: boolean;
}

export function Outcome({ message, live, conversation, isLast, isBusy }: Properties) {
  if (live !== null) return <Waiting live={live} />;
  const sentence = sentenceOf(message);
  if (sentence === "") return isLast && isSlow(message) ? <JoinCommand intro={texts.chat.slow} /> : null;
  const isFailure = message.state === "failed" || message.finish_reason === "context_full";
  return (
    <div class={`outcome ${isFailure ? "failure" : ""}`}>
      <p>{sentence}</p>
      {isLast && !isBusy && <div class="ways-out">{waysOut(message, conversation)}</div>}
      {isLast && message.error === "attention_cache_full" && <JoinCommand intro={texts.addHost} />}
    </div>
  );
}

function Waiting({ live }: { live: Live }) {
  if (live.place !== null) {
    return (
      <div class="outcome waiting">
        <p>{texts.queue(live.place)}</p>
        <JoinCommand intro={texts.addHost} />
      </div>
    );
  }
  if (live.waitingFor === null) return null;
  return (
    <div class="outcome waiting">
      <p>{texts.waiting[live.waitingFor] ?? texts.waitingElse}</p>
      {live.waitingFor === "connection_lost" && (
        <div class="ways-out">
          <Way text={texts.tryNow} run={() => app.hurry()} />
        </div>
      )}
    </div>
  );
}

/** Slower than people read. */
function isSlow({ tokens, seconds, first_token_seconds: first }: Message): boolean {
  if (!tokens || !seconds || tokens < LEAST_JUDGED_TOKENS) return false;
  return tokens / Math.max(seconds - (first ?? 0), 0.001) < SLOW_TOKENS_PER_SECOND;
}

function sentenceOf({ state, error, model, finish_reason: reason }: Message): string {
  if (state === "stopped") return texts.stopped;
  if (state === "interrupted") return texts.interrupted;
  if (state === "failed" && error === "missing_blocks") {
    const name = app.models.find(model ?? "")?.name;
    if (name) return texts.missingBlocks(name);
  }
  if (state === "failed") return texts.failures[error ?? ""] ?? texts.failureElse;
  if (reason === "length") return texts.cutByLength;
  return reason === "context_full" ? texts.contextFull : "";
}

function waysOut(message: Message, conversation: Conversation): ComponentChildren {
  const { id, content, error, finish_reason: reason } = message;
  const again = <Way text={texts.tryAgain} run={() => conversation.regenerate(id)} />;
  const goOn = content !== "" && <Way text={texts.chat.continue} run={() => conversation.continue(id)} />;
  if (error === "maximum_length_exceeded" || reason === "context_full") {
    return [
      <Way text={texts.startAnew} run={() => app.newChat()} />,
      <Way text={texts.dropOldest} run={() => conversation.makeRoom(id)} />,
    ];
  }
  if (error === "message_too_large") return <Way text={texts.chat.edit} run={() => (app.editing.value = message.parent)} />;
  if (error === "missing_blocks" || error === "model_unavailable" || error === "unknown_model") {
    return [
      <Way text={texts.model.another} run={() => (app.sheet.value = { kind: "model" })} />,
      <a class="button quiet" href="#/swarm">
        {texts.model.seeSwarm}
      </a>,
      goOn || again,
    ];
  }
  if (message.state === "failed") return goOn ? [goOn, again] : again;
  return goOn || again;
}

function Way({ text, run }: { text: string; run: () => void }) {
  return (
    <button type="button" class="quiet" onClick={run}>
      {text}
    </button>
  );
}
