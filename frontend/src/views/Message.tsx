/** A question or an answer, with what can be done about it. */

import type { ReadonlySignal } from "@preact/signals";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

import { copyText } from "../clipboard";
import type { Message } from "../contract";
import { app } from "../page";
import type { Conversation, Live } from "../state/conversation";
import { texts } from "../texts";
import { Icon } from "./icons";
import { loadMarkdown, Markdown } from "./Markdown";
import { roundNumber, wholeNumber } from "./numbers";
import { Outcome } from "./Outcome";
import { focusMessageField } from "./shortcuts";

/** Longer questions, like pasted files, are folded. */
const LONGEST_UNFOLDED = 3000;
const MOST_UNFOLDED_LINES = 40;

interface Shared {
  message: Message;
  conversation: Conversation;
  isFar: boolean;
  isLast: boolean;
  isBusy: boolean;
}

export function Question({ message, conversation, isFar, isLast, isFirstTold, isBusy }: Shared & { isFirstTold: boolean }) {
  const isEdited = app.editing.value === message.id;
  return (
    <article class={`question ${isFar ? "far" : ""}`}>
      {isFirstTold && <p class="divider">{texts.chat.notTold}</p>}
      <h2 class="visually-hidden">{texts.chat.you}</h2>
      {isEdited ? <Editor message={message} /> : <QuestionText text={message.content} />}
      {!isEdited && (
        <div class="actions">
          <Versions message={message} conversation={conversation} isBusy={isBusy} />
          <CopyButton text={message.content} />
          <button
            type="button"
            class="icon-button"
            aria-label={texts.chat.edit}
            title={texts.chat.edit}
            disabled={isBusy}
            onClick={() => (app.editing.value = message.id)}
          >
            <Icon name="edit" />
          </button>
        </div>
      )}
      {isLast && !isBusy && (
        <div class="outcome">
          <button type="button" class="quiet" onClick={() => conversation.regenerate(message.id)}>
            {texts.chat.getAnswer}
          </button>
        </div>
      )}
    </article>
  );
}

export function QuestionText({ text }: { text: string }) {
  const [isFolded, setFolded] = useState(() => text.length > LONGEST_UNFOLDED || text.split("\n", MOST_UNFOLDED_LINES + 1).length > MOST_UNFOLDED_LINES);
  const shown = isFolded ? text.slice(0, LONGEST_UNFOLDED).split("\n").slice(0, 12).join("\n") : text;
  return (
    <div class="bubble">
      <div class={`raw ${isFolded ? "folded" : ""}`} dir="auto">
        {shown}
      </div>
      {isFolded && (
        <button type="button" class="bare" onClick={() => setFolded(false)}>
          {texts.chat.showAll}
        </button>
      )}
    </div>
  );
}

function Editor({ message }: { message: Message }) {
  const field = useRef<HTMLTextAreaElement>(null);
  const stop = () => {
    app.editing.value = null;
    focusMessageField();
  };
  const send = () => {
    const text = field.current!.value.trim();
    if (text === "") return;
    void app.edit(message.id, text);
    focusMessageField();
  };
  useLayoutEffect(() => {
    const area = field.current!;
    area.focus();
    area.setSelectionRange(area.value.length, area.value.length);
  }, []);
  const onKey = (event: KeyboardEvent) => {
    if (event.key === "Escape") {
      event.preventDefault();
      stop();
    } else if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    }
  };
  return (
    <div class="editor">
      <textarea ref={field} aria-label={texts.chat.editLabel} dir="auto" defaultValue={message.content} rows={4} onKeyDown={onKey} />
      <div class="editor-buttons">
        <button type="button" class="quiet" onClick={stop}>
          {texts.cancel}
        </button>
        <button type="button" class="primary" onClick={send}>
          {texts.chat.send}
        </button>
      </div>
    </div>
  );
}

export function Answer({ message, conversation, live, isFar, isLast, isBusy }: Shared & { live: ReadonlySignal<Live | null> | null }) {
  loadMarkdown(); // while the answer is waited for
  const growing = live?.value ?? null;
  const text = growing?.content ?? message.content;
  return (
    <article class={`answer ${isFar ? "far" : ""} ${growing ? "growing" : ""}`} aria-busy={growing !== null}>
      <h2 class="visually-hidden">{texts.chat.answer}</h2>
      {text !== "" && <Markdown text={text} isGrowing={growing !== null} isReadFromEnd />}
      {growing && text === "" && <span class="pulse" />}
      <Outcome message={message} live={growing} conversation={conversation} isLast={isLast} isBusy={isBusy} />
      {!growing && (
        <div class="actions">
          <Versions message={message} conversation={conversation} isBusy={isBusy} />
          {text !== "" && <CopyButton text={text} />}
          <button
            type="button"
            class="icon-button"
            aria-label={texts.chat.regenerate}
            title={texts.chat.regenerate}
            disabled={isBusy}
            onClick={() => conversation.regenerate(message.id)}
          >
            <Icon name="redo" />
          </button>
          <Figures message={message} />
        </div>
      )}
    </article>
  );
}

function Figures({ message: { tokens, seconds, first_token_seconds: first, model } }: { message: Message }) {
  const name = model === null ? undefined : app.models.find(model)?.name;
  const parts: [string, string][] = name && name !== app.model.value?.name ? [[texts.model.label, name]] : [];
  if (tokens && seconds) {
    const generating = Math.max(seconds - (first ?? 0), 0.001);
    const rate = tokens > 1 ? (tokens - 1) / generating : tokens / seconds;
    parts.push([texts.chat.speedTitle, texts.chat.speed(roundNumber(rate))]);
    if (first !== null) parts.push([texts.chat.firstTokenTitle, texts.chat.firstToken(roundNumber(first))]);
    parts.push(["", texts.chat.tokens(wholeNumber(tokens))]);
  }
  return (
    <span class="figures">
      {parts.map(([title, text]) => (
        <span key={text} title={title}>
          {text}
        </span>
      ))}
    </span>
  );
}

function Versions({ message, conversation, isBusy }: Pick<Shared, "message" | "conversation" | "isBusy">) {
  const versions = conversation.tree.value.versions(message.id);
  if (versions.length < 2) return null;
  const index = versions.findIndex(({ id }) => id === message.id);
  const show = (step: number) => void app.attempt(conversation.show(versions[index + step]!.id));
  return (
    <span class="versions" role="group" aria-label={texts.chat.version(index + 1, versions.length)}>
      <button type="button" class="icon-button" aria-label={texts.chat.previous} disabled={isBusy || index === 0} onClick={() => show(-1)}>
        <Icon name="left" />
      </button>
      <span aria-hidden="true">
        {index + 1}/{versions.length}
      </span>
      <button
        type="button"
        class="icon-button"
        aria-label={texts.chat.next}
        disabled={isBusy || index === versions.length - 1}
        onClick={() => show(1)}
      >
        <Icon name="right" />
      </button>
    </span>
  );
}

export function CopyButton({ text }: { text: string }) {
  const [isCopied, setCopied] = useState(false);
  const copy = async () => {
    if (!(await copyText(text))) return app.tell(texts.chat.copyFailed);
    setCopied(true);
    setTimeout(() => setCopied(false), 2000);
  };
  const label = isCopied ? texts.chat.copied : texts.chat.copy;
  return (
    <button type="button" class="icon-button" aria-label={label} title={label} onClick={() => void copy()}>
      <Icon name={isCopied ? "check" : "copy"} />
    </button>
  );
}
