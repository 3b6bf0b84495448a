/** The open chat: its messages, what is wrong at the moment, and the field for the next one. */

import { useComputed } from "@preact/signals";
import { useLayoutEffect, useRef, useState } from "preact/hooks";

import { copyText } from "../clipboard";
import { app } from "../page";
import type { Conversation } from "../state/conversation";
import { Following } from "../state/following";
import { texts } from "../texts";
import { Composer } from "./Composer";
import { Icon } from "./icons";
import { Answer, Question } from "./Message";

/** So many messages at the end are always laid out; those before only when they come into view. */
const ALWAYS_LAID_OUT = 12;

export function ChatView() {
  const conversation = app.conversation.value;
  const failure = app.loadFailure.value;
  return (
    <main class="chat">
      {failure ? <p class="muted centred">{failure}</p> : conversation && <Scrolled key={conversation.chat.value.id} conversation={conversation} />}
      {conversation && !failure && <Composer conversation={conversation} />}
    </main>
  );
}

function Scrolled({ conversation }: { conversation: Conversation }) {
  const area = useRef<HTMLDivElement>(null);
  const content = useRef<HTMLDivElement>(null);
  const [following] = useState(() => new Following());
  const [hasMore, setHasMore] = useState(false);
  const toEnd = () => {
    if (conversation.branch.peek().length === 0) return; // the welcome is read from its beginning
    following.follow();
    const element = area.current!;
    element.scrollTop = element.scrollHeight;
    setHasMore(false);
  };
  useLayoutEffect(() => {
    const observer = new ResizeObserver(() => {
      if (following.isFollowing) toEnd();
      else setHasMore(Following.hasMoreBelow(area.current!));
    });
    observer.observe(content.current!);
    observer.observe(area.current!);
    return () => observer.disconnect();
  }, []);
  // A new question is always shown, wherever the reader was.
  const questions = useComputed(() => conversation.branch.value.filter((message) => message.role === "user").length);
  useLayoutEffect(toEnd, [questions.value]);
  const onScroll = () => {
    following.scrolled(area.current!);
    setHasMore(!following.isFollowing && Following.hasMoreBelow(area.current!));
  };
  return (
    <div class="scroll-frame">
      <div class="scroll-area" ref={area} onScroll={onScroll} onClick={copyCode} tabIndex={-1}>
        <div class="column" ref={content}>
          <Messages conversation={conversation} />
        </div>
      </div>
      {hasMore && (
        <button type="button" class="to-latest" aria-label={texts.chat.latest} onClick={toEnd}>
          <Icon name="down" />
        </button>
      )}
    </div>
  );
}

function Messages({ conversation }: { conversation: Conversation }) {
  const branch = conversation.branch.value;
  const leftOut = conversation.leftOut.value;
  const liveId = useComputed(() => conversation.live.value?.id ?? null).value;
  if (branch.length === 0) return <Welcome />;
  const firstTold = leftOut === 0 ? null : branch.filter((message) => message.role === "user")[leftOut]?.id;
  const firstLaidOut = branch.length - ALWAYS_LAID_OUT;
  return (
    <section class="messages" aria-label={texts.chat.messages}>
      {branch.map((message, index) => {
        const shared = { key: message.id, message, conversation, isFar: index < firstLaidOut, isLast: index === branch.length - 1 };
        return message.role === "user" ? (
          <Question {...shared} isFirstTold={message.id === firstTold} isBusy={liveId !== null} />
        ) : (
          <Answer {...shared} live={liveId === message.id ? conversation.live : null} isBusy={liveId !== null} />
        );
      })}
    </section>
  );
}

function Welcome() {
  const model = app.model.value;
  const samples = model?.chat.sample_questions ?? [];
  return (
    <div class="welcome">
      <img src="./icon.svg" alt="" width="52" height="52" />
      <h2>{texts.welcome.heading}</h2>
      <p>{texts.welcome.body}</p>
      {samples.length > 0 && (
        <ul class="samples" aria-label={texts.welcome.samples}>
          {samples.map((question) => (
            <li key={question}>
              <button type="button" class="quiet" dir="auto" onClick={() => void app.send(question)}>
                {question}
              </button>
            </li>
          ))}
        </ul>
      )}
    </div>
  );
}

/** Code blocks in answers have copy buttons that are not components. */
export async function copyCode(event: Event): Promise<void> {
  const button = (event.target as Element).closest<HTMLButtonElement>("button[data-copy]");
  const code = button?.closest(".code")?.querySelector("code");
  if (!button || !code) return;
  const isCopied = await copyText(code.textContent ?? "");
  if (!isCopied) return app.tell(texts.chat.copyFailed);
  button.textContent = texts.chat.copied;
  setTimeout(() => (button.textContent = texts.chat.copyCode), 2000);
}

