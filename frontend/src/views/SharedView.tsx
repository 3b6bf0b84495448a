/** A chat that somebody shared: to be read, nothing else. */

import { useEffect, useState } from "preact/hooks";

import type { SharedChat } from "../contract";
import { readShared } from "../history/server";
import { RequestError } from "../http";
import { app } from "../page";
import { texts } from "../texts";
import { copyCode } from "./ChatView";
import { Markdown } from "./Markdown";
import { CopyButton, QuestionText } from "./Message";
import { date } from "./numbers";

export function SharedView() {
  const route = app.route.value;
  const token = route.view === "shared" ? route.token : "";
  const [chat, setChat] = useState<SharedChat | null>(null);
  const [failure, setFailure] = useState("");
  useEffect(() => {
    setChat(null);
    setFailure("");
    readShared(token)
      .then(setChat)
      .catch((error: unknown) => {
        const isLost = error instanceof RequestError && error.code === "connection_lost";
        setFailure(isLost ? texts.failures["connection_lost"]! : texts.shared.missing);
      });
  }, [token]);
  useEffect(() => {
    if (chat) document.title = `${chat.title} – ${texts.name}`;
  }, [chat]);
  return (
    <div class="page shared">
      <header class="bar">
        <img src="./icon.svg" alt="" width="26" height="26" />
        <span class="brand">{texts.name}</span>
        <span class="spring" />
        <a class="button quiet" href="#/">
          {texts.shared.own}
        </a>
      </header>
      <main class="scroll-area" onClick={copyCode}>
        <div class="column">
          <h1 dir="auto">{chat?.title ?? texts.shared.label}</h1>
          <p class="muted" role="status">
            {failure || (chat ? `${texts.shared.intro(date(chat.created_at))} ${modelName(chat.model)}` : texts.shared.asking)}
          </p>
          <section class="messages" aria-label={texts.chat.messages}>
            {chat?.messages.map((message) => (
              <article key={message.id} class={message.role === "user" ? "question" : "answer"}>
                <h2 class="visually-hidden">{message.role === "user" ? texts.chat.you : texts.chat.answer}</h2>
                {message.role === "user" ? <QuestionText text={message.content} /> : <Markdown text={message.content} isGrowing={false} isReadFromEnd={false} />}
                <div class="actions">
                  <CopyButton text={message.content} />
                </div>
              </article>
            ))}
          </section>
        </div>
      </main>
    </div>
  );
}

function modelName(key: string): string {
  return `${texts.model.label}: ${app.models.find(key)?.name ?? key}`;
}
