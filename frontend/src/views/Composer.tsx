/** The field for the next message, and what people must know before they write. */

import { useLayoutEffect, useRef } from "preact/hooks";

import type { Model } from "../contract";
import { app } from "../page";
import type { Conversation } from "../state/conversation";
import { texts } from "../texts";
import { Icon } from "./icons";
import { wholeNumber } from "./numbers";
import { focusMessageField, isWriting } from "./shortcuts";

/** Measuring a longer text takes its time; the field is at its greatest height then anyway. */
const LONGEST_MEASURED = 10_000;
const CHARACTERS_PER_TOKEN = 4;

export function Composer({ conversation }: { conversation: Conversation }) {
  const field = useRef<HTMLTextAreaElement>(null);
  const isAnswering = conversation.live.value !== null;
  const draft = app.draft.value;
  const model = app.model.value;
  const canSend = draft.trim() !== "" && model !== undefined;
  const send = () => {
    const text = app.draft.value.trim(); // `draft` may be a key older
    if (text === "" || isAnswering || model === undefined) return;
    app.draft.value = "";
    focusMessageField(); // the button that had the focus is gone
    void app.send(text);
  };
  const onKey = (event: KeyboardEvent) => {
    // While a word is being composed (Chinese, Japanese...), Enter belongs to the input method.
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      send();
    } else if (event.key === "ArrowUp" && app.draft.value === "" && !isAnswering) {
      const last = conversation.branch.value.findLast((message) => message.role === "user");
      if (last) {
        event.preventDefault();
        app.editing.value = last.id;
      }
    }
  };
  useLayoutEffect(() => fit(field.current!), [draft]);
  useLayoutEffect(() => {
    if (!isWriting(document.activeElement)) focusMessageField();
  }, [conversation]);
  return (
    <div class="composer-area">
      <div class="column">
        <ModelNote model={model} isAnswering={isAnswering} />
        <form
          class="composer"
          onSubmit={(event) => {
            event.preventDefault();
            send();
          }}
        >
          <textarea
            ref={field}
            id="message"
            rows={1}
            dir="auto"
            aria-label={texts.composer.label}
            aria-describedby="sensitive"
            placeholder={texts.composer.placeholder}
            autocomplete="off"
            value={draft}
            onInput={(event) => (app.draft.value = event.currentTarget.value)}
            onKeyDown={onKey}
          />
          <div class="composer-buttons">
            <button
              type="button"
              class="icon-button"
              aria-label={texts.composer.settings}
              title={texts.composer.settings}
              onClick={() => (app.sheet.value = { kind: "settings" })}
            >
              <Icon name="sliders" />
            </button>
            <ContextGauge conversation={conversation} model={model} />
            <span class="spring" />
            {isAnswering ? (
              <button type="button" class="round stop" aria-label={texts.composer.stop} title={texts.composer.stop} onClick={() => conversation.stop()}>
                <Icon name="stop" />
              </button>
            ) : (
              <button type="submit" class="round primary" aria-label={texts.composer.send} title={texts.composer.send} disabled={!canSend}>
                <Icon name="send" />
              </button>
            )}
          </div>
        </form>
        <p class="fine-print" id="sensitive">
          {texts.composer.sensitive} {keeping()}
        </p>
      </div>
    </div>
  );
}

function keeping(): string {
  if (app.chats.value === null || app.history === null) return "";
  const { isOnServer, expireDays } = app.history;
  if (!isOnServer) return texts.composer.inBrowser;
  return expireDays === null ? texts.composer.onServer : texts.composer.onServerFor(expireDays);
}

function ModelNote({ model, isAnswering }: { model: Model | undefined; isAnswering: boolean }) {
  const isUnreachable = app.models.isUnreachable.value;
  const text = isUnreachable ? texts.model.unreachable : model ? noteOn(model) : "";
  return (
    <p class="model-note" role="status">
      {text}
      {isUnreachable && !isAnswering && (
        <>
          {" "}
          <button type="button" class="link" onClick={() => app.hurry()}>
            {texts.tryNow}
          </button>
        </>
      )}
      {!isUnreachable && model && (model.state === "broken" || model.state === "unavailable") && (
        <>
          {" "}
          <a href="#/swarm">{texts.model.seeSwarm}</a>
        </>
      )}
    </p>
  );
}

function noteOn(model: Model): string {
  switch (model.state) {
    case "loading":
      return texts.model.loading(model.name);
    case "broken":
      return texts.model.broken(model.name, model.missing_blocks.length);
    case "full":
      return texts.model.full(model.name);
    case "unavailable":
      return texts.model.unavailable(model.name);
    default:
      return "";
  }
}

function ContextGauge({ conversation, model }: { conversation: Conversation; model: Model | undefined }) {
  const branch = conversation.branch.value;
  if (model === undefined || branch.length === 0) return null;
  const characters = branch.reduce((sum, message) => sum + message.content.length, 0);
  const used = conversation.contextTokens.value ?? Math.ceil(characters / CHARACTERS_PER_TOKEN);
  const all = model.max_session_length;
  const part = Math.min(1, used / all);
  const label = texts.composer.context(wholeNumber(used), wholeNumber(all));
  return (
    <span class={`gauge ${part > 0.9 ? "nearly-full" : ""}`} role="meter" aria-valuemin={0} aria-valuemax={all} aria-valuenow={Math.min(used, all)} aria-label={label} title={label}>
      <svg viewBox="0 0 20 20" aria-hidden="true">
        <circle cx="10" cy="10" r="7.5" pathLength={100} />
        <circle class="used" cx="10" cy="10" r="7.5" pathLength={100} stroke-dasharray={`${part * 100} 100`} />
      </svg>
    </span>
  );
}

function fit(area: HTMLTextAreaElement): void {
  area.style.height = "auto";
  area.style.height = area.value.length > LONGEST_MEASURED ? "40dvh" : `${area.scrollHeight}px`;
}
