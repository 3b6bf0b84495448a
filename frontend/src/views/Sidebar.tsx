/** The list of chats, with search, and what can be done with each. */

import { signal } from "@preact/signals";
import { useEffect, useRef } from "preact/hooks";

import type { Chat } from "../contract";
import { saveFile } from "../clipboard";
import type { ExportFormat } from "../history/history";
import { app } from "../page";
import type { Group } from "../state/chats";
import { hashOf } from "../state/routes";
import { texts } from "../texts";
import { Icon } from "./icons";
import { Menu } from "./Menu";
import type { Action } from "./Menu";

const SEARCH_DELAY_MILLISECONDS = 200;

const narrow = matchMedia("(max-width: 52rem)");
/** Whether the list lies over the page instead of beside it. */
export const isNarrow = signal(narrow.matches);
narrow.addEventListener("change", () => {
  isNarrow.value = narrow.matches;
  app.isDrawerOpen.value = false;
});

export function toggleSidebar(): void {
  if (isNarrow.value) app.isDrawerOpen.value = !app.isDrawerOpen.value;
  else app.sidebar.value = app.sidebar.value === "open" ? "closed" : "open";
}

export function Sidebar() {
  const isOpen = isNarrow.value ? app.isDrawerOpen.value : app.sidebar.value === "open";
  const element = useRef<HTMLElement>(null);
  useEffect(() => {
    if (isNarrow.value && isOpen) element.current?.querySelector("button")?.focus();
  }, [isOpen]);
  return (
    <nav class="sidebar" aria-label={texts.sidebar.label} inert={!isOpen} ref={element}>
      <div class="sidebar-head">
        <img src="./icon.svg" alt="" width="26" height="26" />
        <span class="brand">{texts.name}</span>
        <button type="button" class="icon-button" aria-label={texts.sidebar.hide} aria-expanded={isOpen} onClick={toggleSidebar}>
          <Icon name="panel" />
        </button>
      </div>
      <button type="button" class="new-chat" onClick={() => app.newChat()}>
        <Icon name="plus" />
        {texts.sidebar.newChat}
      </button>
      <Search />
      <List />
      <Foot />
    </nav>
  );
}

function Search() {
  const timer = useRef<ReturnType<typeof setTimeout> | undefined>(undefined);
  const search = (event: Event) => {
    const { value } = event.currentTarget as HTMLInputElement;
    clearTimeout(timer.current);
    timer.current = setTimeout(() => void app.chats.value?.search(value.trim()), SEARCH_DELAY_MILLISECONDS);
  };
  return (
    <div class="search">
      <Icon name="search" />
      <input id="search" type="search" aria-label={texts.sidebar.search} placeholder={texts.sidebar.search} autocomplete="off" maxLength={200} onInput={search} />
    </div>
  );
}

function List() {
  const chats = app.chats.value;
  const all = chats?.all.value;
  return (
    <div class="chat-list" tabIndex={-1}>
      {chats?.hasFailed.value && <p class="muted">{texts.notices.listFailed}</p>}
      {all?.length === 0 && <p class="muted">{chats?.query.value ? texts.sidebar.noneFound : texts.sidebar.none}</p>}
      {chats?.groups.value.map((group) => <GroupOfChats key={group.period} group={group} />)}
      {chats?.next.value && (
        <button type="button" class="quiet small" onClick={() => void app.attempt(chats.loadMore())}>
          {texts.sidebar.loadMore}
        </button>
      )}
    </div>
  );
}

function GroupOfChats({ group }: { group: Group }) {
  const id = `period-${group.period}`;
  return (
    <section aria-labelledby={id}>
      <h2 id={id}>{texts.sidebar[group.period]}</h2>
      <ul>
        {group.chats.map((chat) => (
          <Entry key={chat.id} chat={chat} />
        ))}
      </ul>
    </section>
  );
}

function Entry({ chat }: { chat: Chat }) {
  const isShown = app.route.value.view === "chat" && app.conversation.value?.chat.value.id === chat.id;
  const title = chat.title || texts.sidebar.untitled;
  return (
    <li class={isShown ? "shown" : ""}>
      <a
        href={hashOf({ view: "chat", id: chat.id })}
        dir="auto"
        title={title}
        aria-current={isShown ? "page" : undefined}
        onClick={() => (app.isDrawerOpen.value = false)}
      >
        {title}
        {app.answering.value.has(chat.id) && (
          <span class="dot answering">
            <span class="visually-hidden">({texts.sidebar.answering})</span>
          </span>
        )}
      </a>
      <Menu label={texts.sidebar.actions(title)} actions={() => actionsOf(chat)} />
    </li>
  );
}

function actionsOf(chat: Chat): Action[] {
  const { sidebar } = texts;
  const sheet = (kind: "rename" | "remove" | "share") => () => void (app.sheet.value = { kind, chat });
  return [
    { text: chat.pinned ? sidebar.unpin : sidebar.pin, run: () => void app.changeChat(chat, { pinned: !chat.pinned }) },
    { text: sidebar.rename, run: sheet("rename") },
    ...(app.history?.isOnServer ? [{ text: sidebar.share, run: sheet("share") }] : []),
    { text: sidebar.exportMarkdown, run: () => void exportChat(chat, "markdown") },
    { text: sidebar.exportJson, run: () => void exportChat(chat, "json") },
    { text: sidebar.delete, run: sheet("remove"), isDangerous: true },
  ];
}

async function exportChat(chat: Chat, format: ExportFormat): Promise<void> {
  const text = await app.export(chat, format);
  if (text === undefined) return;
  const name = (chat.title || texts.sidebar.untitled).replace(/[\\/:*?"<>|\s]+/g, " ").trim().slice(0, 60);
  if (format === "json") saveFile(`${name}.json`, "application/json", text);
  else saveFile(`${name}.md`, "text/markdown", text);
}

function Foot() {
  const file = useRef<HTMLInputElement>(null);
  const read = async () => {
    const input = file.current!;
    const text = await input.files?.[0]?.text();
    input.value = "";
    if (text !== undefined) await app.import(text);
  };
  return (
    <div class="sidebar-foot">
      <a class="foot-link" href="#/swarm" aria-current={app.route.value.view === "swarm" ? "page" : undefined}>
        <Icon name="swarm" />
        {texts.sidebar.swarm}
      </a>
      <button type="button" class="icon-button" aria-label={texts.sidebar.help} onClick={() => (app.sheet.value = { kind: "help" })}>
        <Icon name="help" />
      </button>
      <input ref={file} type="file" accept=".json,application/json" hidden onChange={() => void read()} />
      <Menu
        label={texts.more}
        actions={() => [
          { text: texts.sidebar.importChats, run: () => file.current?.click() },
          { text: texts.sidebar.deleteAll, run: () => (app.sheet.value = { kind: "removeAll" }), isDangerous: true },
        ]}
      />
    </div>
  );
}
