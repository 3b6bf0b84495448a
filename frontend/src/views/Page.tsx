/** The frame of the page: the list of chats, what is looked at, and what is said in between. */

import { useEffect } from "preact/hooks";

import { app } from "../page";
import { texts } from "../texts";
import { ChatView } from "./ChatView";
import { Header } from "./Header";
import { Icon } from "./icons";
import { Sheets } from "./Sheets";
import { SharedView } from "./SharedView";
import { listenForShortcuts } from "./shortcuts";
import { Sidebar } from "./Sidebar";
import { SwarmView } from "./SwarmView";

export function Page() {
  useEffect(listenForShortcuts, []);
  const { view } = app.route.value;
  const isDrawerOpen = app.isDrawerOpen.value;
  if (view === "shared") {
    return (
      <div class="layout">
        <SharedView />
        <Messages />
        <Sheets />
      </div>
    );
  }
  return (
    <div class={`layout ${app.sidebar.value === "open" ? "with-sidebar" : ""} ${isDrawerOpen ? "with-drawer" : ""}`}>
      <button type="button" class="skip" onClick={() => document.getElementById("message")?.focus()}>
        {texts.skipToMessage}
      </button>
      <Sidebar />
      {isDrawerOpen && <div class="backdrop" onClick={() => (app.isDrawerOpen.value = false)} />}
      <div class="page" inert={isDrawerOpen}>
        <Header />
        {view === "swarm" ? <SwarmView /> : <ChatView />}
      </div>
      <Messages />
      <Sheets />
    </div>
  );
}

/** What is told to everybody for a moment, and what only screen readers are told. */
function Messages() {
  const notice = app.notice.value;
  return (
    <>
      <div class="visually-hidden" role="status" id="announcer">
        {app.announcement}
      </div>
      <div class="notice-area" role="status">
        {notice && (
          <div class="notice">
            <span>{notice}</span>
            <button type="button" class="icon-button" aria-label={texts.close} onClick={() => (app.notice.value = "")}>
              <Icon name="close" />
            </button>
          </div>
        )}
      </div>
    </>
  );
}
