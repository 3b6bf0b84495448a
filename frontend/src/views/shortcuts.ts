/** Keys that work everywhere on the page. The help sheet lists them. */

import { app } from "../page";
import { texts } from "../texts";
import { copyText } from "../clipboard";
import { toggleSidebar } from "./Sidebar";

export function listenForShortcuts(): () => void {
  document.addEventListener("keydown", onKey);
  return () => document.removeEventListener("keydown", onKey);
}

function onKey(event: KeyboardEvent): void {
  if (event.defaultPrevented || event.isComposing || app.sheet.value !== null) return;
  const run = actionOf(event);
  if (run === undefined) return;
  event.preventDefault();
  run();
}

function actionOf(event: KeyboardEvent): (() => void) | undefined {
  const key = event.key.toLowerCase();
  const isCommand = event.ctrlKey || event.metaKey;
  if (isCommand && event.shiftKey && key === "o") return newChat;
  if (isCommand && event.shiftKey && key === "l") return copyLastAnswer;
  if (isCommand && !event.shiftKey && key === "k") return search;
  if (isCommand && !event.shiftKey && key === "b") return toggleSidebar;
  if (key === "escape") return escape();
  if (key === "?" && !isWriting(event.target)) return () => (app.sheet.value = { kind: "help" });
  return undefined;
}

function escape(): (() => void) | undefined {
  if (app.isDrawerOpen.value) return () => (app.isDrawerOpen.value = false);
  const conversation = app.conversation.value;
  return conversation?.isAnswering ? () => conversation.stop() : undefined;
}

function newChat(): void {
  if (document.activeElement instanceof HTMLElement) document.activeElement.blur(); // the field of the new chat gets the focus
  app.newChat();
}

function search(): void {
  app.sidebar.value = "open";
  app.isDrawerOpen.value = matchMedia("(max-width: 52rem)").matches;
  requestAnimationFrame(() => document.getElementById("search")?.focus());
}

async function copyLastAnswer(): Promise<void> {
  const answer = app.conversation.value?.branch.value.findLast((message) => message.role === "assistant");
  if (answer) app.tell((await copyText(answer.content)) ? texts.chat.copied : texts.chat.copyFailed);
}

/** On a touch screen this would bring up the keyboard, over the answer. */
export function focusMessageField(): void {
  if (matchMedia("(pointer: fine)").matches) document.getElementById("message")?.focus();
}

/** Whether keys go into a text. */
export function isWriting(target: EventTarget | null): boolean {
  return target instanceof HTMLElement && target.closest("input, textarea, select, [contenteditable]") !== null;
}
